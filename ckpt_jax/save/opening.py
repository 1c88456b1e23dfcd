"""Opening a run to train it: how it continues, and the parts that save into it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from orbax.checkpoint.checkpoint_managers import SaveDecisionPolicy

from ckpt_jax.config import Config
from ckpt_jax.errors import CheckpointError, StorageError
from ckpt_jax.failures import storage_errors
from ckpt_jax.job.agreement import decided_by_process_zero
from ckpt_jax.job.preemption import PreemptionNotice
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.layout import contents
from ckpt_jax.orbax.format import DEFAULT_ITEM
from ckpt_jax.policies.from_config import make_schedule
from ckpt_jax.policies.retention import Retention
from ckpt_jax.policies.schedule import AnyOf, OnPreemption
from ckpt_jax.rewrite.swap import finish_rewrites
from ckpt_jax.rewrite.thin import Thinner
from ckpt_jax.run import foreign
from ckpt_jax.run.deletion import StepDeleter
from ckpt_jax.run.events import Deletion, Start
from ckpt_jax.run.journal import Journal
from ckpt_jax.run.naming import PLAIN, Naming
from ckpt_jax.run.steps import (
  is_tree,
  naming_in,
  newest_step,
  our_item,
  our_metadata,
  step_path,
  use_naming,
)
from ckpt_jax.save.admission import Admission
from ckpt_jax.save.meeting import Meeting, Settings, agreed_run
from ckpt_jax.save.retention import LiveRetention
from ckpt_jax.storage import look
from ckpt_jax.storage.kinds import StorageKind, check_suitable
from ckpt_jax.storage.objects import snapshot
from ckpt_jax.tuning.planner import Planner
from ckpt_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class OpenRun:
  """A run that one Checkpointer has open, and the parts that act on it. `Session` ends them.

  Attributes:
    directory: the run.
    config: the user's settings.
    storage: the kind of storage that the run is on.
    planner: decides settings that are `auto`, once it has seen a state.
    schedule: when to save, apart from preemption.
    policy: when to save, preemption included.
    retention: which steps stay.
    deleter: removes the others.
    thinner: removes parts of older steps.
    journal: records what happens to the run.
    notice: catches SIGTERM; None if the configuration says not to.
    admission: admits saves to the storage and makes commits durable.
    item: what the state is saved as within a step; empty where steps have no items, and none can be added.
    meeting: where the processes meet during a save.
  """

  directory: epath.Path
  config: Config
  storage: StorageKind
  planner: Planner
  schedule: SaveDecisionPolicy
  policy: SaveDecisionPolicy
  retention: LiveRetention
  deleter: StepDeleter
  thinner: Thinner
  journal: Journal
  notice: PreemptionNotice | None
  admission: Admission
  item: str
  meeting: Meeting

  def check_writable(self) -> None:
    """Raises CheckpointError if steps of ours cannot stand beside those in storage."""
    if not self.item:
      raise CheckpointError(
        f"{self.directory}: its checkpoints have no items (flax.training.checkpoints writes such), and neither program "
        "could read a mix of both; save into another directory: Checkpointer(NEW), with what restore() returned. "
        "Nothing was written",
        topic="not-a-run",
      )


def open_run(directory: str | os.PathLike[str], config: Settings, schedule: SaveDecisionPolicy | None) -> OpenRun:
  """Opens a run, which need not exist. All processes call it alike; process 0 looks at storage.

  Args:
    directory: the run.
    config: the user's settings, or what `as_config` makes them of.
    schedule: in place of the configuration's; None for that.

  Raises:
    NotARunError: if there are checkpoints but no steps; the message says how to open them.
    StorageError: if the run cannot be reached, or is on a disk that the job's other hosts do not share.
    ConfigError: if the settings are wrong, or not the same on all processes.
  """
  path, config, hosts = agreed_run(directory, config)
  kind = check_suitable(path, config.storage.kind, hosts)
  first = jax.process_index() == 0
  # No callback here may hold the Checkpointer: one that is dropped must be gone at once, see `session`.
  meeting = Meeting(path, config.timeouts.save_s)
  retention = LiveRetention(Retention.from_config(config.retention), path, meeting.decided)
  journal = Journal(path, keep=first and config.observe.events, appends=kind is not StorageKind.BUCKET_MOUNT)
  deleter = StepDeleter(
    path,
    active=first,
    removed=lambda step, why: journal.emit(Deletion(step=step, why=why)),
    timeout=config.timeouts.delete,
    files_per_second=config.retention.delete_rate or 0,
    why=retention.why,
  )
  thinner = Thinner(
    path,
    config.retention.thin.keep if config.retention.thin else (),
    deleter,
    active=first,
    restoring=retention.restoring,
    done=retention.forget,
    timeout=config.timeouts.delete,
  )
  retention.thin = thinner.thin
  notice = PreemptionNotice() if config.preemption.enabled else None
  with storage_errors(f"{path}: cannot open the run"), snapshot(path):
    item = _continued(path, config.item, config.timeouts.restore_s)  # nothing lists steps before their names are known
    schedule = schedule or make_schedule(config.schedule, path)
    (admission := Admission(path, config, kind, retention, deleter, meeting)).opened()
  return OpenRun(
    path,
    config,
    kind,
    Planner(path, config, kind, _plans_of(path, config)),
    schedule,
    AnyOf([OnPreemption(lambda: notice is not None and notice.received), schedule]),
    retention,
    deleter,
    thinner,
    journal,
    notice,
    admission,
    item,
    meeting,
  )


def start() -> Start:
  """The record of this start of the job."""
  return Start(
    processes=jax.process_count(),
    devices=jax.device_count(),
    platform=jax.default_backend(),
    host=socket.gethostname(),
    version=__version__,
  )


def _plans_of(path: epath.Path, config: Config) -> Callable[[Callable[[], Any]], Any]:
  """Gives process 0's plans to all; no meeting of a save, since a restore plans too, maybe beside a save."""
  return functools.partial(
    decided_by_process_zero, rendezvous=Rendezvous(f"plan {path}"), timeout=config.timeouts.save_s, what="a plan"
  )


def _continued(directory: epath.Path, item: str | None, timeout: float) -> str:
  """The item that the state is saved as. Process 0 looks how the run continues; all processes name its steps alike.

  `item` is `Config.item`. The other processes wait `timeout` seconds for process 0.
  """

  def look_at_run() -> tuple[str, int, str]:
    finish_rewrites(directory)
    with snapshot(directory):
      names = look.names(directory)
      found = naming_in(directory, names, opening=True)
      newest = newest_step(directory, names)
      if newest is None:
        foreign.refuse(directory)
      elif found == PLAIN:
        with contextlib.suppress(StorageError):  # what cannot be looked into is no reason to stop
          foreign.warn_of_others(directory, names)
      return found.prefix, found.width, _item_of(directory, newest, item)

  prefix, width, name = decided_by_process_zero(look_at_run, Rendezvous(f"open {directory}"), timeout)
  if jax.process_index() > 0:
    use_naming(directory, Naming(prefix, width))
  return name


def _item_of(directory: epath.Path, newest: int | None, wanted: str | None) -> str:
  """The configured item, or that of the newest step: programs that read this run look for the state there."""
  if newest is None:
    return wanted or DEFAULT_ITEM
  step_dir = step_path(directory, newest)
  if is_tree(step_dir):
    return ""
  if wanted is not None:
    return wanted
  try:
    ours = our_metadata(step_dir)
    return our_item(ours) if ours else contents.item_name(step_dir, None, ours)
  except CheckpointError:  # damaged, or several items of which none stands out
    return DEFAULT_ITEM
