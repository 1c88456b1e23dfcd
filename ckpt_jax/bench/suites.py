"""The states that are saved and restored, as numpy trees, and the devices and storage of each.

Imports only numpy: the processes of other libraries have no jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ckpt_jax.errors import ConfigError

Tree = dict[str, Any]
ORBAX, ORBAX_PLAIN = "orbax", "orbax-uncompressed"
OURS, TUNED, PACKED, ZSTD, PLAIN = "ckpt_jax", "tuned", "packed", "ckpt_jax-zstd", "ckpt_jax-uncompressed"
DCP, DCP_ASYNC, SAFETENSORS, RAW = "dcp", "dcp-async", "safetensors", "raw"


@dataclasses.dataclass(frozen=True)
class Suite:
  """One state, and the variants that save it.

  Attributes:
    name, what: for commands and tables.
    make: makes the state from a random generator. The same seed gives every variant the same bits.
    variants: names of `variants.VARIANTS`, the baseline first.
    processes: how many processes save together.
    devices: virtual CPU devices in each.
    mesh: axis names and sizes over all devices; empty for one device. Leaves whose first dimension divides by the
      `fsdp` axis are split along it and replicated along the others, all other leaves are replicated.
    storage: `disk`, or the emulated bucket `gs` or `s3`.
    hidden: whether it only tests the benchmark itself; its figures are meaningless.
  """

  name: str
  what: str
  make: Callable[[np.random.Generator], Tree]
  variants: tuple[str, ...]
  processes: int = 1
  devices: int = 1
  mesh: tuple[tuple[str, int], ...] = ()
  storage: str = "disk"
  hidden: bool = False


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
  """Leaves with their dotted paths, the names in formats without a tree."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def state_of(suite: Suite) -> Tree:
  """Makes the suite's state, with the same bits at each call."""
  return suite.make(np.random.default_rng(0))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return rng.standard_normal(shape, dtype=np.float32)


def _adam(params: Callable[[], Tree]) -> Tree:
  return {"params": params(), "mu": params(), "nu": params(), "step": np.int32(0)}


def _w1(rng: np.random.Generator) -> Tree:
  square, layer = (768, 768), {"up": (768, 1024), "b1": (768,), "b2": (1024,), "ln": (768,)}
  shapes = {"q": square, "k": square, "v": square, "o": square, **layer}

  def params() -> Tree:
    tree: Tree = {f"l{i}": {name: _normal(rng, *shape) for name, shape in shapes.items()} for i in range(25)}
    return tree | {"emb": _normal(rng, 8192, 768)}

  return _adam(params)


def _w2(rng: np.random.Generator) -> Tree:
  return {f"g{i}": {f"x{j}": _normal(rng, 100, 100) for j in range(50)} for i in range(100)}


def _small(rng: np.random.Generator) -> Tree:
  names = ("q", "k", "v", "o", "gate", "up", "down")

  def params() -> Tree:
    return {
      f"l{i}": {name: {"a": _normal(rng, 4, 256), "b": _normal(rng, 256, 4)} for name in names} for i in range(32)
    }

  return _adam(params)


def _moe(rng: np.random.Generator) -> Tree:
  def expert() -> Tree:
    return {name: _normal(rng, 128, 128) for name in ("gate", "up", "down")}

  return {f"l{i}": {"router": _normal(rng, 128, 64)} | {f"e{j}": expert() for j in range(64)} for i in range(16)}


def _multi(rng: np.random.Generator, layers: int = 11, width: int = 512) -> Tree:
  shapes = {name: (width, width) for name in "qkvo"} | {"up": (width, 2 * width), "ln": (width,)}
  return _adam(lambda: {f"l{i}": {name: _normal(rng, *shape) for name, shape in shapes.items()} for i in range(layers)})


def _bucket(rng: np.random.Generator) -> Tree:
  return {f"w{i}": _normal(rng, 256, 1024) for i in range(64)}


