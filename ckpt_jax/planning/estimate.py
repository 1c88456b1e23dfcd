"""The arithmetic of checkpoints: bytes of a state, of a step, of a restore, and the seconds that they take.

`ckpt.estimate`, the simulator, the planner and the check before a save take it from here. A state of N parameters is N
times the bytes of a parameter plus what its optimizer keeps for each: 4 + 8 for float32 and Adam. A state given as a
tree is added up leaf by leaf, so that it is exact.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ckpt_jax.config.arguments import check_type, checked, whole_number
from ckpt_jax.config.html import html_table
from ckpt_jax.config.units import count, one_of, parse_count, parse_dtype, size_text
from ckpt_jax.errors import ConfigError

PyTree = Any
STRATEGIES = ("direct", "gather", "broadcast")

# Values that an optimizer keeps for each parameter, in the dtype of what it updates, as optax does. Adafactor keeps
# sums of rows and columns, 2 / d of a d x d matrix, counted as none; but all second moments of arrays with a side below
# 128. Muon keeps one value for matrices and Adam's two for the rest. Only a tree shows how much of that there is.
_SLOTS = {"sgd": 0, "momentum": 1, "lion": 1, "muon": 1, "adam": 2, "adamw": 2, "adafactor": 0}
# Adam with moments of 8 bits, and a float32 scale for each block of 256 (Dettmers et al. 2022, "8-bit Optimizers via
# Block-wise Quantization").
_ADAM_8BIT, _BLOCK = "adam8bit", 256
OPTIMIZERS = (*_SLOTS, _ADAM_8BIT)
# Measured: Orbax's and our metadata and OCDBT's nodes take 4 kB a step and 0.4 to 1 kB a leaf.
_LEAF_NBYTES, _STEP_NBYTES = 700, 4000
_COPY_SPEED = 5e9  # bytes per second, from devices to host memory


def step_nbytes(nbytes: float, leaves: int, stored_share: float = 1.0) -> int:
  """Bytes of a committed step.

  Args:
    nbytes: bytes of its arrays.
    leaves: number of its arrays.
    stored_share: stored bytes of an array over its bytes; below 1 if compression helps.
  """
  return round(nbytes * stored_share) + leaves * _LEAF_NBYTES + _STEP_NBYTES


def room_nbytes(nbytes: float, leaves: int, stored_share: float = 1.0) -> int:
  """Bytes that must be free for a step: with room for metadata of long names and many processes."""
  return step_nbytes(nbytes, leaves * 6, stored_share) + (1 << 20)


def host_nbytes(written: float, in_flight: float | None = None) -> int:
  """Host memory of a process that saves, besides the state: a copy of what it writes, and what is being encoded.

  Args:
    written: bytes that the process writes: of replicas its part.
    in_flight: bytes that are encoded at a time; None for an uncompressed write, which streams out of the copy.
  """
  return int(written + min(written, written / 8 if in_flight is None else in_flight))


def copy_seconds(nbytes: float) -> float:
  """Seconds of a copy from devices to host memory at 5 GB/s, for which a save blocks training."""
  return max(nbytes / _COPY_SPEED, 1e-3)


@dataclasses.dataclass(frozen=True)
class SizeEstimate:
  """Bytes of a training state and of the weights that remain of it.

  Attributes:
    groups: bytes by part of the state: `params`, `master`, `optimizer`, `ema`; of a given state, by key at its top.
    params: number of parameters; None if the state does not say which of its leaves they are.
    leaves: number of arrays; 0 if only the number of parameters is known.
    optimizer, param_dtype: by name; empty for a given state.
    inference_dtype: of the weights for inference.
  """

  groups: Mapping[str, int]
  params: int | None = None
  leaves: int = 0
  optimizer: str = ""
  param_dtype: str = ""
  inference_dtype: str = "bfloat16"

  @property
  def training_nbytes(self) -> int:
    """Bytes of the whole training state."""
    return sum(self.groups.values())

  @property
  def inference_nbytes(self) -> int | None:
    """Bytes of the parameters alone in `inference_dtype`, without the scales of quantized ones; None if unknown."""
    return None if self.params is None else math.ceil(self.params * bits_of(self.inference_dtype) / 8)

  @property
  def bytes_per_param(self) -> float | None:
    """Bytes of training state for each parameter."""
    return self.training_nbytes / self.params if self.params else None

  @property
  def inference_share(self) -> float | None:
    """Inference weights over training state: 1/6 for float32 with Adam and bfloat16."""
    nbytes = self.inference_nbytes
    return None if nbytes is None or not self.training_nbytes else nbytes / self.training_nbytes

  @property
  def step_nbytes(self) -> int:
    """Bytes of a committed step without compression, metadata included."""
    return step_nbytes(self.training_nbytes, self.leaves)

  def to_dict(self) -> dict[str, Any]:
    """JSON-able data, properties included."""
    names = ("training_nbytes", "inference_nbytes", "bytes_per_param", "inference_share", "step_nbytes")
    return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}

  def rows(self) -> list[tuple[str, int, float | None]]:
    """What it is, its bytes, and bytes a parameter: a row for each group, their sum, and the weights for inference."""
    labels = {"params": f"parameters, {self.param_dtype}", "optimizer": f"optimizer, {self.optimizer}"}
    groups = [(labels.get(name, name) if self.optimizer else name, n) for name, n in self.groups.items()]
    named = [*groups, ("training state", self.training_nbytes)]
    if self.inference_nbytes is not None:
      named.append((f"weights for inference, {self.inference_dtype}", self.inference_nbytes))
    return [(name, nbytes, nbytes / self.params if self.params else None) for name, nbytes in named]

  def __repr__(self) -> str:
    what = count(self.params, "parameter") if self.params is not None else count(self.leaves, "array")
    return f"SizeEstimate({what}: {', '.join(f'{name} {size_text(nbytes)}' for name, nbytes, _ in self.rows())})"

  def _repr_html_(self) -> str:
    rows = [(name, size_text(n), "" if each is None else f"{each:.3g}") for name, n, each in self.rows()]
    return html_table(("", "size", "bytes a parameter"), rows)


def estimate(
  params: float | str | PyTree = None,
  optimizer: Any = "adam",
  param_dtype: Any = None,
  *,
  master_dtype: Any = None,
  moments_dtype: Any = None,
  ema: int = 0,
  inference_dtype: Any = "bfloat16",
  state: PyTree = None,
) -> SizeEstimate:
  """Bytes of a training state, and of the weights for inference that remain of it. Allocates nothing.

  Args:
    params: their number (7e9, "7b"), or a tree of arrays or `jax.ShapeDtypeStruct`s, which makes the answer exact.
    optimizer: a name of OPTIMIZERS; or, with a tree, any optax transformation.
    param_dtype: of the parameters. Default: float32, or those of the tree.
    master_dtype: of a second copy that the optimizer updates; None for none.
    moments_dtype: of the optimizer's values. Default: as optax, that of the parameters which it updates.
    ema: number of averaged copies, in the dtype that the optimizer updates.
    inference_dtype: such as bfloat16, int8, int4.
    state: instead of `params`, a whole training state, concrete or abstract; where the parameters are at the key
      `params` or `model`.

  Raises:
    ConfigError: if an argument makes no sense.
  """
  inference_dtype = checked("estimate: inference_dtype", parse_dtype, inference_dtype)
  if (params is None) == (state is None):
    raise ConfigError("estimate: give either params= (their number, or a tree) or state=")
  if state is not None:
    return _of_state(state, inference_dtype)
  copies = whole_number(ema)
  check_type("estimate: ema", ema, copies is not None and copies >= 0, "a number of averaged copies")
  if not callable(getattr(optimizer, "init", None)):
    checked("estimate: optimizer", one_of, optimizer, OPTIMIZERS)
  dtypes = {"param_dtype": param_dtype, "master_dtype": master_dtype, "moments_dtype": moments_dtype}
  given = {
    name: checked(f"estimate: {name}", parse_dtype, dtype) for name, dtype in dtypes.items() if dtype is not None
  }
  recipe = _Recipe(optimizer, **given, ema=ema)
  if getattr(params, "ndim", None) == 0 and hasattr(params, "item"):  # a number of numpy or jax
    params = params.item()
  if not isinstance(params, (int, float, str)):
    check_type("estimate: params", params, arrays_of(params), "their number, or a tree of arrays")
    return recipe.of_tree(params, inference_dtype)
  return recipe.of_count(checked("estimate: params", parse_count, params), inference_dtype)


def bits_of(dtype: Any) -> int:
  """Bits of a value."""
  dtype = np.dtype(dtype)
  if dtype.kind in "iuV" or dtype.type.__module__.startswith("ml_dtypes"):
    info = ml_dtypes.iinfo if "int" in dtype.name else ml_dtypes.finfo
    return info(dtype).bits
  return dtype.itemsize * 8


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """What a state holds besides its parameters; see `estimate`."""

  optimizer: Any
  param_dtype: str | None = None
  master_dtype: str | None = None
  moments_dtype: str | None = None
  ema: int = 0

  def of_count(self, params: int, inference_dtype: str) -> SizeEstimate:
    """The state of a number of parameters, whose shapes are not known."""
    if not isinstance(self.optimizer, str):
      raise ConfigError("estimate: an optax transformation needs the shapes of the parameters: params= must be a tree")
    own = self.param_dtype or "float32"
    updated = self.master_dtype or own
    groups = {"params": params * np.dtype(own).itemsize}
    if self.master_dtype:
      groups["master"] = params * np.dtype(self.master_dtype).itemsize
    if self.optimizer == _ADAM_8BIT:
      groups["optimizer"] = 2 * _in_blocks(params)
    else:
      groups["optimizer"] = params * _SLOTS[self.optimizer] * np.dtype(self.moments_dtype or updated).itemsize
    if self.ema:
      groups["ema"] = params * self.ema * np.dtype(updated).itemsize
    return SizeEstimate(groups, params, 0, self.optimizer, own, inference_dtype)

  def of_tree(self, params: PyTree, inference_dtype: str) -> SizeEstimate:
    """The state of given parameters, leaf by leaf."""
    own = _cast(params, self.param_dtype)
    updated = _cast(own, self.master_dtype)
    trees: dict[str, list[Any]] = {"params": arrays_of(own)}
    if self.master_dtype:
      trees["master"] = arrays_of(updated)
    trees["optimizer"] = self._optimizer_arrays(_cast(updated, self.moments_dtype))
    if self.ema:
      trees["ema"] = arrays_of(updated) * self.ema
    dtypes = sorted({str(leaf.dtype) for leaf in trees["params"]})
    return SizeEstimate(
      {name: sum(map(_nbytes, leaves)) for name, leaves in trees.items()},
      sum(math.prod(leaf.shape) for leaf in trees["params"]),
      sum(map(len, trees.values())),
      self.optimizer if isinstance(self.optimizer, str) else "optax",
      ", ".join(dtypes),
      inference_dtype,
    )

  def _optimizer_arrays(self, params: PyTree) -> list[Any]:
    import jax

    if self.optimizer == _ADAM_8BIT:
      moments = [jax.ShapeDtypeStruct(leaf.shape, np.int8) for leaf in arrays_of(params)]
      scales = [jax.ShapeDtypeStruct((-(-math.prod(m.shape) // _BLOCK),), np.float32) for m in moments]
      return [*moments, *scales] * 2
    optimizer = _optax(self.optimizer) if isinstance(self.optimizer, str) else self.optimizer
    try:
      return arrays_of(jax.eval_shape(optimizer.init, params))
    except Exception as e:
      raise ConfigError(f"estimate: {self.optimizer!r} cannot be initialized with these parameters: {e}") from e


def _of_state(state: PyTree, inference_dtype: str) -> SizeEstimate:
  import jax

  from ckpt_jax.layout.structure import path_name

  groups: collections.Counter[str] = collections.Counter()
  sizes: collections.Counter[str] = collections.Counter()
  leaves = 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    if arrays := arrays_of(leaf):
      top = path_name(path[:1]) or "state"
      groups[top] += _nbytes(arrays[0])
      sizes[top] += math.prod(arrays[0].shape)
      leaves += 1
  params = next((sizes[name] for name in ("params", "model") if name in sizes), None)
  return SizeEstimate(dict(groups), params, leaves, inference_dtype=inference_dtype)


def _in_blocks(values: int) -> int:
  """Bytes of values in 8 bits with a float32 scale for each block."""
  return values + 4 * -(-values // _BLOCK)


def _optax(name: str) -> Any:
  import optax

  if name == "momentum":
    return optax.sgd(1e-3, momentum=0.9)
  if name == "muon":
    from optax.contrib import muon

    return muon(1e-3)
  return getattr(optax, name)(1e-3)


def _cast(tree: PyTree, dtype: str | None) -> PyTree:
  """The description of a tree, its floating-point leaves in another dtype."""
  import jax

  def described(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
      return leaf
    floating = jax.numpy.issubdtype(leaf.dtype, np.floating)
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype) if dtype and floating else leaf.dtype)

  return jax.tree.map(described, tree)


def arrays_of(tree: PyTree) -> list[Any]:
  """The arrays of a tree; typed PRNG keys as the numbers in them."""
  import jax

  from ckpt_jax.layout.encoding import as_words

  return [as_words(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]


def _nbytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


# -- a job's storage and hosts


@dataclasses.dataclass(frozen=True)
class Storage:
  """How fast the run's storage is, in bytes per second.

  Attributes:
    bandwidth: of all hosts together (a file server), or None.
    per_host: the most that one host can move; with `bandwidth` unset the total grows with the hosts (a bucket).
    interconnect: between hosts, in each direction, for `gather` and `broadcast`.
  """

  bandwidth: float | None = None
  per_host: float | None = None
  interconnect: float = 12.5e9

  def __post_init__(self):
    if self.bandwidth is None and self.per_host is None:
      raise ConfigError("Storage: give bandwidth (of all hosts together), per_host, or both")
    for name in ("bandwidth", "per_host", "interconnect"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ConfigError(f"Storage({name}={value}): must be above zero")

  def seconds(self, nbytes_total: float, hosts: int, busy_hosts: int | None = None) -> float:
    """Seconds to move `nbytes_total`, spread evenly over `busy_hosts` (default: all) of `hosts`."""
    together = nbytes_total / (self.bandwidth or math.inf)
    return max(together, nbytes_total / (busy_hosts or hosts) / (self.per_host or math.inf))

  def restore_seconds(self, nbytes: float, hosts: int, strategy: str = "direct", copies: float = 1) -> float:
    """Seconds to restore a state; see `traffic` for the arguments."""
    moved = traffic(nbytes, hosts, strategy, copies)
    # Ring all-gather or pipelined broadcast: each host receives its part once, while it sends.
    exchange = nbytes * copies / hosts / self.interconnect if moved.exchanged else 0.0
    return self.seconds(moved.read, hosts, max(1, int(hosts / copies)) if strategy == "broadcast" else None) + exchange


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes that a restore reads from storage, and that hosts send each other, over all of them."""

  read: float
  exchanged: float


def traffic(nbytes: float, hosts: int, strategy: str = "direct", copies: float = 1) -> Traffic:
  """What a restore moves.

  Args:
    nbytes: bytes of the whole state.
    hosts: number of hosts that restore at once.
    strategy: `direct`: each replica reads its own copy; `gather`: each host reads 1/N of one copy, and they exchange
      it; `broadcast`: one replica reads and sends.
    copies: replicas of the state over all hosts: 1 if it is sharded over them, `hosts` in pure data parallelism.
  """
  if strategy not in STRATEGIES:
    raise ConfigError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
  if strategy == "direct":
    return Traffic(nbytes * copies, 0.0)
  return Traffic(nbytes, nbytes * (copies - 1) if hosts > 1 else 0.0)
