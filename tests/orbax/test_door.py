"""One door to Orbax: outside of it nothing uses private or deprecated names, or spells Orbax's files and keys."""

import ast
import json
import pathlib

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from ckpt_jax.orbax import format as orbax_format

PACKAGE = pathlib.Path(__file__).parents[2] / "ckpt_jax"
DEPRECATED = {
  "check_input_arguments",
  "get_cast_tspec_deserialize",
  "get_cast_tspec_serialize",
  "get_json_tspec_read",
  "get_json_tspec_write",
  "get_ts_context",
  "is_supported_empty_value",
  "is_supported_type",
  "merge_ocdbt_per_process_files",
}
# Words that also mean other things: the names of our own keys, of an argument, of an axis.
COMMON = {"checkpoint", "d", "default", "key", "metrics"}
SPELLED = {v for k, v in vars(orbax_format).items() if k.isupper() and isinstance(v, str)} - COMMON
# The benchmark writes with plain Orbax and looks at what that left.
SOURCES = [p for p in PACKAGE.rglob("*.py") if p.parent.name not in ("orbax", "bench")]


def leaks(source):
  """(line, what) of each use of what only `orbax` may touch."""
  tree = ast.parse(source)
  docs = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    and node.body
    and isinstance(node.body[0], ast.Expr)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module and "._src" in node.module:
      yield node.lineno, node.module
    elif isinstance(node, ast.Import):
      yield from ((node.lineno, a.name) for a in node.names if "._src" in a.name)
    elif isinstance(node, ast.Attribute) and node.attr in DEPRECATED | {"_src"} and "private" not in ast.unparse(node):
      yield node.lineno, ast.unparse(node)
    elif isinstance(node, ast.Constant) and node.value in SPELLED and id(node) not in docs:
      yield node.lineno, node.value
    elif isinstance(node, ast.Compare) and "__name__" in ast.unparse(node.left) and "Metadata" in ast.unparse(node):
      yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_leaves_the_insides_of_orbax_to_the_door(path):
  assert [f"{path.relative_to(PACKAGE)}:{line}: {what}" for line, what in leaks(path.read_text())] == []


def test_leaks_are_seen():
  source = """
from orbax.checkpoint._src.tree import utils
import jax._src.core
context = ocp.type_handlers.get_ts_context()
marker = "commit_success.txt"
if type(meta).__name__ == "StringMetadata":
  pass
"""
  assert sorted(line for line, _ in leaks(source)) == [2, 3, 4, 5, 6]


def test_names_of_files_and_keys_are_those_that_plain_orbax_writes(tmp_path):
  options = ocp.CheckpointManagerOptions(best_fn=lambda m: m["loss"])
  state = {"a": jnp.arange(4), "text": "t", "number": 3}
  with ocp.CheckpointManager(tmp_path, options=options) as manager:
    manager.save(0, args=ocp.args.PyTreeSave(state), metrics={"loss": 1.0})
  step, f = tmp_path / "0", orbax_format
  item = step / f.DEFAULT_ITEM
  files = {p.name for p in item.iterdir()}
  assert {f.ITEM_METADATA, f.SHARDINGS, f.TEXTS, f.ARRAY_METADATAS, f.MANIFEST, f.VALUES} <= files
  assert any(f.is_process_database(name) for name in files)
  assert (step / f.STEP_METADATA).exists() and (step / f.METRICS_ITEM / f.METRICS_ITEM).exists()
  metadata = json.loads((step / f.STEP_METADATA).read_text())
  assert {f.ITEM_HANDLERS, f.BEGUN_AT, f.COMMITTED_AT, f.CUSTOM} <= set(metadata)
  tree = json.loads((item / f.ITEM_METADATA).read_text())
  assert {f.TREE, f.USE_ZARR3} <= set(tree)
  kinds = {f.key_path(entry): entry[f.VALUE][f.VALUE_TYPE] for entry in tree[f.TREE].values()}
  assert set(kinds) == {("a",), ("text",), ("number",)}
  described = ocp.PyTreeCheckpointHandler().metadata(item).tree
  assert f.is_text(described["text"]) and f.is_number(described["number"])
  assert not f.is_text(described["a"]) and not f.is_number(described["a"])
