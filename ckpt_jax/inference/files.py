"""An export as files: which arrays it has, and which bytes of them are in which file. Pure functions of shapes.

All bytes of an export are written in one order, that of its pieces: a piece is a part of a file, and holds a part of
one array, or text. Both formats come down to this; they differ in the names of the files and in the text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.errors import ConfigError
from ckpt_jax.inference.quantize import Scheme
from ckpt_jax.layout.encoding import dtype_name
from ckpt_jax.orbax import plain

VALUES, SCALE = "values", "scale"  # what a quantised leaf becomes
_UNIT_NBYTES = 256 << 20
INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8
DTYPES = {
  "BOOL": "bool",
  "U8": "uint8",
  "I8": "int8",
  "U16": "uint16",
  "I16": "int16",
  "U32": "uint32",
  "I32": "int32",
  "U64": "uint64",
  "I64": "int64",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F16": "float16",
  "BF16": "bfloat16",
  "F32": "float32",
  "F64": "float64",
}
_NAMES = {name: code for code, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array of an export: its name, by which the file knows it, and its place in a tree."""

  name: str
  keys: tuple[Any, ...]
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of its values."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of the step, and what it becomes.

  Attributes:
    source: its path in the step.
    path: its path below the parameters.
    keys: the same as keys of jax.
    name: what it is called in the export.
    shape: as it was saved.
    dtype: of a leaf that stays in floating point, and of all that are no floats.
    scheme: how it is quantised; None if it is not.
    transposed: whether a matrix is written with its axes swapped.
  """

  source: str
  path: str
  keys: tuple[Any, ...]
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  scheme: Scheme | None = None
  transposed: bool = False

  @property
  def tensors(self) -> tuple[Tensor, ...]:
    """The arrays that it becomes: itself, or integers and their scales."""
    if self.scheme is None:
      return (Tensor(self.name, self.keys, self.shape[::-1] if self.transposed else self.shape, self.dtype),)
    scheme, shape = self.scheme, self.shape
    below = [(*self.keys, jax.tree_util.DictKey(part)) for part in (VALUES, SCALE)]
    stored = np.dtype(np.int8 if scheme.bits == 8 else np.uint8)
    return (
      Tensor(f"{self.name}.{VALUES}", below[0], scheme.stored_shape(shape), stored),
      Tensor(f"{self.name}.{SCALE}", below[1], scheme.scale_shape(shape), np.dtype(np.float32)),
    )

  @property
  def nbytes(self) -> int:
    """Bytes of its arrays."""
    return sum(tensor.nbytes for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a file, which follows the piece before it if that is in the same file.

  Attributes:
    file: below the directory of the export.
    nbytes: its length.
    tensor: the array of which it holds a part; empty for text.
    text: its content, if that is known beforehand.
  """

  file: str
  nbytes: int
  tensor: str = ""
  text: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
  """Files that are finished together, and after an interruption written again together.

  Attributes:
    leaves: those in them, in the order of their bytes.
    pieces: of the files.
  """

  leaves: tuple[Leaf, ...]
  pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """All files of an export.

  Attributes:
    units: those with arrays.
    closing: the others by name, written after all units.
  """

  units: tuple[Unit, ...]
  closing: dict[str, bytes]


def orbax_layout(leaves: Sequence[Leaf], most: int, at_ns: int) -> Layout:
  """An export that plain Orbax restores, in units of at most `most` bytes; see `orbax.plain` for `at_ns`.

  Raises:
    ConfigError: naming the leaf whose dtype the format lacks.
  """
  units = []
  for leaf in leaves:
    if not plain.is_storable(leaf.dtype):
      raise ConfigError(f"{leaf.path}: Orbax cannot store {leaf.dtype} without a note; name another subtree")
  for group in _groups(leaves, min(most, _UNIT_NBYTES)):
    pieces = []
    for tensor in [tensor for leaf in group for tensor in leaf.tensors]:
      (file, text), chunks = plain.array_files(tensor.name, tensor.shape, tensor.dtype)
      pieces.append(Piece(file, len(text), text=text))
      pieces += [Piece(chunk, nbytes, tensor.name) for chunk, nbytes in chunks]
    units.append(Unit(tuple(group), tuple(pieces)))
  paths = [tensor.keys for leaf in leaves for tensor in leaf.tensors]
  return Layout(tuple(units), plain.describing_files(paths, at_ns))


def safetensors_layout(leaves: Sequence[Leaf], most: int, metadata: dict[str, str]) -> Layout:
  """Files of at most `most` bytes, unless one leaf is larger, named as transformers expects.

  https://github.com/huggingface/safetensors (format); https://huggingface.co/docs/transformers/big_models (index).

  Raises:
    ConfigError: naming the leaf whose dtype the format lacks.
  """
  if unknown := [leaf for leaf in leaves for t in leaf.tensors if dtype_name(t.dtype) not in _NAMES]:
    raise ConfigError(f"{unknown[0].path}: safetensors has no {unknown[0].dtype}; leave it out, or use format='orbax'")
  groups = list(_groups(leaves, most))
  units = []
  weights: dict[str, str] = {}
  for number, group in enumerate(groups, 1):
    file = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
    ordered = sorted(group, key=_alignment)
    tensors = [tensor for leaf in ordered for tensor in leaf.tensors]
    header = _header(tensors, metadata)
    pieces = [Piece(file, len(header), text=header), *(Piece(file, t.nbytes, t.name) for t in tensors)]
    units.append(Unit(tuple(ordered), tuple(pieces)))
    weights |= {tensor.name: file for tensor in tensors}
  index = {"metadata": {"total_size": sum(leaf.nbytes for leaf in leaves)}, "weight_map": dict(sorted(weights.items()))}
  return Layout(tuple(units), {INDEX: json.dumps(index, indent=2).encode()} if len(groups) > 1 else {})


def _alignment(leaf: Leaf) -> tuple[bool, int]:
  """Orders leaves so that each array begins at a multiple of its items' size, as programs that map files need."""
  sizes = [tensor.dtype.itemsize for tensor in leaf.tensors]
  return leaf.nbytes % max(sizes) > 0 or leaf.tensors[0].nbytes % sizes[-1] > 0, -max(sizes)


def _header(tensors: Sequence[Tensor], metadata: dict[str, str]) -> bytes:
  at = 0
  entries: dict[str, Any] = {"__metadata__": metadata}
  for tensor in tensors:
    offsets = [at, at := at + tensor.nbytes]
    entries[tensor.name] = {
      "dtype": _NAMES[dtype_name(tensor.dtype)],
      "shape": list(tensor.shape),
      "data_offsets": offsets,
    }
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGNMENT)
  return len(text).to_bytes(8, "little") + text


def _groups(leaves: Sequence[Leaf], most: int) -> list[list[Leaf]]:
  groups: list[list[Leaf]] = []
  room = 0
  for leaf in leaves:
    if not groups or leaf.nbytes > room:
      groups.append([])
      room = most
    groups[-1].append(leaf)
    room -= leaf.nbytes
  return groups
