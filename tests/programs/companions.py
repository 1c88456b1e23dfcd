"""Random programs of several Checkpointers in one process: companions.py DIRECTORY SEED COUNT.

Each program has two to four Checkpointers in threads of their own, one of them in the main thread, which Ctrl-C
interrupts at random; some are shared by two threads, one may live in an event loop, and beside them plain Orbax saves.
States fail to be saved, disks fail, runs are deleted. What `save`, `wait` and `close` said is compared with storage.
Prints what was not true as JSON; a hang ends the process with all stacks and exit code 3.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import ckpt_jax as ckpt
from ckpt_jax.integrity import health
from ckpt_jax.policies.schedule import Schedule
from ckpt_jax.run import steps as run
from ckpt_jax.save import commit, session

LIMIT_S = 120.0  # for one program
health.BEFORE_SAVE_NBYTES = 1 << 16  # so that small states, too, are found to be unhealthy behind a save
top, first, count = pathlib.Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])

# -- disks that fail

broken: dict[str, int] = {}  # in which of four ways the next save of a run fails
noise = random.Random()
seal, sync_directory = commit.seal, commit.sync_directory


def fails(path, kinds):
  name = next((n for n in broken if path.startswith(n + "/") or path == n), None)
  if name is None or broken[name] not in kinds:
    return
  del broken[name]
  raise OSError(5, "Input/output error")


def failing_seal(path, how):
  time.sleep(noise.random() * 0.03)  # so that commits fall anywhere in the programs of others
  fails(path, [1])
  seal(path, how)


def failing_sync(path):
  if os.path.isdir(os.path.join(path, ".ckpt_jax")):  # of the run, after the rename
    fails(path, [2])
  sync_directory(path)


commit.seal, commit.sync_directory = failing_seal, failing_sync

# -- interrupts


class Interrupts:
  """Ctrl-C for the main thread, which reaches it only within `possible`."""

  def __init__(self):
    self.armed = False
    signal.signal(signal.SIGINT, self)

  def __call__(self, signum, frame):
    if self.armed:
      self.armed = False
      raise KeyboardInterrupt

  @contextlib.contextmanager
  def possible(self, rng):
    """Interrupts the block after a random time, if it has not ended before; the caller sees KeyboardInterrupt."""
    ended = threading.Event()

    def strike(delay):
      if not ended.wait(delay):
        os.kill(os.getpid(), signal.SIGINT)

    striker = threading.Thread(target=strike, args=[rng.choice([0.0, 0.001, 0.004, 0.01, 0.03, 0.1])], daemon=True)
    self.armed = True
    striker.start()
    try:
      yield
    finally:
      self.armed = False
      ended.set()
      striker.join()


interrupts = Interrupts()


@contextlib.contextmanager
def never(rng):
  yield


# -- what is said, and whether it is true


class Book:
  """What a run was said to hold."""

  def __init__(self, path):
    self.path = path
    self.lock = threading.Lock()
    self.next = 0
    self.last = None  # of the present Checkpointer
    self.calm = random.Random(path).random() < 0.4  # no disk fails, and nothing is deleted
    self.unfit = set()  # steps whose state cannot be saved
    self.saved, self.failed, self.asked = set(), set(), set()
    self.wrong = []

  def step(self):
    with self.lock:
      self.next = self.last = self.next + 1
      self.asked.add(self.next)
      return self.next

  def there(self, step):
    return run.is_step(epath.Path(self.path) / str(step))

  def note(self, text):
    with self.lock:
      self.failed |= {int(number) for number in re.findall(r"step (\d+) was not saved", text)}

  def said(self, what, error, step=None):
    """Takes note of what a call raised."""
    self.note(str(error))
    if step is not None and not isinstance(error, KeyboardInterrupt):
      with self.lock:
        self.failed.add(step)
    if self.calm and isinstance(error, ckpt.CheckpointError):
      named = {int(number) for number in re.findall(r"step (\d+) was not saved", str(error))}
      if not (named or {step}) <= self.unfit:
        self.wrong.append(f"{what} raised without a reason: {error}")
    if "taken it over" in str(error) or "another job" in str(error):
      self.wrong.append(f"{what} met another Checkpointer: {error}")
    if not isinstance(error, (ckpt.CheckpointError, KeyboardInterrupt)):
      self.wrong.append(f"{what} raised {type(error).__name__}: {error}")

  def forget(self):
    """The run was deleted: nothing can be said of what was asked for so far."""
    with self.lock:
      self.saved.clear()
      self.failed.clear()

  def check(self, step, what):
    """After a silent `wait` or `close`."""
    with self.lock:
      due = step in self.saved and step not in self.failed
    if due and not self.there(step):
      self.wrong.append(f"{what} was silent, and step {step} is not there")

  def check_all(self):
    for step in sorted(self.saved - self.failed):
      if not self.there(step):
        self.wrong.append(f"save({step}) said True, nobody said that it failed, and it is not there")
    for step in sorted(self.failed):
      if self.there(step):
        self.wrong.append(f"step {step} was said to have failed, and it is there")
    there = run.committed_steps(epath.Path(self.path))
    for step in set(there) - self.asked:
      self.wrong.append(f"nobody asked for step {step}")
    if there:
      with ckpt.Checkpointer(self.path) as c:
        found = c.restore(there[-1]).state
        if float(np.asarray(found["x"]).reshape(-1)[0]) != there[-1]:
          self.wrong.append(f"step {there[-1]} holds something else")


class Log(logging.Handler):
  """What is said in the log alone: while another error is on its way, or of a Checkpointer that was dropped."""

  def emit(self, record):
    text = record.getMessage()
    for book in list(books.values()):
      if f"{book.path}:" in text:
        book.note(text)


books: dict[str, Book] = {}
logging.getLogger("ckpt_jax").addHandler(Log(logging.WARNING))


def state(step, kind):
  n = {"small": 8, "large": 1 << 18}.get(kind, 1 << 15)
  out = {f"w{i}": jnp.ones(n) for i in range(3)} | {"x": jnp.full(n, float(step)), "text": "a", "n": 3}
  if kind == "nan":
    out["y"] = jnp.full(n, jnp.nan)
  return out


STATES = ["small", "small", "large", "nan", "extras"]


class Fickle(Schedule):
  """The user's own schedule, which may fail when it is told that a save begins, or that it has committed."""

  def __init__(self, path):
    self.path = path

  def should_save(self, step, previous_steps, *, context):
    return True

  def begun(self, step):
    fails(self.path, [3])

  def finished(self, blocking_s, background_s):
    fails(self.path, [4])


