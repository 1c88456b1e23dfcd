"""Every error names a section of docs/troubleshooting.md, every section is named, and every warning is in a table."""

import ast
import errno
import os
import pathlib
import re

import pytest
from commands import cli

import ckpt_jax as ckpt
from ckpt_jax import errors
from ckpt_jax.cli.explain import topics
from ckpt_jax.job.agreement import error_from_json, error_to_json

PACKAGE = pathlib.Path(ckpt.__file__).parent
PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
TREES = [ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py")) if "bench" not in p.parts]
CALLS = [node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Call)]


def named_in_the_code():
  """The topics of classes, and those that raise sites give."""
  classes = [node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
  named = {
    line.value.value
    for node in classes
    for line in node.body
    if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "topic" and isinstance(line.value, ast.Constant)
  }
  given = {
    node.value for node in ast.walk(ast.Module(TREES, [])) if isinstance(node, ast.keyword) and node.arg == "topic"
  }
  assigned = [n for tree in TREES for n in ast.walk(tree) if isinstance(n, ast.Assign)]
  values = [*given, *(n.value for n in assigned if ast.unparse(n.targets[0]) == "topic")]
  texts = {c.value for value in values for c in ast.walk(value) if isinstance(c, ast.Constant)}
  return named | {text for text in texts if isinstance(text, str)} - {"topic"}


def test_topics_of_errors_are_the_sections_of_the_page():
  assert named_in_the_code() == {name for name in topics() if not name.startswith("log-of-")}


def test_a_plain_checkpoint_error_always_names_its_topic():
  bare = [c for c in CALLS if ast.unparse(c.func) == "CheckpointError" and "topic" not in {k.arg for k in c.keywords}]
  assert [ast.unparse(c) for c in bare if "type(e).__name__" not in ast.unparse(c)] == []


def test_every_class_is_named_in_its_section():
  for name, kind in vars(errors).items():
    if isinstance(kind, type) and issubclass(kind, errors.CheckpointError):
      assert f"`{name}`" in topics()[kind.topic], name


def pieces(call):
  """What the first sentence of a logged line says around its placeholders."""
  node = call.args[1] if call.func.attr == "log" else call.args[0]
  sentence = ast.literal_eval(node).replace("`", "").split(". ")[0]
  return [p.strip(" :;,.()") for p in re.split(r"%[-+.\d]*[a-z]%?", sentence)]


def test_every_warning_is_in_a_table():
  logged = [c for c in CALLS if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "_log"]
  loud = [
    c for c in logged if c.func.attr in ("warning", "error") or (c.func.attr == "log" and "WARN" in ast.unparse(c))
  ]
  table = " ".join(PAGE.partition("## Warnings and log lines")[2].split())
  assert len(loud) > 40
  assert [longest for call in loud if (longest := max(pieces(call), key=len)) not in table] == []


def test_sections_begin_with_one_sentence_on_one_line():
  for text in topics().values():
    first = text.splitlines()[2]
    assert first.endswith(".") and len(first) <= 120, first


def test_note_is_below_the_message_and_survives_the_way_to_other_processes():
  error = errors.SaveStorageError("RUN: step 3 was not saved", 3, topic="another-job")
  arrived = error_from_json(error_to_json(error))
  for e in (error, arrived):
    assert (str(e), e.step, e.topic) == ("RUN: step 3 was not saved", 3, "another-job")
    assert e.__notes__ == ["What to do: ckpt-jax explain another-job"]


def test_command_prints_the_link_and_the_section(tmp_path):
  failed = cli("ls", tmp_path / "none")
  assert failed.returncode == 1
  topic = re.search(r"\n  What to do: ckpt-jax explain (\S+)\n$", failed.stderr)[1]
  shown = cli("explain", topic)
  assert shown.returncode == 0 and "No checkpoint" in shown.stdout and "restore_or_init(init_fn)" in shown.stdout
  assert "\nno-checkpoint " in cli("explain").stdout
  for name in ("NoCheckpointError", "ckpt_jax.errors.NoCheckpointError", "No checkpoint", "no_checkpoint"):
    assert cli("explain", name).stdout == shown.stdout
  mistyped = cli("explain", "no-checkpiont")
  assert mistyped.returncode == 2 and "did you mean no-checkpoint?" in mistyped.stderr


@pytest.mark.parametrize("path, topic", [("", "run-directory"), ("ftp://a/b", "run-directory")])
def test_situation_is_told_apart_within_a_class(path, topic):
  with pytest.raises(errors.CheckpointError) as caught:
    ckpt.Checkpointer(path)
  assert caught.value.topic == topic


FOREIGN = {os.strerror(getattr(errno, name)) for name in ("EACCES", "EROFS", "ESTALE", "EIO", "ENOTCONN", "EMFILE")}
FOREIGN |= {"error setting certificate verify locations", "Connect timeout"}  # of TensorStore and s3fs


def test_messages_that_sections_quote_are_those_of_the_code():
  texts = [c.value for t in TREES for c in ast.walk(t) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
  code = "\n".join(texts)
  quoted = [q for line in re.findall(r"^- (`.*?)(?:: |$)", PAGE, re.MULTILINE) for q in re.findall(r"`([^`]+)`", line)]
  pieces = [p.strip() for q in quoted for p in re.split(r"\.\.\.|\b[A-Z]+\b|\d+|://|''", q) if len(p.strip()) > 6]
  assert len(pieces) > 60
  missing = [p for p in pieces if p not in code and p not in FOREIGN]
  assert not missing, missing
