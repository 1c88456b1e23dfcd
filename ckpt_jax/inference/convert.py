"""Checkpoints of other programs become steps of a new run: files of flax, Orbax checkpoints without a step number."""

from __future__ import annotations

import dataclasses
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
_ELSEWHERE = "//GDAPlaceholder:"  # flax: an array of several processes, in a directory beside the file


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint to convert: the step that it becomes, where it is, and what gives its state, metrics and extras."""

  step: int
  path: epath.Path
  read: Callable[[], tuple[PyTree, dict[str, Any], Any]]


def convert(
  source: str | os.PathLike[str],
  target: str | os.PathLike[str],
  *,
  step: int | None = None,
  item: str | None = None,
  config: Config | None = None,
) -> Iterator[Source]:
  """Makes checkpoints steps of a run, oldest first. What was read is yielded once it is committed there.

  Args:
    source: a directory of flax.training.checkpoints, one of its files, a checkpoint without a step number, or a run.
    target: the run, new or not; a step that it has is an error.
    step: of several, the one to convert; of one without a number, the number that it gets.
    item: the item that is read, where steps have several.
    config: for `target`. Default: every step is kept, whatever its health.

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
      raise CheckpointError(f"{c.directory}: has steps {taken} already; convert into a new directory")
    for one in found:
      state, metrics, extras = one.read()
      c.save(one.step, state, metrics=metrics, extras=extras, force=True)
      c.wait()
      yield one


def sources(directory: epath.Path, step: int | None, item: str | None) -> list[Source]:
  """What there is to convert, oldest first; see `convert`."""
  if not directory.exists():
    raise NoCheckpointError(f"{directory}: does not exist")
  if not directory.is_dir():
    return [_flax(directory, _needed(directory, _trailing(directory.name), step))]
  if newest_step(directory) is not None:
    numbers = [number for number in committed_steps(directory) if step is None or number == step]
    if not numbers:
      step_directory(directory, step or 0)  # says what steps there are
    return [Source(n, step_path(directory, n), lambda n=n: _step(directory, n, item)) for n in numbers]  # type: ignore[misc]
  if is_step(directory):
    number = _needed(directory, foreign.number_of(directory.name), step)
    return [Source(number, directory, lambda: _bare(directory, item))]
  all_files = foreign.flax_files(directory)
  files = [(n, path) for path in all_files if (n := _trailing(path.name)) is not None]
  if len(files) < len(all_files):
    odd = next(path for path in all_files if _trailing(path.name) is None)
    raise ConfigError(
      f"{odd}: has no whole step number; convert such files one by one: ckpt-jax convert {odd} RUN --step N"
    )
  kinds = sorted({path.name.removesuffix(str(n)) for n, path in files})
  if len(kinds) > 1:
    raise CheckpointError(
      f"{directory}: holds files of several kinds ({', '.join(f'{k}*' for k in kinds[:5])}); convert one file, or move "
      "those of one kind into a directory of their own"
    )
  if not files:
    foreign.refuse(directory)
  chosen = sorted((n, path) for n, path in files if step is None or n == step)
  if not chosen:
    there = f" {step} to convert; there are {sorted(n for n, _ in files)}" if files else " to convert"
    raise NoCheckpointError(f"{directory}: no checkpoint{there}")
  return [_flax(path, n) for n, path in chosen]


def _trailing(name: str) -> int | None:
  match = re.search(r"(?<![0-9.])([0-9]+)$", name)
  return None if match is None else int(match[1])


def _needed(path: epath.Path, found: int | None, given: int | None) -> int:
  number = found if given is None else given
  if number is None:
    raise ConfigError(f"{path}: has no step number; give the step that it becomes: --step N")
  return number


def _step(directory: epath.Path, step: int, item: str | None) -> tuple[PyTree, dict[str, Any], Any]:
  with Checkpointer(directory, Config(restore={"on_corruption": "raise"}, preemption={"enabled": False})) as c:
    restored = c.restore(step, item=item)
  return restored.state, restored.metrics, restored.extras


def _bare(directory: epath.Path, item: str | None) -> tuple[PyTree, dict[str, Any], Any]:
  return read_state(directory, Config(), RestoreRequest(item=item)), {}, None


def _flax(path: epath.Path, step: int) -> Source:
  return Source(step, path, lambda: (read_flax(path), {}, None))


def read_flax(path: epath.Path) -> PyTree:
  """The state in a file of flax: dicts, of the attributes, keys or numbers of whatever node was saved.

  Raises:
    CorruptCheckpointError: if it is no such file, or is cut short.
    CheckpointError: if a part of it is elsewhere.
  """
  from flax import serialization

  try:
    state = serialization.msgpack_restore(path.read_bytes())
  except MemoryError:
    raise
  except Exception as e:
    raise CorruptCheckpointError(f"{path}: cannot be read as flax wrote it ({type(e).__name__}: {e})") from e
  if not isinstance(state, dict):
    raise CorruptCheckpointError(f"{path}: holds no tree as flax writes one, but a {type(state).__name__}")
  for name, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    if isinstance(leaf, str) and leaf.startswith(_ELSEWHERE):
      raise CheckpointError(
        f"{path}: {path_name(name)} is in {path.name}_gda, which only flax reads: restore it with "
        "flax.training.checkpoints.restore_checkpoint(..., target=) in a job like the one that saved it, and save that"
      )
  return state
