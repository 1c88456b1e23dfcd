"""How fast arrays travel between this process's devices and host memory: measured once for a host and its devices."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.job.threads import transfers_asked_for
from ckpt_jax.storage.cache import recall, remember

_log = logging.getLogger(__name__)
PINNED = "pinned_host"
_VERSION = 2  # of the measurements on disk
_ARRAY_NBYTES, _ARRAYS = 4 << 20, 8  # a device
_TINY = 256
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Link:
  """Rates of batched transfers from and to all devices of this process at a time, in bytes per second.

  Attributes:
    to_pinned: from the devices to pinned host memory; None without such memory.
    to_pageable: from the devices to ordinary memory.
    from_pageable: to the devices, from numpy arrays.
    first_pinned: into pinned memory that the process uses for the first time, whose pages must be pinned; None without
      such memory. Later transfers reuse it.
    put_s: seconds of Python for each array of a batched transfer.
  """

  to_pinned: float | None
  to_pageable: float
  from_pageable: float
  first_pinned: float | None
  put_s: float

  @property
  def prefers_pinned(self) -> bool:
    """Whether copies to the host are faster through pinned memory."""
    return self.to_pinned is not None and self.to_pinned >= self.to_pageable


def measured_link() -> Link | None:
  """Measures the link in some 0.2 s, or takes what was measured on this host for such devices.

  The devices need 32 MiB each meanwhile. None if they do not have them.
  """
  if (known := known_link()) is not None:
    return known
  try:
    found = _measure(jax.local_devices())
  except Exception as e:  # a full device, as a rule; what waits for the figures goes on without
    _log.info("the link between devices and host was not measured: %s: %s", type(e).__name__, e)
    return None
  remember("link", _key(), dataclasses.asdict(found))
  return found


def known_link() -> Link | None:
  """What was measured on this host, if anything."""
  known = recall("link", _key())
  return None if known is None else Link(**known)


def _key() -> str:
  devices = jax.local_devices()
  return f"{_VERSION} {jax.__version__} {len(devices)} {devices[0].device_kind}"


def has_pinned(device: jax.Device) -> bool:
  """Whether a device can use pinned host memory."""
  return PINNED in {memory.kind for memory in device.addressable_memories()}


@transfers_asked_for()
def _measure(devices: Sequence[jax.Device]) -> Link:
  homes = [jax.sharding.SingleDeviceSharding(device) for device in devices for _ in range(_ARRAYS)]
  hosts = [np.zeros(_ARRAY_NBYTES, np.uint8) for _ in homes]
  nbytes = len(hosts) * _ARRAY_NBYTES
  arrays, _ = _timed(lambda: jax.device_put(hosts, homes))
  to_pinned = first = None
  places = homes
  if all(map(has_pinned, devices)):
    places = [home.with_memory_kind(PINNED) for home in homes]
    _, first_s = _timed(lambda: jax.device_put(arrays, places))
    to_pinned = nbytes / _best(lambda: jax.device_put(arrays, places))
    first = nbytes / first_s
  tiny = jax.block_until_ready(jax.device_put([np.zeros(8, np.uint8)] * _TINY, homes[0]))
  return Link(
    to_pinned=to_pinned,
    to_pageable=nbytes / _best(lambda: pageable(arrays), lambda copies: [np.asarray(copy) for copy in copies]),
    from_pageable=nbytes / _best(lambda: jax.device_put(hosts, homes)),
    first_pinned=first,
    put_s=_best(lambda: jax.device_put(tiny, places[0])) / _TINY,
  )


def pageable(arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """Starts to copy single-device arrays to ordinary host memory; numpy arrays of what it returns wait for the copies.

  The arrays themselves keep no host copy, as they would if numpy asked them for one.
  """
  aliases: list[jax.Array] = [jax.make_array_from_single_device_arrays(x.shape, x.sharding, [x]) for x in arrays]
  for alias in aliases:
    alias.copy_to_host_async()
  return aliases


def _timed(work: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> tuple[Any, float]:
  started = time.perf_counter()
  result = work()
  wait(result)
  return result, time.perf_counter() - started


def _best(work: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
  return min(_timed(work, wait)[1] for _ in range(_ROUNDS))
