"""Where the processes of a job wait for each other: with a limit, naming the missing, and never for one that failed.

jax's own barriers end after their timeout without naming the missing processes, and a process that fails on its way to
one leaves the others waiting until then (704 GPUs idled 4.5 hours in marin-community/marin#8534). Here each process
notes its arrival in jax's coordination service, process 0 counts, and a failure is noted in the same place.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ckpt_jax.errors import CheckpointError
from ckpt_jax.orbax import private

_log = logging.getLogger(__name__)
_LOG_EVERY_S = 60.0
_SLICE_S = 2.0  # how long a failure elsewhere may go unnoticed
_NOTHING = "-"  # the coordination service treats an empty value as missing
_POLL_S = 0.25  # how long process 0 waits for one of the missing before it looks for failures

Combine = Callable[[list[str]], list[str]]

_made: collections.Counter[str] = collections.Counter()
_making = threading.Lock()


class PeerFailedError(CheckpointError):
  """Another process of the job failed on its way to where this one waits. The message names both."""

  topic = "another-process-failed"


class Rendezvous:
  """A barrier of all processes of the job. All must make and use it alike, from one thread at a time.

  Nothing here touches devices, so it may be used behind training. A single process waits for nothing.

  Attributes:
    name: the same on all processes; a number distinguishes it from others of this job.
  """

  def __init__(self, name: str):
    with _making:
      _made[name] += 1  # e.g. one Checkpointer after the other on one run
      self.name = f"{name} {_made[name]}"
    self._round = 0
    self._heard = False  # of the failure of another process, in this round
    self._uses: collections.Counter[str] = collections.Counter()
    self._old: list[str] = []
    self._store: Any = private.coordination_service() if jax.process_count() > 1 else None

  def begin(self) -> str:
    """Starts a new round, for which earlier failures do not count. Returns a name of its own."""
    self._round += 1
    self._heard = False
    self._uses.clear()
    return f"{self.name}/{self._round}"

  def fail(self, reason: str) -> None:
    """Reports that this process will not arrive; those that wait, or will, raise `reason`.

    Not if it has heard of the failure of another, which the others hear of too.
    """
    if self._store is not None and not self._heard:
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, and with it whoever would listen
        self._store.key_value_set(f"{self._key}/failed/{jax.process_index()}", reason or _NOTHING, allow_overwrite=True)

  def check(self, what: str) -> None:
    """Raises PeerFailedError if another process has failed, so that this one need not begin to wait."""
    if self._store is not None:
      self._raise_failure(what)

  def wait(self, what: str, timeout: float) -> None:
    """Returns once all processes are here. See `exchange`."""
    self.exchange(what, "", timeout)

  def exchange(self, what: str, text: str, timeout: float, combine: Combine = list) -> list[str]:
    """Returns once all processes are here, with the texts of all of them, by process.

    Args:
      what: what is waited for, the same on all processes; may be used again.
      text: this process's contribution; short, since the coordinator holds all of them.
      timeout: seconds.
      combine: makes of all texts, on process 0, the ones that all get instead; then they need not be as short.

    Raises:
      TimeoutError: naming the processes that did not arrive.
      PeerFailedError: if one of them failed.
    """
    if self._store is None:
      return combine([text])
    self._uses[what] += 1
    place = f"{self._key}/{what}/{self._uses[what]}"
    collect = functools.partial(self._count, combine) if jax.process_index() == 0 else self._listen
    try:
      self._store.key_value_set(f"{place}/here/{jax.process_index()}", text or _NOTHING)
      return collect(place, what, timeout)
    except jax.errors.JaxRuntimeError as e:
      raise PeerFailedError(f"waiting for {what}: the coordination service is gone (process 0): {e}") from e

  def note(self, text: str) -> None:
    """Records how far this process is, for `notes`; replaces its last record."""
    if self._store is not None:
      self._store.key_value_set(f"{self._key}/notes/{jax.process_index()}", text, allow_overwrite=True)

  def notes(self) -> dict[int, str]:
    """The last `note` of each process that made one."""
    return {} if self._store is None else self._by_process(f"{self._key}/notes/")

  @property
  def _key(self) -> str:
    return f"ckpt_jax/{self.name}/{self._round}"

  def _by_process(self, prefix: str) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): text for key, text in self._store.key_value_dir_get(prefix)}

  def _count(self, combine: Combine, place: str, what: str, timeout: float) -> list[str]:
    """For process 0: waits until all have arrived, and lets them go."""
    started = time.monotonic()
    deadline, log_at = started + timeout, started + _LOG_EVERY_S
    while True:
      here = self._by_process(f"{place}/here/")
      missing = [p for p in range(jax.process_count()) if p not in here]
      if not missing:
        break
      self._raise_failure(what)
      if time.monotonic() > deadline:
        message = _timed_out(what, timeout, missing)
        self._store.key_value_set(f"{place}/go", json.dumps(message))
        raise TimeoutError(message)
      if time.monotonic() > log_at:
        log_at += _LOG_EVERY_S
        _log.warning("still waiting for %s, up to %.0f s; not there yet: %s", what, timeout, _listed(missing))
      # Any of them: the chance that the next one to come is the last is small, so that there are few rounds.
      self._get(f"{place}/here/{missing[-1]}", _POLL_S)
    self._raise_failure(what)
    said = combine(["" if here[p] == _NOTHING else here[p] for p in range(jax.process_count())])
    self._store.key_value_set(f"{place}/go", json.dumps(said))
    # All that are here have left the places before the last one.
    self._old.append(place)
    while len(self._old) > 2:
      self._store.key_value_delete(f"{self._old.pop(0)}/")
    return said

  def _listen(self, place: str, what: str, timeout: float) -> list[str]:
    """For the others: waits for process 0, a little longer than it does, since it names the missing ones."""
    deadline = time.monotonic() + timeout + _SLICE_S
    while (left := deadline - time.monotonic()) > 0:
      message = self._get(f"{place}/go", min(left, _SLICE_S))
      if message is None:
        self._raise_failure(what)
        continue
      said = json.loads(message)
      if isinstance(said, str):
        raise TimeoutError(said)
      return said
    raise TimeoutError(_timed_out(what, timeout, [0]))

  def _get(self, key: str, timeout: float) -> str | None:
    """The text of a key as soon as it is there, or None after so many seconds."""
    try:
      return self._store.blocking_key_value_get(key, max(1, int(timeout * 1000)))
    except jax.errors.JaxRuntimeError as e:
      if "DEADLINE_EXCEEDED" not in str(e):
        raise
    return None

  def _raise_failure(self, what: str) -> None:
    failed = self._by_process(f"{self._key}/failed/")
    failed.pop(jax.process_index(), None)
    if failed:
      self._heard = True
      first = min(failed)
      raise PeerFailedError(f"waiting for {what}: process {first} failed: {failed[first]}")


def _timed_out(what: str, timeout: float, missing: list[int]) -> str:
  return (
    f"waited {timeout:.0f} s for {what}; of {jax.process_count()} processes these did not arrive: {_listed(missing)}"
  )


def _listed(processes: list[int]) -> str:
  return ", ".join(map(str, processes[:20])) + (f" and {len(processes) - 20} more" if len(processes) > 20 else "")
