"""Commits that survive a power cut, with the right file modes: from the last byte to the rename.

TensorStore syncs the data files that it writes. Orbax syncs neither its metadata files and markers nor any directory
(`_METADATA`, `_CHECKPOINT_METADATA`, `array_metadatas/*`, `commit_success.txt`), so that after a power cut a step may
have its name and files of length zero. Synced here, in this order: the files, their directories, after the rename the
directory of the run; only then does a save count as committed.

The hook is Orbax's `temporary_path_class` option: the object that makes a step's temporary directory and renames it.
`post_finalization_callback` is called before the rename, which is too early.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ckpt_jax.orbax import private
from ckpt_jax.orbax.format import ARRAY_METADATAS
from ckpt_jax.run.naming import Naming
from ckpt_jax.run.steps import committed_steps, naming_in
from ckpt_jax.storage.durable import Sealing, seal, sync_directory, sync_file
from ckpt_jax.storage.urls import is_object_store

atomicity = ocp.path.atomicity


def sync_own_files(item_directories: Iterable[str]) -> None:
  """Syncs the small files that this process wrote: process 0 cannot, if they are in another host's page cache."""
  for folder in item_directories:
    file = os.path.join(folder, ARRAY_METADATAS, f"process_{jax.process_index()}")
    with contextlib.suppress(FileNotFoundError):
      sync_file(file)


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Called while a step's directory is made and committed, on process 0, in Orbax's background thread.

  Attributes:
    beginning: before the directory is made; raises to stop the save.
    committing: after the last write and before the rename; raises to stop the commit.
    committed: once the commit is durable.
  """

  beginning: Callable[[int], None]
  committing: Callable[[int], None]
  committed: Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class StepNames(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
  """Orbax's `step_name_format` for a run whose steps are not named by plain numbers."""

  naming: Naming

  def build_name(self, step: int) -> str:
    """See Orbax's NameFormat."""
    return self.naming.name(step)

  def find_step(self, base_path: Any, step: int) -> ocp.path.step.Metadata:
    """See Orbax's NameFormat."""
    return ocp.path.step.Metadata(step=step, path=epath.Path(base_path) / self.build_name(step))

  def find_all(self, base_path: Any) -> Iterator[ocp.path.step.Metadata]:
    """See Orbax's NameFormat."""
    return (self.find_step(base_path, step) for step in committed_steps(epath.Path(base_path)))


def step_path_class(
  directory: epath.Path, sealing: Sealing, hooks: Hooks
) -> type[ocp.path.atomicity_types.TemporaryPath]:
  """Orbax's `temporary_path_class` for the steps of a run, and for the items in them."""
  renames = not is_object_store(directory)
  naming = naming_in(directory)
  base: Any = atomicity.AtomicRenameTemporaryPath if renames else atomicity.CommitFileTemporaryPath

  class StepPath(base):
    """The temporary directory of a step or item of this run."""

    def __init__(self, temporary_path: Any, final_path: Any, **options: Any):
      if sealing.directory_mode is not None:
        options["file_options"] = ocp.options.FileOptions(path_permission_mode=sealing.directory_mode)
      super().__init__(temporary_path, final_path, **options)

    async def create(self) -> epath.Path:
      step = self._step()
      if step is not None:
        await asyncio.to_thread(hooks.beginning, step)
      return await super().create()

    async def finalize(self) -> None:
      step = self._step()
      if step is None:  # an item; its files are synced with the step's
        await super().finalize()
      elif renames:
        private.rename_by(self, functools.partial(_rename, self.get(), self.get_final(), step, sealing, hooks))
        await super().finalize()
      else:
        await asyncio.to_thread(hooks.committing, step)
        await super().finalize()
        await asyncio.to_thread(hooks.committed, step)

    def _step(self) -> int | None:
      final = self.get_final()
      return naming.step(final.name) if final.parent == directory else None

  return StepPath


def _rename(temporary: epath.Path, final: epath.Path, step: int, sealing: Sealing, hooks: Hooks) -> None:
  """Commits a step whose files are all written: they reach the disk, then the step gets its name."""
  seal(os.fspath(temporary), sealing)
  hooks.committing(step)
  temporary.rename(final)
  if sealing.fsync:
    try:
      sync_directory(os.fspath(final.parent))
    except OSError:
      final.rename(temporary)  # what is reported as failed must not be there
      raise
  hooks.committed(step)
