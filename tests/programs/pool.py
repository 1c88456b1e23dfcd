"""One process of a job that runs one program of this directory after the other: pool.py SOCKET; see tests/jobs.py."""

import gc
import os
import runpy
import sys
import traceback
from multiprocessing.connection import Client

from ckpt_jax import multihost

multihost.initialize()

import jax

jax.devices()
own = {name: value for name, value in os.environ.items() if name.startswith(("CKPT_JAX_", "XLA_", "JAX_"))}
with Client(sys.argv[1], "AF_UNIX") as tests:
  tests.send(jax.process_index())
  while True:
    try:
      sys.argv, environment, directory, end = tests.recv()
    except EOFError:
      break
    os.environ.clear()
    os.environ.update(environment | own)
    os.chdir(directory)
    code = 0
    try:
      runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
      code = e.code if isinstance(e.code, int) else int(e.code is not None)
      if code and not isinstance(e.code, int):
        print(e.code, flush=True)
    except BaseException:
      traceback.print_exc()
      code = 1
    gc.collect()
    sys.stderr.flush()
    print(end, end="", flush=True)
    tests.send(code)
