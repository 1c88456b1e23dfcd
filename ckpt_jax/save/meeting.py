"""Where the processes of a job meet before a save: all must open the same run and save the same, or none does."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from etils import epath

from ckpt_jax.config import Config, as_config
from ckpt_jax.errors import CheckpointError, ConfigError
from ckpt_jax.job.agreement import decided_by_process_zero, digest, meet, who_differs
from ckpt_jax.job.rendezvous import Combine, PeerFailedError, Rendezvous
from ckpt_jax.layout import alike
from ckpt_jax.run.steps import run_directory
from ckpt_jax.save.snapshot import Encoded
from ckpt_jax.storage.cache import boot_id
from ckpt_jax.storage.connect import connect
from ckpt_jax.storage.kinds import detect
from ckpt_jax.storage.paths import given

T = TypeVar("T")
Settings = Config | Mapping[str, Any] | str | os.PathLike[str] | None


class Meeting:
  """The meetings of the saves of one run. All processes make and use it alike; a single one waits for nothing.

  One rendezvous serves all of them, so that whoever fails is heard wherever the others wait, and whoever does something
  else than the others is found out at once.
  """

  def __init__(self, directory: epath.Path, timeout: float):
    """Sends nothing. `timeout`: seconds that each wait may last, `timeouts.save`."""
    self._directory = directory
    self._timeout = timeout
    self._rendezvous = Rendezvous(f"save {directory}")

  def begin(self) -> None:
    """Forgets what failed before."""
    self._rendezvous.begin()

  def fail(self, reason: str) -> None:
    """Has those that wait for this process, or will, raise `reason`."""
    self._rendezvous.fail(reason)

  def wait(self, what: str) -> None:
    """Waits for all processes."""
    self._rendezvous.wait(what, self._timeout)

  def decided(self, decide: Callable[[], T], what: str = "what process 0 decides") -> T:
    """What `decide` returns or raises on process 0, on all; see `decided_by_process_zero`."""
    return decided_by_process_zero(decide, self._rendezvous, self._timeout, what)

  def agreed(self, step: int, encode: Callable[[], Encoded]) -> Encoded:
    """What `encode` returns, if all processes save this step, and a state of the same leaves.

    Raises:
      CheckpointError: on all processes, naming who differs and in what, or what one of them cannot save.
    """
    if jax.process_count() == 1:
      return encode()
    try:
      found = encode()
    except CheckpointError as e:
      self.exchange("cannot save", error=e)
      raise
    digests = self.exchange(f"saves step {step}", alike.digest_of(found.flat))
    compare = functools.partial(self.exchange, "compares its leaves")
    if who := who_differs(alike.kinds(found.flat), digests, self.decided, compare):
      raise CheckpointError(
        f"{self._directory}: step {step} was not saved, since not all processes hold the same leaves: {who}. Nothing "
        "was written",
        topic="processes-differ",
      )
    return found

  def numbers(self, mine: list[int]) -> list[list[int]]:
    """The numbers of all processes, by process."""
    return list(map(json.loads, self.exchange("plans its copies", json.dumps(mine))))

  def combined(self, what: str, text: str, combine: Combine) -> str:
    """What process 0 makes of the texts of all processes, on all; `what` they are to do."""
    return self._met(what, text, combine=combine)[0]

  def exchange(self, doing: str, text: str = "", error: CheckpointError | None = None) -> list[str]:
    """The texts of all processes, by process.

    Args:
      doing: what this process does, in words; it must be the same on all.
      text: this process's contribution; short.
      error: what keeps it from that; then all processes raise.
    """
    told = self._met("all processes to save", json.dumps([doing, text]), error)
    does, texts = zip(*map(json.loads, told), strict=True)
    if len(set(does)) > 1:
      named = ", ".join(f"process {process} {what}" for process, what in enumerate(does[:20]))
      raise CheckpointError(
        f"{self._directory}: nothing was saved: all processes must save the same steps, and {named}",
        topic="processes-differ",
      )
    return list(texts)

  def _met(self, what: str, text: str, error: CheckpointError | None = None, combine: Combine = list) -> list[str]:
    try:
      return meet(self._rendezvous, what, text, timeout=self._timeout, error=error, combine=combine)
    except TimeoutError as e:
      raise PeerFailedError(
        f"{self._directory}: {e} (timeouts.save); all of them call save at the same steps"
      ) from None


def agreed_run(directory: str | os.PathLike[str], config: Settings) -> tuple[epath.Path, Config, int]:
  """The run that all processes open, with the same settings on the same kind of storage, and the number of their hosts.

  Raises:
    CheckpointError: on all processes, naming who differs and in what, or what one of them cannot open.
  """
  if jax.process_count() == 1:
    settings = as_config(config)
    return _connected(directory, settings), settings, 1
  error: Exception | None = None
  path, settings, facts = epath.Path(), Config(), {}
  try:
    settings = as_config(config)
    path = _connected(directory, settings)
    facts = _facts(path, settings)
  except Exception as e:
    error = e
  rendezvous, timeout = Rendezvous("open"), settings.timeouts.restore_s
  mine = json.dumps([digest(facts), boot_id()])  # containers of one host may have host names of their own
  decided = functools.partial(decided_by_process_zero, rendezvous=rendezvous, timeout=timeout)
  compare = functools.partial(meet, rendezvous, "all processes to compare their settings", timeout=timeout)
  try:
    told = meet(rendezvous, "all processes to open a run", mine, timeout=timeout, error=error)
    digests, hosts = zip(*map(json.loads, told), strict=True)
    who = who_differs(facts, digests, decided, compare)
  except TimeoutError as e:
    raise PeerFailedError(f"{path}: {e} (timeouts.restore)") from None
  if who:
    raise ConfigError(
      f"{path}: all processes of a job open the same run with the same settings; nothing was read or written. {who}",
      topic="processes-differ",
    )
  return path, settings, len(set(hosts))


def _connected(directory: str | os.PathLike[str], settings: Config) -> epath.Path:
  directory = given(directory)
  connect(directory, settings.storage)
  return run_directory(directory)


def _facts(path: epath.Path, settings: Config) -> dict[str, str]:
  """What must be the same on all processes, by name."""
  kind = settings.storage.kind
  facts = {"the run": os.fspath(path), "its storage": str(detect(path) if kind == "auto" else kind)}
  data = settings.to_dict()
  facts["item"] = str(data.pop("item"))
  for section in sorted(data.keys() - {"limits", "observe", "storage"}):
    facts |= {f"{section}.{key}": str(value) for key, value in data[section].items()}
  return facts
