"""Orbax's names of files and items, and its JSON keys, in one place.

    RUN/12/_CHECKPOINT_METADATA          step: item handlers, times, custom metadata
    RUN/12/commit_success.txt            the step is committed (object stores; on a disk the rename says so as well)
    RUN/12/default/_METADATA             item: the tree, leaf by leaf
    RUN/12/default/_sharding             shardings of the arrays
    RUN/12/default/_strings.json         leaves that are text
    RUN/12/default/array_metadatas/      shapes and chunks that were written; which arrays are PRNG keys
    RUN/12/default/manifest.ocdbt, d/    the database of all arrays, merged from
    RUN/12/default/ocdbt.process_*/      one for each process that wrote
    RUN/12/metrics/metrics               the metrics of the step

tests/orbax/test_format.py writes a step with plain Orbax and finds each of these names in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEP_METADATA = "_CHECKPOINT_METADATA"
ITEM_METADATA = "_METADATA"
COMMIT_MARKER = "commit_success.txt"
SHARDINGS = "_sharding"
TEXTS = "_strings.json"
ARRAY_METADATAS = "array_metadatas"
MANIFEST = "manifest.ocdbt"  # an OCDBT database, which keeps values and nodes in ...
VALUES = "d"
PROCESS_DATABASE = "ocdbt.process_"  # and the number of the process
AGGREGATE = "checkpoint"  # the tree, and its small leaves, as Orbax before 0.4 wrote it
TEMPORARY = ".orbax-checkpoint-tmp"

DEFAULT_ITEM = "default"
METRICS_ITEM = "metrics"

# Keys of STEP_METADATA.
ITEM_HANDLERS = "item_handlers"
BEGUN_AT, COMMITTED_AT = "init_timestamp_nsecs", "commit_timestamp_nsecs"
CUSTOM = "custom_metadata"
# Keys of ITEM_METADATA, and of each entry of its tree.
TREE, USE_ZARR3, USE_OCDBT = "tree_metadata", "use_zarr3", "use_ocdbt"
KEYS, KEY, KEY_TYPE = "key_metadata", "key", "key_type"
VALUE, VALUE_TYPE, WRITE_SHAPE = "value_metadata", "value_type", "write_shape"
# Value types of leaves.
ARRAY_TYPES, NUMBER_TYPE, TEXT_TYPE = ("jax.Array", "np.ndarray"), "scalar", "string"
EMPTY_TYPES = ("Dict", "List", "Tuple", "None", "NamedTuple")  # of containers without leaves
VALUE_TREE = "value_metadata_tree"  # of items whose tree has nodes that JSON cannot describe


def key_path(entry: Mapping[str, Any]) -> tuple[str, ...]:
  """The keys on the way to a leaf, from its entry in ITEM_METADATA."""
  return tuple([str(key[KEY]) for key in entry[KEYS]])


def process_database(process: int) -> str:
  """The name of a process's database in an item."""
  return f"{PROCESS_DATABASE}{process}"


def is_process_database(name: str) -> bool:
  """Whether a directory of an item is the database of one process."""
  return name.startswith(PROCESS_DATABASE)


def is_text(meta: Any) -> bool:
  """Whether a leaf, as Orbax's metadata describes it, is text."""
  return _is(meta, "StringMetadata")


def is_number(meta: Any) -> bool:
  """Whether a leaf, as Orbax's metadata describes it, is a Python number."""
  return _is(meta, "ScalarMetadata")


def _is(meta: Any, name: str) -> bool:
  from orbax.checkpoint import metadata  # what only needs names starts half a second earlier

  return isinstance(meta, getattr(metadata, name))