def act(c, book, rng, possible, shared):
  """One call of one Checkpointer."""
  what = rng.choice(["save"] * 6 + ["wait"] * 3 + ["restore"] + ["break", "block", "delete"] * (not book.calm))
  if what == "save":
    step, kind = book.step(), rng.choice(STATES)
    if kind in ("nan", "extras"):
      book.unfit.add(step)
    extras = {"o": object()} if kind == "extras" else {"at": step}
    try:
      with possible(rng):
        done = c.save(step, state(step, kind), extras=extras, metrics={"loss": 1.0}, force=True)
    except BaseException as e:
      book.said(f"save({step}, {kind})", e, step)
    else:
      with book.lock:
        (book.saved if done else book.failed).add(step)
  elif what == "wait":
    last = book.last
    try:
      with possible(rng):
        c.wait()
    except BaseException as e:
      book.said("wait", e)
    else:
      if not shared:
        book.check(last, "wait")
  elif what == "restore" and (book.saved - book.unfit or not book.calm):
    try:
      with possible(rng):
        found = c.restore()
      if float(np.asarray(found.state["x"]).reshape(-1)[0]) != found.step:
        book.wrong.append(f"restore gave something else for step {found.step}")
    except BaseException as e:
      book.said("restore", e)
  elif what == "break":
    broken[book.path] = rng.choice([1, 2, 3, 4])
  elif what == "block" and not shared and os.path.isdir(book.path):
    with blocked(pathlib.Path(book.path)):
      step = book.step()
      try:
        with possible(rng):
          if c.save(step, state(step, "small"), force=True):
            book.saved.add(step)
        c.wait()
      except BaseException as e:
        book.said(f"save({step}) while the run cannot be written", e)
      else:
        book.wrong.append(f"save({step}) and wait() were silent where nothing can be written")
  elif what == "delete" and not shared and rng.random() < 0.3:
    with contextlib.suppress(BaseException):
      c.wait()
    book.forget()
    shutil.rmtree(book.path, ignore_errors=True)


