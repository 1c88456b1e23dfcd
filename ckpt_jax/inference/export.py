"""Exports the parameters of a step for inference: one part after the other, in bounded memory, without devices.

Reading, converting and writing go on at the same time: `restore.stream` reads ahead in one thread, this one converts,
and `writing` writes in others. Which bytes go where is known beforehand (`files`), so that an interrupted export goes
on where it was, and ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ckpt_jax.config.units import count, size_text
from ckpt_jax.errors import CheckpointError, ConfigError
from ckpt_jax.inference import rename as renaming
from ckpt_jax.inference.cast import Loss
from ckpt_jax.inference.files import Layout, Leaf, orbax_layout, safetensors_layout
from ckpt_jax.inference.options import Options
from ckpt_jax.inference.output import Output
from ckpt_jax.inference.quantize import scheme_of
from ckpt_jax.inference.source import open_step, parameters
from ckpt_jax.inference.values import Values
from ckpt_jax.inference.writing import Files
from ckpt_jax.integrity.exported import ExportRecord, Hashed
from ckpt_jax.layout.structure import path_name
from ckpt_jax.restore.fallback import StepGoneError
from ckpt_jax.restore.patterns import as_patterns, matches, selected
from ckpt_jax.restore.step import Step
from ckpt_jax.run.steps import is_gone, run_directory

_log = logging.getLogger(__name__)
PyTree = Any
WORTH_SAYING = 0.01  # a change of the loss


@dataclasses.dataclass(frozen=True)
class ExportReport:
  """An export, and what it lost.

  Attributes:
    path: where it is.
    step: the step that it was made from.
    node: the node of the state.
    leaves: how many leaves it has.
    nbytes: bytes of its arrays.
    source_nbytes: bytes of the same leaves in the step.
    losses: what each leaf lost, by path.
    quantized: paths of the leaves that are integers with scales.
    left_out: leaves of the node that are no numbers (keys of random numbers, text), by path, with their type.
    loss_before, loss_after: what `evaluate` returned; None without it.
  """

  path: epath.Path
  step: int
  node: str
  leaves: int
  nbytes: int
  source_nbytes: int
  losses: dict[str, Loss]
  quantized: tuple[str, ...] = ()
  left_out: dict[str, str] = dataclasses.field(default_factory=dict)
  loss_before: float | None = None
  loss_after: float | None = None

  def __repr__(self) -> str:
    worst = max(self.losses.values(), key=lambda loss: loss.relative, default=None)
    lost = "" if worst is None else f", at most {worst.relative:.2%} lost of a leaf"
    return (
      f"ExportReport({self.path}: {self.node or 'all'} of step {self.step}, {count(self.leaves, 'leaf', 'leaves')}, "
      f"{size_text(self.source_nbytes)} -> {size_text(self.nbytes)}, {len(self.quantized):,} quantised{lost})"
    )

  @property
  def change(self) -> float | None:
    """The change of the loss, as a share of it."""
    if self.loss_before is None or self.loss_after is None:
      return None
    return (self.loss_after - self.loss_before) / abs(self.loss_before) if self.loss_before else float("inf")

  def by_group(self) -> dict[str, Loss]:
    """The largest losses by group: the node above each leaf, with `*` for numbers, by their first two segments."""
    groups: dict[str, Loss] = {}
    for path, loss in self.losses.items():
      group = "/".join("*" if key.isdecimal() else key for key in path.split("/")[:-1][:4]) or path
      if group not in groups or loss.relative > groups[group].relative:
        groups[group] = loss
    return groups


def export(
  run: str | os.PathLike[str],
  step: int | str,
  out: str | os.PathLike[str],
  dtype: Any = "bfloat16",
  quantize: Literal["int8", "int4"] | None = None,
  format: Literal["orbax", "safetensors"] = "orbax",
  **more: Any,
) -> ExportReport:
  """Writes the parameters of a step, and nothing else, for inference. One process calls it.

  What is read is compared with the fingerprints of the save. An export that was interrupted goes on when it is called
  again in the same way.

  Args:
    run, step: a committed step; `latest`, or `best:METRIC`.
    out: a directory that does not exist: a path, gs:// or s3://.
    dtype, quantize, format, more: see `Options`.

  Raises:
    NoCheckpointError: if there is no such step, or it is deleted meanwhile.
    ConfigError: for arguments that make no sense, or if it is not clear what the parameters are.
    CorruptCheckpointError: if the step is damaged.
    CheckpointError: if `out` exists, or a number does not fit into `dtype`.
    OutOfSpaceError: if the storage is full; then nothing is left at `out`.
  """
  options = Options(dtype=dtype, quantize=quantize, format=format, **more)
  evaluate = _function(options.evaluate)
  output = Output(run_directory(out), overwrite=options.overwrite)
  number, source = open_step(run, step, options.item)
  node = parameters(source.infos, options.subtree, ema=options.ema, where=str(source))
  leaves, left_out = _leaves(source, node, options)
  if not leaves:
    raise ConfigError(f"{source}: there are no numbers below {node!r}")
  layout = _layout(source, leaves, options)
  about = {"run": os.fspath(run_directory(run)), "step": number, "node": node, "format": options.format}
  about |= {"dtype": options.dtype, "quantize": options.quantize}
  nbytes = sum(leaf.nbytes for leaf in leaves)
  losses: dict[str, Loss] = {}
  try:
    with output.open(_plan(source, layout), nbytes):
      files = _write(source, layout, output, options, losses)
      output.close_files(files, layout.closing)
      output.commit(ExportRecord(about, _names(source, node, leaves), _described(leaves), files).to_bytes())
  except CheckpointError as e:
    if is_gone(source.directory.parent, number):
      raise StepGoneError(f"{source}: was deleted while it was exported; pin the step first: ckpt-jax pin") from e
    raise
  report = ExportReport(
    path=output.target,
    step=number,
    node=node,
    leaves=len(leaves),
    nbytes=nbytes,
    source_nbytes=sum(source.infos[leaf.source].nbytes for leaf in leaves),
    losses={leaf.path: losses[leaf.path] for leaf in leaves},
    quantized=tuple(leaf.path for leaf in leaves if leaf.scheme),
    left_out=left_out,
  )
  return report if evaluate is None else _evaluated(report, source, leaves, evaluate)


# -- what becomes of each leaf


def _leaves(source: Step, node: str, options: Options) -> tuple[list[Leaf], dict[str, str]]:
  """The leaves below a node, and those that are left out, by path with their type."""
  prefix = f"{node}/" if node else ""
  found = jax.tree_util.tree_flatten_with_path(source.item.tree)[0]
  chosen = [(path_name(keys), keys) for keys, _ in found]
  depth = node.count("/") + 1 if node else 0
  below = {
    p.removeprefix(prefix) or p: (p, keys[depth:] or keys[-1:]) for p, keys in chosen if f"{p}/".startswith(prefix)
  }
  keep = as_patterns(options.keep, "keep") if options.keep else ()
  selected(keep, below, "keep", str(source))
  rules = renaming.rules(options.rename)
  leaves, left_out = [], {}
  for path, (name, keys) in below.items():
    info = source.infos[name]
    if not info.has_numbers:
      left_out[path] = info.dtype
      continue
    dtype = np.dtype(source.meta[name].dtype if info.scalar else jnp.dtype(info.dtype))
    scheme = None
    if jnp.issubdtype(dtype, jnp.floating):
      kept = any(matches(pattern, path) for pattern in keep)
      scheme = scheme_of(path, info.shape, options.quantize, options.group) if options.quantize and not kept else None
      dtype = dtype if options.dtype is None else jnp.dtype(options.dtype)
    named = renaming.named(path, rules)
    if named.transposed and len(info.shape) != 2:
      raise ConfigError(f"rename: {path} has shape {list(info.shape)}; `:T` is for matrices")
    if named.transposed and scheme:
      raise ConfigError(f"rename: {path} is quantised, and is not transposed; leave out `:T`, or keep={path!r}")
    leaves.append(Leaf(name, path, keys, named.name, tuple(info.shape), dtype, scheme, named.transposed))
  renaming.refuse_shared((leaf.path, tensor.name) for leaf in leaves for tensor in leaf.tensors)
  return leaves, left_out


def _layout(source: Step, leaves: Sequence[Leaf], options: Options) -> Layout:
  if options.format == "safetensors":
    return safetensors_layout(leaves, options.shard_size, dict(options.metadata))
  return orbax_layout(leaves, options.shard_size, source.committed_at)


def _plan(source: Step, layout: Layout) -> str:
  """A digest of everything that decides the bytes of an export."""
  made = [str(source.directory), source.committed_at, dataclasses.astuple(layout)]
  return hashlib.blake2b(repr(made).encode(), digest_size=16).hexdigest()


def _names(source: Step, node: str, leaves: Sequence[Leaf]) -> PyTree:
  """The containers below a node, with the names of leaves for leaves."""
  tree: PyTree = source.item.tree
  for key in node.split("/") if node else ():
    tree = tree[int(key) if isinstance(tree, (list, tuple)) else key]
  names = {leaf.path: leaf.name for leaf in leaves}
  return jax.tree_util.tree_map_with_path(lambda keys, _: names.get(path_name(keys) or leaves[0].path), tree)


def _described(leaves: Sequence[Leaf]) -> dict[str, dict[str, Any]]:
  found: dict[str, dict[str, Any]] = {}
  for leaf in leaves:
    found[leaf.name] = {"path": leaf.path, "shape": list(leaf.shape), "dtype": leaf.dtype.name}
    if leaf.scheme:
      found[leaf.name] |= dataclasses.asdict(leaf.scheme)
    if leaf.transposed:
      found[leaf.name]["transposed"] = True
  return found


# -- writing


def _write(
  source: Step, layout: Layout, output: Output, options: Options, losses: dict[str, Loss]
) -> dict[str, list[Hashed]]:
  """Writes all units that are not there yet; returns the pieces of all files."""
  files: dict[str, list[Hashed]] = {}
  missing = []
  for number, unit in enumerate(layout.units):
    if (note := output.finished(number)) is None:
      missing.append((number, unit))
    else:
      files |= note["files"]
      losses |= {path: Loss(**loss) for path, loss in note["losses"].items()}
  values = Values(source, [leaf for _, unit in missing for leaf in unit.leaves], options)
  writer = Files(output.place, options.memory // 4)
  try:
    for number, unit in missing:
      writer.begin(unit)
      for leaf in unit.leaves:
        losses[leaf.path] = values.convert(leaf, writer.take)
      written = writer.end()
      files |= written
      done = {leaf.path: dataclasses.asdict(losses[leaf.path]) for leaf in unit.leaves}
      output.finish_unit(number, {"files": written, "losses": done})
  finally:
    values.close()
    writer.close()
  return files


# -- what was lost


def _function(evaluate: str | Callable[[PyTree], Any] | None) -> Callable[[PyTree], Any] | None:
  if not isinstance(evaluate, str):
    return evaluate
  module, _, name = evaluate.partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as e:
    raise ConfigError(f"evaluate: {evaluate!r}: {e}; expected MODULE:FUNCTION") from e


def _evaluated(
  report: ExportReport, source: Step, leaves: Sequence[Leaf], evaluate: Callable[[PyTree], Any]
) -> ExportReport:
  """The report with the losses of the parameters as they were saved and as they were exported, in float32."""
  from ckpt_jax.inference.load import load_quantized
  from ckpt_jax.inference.quantize import dequantize

  saved = source.read([(source.plan(leaf.source), None) for leaf in leaves])
  values = {leaf.path: source.plan(leaf.source).finish(saved[leaf.source]) for leaf in leaves}
  exported = load_quantized(report.path)
  before = jax.tree_util.tree_map_with_path(
    lambda keys, _: jnp.asarray(values[path_name(keys)]), exported, is_leaf=lambda x: not isinstance(x, (dict, list))
  )
  found = [float(evaluate(tree)) for tree in (before, _as_float32(dequantize(exported)))]
  report = dataclasses.replace(report, loss_before=found[0], loss_after=found[1])
  if report.change is not None and not abs(report.change) <= WORTH_SAYING:
    _log.warning("%s: the loss changed by %+.1f%%, from %.4g to %.4g", report.path, 100 * report.change, *found)
  return report


def _as_float32(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
