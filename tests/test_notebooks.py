"""The notebooks run from an installation alone, and show what their code does now."""

import ast
import io
import os
import re
import signal
import sys
import threading
import time

import nbformat
import pytest
from PIL import Image

import ckpt_jax as ckpt
import notebooks

FOREIGN = {"flax", "jax", "matplotlib", "numpy", "optax"}
PUBLIC = {*ckpt.__all__, "multihost", "observe", "policies"}
each = pytest.mark.parametrize("path", notebooks.ALL, ids=lambda p: p.stem)


def test_there_are_six():
  assert len(notebooks.ALL) == 6


@pytest.mark.notebook
@each
def test_it_runs_and_says_what_the_repository_shows(path, tmp_path, lenient_jax):
  kept, now = nbformat.read(path, as_version=4), notebooks.execute(path, tmp_path)
  for old, new in zip(notebooks.code(kept), notebooks.code(now), strict=True):
    if "varies" not in old.metadata.get("tags", ()):
      assert notebooks.said(new) == notebooks.said(old), f"make notebooks; this cell says something else:\n{old.source}"


@each
def test_its_outputs_are_of_its_code_small_and_have_a_picture(path):
  notebook = nbformat.read(path, as_version=4)
  assert notebook.metadata["executed"] == notebooks.sources(notebook), "make notebooks"
  assert path.stat().st_size < 150_000
  outputs = [output for cell in notebooks.code(notebook) for output in cell.outputs]
  pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
  assert pictures and all(Image.open(io.BytesIO(notebooks.decoded(png))).width > 300 for png in pictures)
  shown = str(outputs)
  assert "Traceback" not in shown and "/tmp/" not in shown and "Warning" not in shown


@each
def test_it_uses_public_names_alone(path):
  for cell in notebooks.code(nbformat.read(path, as_version=4)):
    tree = ast.parse(cell.source)
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        tops = [alias.name for alias in node.names]
        assert {t for t in tops if "ckpt_jax" in t} <= {"ckpt_jax"}, tops
      elif isinstance(node, ast.ImportFrom):
        tops = [node.module]
        if "ckpt_jax" in node.module:
          assert node.module == "ckpt_jax" and {alias.name for alias in node.names} <= PUBLIC, cell.source
      else:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ckpt":
          assert node.attr in PUBLIC, node.attr
        continue
      assert {t.partition(".")[0] for t in tops} <= {*sys.stdlib_module_names, *FOREIGN, "ckpt_jax"}, tops


@each
def test_it_reads_as_a_lesson(path):
  notebook = nbformat.read(path, as_version=4)
  first, last = notebook.cells[0].source, notebook.cells[-1].source
  assert re.match(r"# .+\n\n", first) and "You will learn" in first.replace("you will learn", "You will learn")
  assert "pip install 'ckpt-jax[notebooks,plots]'" in first and "**Next:**" in last
  text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
  assert any("**Notice**" in cell for cell in text)
  assert max(len(cell.source.splitlines()) for cell in notebooks.code(notebook)) <= 55


@pytest.mark.notebook
def test_quickstart_goes_on_after_an_interrupt_a_second_run_of_a_cell_and_a_new_kernel(tmp_path, lenient_jax):
  (path,) = [p for p in notebooks.ALL if p.stem == "01_quickstart"]
  notebook = nbformat.read(path, as_version=4)
  go_on = next(i for i, cell in enumerate(notebook.cells) if cell.source == "state = train(400)")
  resume = notebook.cells[go_on]  # nbclient puts what it executes in its place
  slow = nbformat.v4.new_code_cell("train(20_000)")  # a reader interrupts it in the middle
  client = notebooks.client(notebook, tmp_path)
  client.allow_errors = True
  with client.setup_kernel():
    for i in range(go_on):
      client.execute_cell(notebook.cells[i], i)

    stopped = threading.Event()

    def interrupt():
      committed = [tmp_path / "runs" / "quickstart" / str(step) for step in range(300, 3000, 50)]
      while not any(step.exists() for step in committed):
        time.sleep(0.05)
      os.kill(client.km.provisioner.pid, signal.SIGINT)
      while not stopped.wait(20):  # as a reader clicks again: an interrupt within a callback of jax is lost
        os.kill(client.km.provisioner.pid, signal.SIGINT)

    clicking = threading.Thread(target=interrupt, daemon=True)
    clicking.start()
    interrupted = client.execute_cell(slow, go_on)
    stopped.set()
    clicking.join()
    # Not "KeyboardInterrupt": jax turns one that comes while it compares structures into a ValueError.
    printed = "".join(o.text for o in interrupted.outputs if o.output_type == "stream")
    assert "goes on from step 250" in printed and "saved steps" not in printed
    again = client.execute_cell(resume, go_on)  # in the same kernel
    assert "goes on from step" in again.outputs[0].text and "399]" in again.outputs[-1].text
  anew = notebooks.execute(path, tmp_path)  # in a new one, from top to bottom
  assert "goes on from step" in notebooks.code(anew)[3].outputs[0].text
  assert os.listdir(tmp_path) == ["runs"]
