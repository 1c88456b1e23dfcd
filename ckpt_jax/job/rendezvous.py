"""Where the processes of a job wait for each other: never for ever, never in silence, and never for one that failed.

jax's own barriers end after their timeout with no word on who is missing, and a process that fails on its way to one
leaves the others waiting until then (704 GPUs idled 4.5 hours in marin-community/marin#8534). Here each process notes
its arrival in jax's coordination service, process 0 counts, and a failure is noted in the same place.
"""

from __future__ import annotations

import collections
import json
import threading
import time
from typing import Any

import jax

from ckpt_jax.errors import CheckpointError
from ckpt_jax.orbax import private

_SLICE_S = 2.0  # how long a failure elsewhere may go unnoticed
_NOTHING = "-"  # the coordination service takes no empty value for one that is there
_POLL_S = (0.005, 0.25)  # shortest and longest pause of process 0 between two looks

_made: collections.Counter[str] = collections.Counter()
_making = threading.Lock()


class PeerFailedError(CheckpointError):
  """Another process of the job failed on its way to where this one waits. The message names both."""


class Rendezvous:
  """A barrier of all processes of the job. All must make and use it alike, from one thread at a time.

  Nothing here touches devices, so it may be used behind training. With one process nothing is waited for.

  Attributes:
    name: the same on all processes; a number is added that sets it apart from others of this job.
  """

  def __init__(self, name: str):
    with _making:
      _made[name] += 1  # e.g. one Checkpointer after the other on one run
      self.name = f"{name} {_made[name]}"
    self._round = 0
    self._uses: collections.Counter[str] = collections.Counter()
    self._old: list[str] = []
    self._store: Any = private.coordination_service() if jax.process_count() > 1 else None

  def begin(self) -> str:
    """Starts a new undertaking: failures that were told before belong to the last one. Returns a name of its own."""
    self._round += 1
    self._uses.clear()
    return f"{self.name}/{self._round}"

  def fail(self, reason: str) -> None:
    """Tells the other processes that this one will not arrive; those that wait, or will, raise `reason`."""
    if self._store is not None:
      self._store.key_value_set(f"{self._failures}{jax.process_index()}", reason, allow_overwrite=True)

  def wait(self, what: str, timeout: float) -> None:
    """Returns once all processes are here. See `exchange`."""
    self.exchange(what, "", timeout)

  def exchange(self, what: str, text: str, timeout: float) -> list[str]:
    """Returns once all processes are here, with the text that each brought, by process.

    Args:
      what: what is waited for, the same on all processes; it may be used again.
      text: what this process has to say; short, since the coordinator holds all of them.
      timeout: seconds.

    Raises:
      TimeoutError: naming the processes that did not arrive.
      PeerFailedError: if one of them failed.
    """
    if self._store is None:
      return [text]
    self._uses[what] += 1
    place = f"ckpt_jax/{self.name}/{self._round}/{what}/{self._uses[what]}"
    self._store.key_value_set(f"{place}/here/{jax.process_index()}", text or _NOTHING)
    deadline = time.monotonic() + timeout
    if jax.process_index() == 0:
      said = self._count(place, what, timeout, deadline)
    else:
      said = self._listen(place, what, timeout, deadline)
    return ["" if text == _NOTHING else text for text in said]

  def note(self, text: str) -> None:
    """Leaves word of how far this process is, for `notes`; replaces the last one."""
    if self._store is not None:
      key = f"ckpt_jax/{self.name}/{self._round}/notes/{jax.process_index()}"
      self._store.key_value_set(key, text, allow_overwrite=True)

  def notes(self) -> dict[int, str]:
    """The last note of each process that left one."""
    if self._store is None:
      return {}
    found = self._store.key_value_dir_get(f"ckpt_jax/{self.name}/{self._round}/notes/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in found}

  @property
  def _failures(self) -> str:
    return f"ckpt_jax/{self.name}/{self._round}/failed/"

  def _count(self, place: str, what: str, timeout: float, deadline: float) -> list[str]:
    pause, longest = _POLL_S
    missing = list(range(jax.process_count()))
    here: dict[int, str] = {}
    while missing:
      here = {int(key.rsplit("/", 1)[1]): said for key, said in self._store.key_value_dir_get(f"{place}/here/")}
      missing = [p for p in missing if p not in here]
      self._raise_failure(what)
      if missing and time.monotonic() > deadline:
        message = self._timed_out(what, timeout, missing)
        self._store.key_value_set(f"{place}/go", json.dumps(message))
        raise TimeoutError(message)
      if missing:
        time.sleep(pause)
        pause = min(pause * 1.5, longest)
    said = [here[p] for p in range(jax.process_count())]
    self._store.key_value_set(f"{place}/go", json.dumps(said))
    # Whoever is here has left the places before the last one.
    self._old.append(place)
    while len(self._old) > 2:
      self._store.key_value_delete(f"{self._old.pop(0)}/")
    return said

  def _listen(self, place: str, what: str, timeout: float, deadline: float) -> list[str]:
    # A little longer than process 0, which knows who is missing and says so.
    while (left := deadline + _SLICE_S - time.monotonic()) > 0:
      message = None
      try:
        message = self._store.blocking_key_value_get(f"{place}/go", int(min(left, _SLICE_S) * 1000))
      except jax.errors.JaxRuntimeError as e:
        if "DEADLINE_EXCEEDED" not in str(e):
          raise PeerFailedError(f"waiting for {what}: the coordination service is gone (process 0): {e}") from e
      if message is None:  # out of the handler, so that the deadline of a slice is no part of what is raised
        self._raise_failure(what)
        continue
      said = json.loads(message)
      if isinstance(said, str):
        raise TimeoutError(said)
      return said
    raise TimeoutError(self._timed_out(what, timeout, [0]))

  def _raise_failure(self, what: str) -> None:
    failed = {int(key.rsplit("/", 1)[1]): reason for key, reason in self._store.key_value_dir_get(self._failures)}
    failed.pop(jax.process_index(), None)
    if failed:
      first = min(failed)
      raise PeerFailedError(f"waiting for {what}: process {first} failed: {failed[first]}")

  def _timed_out(self, what: str, timeout: float, missing: list[int]) -> str:
    names = ", ".join(str(p) for p in missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    return f"waited {timeout:.0f} s for {what}; of {jax.process_count()} processes these did not arrive: {names}"
