"""Converts checkpoints of other programs to steps of a run: files of flax, Orbax checkpoints without a step number."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from ckpt_jax.checkpointer import Checkpointer
from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, ConfigError, CorruptCheckpointError, NoCheckpointError
from ckpt_jax.layout.structure import path_name
from ckpt_jax.restore.read import RestoreRequest, read_state
from ckpt_jax.run import foreign
from ckpt_jax.run.steps import committed_steps, is_step, newest_step, run_directory, step_directory, step_path

PyTree = Any
Contents = tuple[PyTree, dict[str, Any], Any]
_ELSEWHERE = "//GDAPlaceholder:"  # flax: an array of several processes, in a directory beside the file


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint to convert.

  Attributes:
    step: the step that it becomes.
    path: where it is.
    read: reads its state, metrics and extras.
  """

  step: int
  path: epath.Path
  read: Callable[[], Contents]


def convert(
  source: str | os.PathLike[str],
  target: str | os.PathLike[str],
  *,
  step: int | None = None,
  item: str | None = None,
  config: Config | None = None,
) -> Iterator[Source]:
  """Saves checkpoints as steps of a run, oldest first, and yields each one once its step is committed.

  Args:
    source: a directory of flax.training.checkpoints, one of its files, a checkpoint without a step number, or a run.
    target: the run, new or not; a step that it has already is an error.
    step: the one of several to convert, or the number of one that has none.
    item: the item that holds the state, in steps with several.
    config: settings of `target`. Default: keep every step, non-finite ones too.

  Raises:
    NoCheckpointError: if there is nothing to convert.
    ConfigError: if a checkpoint has no step number and none was given.
    CorruptCheckpointError: if one cannot be read.
  """
  found = sources(run_directory(source), step, item)
  config = config or Config(retention={"last": None}, health={"nonfinite": "tag"})
  with Checkpointer(target, config) as c:
    taken = sorted({s.step for s in found} & {s.step for s in c.steps()})
    if taken:
      raise CheckpointError(f"{c.directory}: has steps {taken} already; convert into a new directory", topic="convert")
    for one in found:
      state, metrics, extras = one.read()
      c.save(one.step, state, metrics=metrics, extras=extras, force=True)
      c.wait()
      yield one


def sources(directory: epath.Path, step: int | None, item: str | None) -> list[Source]:
  """The checkpoints to convert, oldest first; see `convert` for arguments and errors."""
  if not directory.exists():
    raise NoCheckpointError(f"{directory}: does not exist", topic="convert")
  if not directory.is_dir():
    number = _needed(directory, _trailing(directory.name), step)
    return [Source(number, directory, functools.partial(_flax, directory))]
  if newest_step(directory) is not None:
    numbers = [number for number in committed_steps(directory) if step in (None, number)]
    if not numbers:
      step_directory(directory, step or 0)  # raises an error that names the committed steps
    return [Source(n, step_path(directory, n), functools.partial(_step, directory, n, item)) for n in numbers]
  if is_step(directory):
    number = _needed(directory, foreign.number_of(directory.name), step)
    return [Source(number, directory, functools.partial(_bare, directory, item))]
  files = foreign.flax_files(directory)
  if not files:
    foreign.refuse(directory)
    raise NoCheckpointError(f"{directory}: no checkpoint to convert", topic="convert")
  for path in files:
    if _trailing(path.name) is None:
      raise ConfigError(
        f"{path}: has no whole step number; convert such files one by one: ckpt-jax convert {path} RUN --step N",
        topic="convert",
      )
  kinds = sorted({path.name.rstrip("0123456789") for path in files})
  if len(kinds) > 1:
    raise CheckpointError(
      f"{directory}: holds files of several kinds ({', '.join(f'{k}*' for k in kinds[:5])}); convert one file, or move "
      "those of one kind into a directory of their own",
      topic="convert",
    )
  found = sorted((n, path) for path in files if (n := _trailing(path.name)) is not None)
  chosen = [Source(n, path, functools.partial(_flax, path)) for n, path in found if step in (None, n)]
  if not chosen:
    raise NoCheckpointError(
      f"{directory}: no checkpoint {step} to convert; there are {[n for n, _ in found]}", topic="convert"
    )
  return chosen


def _trailing(name: str) -> int | None:
  match = re.search(r"(?<![0-9.])([0-9]+)$", name)
  return None if match is None else int(match[1])


def _needed(path: epath.Path, found: int | None, given: int | None) -> int:
  number = found if given is None else given
  if number is None:
    raise ConfigError(f"{path}: has no step number; give the step that it becomes: --step N", topic="convert")
  return number


def _step(directory: epath.Path, step: int, item: str | None) -> Contents:
  with Checkpointer(directory, Config(restore={"on_corruption": "raise"}, preemption={"enabled": False})) as c:
    restored = c.restore(step, item=item)
  return restored.state, restored.metrics, restored.extras


def _bare(directory: epath.Path, item: str | None) -> Contents:
  return read_state(directory, Config(), RestoreRequest(item=item)), {}, None


def _flax(path: epath.Path) -> Contents:
  return read_flax(path), {}, None


def read_flax(path: epath.Path) -> PyTree:
  """Reads a file of flax: dicts, whose keys are the attributes, keys or indices of the nodes that were saved.

  Raises:
    CorruptCheckpointError: if it is not such a file, or is truncated.
    CheckpointError: if some of its arrays are in another directory.
  """
  from flax import serialization

  try:
    state = serialization.msgpack_restore(path.read_bytes())
  except MemoryError:
    raise
  except Exception as e:
    raise CorruptCheckpointError(
      f"{path}: cannot be read as a file of flax ({type(e).__name__}: {e})", topic="convert"
    ) from e
  if not isinstance(state, dict):
    raise CorruptCheckpointError(
      f"{path}: holds a {type(state).__name__} rather than the tree that flax writes", topic="convert"
    )
  for name, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    if isinstance(leaf, str) and leaf.startswith(_ELSEWHERE):
      raise CheckpointError(
        f"{path}: {path_name(name)} is in {path.name}_gda, which only flax reads: restore it with "
        "flax.training.checkpoints.restore_checkpoint(..., target=) in a job like the one that saved it, and save "
        "that",
        topic="convert",
      )
  return state
