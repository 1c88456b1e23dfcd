"""A process that does not come, or fails, where the others wait for it in a save or restore: late.py RUN NOTES.

Each case patches one call on process 1 alone, which then stays away until process 0 has given up, or raises.
"""

import pathlib
import sys
import time
from unittest import mock

from ckpt_jax import multihost

multihost.initialize()

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.integrity import comparison
from ckpt_jax.integrity.fingerprint import Taken
from ckpt_jax.job.rendezvous import Rendezvous
from ckpt_jax.layout.handler import PyTreeHandler

run, notes = sys.argv[1], pathlib.Path(sys.argv[2])
me = jax.process_index()
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
w = np.ones((12, 8), np.float32)
state = {"w": jax.make_array_from_callback(w.shape, NamedSharding(mesh, P("fsdp")), lambda index: w[index])}
between = Rendezvous("between the cases of late.py")
meet = {"save": "5s", "restore": "5s"}


def patched(of, name, case, fails):
  real = getattr(of, name)

  def late(*arguments, **options):
    if fails:
      raise MemoryError("no memory for it")
    deadline = time.monotonic() + 60
    while not (notes / case).exists():
      assert time.monotonic() < deadline, "process 0 still waits"
      time.sleep(0.02)
    return real(*arguments, **options)

  return mock.patch.object(of, name, late if me == 1 else real)


def raised(of, name, work, *, fails=False):
  """What `work` raises on this process while process 1 is late at a call, or fails in it."""
  case = f"{name} {fails}"
  with patched(of, name, case, fails):
    try:
      work()
    except Exception as e:
      found = e
    else:
      raise SystemExit(f"{case}: nothing was raised")
  if me == 0:
    (notes / case).touch()
  between.wait(case, 60)
  return found


with ckpt.Checkpointer(run, {"timeouts": meet}) as c:
  collectives = []
  with mock.patch.object(multihost_utils, "process_allgather", collectives.append):
    c.save(0, state)
    c.wait()
    c.restore(like=state)
  assert not collectives, "a collective waits for ever"

  found = raised(Taken, "tallies", lambda: c.save(1, state))
  assert me == 1 or ("health of the state; of 2 processes these did not arrive: 1" in str(found)), found
  found = raised(ocp.CheckpointManager, "save", lambda: c.save(1, state))
  assert isinstance(found, ckpt.SaveFailedError) and "these did not arrive: 1" in str(found), found
  found = raised(PyTreeHandler, "async_save", lambda: c.save(1, state), fails=True)
  assert isinstance(found, ckpt.SaveFailedError) and "no memory for it" in str(found), found
  assert me == 1 or "process 1 failed" in str(found), found
  assert c.save(1, state), "the next save is not held up"
  c.wait()
  found = raised(comparison, "_folded", lambda: c.restore(like=state))
  assert me == 1 or (isinstance(found, ckpt.RestoreTimeoutError) and "did not arrive: 1" in str(found)), found
  assert c.restore(like=state).step == 1
print("nobody was waited for without a limit", flush=True)
