"""Items whose tree is in one MessagePack file, `checkpoint`, as Orbax wrote them before 0.6.

Each leaf of the file is the name of an array beside it, or the value itself: flax.training.checkpoints had Orbax put
all values there. Before 0.4 nothing else describes the tree. `ArraySave` calls its only array `checkpoint` to this day,
and Orbax's handler of trees takes that for the file.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import msgpack_utils

from ckpt_jax.config import LimitsConfig
from ckpt_jax.layout import reading
from ckpt_jax.layout.direct import EMPTY
from ckpt_jax.layout.handler import describe_array, limited_context
from ckpt_jax.layout.structure import path_name
from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import AGGREGATE, ITEM_METADATA, MANIFEST, TREE, VALUE, VALUE_TYPE, key_path
from ckpt_jax.run import untrusted
from ckpt_jax.storage import look

PyTree = Any
_ELSEWHERE = "PLACEHOLDER://"


def describe(
  item: epath.Path, limits: LimitsConfig
) -> tuple[PyTree, ocp.type_handlers.ParamInfo, dict[str, ts.TensorStore], dict[str, Any]] | None:
  """What `contents.ItemDescription` holds of such an item: its tree, Orbax's info, open arrays, and values by path.

  Args:
    item: its directory.
    limits: for the opening of arrays.

  Returns:
    None if all values are elsewhere, and `_METADATA` describes them.
  """
  file = item / AGGREGATE
  if look.exists(file / ".zarray"):
    tree = {AGGREGATE: f"{_ELSEWHERE}{AGGREGATE}"}
  elif look.exists(file) and not look.is_dir(file):
    tree = msgpack_utils.msgpack_restore(look.read_bytes(file))
  else:
    return None
  flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
  values = {name: v for name, v in flat.items() if not (isinstance(v, str) and v.startswith(_ELSEWHERE))}
  if not values and not look.is_dir(file) and look.exists(item / ITEM_METADATA):
    return None
  is_ocdbt = look.exists(item / MANIFEST)
  info = ocp.type_handlers.ParamInfo(
    name="",
    parent_dir=item,
    is_ocdbt_checkpoint=is_ocdbt,
    use_zarr3=False,
    ts_context=private.tensorstore_context(use_ocdbt=is_ocdbt),
    value_typestr="jax.Array",
  )
  info = info.replace(ts_context=limited_context(limits, info))
  types = _value_types(item)
  elsewhere = {name: str(v).removeprefix(_ELSEWHERE) for name, v in flat.items() if name not in values}
  empty = {name: EMPTY[kind]() for name in elsewhere if (kind := types.get(name)) in EMPTY}
  elsewhere = {name: stored for name, stored in elsewhere.items() if name not in empty}
  infos = [info.replace(name=name) for name in elsewhere.values()]
  opened = reading.open_stores(infos, info.ts_context) if infos else []
  stores = dict(zip(elsewhere.values(), opened, strict=True))

  def meta(path: Any, leaf: Any) -> Any:
    name = path_name(path)
    if name in values:
      return _describe_value(name, item, leaf)
    if name in empty:
      return empty[name]
    array = describe_array(elsewhere[name], item, stores[elsewhere[name]], None)
    return _scalar(name, item, array.dtype) if types.get(name) == "scalar" else array

  return jax.tree_util.tree_map_with_path(meta, tree), info, stores, values


def _value_types(item: epath.Path) -> dict[str, str]:
  """Of the leaves, by path, as `_METADATA` has them; empty if Orbax wrote none yet."""
  file = item / ITEM_METADATA
  if not look.exists(file):
    return {}
  data = untrusted.read_json(file)
  untrusted.check_tree(data, str(file))
  return {"/".join(key_path(entry)): str(entry[VALUE].get(VALUE_TYPE)) for entry in data.get(TREE, {}).values()}


def _scalar(name: str, item: epath.Path, dtype: Any) -> ocp.metadata.ScalarMetadata:
  return ocp.metadata.ScalarMetadata(name=name, directory=item, shape=(), sharding=None, dtype=dtype)


def _describe_value(name: str, item: epath.Path, value: Any) -> Any:
  if isinstance(value, str):
    return ocp.metadata.StringMetadata(name=name, directory=item)
  array = np.asarray(value)
  if isinstance(value, (bool, int, float)):
    return _scalar(name, item, array.dtype)
  return ocp.metadata.ArrayMetadata(
    name=name, directory=item, shape=array.shape, dtype=array.dtype, sharding=None, storage=None
  )


def as_asked(value: Any, scalar: type | None, sharding: jax.sharding.Sharding | None) -> Any:
  """A value of the file as a number or text, as a jax array with a sharding, or as numpy."""
  if scalar is not None:
    return scalar(value)
  array = np.array(value)  # its own memory: msgpack's is read-only
  if sharding is None:
    return array
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
