"""Journals whose processes are killed: killed_journals.py RUN COUNT prints how many records each had seen written."""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time

from ckpt_jax.observe import Save
from ckpt_jax.run.journal import Journal
from ckpt_jax.run.steps import run_directory


def write(run, written):
  """Emits one record after the other, and counts those that the file holds."""
  journal = Journal(run_directory(run))
  journal.begin()
  journal.flush(60)  # the record of the start: it must not be taken for the first save
  place, size = os.path.join(run, ".ckpt_jax", "events"), 0
  started = now = sum(e.stat().st_size for e in os.scandir(place)) if os.path.isdir(place) else 0
  for step in range(10**6):
    journal.emit(Save(step=step, nbytes=1))
    while now == max(size, started):
      now = sum(e.stat().st_size for e in os.scandir(place)) if os.path.isdir(place) else 0
    size = now
    written[:8] = struct.pack("q", step + 1)


random.seed(0)
counts = []
for _ in range(int(sys.argv[2])):
  written = mmap.mmap(-1, 8)
  child = os.fork()
  if not child:
    write(sys.argv[1], written)
  while struct.unpack("q", written[:8])[0] < 3:
    time.sleep(0.001)
  time.sleep(random.uniform(0, 0.02))
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  counts.append(struct.unpack("q", written[:8])[0])
print(json.dumps(counts))