def _compressible(rng: np.random.Generator) -> Tree:
  def upcast() -> np.ndarray:
    # A bfloat16 stored as float32 has 16 zero bits.
    return (_normal(rng, 1024, 1024).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

  return {
    f"l{i}": {"w": upcast() if i % 2 else np.zeros((1024, 1024), np.float32), "b": _normal(rng, 16)} for i in range(100)
  }


def _tiny(rng: np.random.Generator) -> Tree:
  return {f"l{i}": {"w": _normal(rng, 64, 64), "b": _normal(rng, 64)} for i in range(20)} | {"step": np.int32(7)}


_PEERS = (DCP, DCP_ASYNC, SAFETENSORS, RAW)
_SMALL_LEAVES = (ORBAX, OURS, PACKED, TUNED, *_PEERS)

SUITES: dict[str, Suite] = {
  s.name: s
  for s in (
    Suite("w1", "1.0 GB float32 Adam state, 604 leaves, 1 device", _w1, (ORBAX, ORBAX_PLAIN, OURS, TUNED, *_PEERS)),
    Suite("w2", "200 MB in 5,000 leaves of 40 KB, 1 device", _w2, _SMALL_LEAVES),
    Suite(
      "w3",
      "w1 over 8 devices of one process",
      _w1,
      (ORBAX, ORBAX_PLAIN, OURS, TUNED, RAW),
      devices=8,
      mesh=(("fsdp", 8),),
    ),
    Suite("small", "LoRA adapters and Adam: 5.5 MB in 1,345 leaves of 4 KB", _small, _SMALL_LEAVES),
    Suite("moe", "16 layers of 64 unstacked experts: 202 MB in 3,088 leaves of 64 KB", _moe, _SMALL_LEAVES),
    Suite(
      "multi",
      "208 MB Adam state, 4 processes with 2 devices each, mesh data=2 x fsdp=4",
      _multi,
      (ORBAX, OURS, TUNED),
      processes=4,
      devices=2,
      mesh=(("data", 2), ("fsdp", 4)),
    ),
    Suite("bucket-gs", "67 MB in 64 leaves, emulated gs://", _bucket, (ORBAX, OURS, TUNED), storage="gs"),
    Suite("bucket-s3", "67 MB in 64 leaves, emulated s3://", _bucket, (ORBAX, OURS, TUNED), storage="s3"),
    Suite(
      "compressible",
      "419 MB, half the leaves zeros, half bfloat16 weights kept as float32",
      _compressible,
      (ORBAX, ORBAX_PLAIN, PLAIN, ZSTD, OURS, TUNED),
    ),
    Suite("tiny", "checks the benchmark", _tiny, (ORBAX, OURS, *_PEERS), hidden=True),
    Suite(
      "tiny-multi",
      "checks the benchmark",
      lambda rng: _multi(rng, 1, 64),
      (ORBAX, OURS),
      processes=2,
      devices=2,
      mesh=(("data", 2), ("fsdp", 2)),
      hidden=True,
    ),
    Suite("tiny-gs", "checks the benchmark", _tiny, (ORBAX, OURS), storage="gs", hidden=True),
  )
}
GROUPS = {"bucket": ("bucket-gs", "bucket-s3"), "all": tuple(s.name for s in SUITES.values() if not s.hidden)}
NAMES = [*(s.name for s in SUITES.values() if not s.hidden), *GROUPS]


def chosen_suites(names: Sequence[str]) -> list[Suite]:
  """Suites by name or group, each once, in the order of `names`.

  Raises:
    ConfigError: for an unknown name; the message lists the known ones.
  """
  found: dict[str, Suite] = {}
  for name in names:
    for member in GROUPS.get(name, (name,)):
      if member not in SUITES:
        raise ConfigError(f"no suite {member!r}; there are {', '.join(NAMES)}")
      found[member] = SUITES[member]
  return list(found.values())