@contextlib.contextmanager
def blocked(path):
  """A run that cannot be written, be it by root."""
  other = path.with_name(path.name + ".other")
  other.write_text("in the way")
  exchange(path, other)
  try:
    yield
  finally:
    exchange(path, other)
    other.unlink()


def exchange(*paths):
  """Two paths change places at once, whatever is being written there."""
  if ctypes.CDLL(None, use_errno=True).renameat2(-100, os.fsencode(paths[0]), -100, os.fsencode(paths[1]), 2):
    raise OSError(ctypes.get_errno(), "renameat2")


def live(book, seed, possible=never, in_loop=False):
  """The life of one run: Checkpointers one after the other."""
  rng = random.Random(seed)
  for _ in range(rng.choice([1, 1, 2])):
    c = ckpt.Checkpointer(book.path, {"preemption": {"enabled": False}}, schedule=Fickle(book.path))
    book.last = second = None
    shared = rng.random() < 0.25
    if shared:
      second = threading.Thread(target=calls, args=[c, book, random.Random(seed + 1), never, True], daemon=True)
      second.start()
    if in_loop:

      async def main(c=c, shared=shared):
        calls(c, book, rng, possible, shared)

      asyncio.run(main())
    else:
      calls(c, book, rng, possible, shared)
    if second is not None:
      second.join()
    end(c, book, rng, possible)
    del c
    gc.collect()


def calls(c, book, rng, possible, shared):
  for _ in range(rng.randint(2, 8)):
    act(c, book, rng, possible, shared)


def end(c, book, rng, possible):
  how = rng.choice(["close", "close", "with", "with interrupted", "drop"])
  last = book.last
  if how == "close":
    for attempt in range(3):
      try:
        with possible(rng) if attempt == 0 else never(rng):
          c.close()
      except BaseException as e:
        book.said("close", e)
        continue
      book.check(last, "close")
      break
    else:
      book.wrong.append("close() raised three times")
  elif how.startswith("with"):
    step = book.step()
    try:
      with c:
        if c.save(step, state(step, "small"), force=True):
          book.saved.add(step)
        if how == "with interrupted":
          raise KeyboardInterrupt
    except BaseException as e:
      book.said("with", e, None if step in book.saved else step)
    book.check(step, "with")


def plain(path, seed, wrong):
  """Orbax without us, beside us."""
  rng = random.Random(seed)
  with ocp.CheckpointManager(path) as manager:
    for step in range(rng.randint(2, 6)):
      fails = rng.random() < 0.3
      try:
        kind = jnp.float8_e4m3 if fails else jnp.float32  # which TensorStore does not know
        manager.save(step, args=ocp.args.StandardSave({"x": np.full(100, step), "y": jnp.ones(1000, kind)}))
        if fails or rng.random() < 0.5:
          manager.wait_until_finished()
      except Exception as e:
        if not fails:
          wrong.append(f"plain Orbax: save({step}) raised {type(e).__name__}: {e}")
        continue
      manager.wait_until_finished()
      if not (path / str(step) / "_CHECKPOINT_METADATA").exists():
        wrong.append(f"plain Orbax: step {step} is not there")


def program(seed):
  rng = random.Random(seed)
  paths = [str(top / f"{seed}-{i}") for i in range(rng.randint(2, 4))]
  books.clear()
  books.update({path: Book(path) for path in paths})
  wrong = []
  threads = [
    threading.Thread(target=live, args=[books[path], rng.random(), never, rng.random() < 0.2], daemon=True)
    for path in paths[1:]
  ]
  if rng.random() < 0.5:
    threads.append(threading.Thread(target=plain, args=[top / f"{seed}-plain", rng.random(), wrong], daemon=True))
  for thread in threads:
    thread.start()
  live(books[paths[0]], rng.random(), interrupts.possible)
  for thread in threads:
    thread.join()
  gc.collect()
  while session._open:  # those that were dropped end by themselves
    time.sleep(0.01)
  for book in books.values():
    book.check_all()
    wrong += [f"run {book.path}: {what}" for what in book.wrong]
  return wrong


caught = []
threading.excepthook = lambda args: caught.append(f"a thread raised {args.exc_type.__name__}: {args.exc_value}")
found = {}
for seed in range(first, first + count):
  faulthandler.dump_traceback_later(LIMIT_S, exit=True)
  wrong = program(seed) + caught
  caught.clear()
  if wrong:
    found[seed] = wrong
faulthandler.cancel_dump_traceback_later()
print(json.dumps(found, indent=1))
