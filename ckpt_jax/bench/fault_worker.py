"""The process that a fault hits: the same trainer over ckpt_jax or over plain Orbax, run as

    python -m ckpt_jax.bench.fault_worker SIDE SCENARIO RUN [OPTIONS as JSON]

SIDE is `ckpt_jax` or `orbax`. It prints one JSON object a line. A state is a function of its step, so that every
restored state can be checked bit by bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ckpt_jax import multihost
from ckpt_jax.bench.common import emit
from ckpt_jax.bench.fault_places import unfinished
from ckpt_jax.orbax.format import TEMPORARY

_LEAVES = 8


class Side:
  """What the scenarios need of a checkpointer; `save` and `wait` raise the errors that training would see.

  Args:
    url: of the run.
    options: `megabytes` of a state; `keep`: steps that stay; `frozen`: how many of its 8 leaves are the same in each
      step; `config`: of ours; `server`: the process that serves the bucket.
    timeout: of a save, in seconds.

  Attributes:
    url: of the run.
    run: its directory, if it is no bucket.
    errors: those that training would see, one line each.
    nbytes: of a state, without the leaves that are the same in each step.
    step: that the fault meets; those before it are committed.
    server: see `options`.
  """

  def __init__(self, url: str, options: dict[str, Any], timeout: float):
    import jax

    self.url = url
    self.run = pathlib.Path(url)
    self.errors: list[str] = []
    self.server: int = options.get("server", 0)
    self._timeout = timeout
    self._keep = options.get("keep", 3)
    self._frozen = options.get("frozen", 0)
    self.step = 4 if self._frozen else 2  # the third save is the first one that shares files with the step before
    self._rows = max(1, int(options["megabytes"] * 1e6) // (_LEAVES * 4 * 256))
    self._mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    self._rows += -self._rows % jax.device_count()
    self.nbytes = self._rows * 256 * 4 * (_LEAVES - self._frozen)

  def values(self, step: int) -> dict[str, Any]:
    """The state of a step, in host memory."""
    import numpy as np

    frozen, rng = np.random.default_rng(10**6), np.random.default_rng(step)
    leaves = [frozen] * self._frozen + [rng] * (_LEAVES - self._frozen)
    return {f"w{i}": of.standard_normal((self._rows, 256), dtype=np.float32) for i, of in enumerate(leaves)}

  def state(self, step: int) -> dict[str, Any]:
    """The state of a step, on its devices."""
    import jax

    spread = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec("fsdp"))
    put = functools.partial(jax.make_array_from_callback, sharding=spread)
    return {k: put(v.shape, data_callback=v.__getitem__) for k, v in self.values(step).items()}

  def is_right(self, step: int) -> bool:
    """Whether a step can be restored and has every bit of what was saved."""
    import numpy as np

    try:
      got = self.restore(step)
      return all(
        np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
        for name, value in self.values(step).items()
        for shard in got[name].addressable_shards
      )
    except Exception as e:
      self.errors.append(f"restore: {type(e).__name__}: {_line(e)}")
      return False

  def try_to(self, action: Callable[[], Any]) -> bool:
    """Whether an action raised no error; an error is recorded."""
    try:
      action()
      return True
    except Exception as e:
      self.errors.append(f"{type(e).__name__}: {_line(e)}")
      return False

  def saved(self, step: int) -> bool:
    """Whether a save of `step` commits and comes back right."""
    if not self.try_to(lambda: self.commit(step)):
      return False
    return step in self.steps() and self.is_right(step)

  def commit(self, step: int) -> None:
    """Saves a step and waits for its commit."""
    self.save(step)
    self.wait()

  def leftovers(self) -> int:
    """Counts unfinished steps, after five seconds if there are some: Orbax removes them in the background."""
    deadline = time.monotonic() + 5
    while True:
      count = len(unfinished(self.url))
      if not count or time.monotonic() > deadline:
        return count
      time.sleep(0.05)

  def save(self, step: int) -> None:
    raise NotImplementedError

  def wait(self) -> None:
    raise NotImplementedError

  def restore(self, step: int) -> Any:
    raise NotImplementedError

  def steps(self) -> list[int]:
    raise NotImplementedError

  def close(self) -> None:
    raise NotImplementedError


class Ours(Side):
  """ckpt_jax."""

  def __init__(self, url: str, options: dict[str, Any], timeout: float):
    import ckpt_jax as ckpt

    super().__init__(url, options, timeout)
    config = {"retention": {"last": self._keep}, "timeouts": {"save": timeout}} | options.get("config", {})
    self._c = ckpt.Checkpointer(url, config)

  def save(self, step: int) -> None:
    if not self._c.save(step, self.state(step)):
      raise RuntimeError(f"step {step}: the save was skipped")

  def wait(self) -> None:
    self._c.wait()

  def restore(self, step: int) -> Any:
    return self._c.restore(step, like=self.state(0)).state

  def steps(self) -> list[int]:
    return [s.step for s in self._c.steps()]

  def close(self) -> None:
    self._c.close()


class Orbax(Side):
  """Plain Orbax with the options that a careful user sets: three steps, leftovers cleaned up, the same timeout."""

  def __init__(self, url: str, options: dict[str, Any], timeout: float):
    import orbax.checkpoint as ocp

    super().__init__(url, options, timeout)
    self._ocp = ocp
    self._m = ocp.CheckpointManager(
      url,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        cleanup_tmp_directories=True,
        async_options=ocp.options.AsyncOptions(timeout_secs=max(1, int(timeout))),
      ),
    )

  def save(self, step: int) -> None:
    if not self._m.save(step, args=self._ocp.args.PyTreeSave(self.state(step))):
      raise RuntimeError(f"step {step}: the save was skipped")

  def wait(self) -> None:
    self._m.wait_until_finished()

  def restore(self, step: int) -> Any:
    import jax

    like = self.state(0)
    args = jax.tree.map(lambda x: self._ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), like)
    return self._m.restore(step, args=self._ocp.args.PyTreeRestore(like, restore_args=args))

  def steps(self) -> list[int]:
    return list(self._m.all_steps())

  def close(self) -> None:
    self._m.close()


SIDES: dict[str, type[Side]] = {"ckpt_jax": Ours, "orbax": Orbax}


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:160]


def live(side: type[Side], run: str, options: dict[str, Any]) -> None:
  """One life of a job that will be killed: reports the steps of earlier lives, then saves until the end."""
  import jax

  job = side(run, options, 300.0)
  steps = job.steps()
  wrong = [step for step in steps if not job.is_right(step)]
  first, in_bucket = jax.process_index() == 0, "://" in run
  if first:
    emit(found=steps, wrong=wrong, told=job.errors, **({} if in_bucket else {"leftovers": job.leftovers()}))
  step = begin = (max(steps) if steps else -1) + 1
  for _ in range(options["saves"]):
    if first:
      emit(begin=step)
    job.save(step)
    if in_bucket and step == begin:  # only a job that saves may clear them there
      job.wait()
      emit(leftovers=job.leftovers())
    step += 1
    time.sleep(0.01)
  job.wait()
  good = step - 1 in job.steps() and job.is_right(step - 1)
  if first:
    emit(saved=step - 1, good=good)
  job.close()


def full_disk(job: Side, disk: pathlib.Path, seed: int) -> None:
  """Another program fills the disk while a step is being written."""
  filler = threading.Thread(target=_fill, args=(disk / "filler", seed * 0.005))
  filler.start()
  job.try_to(lambda: job.commit(job.step))
  filler.join()
  (disk / "filler").unlink()


def _fill(file: pathlib.Path, delay: float) -> None:
  time.sleep(delay)
  with contextlib.suppress(OSError), open(file, "wb", buffering=0) as f:
    while True:
      f.write(bytes(1 << 16))


def too_large(job: Side, disk: pathlib.Path, _: int) -> None:
  """A step that does not fit is saved again and again."""
  size = shutil.disk_usage(disk).free - int(job.nbytes * 0.7)
  with open(disk / "filler", "wb") as f:
    f.write(bytes(max(0, size)))
  for step in range(job.step, job.step + 3):
    job.try_to(functools.partial(job.commit, step))
  (disk / "filler").unlink()


def read_only(job: Side, disk: pathlib.Path, _: int) -> None:
  """The file system turns read-only, as ext4 does after an I/O error, and later is writable again."""
  subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
  job.try_to(lambda: job.commit(2))
  subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def directory_deleted(job: Side, disk: pathlib.Path, seed: int) -> None:
  """The directory of a step is deleted while it is being written."""
  del disk

  def delete() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
      for path in job.run.glob(f"2{TEMPORARY}*"):
        time.sleep(0.002 * seed)
        shutil.rmtree(path, ignore_errors=True)
        return

  thread = threading.Thread(target=delete)
  thread.start()
  job.try_to(lambda: job.commit(2))
  thread.join()


def hang(job: Side, disk: pathlib.Path, _: int) -> None:
  """The file system stops answering writes in the middle of a save (fsfreeze), for longer than the timeout."""
  job.save(2)
  subprocess.run(["fsfreeze", "-f", disk], check=True)
  _wait_until(job, lambda: subprocess.run(["fsfreeze", "-u", disk], check=False, capture_output=True))


def server_stops(job: Side, disk: pathlib.Path, seed: int) -> None:
  """The server of a bucket stops answering in the middle of a save (SIGSTOP), for longer than the timeout."""
  del disk
  job.save(job.step)
  time.sleep(0.1 * seed)
  os.kill(job.server, signal.SIGSTOP)
  _wait_until(job, lambda: os.kill(job.server, signal.SIGCONT))


def _wait_until(job: Side, thaw: Callable[[], Any]) -> None:
  """Waits for a save whose storage hangs until `thaw` is called, which is after 30 seconds at the latest."""
  timer = threading.Timer(30, thaw)
  timer.start()
  started = time.monotonic()
  job.try_to(job.wait)
  waited = time.monotonic() - started
  emit(waited_s=waited)
  if waited > 29:
    job.errors.append("wait() hung for as long as the storage did")
  timer.cancel()
  thaw()
  time.sleep(2)


def sigterm(job: Side, disk: pathlib.Path, _: int) -> None:
  """SIGTERM arrives in the middle of a save."""
  del disk
  job.save(2)
  os.kill(os.getpid(), signal.SIGTERM)
  job.save(3)
  job.wait()


def odd_directories(job: Side, disk: pathlib.Path, _: int) -> None:
  """The run holds an empty directory named 4, and one named 5 with a file of the user in it."""
  del disk
  (job.run / "4").mkdir()
  (job.run / "5").mkdir()
  (job.run / "5" / "thesis.tex").write_text("mine")


def nothing(job: Side, disk: pathlib.Path, _: int) -> None:
  del job, disk


SCENARIOS: dict[str, Callable[[Side, pathlib.Path, int], None]] = {
  "full_disk": full_disk,
  "too_large": too_large,
  "read_only": read_only,
  "directory_deleted": directory_deleted,
  "hang": hang,
  "server_stops": server_stops,
  "sigterm": sigterm,
  "odd_directories": odd_directories,
  "clock_back": nothing,
}


def scenario(name: str, side: type[Side], run: str, options: dict[str, Any]) -> None:
  """Saves steps, runs the fault, and reports what is left."""
  job = side(run, options, options.get("timeout", 60.0))
  for step in range(job.step):
    job.commit(step)
  before = len(job.errors)
  emit(before=job.steps(), hit=job.step)
  SCENARIOS[name](job, pathlib.Path(options["disk"]), options["seed"])
  errors = job.errors[before:]
  emit(errors=errors)
  following = 4 if name == "odd_directories" else 7
  emit(next=job.saved(following), kept=job.is_right(job.step - 1), told=job.errors[before + len(errors) :])
  job.try_to(job.close)


def after(side: type[Side], run: str, options: dict[str, Any]) -> None:
  """A new process opens the run after the fault."""
  job = side(run, options, 60.0)
  steps = job.steps()
  wrong = [step for step in steps if not job.is_right(step)]
  works = job.saved(options.get("step", 9))
  emit(found=steps, wrong=wrong, next=works, leftovers=job.leftovers(), told=job.errors)
  job.try_to(job.close)


def hold(side: type[Side], run: str, options: dict[str, Any]) -> None:
  """Saves a step, and stays open until standard input ends."""
  job = side(run, options, 60.0)
  emit(saved=job.saved(0))
  sys.stdin.readline()
  emit(next=job.saved(5), found=job.steps(), told=job.errors)
  job.try_to(job.close)


def main() -> None:
  """Runs the scenario of the command line."""
  side, name, run = SIDES[sys.argv[1]], sys.argv[2], sys.argv[3]
  options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
  if "clock" in options:  # before any module reads it
    real, real_ns, shift = time.time, time.time_ns, options["clock"]
    time.time = lambda: real() + shift
    time.time_ns = lambda: real_ns() + int(shift * 1e9)
  multihost.initialize()
  others = {"live": live, "after": after, "hold": hold}
  if name in others:
    others[name](side, run, options)
  else:
    scenario(name, side, run, options)


if __name__ == "__main__":
  main()
