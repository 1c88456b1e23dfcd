"""Each small trainer: interrupted and resumed, it ends with the bits of a run that was not."""

import importlib
import pathlib
import pkgutil
import re
import signal
import subprocess
import sys

import jax
import pytest

import ckpt_jax as ckpt
from ckpt_jax import examples

NAMES = [m.name for m in pkgutil.iter_modules(examples.__path__) if m.name.startswith(("with_", "from_"))]
ROOT = pathlib.Path(examples.__file__).parents[2]
ARGUMENTS = ["--steps", "13", "--every", "4"]
# A whole run, and one that is killed with -9 while step 6 is trained and step 4 may still be written.
KILLED = """
import os, signal, sys
import ckpt_jax as ckpt
from ckpt_jax.examples import with_nnx
whole, killed, *arguments = sys.argv[1:]
with_nnx.main(["--run", whole, *arguments])
save = ckpt.Checkpointer.save
def save_or_die(self, step, *args, **kwargs):
  if step == 6:
    os.kill(os.getpid(), signal.SIGKILL)
  return save(self, step, *args, **kwargs)
ckpt.Checkpointer.save = save_or_die
with_nnx.main(["--run", killed, *arguments])
"""


@pytest.fixture(autouse=True)
def default_promotion():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def last(run):
  with ckpt.Checkpointer(run) as c:
    restored = c.restore()
  return restored.state, restored.step, restored.metrics, restored.extras


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_and_resumed_it_ends_with_the_same_bits(name, tmp_path, monkeypatch, capsys, assert_same):
  trainer = importlib.import_module(f"ckpt_jax.examples.{name}")
  trainer.main(["--run", str(tmp_path / "whole"), *ARGUMENTS])
  save = ckpt.Checkpointer.save

  def interrupted(self, step, *args, **kwargs):
    if step == 6:
      raise KeyboardInterrupt  # in the middle of a step: what was trained since step 4 is lost
    return save(self, step, *args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ckpt.Checkpointer, "save", interrupted)
    trainer.main(["--run", str(tmp_path / "stopped"), *ARGUMENTS])
  capsys.readouterr()
  trainer.main(["--run", str(tmp_path / "stopped"), *ARGUMENTS])
  assert capsys.readouterr().out.startswith("from step 5")
  assert_same(last(tmp_path / "stopped"), last(tmp_path / "whole"))
  assert last(tmp_path / "whole")[1] == 12
  trainer.main(["--run", str(tmp_path / "stopped"), *ARGUMENTS])  # all is done: nothing to train


@pytest.mark.multiprocess
def test_killed_while_it_trains_it_resumes_bitwise(tmp_path, lenient_jax, assert_same):
  whole, run = tmp_path / "whole", tmp_path / "killed"
  killed = subprocess.run([sys.executable, "-c", KILLED, whole, run, *ARGUMENTS], capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  command = [sys.executable, "-m", "ckpt_jax.examples.with_nnx", "--run", run, *ARGUMENTS]
  resumed = subprocess.run(command, capture_output=True, text=True)
  assert resumed.returncode == 0, resumed.stderr
  assert re.match("from step [15]\n", resumed.stdout)  # the write of step 4 may have won the race
  assert_same(last(run), last(whole))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_shows_its_help_and_uses_public_names_alone(name, capsys):
  trainer = importlib.import_module(f"ckpt_jax.examples.{name}")
  with pytest.raises(SystemExit) as done:
    trainer.main(["--help"])
  assert done.value.code == 0 and {"--run", "--steps", "--every"} <= set(capsys.readouterr().out.split())
  source = pathlib.Path(trainer.__file__).read_text()
  assert len(source.splitlines()) <= 100
  assert "ckpt_jax." not in source.replace("-m ckpt_jax.examples.", "") and "from ckpt_jax" not in source


def test_page_shows_lines_that_are_there_and_names_every_trainer():
  page = (ROOT / "docs" / "integrations.md").read_text()
  sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
  shown = {}
  for section in sections:
    for name in re.findall(r"`ckpt_jax/examples/(\w+)\.py`", section):
      source = [line.strip() for line in (ROOT / "ckpt_jax" / "examples" / f"{name}.py").read_text().splitlines()]
      (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
      shown[name] = [line for line in map(str.strip, code.splitlines()) if line not in ("", "...", *source)]
      assert f"-m ckpt_jax.examples.{name} " in page and f"<!-- from the code: {name} -->" in section
  assert shown == {name: [] for name in NAMES}
