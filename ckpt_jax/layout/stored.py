"""How the leaves of an item are stored, by the metadata of each array: read without jax and Orbax, in milliseconds."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the dtypes bfloat16, int4 ...
import numpy as np
import tensorstore as ts
from etils import epath

from ckpt_jax.layout.keys import PACK_INDEX, prefix
from ckpt_jax.orbax import format as fmt
from ckpt_jax.run import untrusted
from ckpt_jax.storage import look
from ckpt_jax.storage.clients import kvstore_spec


@dataclasses.dataclass(frozen=True)
class Stored:
  """A leaf as it is stored.

  Attributes:
    name: in the database.
    kind: `array`, `number` (a Python one) or `text`.
    shape, dtype: of its array; none for text.
    chunks: shape of the pieces that are compressed and read whole; None for text and packed leaves.
    codec: `none`, `zstd`, `shuffled zstd` ...; `packed` for a leaf in a slab.
    slabs: the processes in whose slabs a packed leaf is.
    sharding: that which it was saved with, such as `P(data, None) on data=2, model=4`; empty if that is not known.
  """

  name: str
  kind: str
  shape: tuple[int, ...] = ()
  dtype: np.dtype | None = None
  chunks: tuple[int, ...] | None = None
  codec: str = ""
  sharding: str = ""
  slabs: tuple[int, ...] = ()


def tree_entries(item: epath.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The JSON that describes the tree of an item, and its entry for each leaf.

  Raises:
    CorruptCheckpointError: if it is damaged.
  """
  file = item / fmt.ITEM_METADATA
  data = untrusted.read_json(file)
  untrusted.check_tree(data, str(file))
  return data, list(data.get(fmt.TREE, {}).values())


def stored_leaves(item: epath.Path) -> dict[str, Stored] | None:
  """The leaves of an item by path, sorted as in a tree of dicts; None if only `describe_item` can tell.

  That is so of early Orbax's items, of trees with nodes that JSON cannot describe, and of whatever is damaged.
  """
  if look.exists(item / fmt.AGGREGATE):
    return None
  data, entries = tree_entries(item)
  kinds = {entry[fmt.VALUE].get(fmt.VALUE_TYPE) for entry in entries}
  if fmt.VALUE_TREE in data or not kinds <= {*fmt.EMPTY_TYPES, *fmt.ARRAY_TYPES, fmt.NUMBER_TYPE, fmt.TEXT_TYPE}:
    return None
  try:
    return _leaves(item, data, entries, _packed(item))
  except (ValueError, LookupError, TypeError, AttributeError):
    return None


def _leaves(
  item: epath.Path, data: dict[str, Any], entries: list[dict[str, Any]], packed: dict[str, Any]
) -> dict[str, Stored]:
  rows = [(path := fmt.key_path(entry), entry[fmt.VALUE][fmt.VALUE_TYPE], ".".join(path)) for entry in entries]
  rows = [(path, kind, name) for path, kind, name in rows if kind not in fmt.EMPTY_TYPES or name in packed]
  arrays = [name for _, kind, name in rows if kind != fmt.TEXT_TYPE and name not in packed]

  def in_order(row: tuple[tuple[str, ...], str, str]) -> list[tuple[bool, Any]]:
    return [(not key.isdecimal(), int(key) if key.isdecimal() else key) for key in row[0]]

  own = dict(zip(arrays, _array_metadata(item, data, arrays), strict=True))
  shardings = _shardings(item)
  return {
    "/".join(path): _stored(kind, name, own.get(name), packed.get(name), shardings.get(name, ""))
    for path, kind, name in sorted(rows, key=in_order)
  }


def _packed(item: epath.Path) -> dict[str, Any]:
  if not look.exists(item / PACK_INDEX):
    return {}
  index = untrusted.read_json(item / PACK_INDEX)
  if index["format"] != 1:
    raise ValueError("of another version")
  return index["leaves"]


def _stored(kind: str, name: str, own: dict[str, Any] | None, packed: Sequence[Any] | None, sharding: str) -> Stored:
  if kind == fmt.TEXT_TYPE:
    return Stored(name, "text")
  what = "number" if kind == fmt.NUMBER_TYPE else "array"
  if packed is not None:
    slabs = tuple(sorted({piece[0] for piece in packed[2]}))
    return Stored(name, what, tuple(packed[1]), np.dtype(packed[0]), None, "packed", sharding, slabs)
  assert own is not None
  if "data_type" in own:  # zarr 3
    dtype, grid, codecs = own["data_type"], own["chunk_grid"], own["codecs"]
    if codecs[0]["name"] == "sharding_indexed":  # chunks within chunks
      grid = codecs[0]
      codecs = grid["configuration"]["codecs"]
    chunks = grid["configuration"]["chunk_shape"]
    last: dict[str, Any] = {"name": "none"}
    last = next((c for c in codecs if c["name"] not in ("bytes", "transpose")), last)
    codec = {**last.get("configuration", {}), "id": last["name"]}
  else:
    dtype, chunks, codec = own["dtype"], own["chunks"], own["compressor"] or {"id": "none"}
  return Stored(name, what, tuple(own["shape"]), np.dtype(dtype), tuple(chunks), _codec_name(codec), sharding)


def _codec_name(codec: dict[str, Any]) -> str:
  """A codec of zarr in words."""
  if codec["id"] != "blosc":
    return str(codec["id"])
  shuffled = "" if codec.get("shuffle") in (0, "noshuffle") else "shuffled "
  return shuffled + str(codec["cname"])


def _array_metadata(item: epath.Path, data: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
  """zarr's metadata of arrays.

  Raises:
    ValueError: if that of one is missing or cannot be read.
  """
  spec = kvstore_spec(str(item).rstrip("/") + "/")
  if data.get(fmt.USE_OCDBT, look.exists(item / fmt.MANIFEST)):
    spec = {"driver": "ocdbt", "base": spec}
  store = ts.KvStore.open(spec).result()
  file = "zarr.json" if data.get(fmt.USE_ZARR3) else ".zarray"
  return [json.loads(r.result().value) for r in [store.read(prefix(name) + file) for name in names]]


def _shardings(item: epath.Path) -> dict[str, str]:
  """The sharding of each array in words, by name."""
  if not look.exists(item / fmt.SHARDINGS):
    return {}
  found = untrusted.read_json(item / fmt.SHARDINGS)
  words = {text: _in_words(json.loads(text)) for text in set(found.values())}  # thousands of leaves share a few
  return {base64.b64decode(name).decode(): words[text] for name, text in found.items()}


def _in_words(sharding: dict[str, Any]) -> str:
  if "partition_spec" not in sharding:
    return str(sharding.get("device_str") or sharding.get("sharding_type", ""))

  def axis(names: Any) -> str:
    return f"({', '.join(names)})" if isinstance(names, list) else str(names)

  spec = ", ".join(map(axis, sharding["partition_spec"]))
  mesh = ", ".join(f"{name}={n}" for name, n in zip(sharding["axis_names"], sharding["shape"], strict=True))
  return f"P({spec}) on {mesh}"
