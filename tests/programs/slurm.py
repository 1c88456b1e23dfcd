"""A stand-in for Slurm on one machine: `sbatch`, `srun` and `scontrol`, by the name that this file is called by.

A job has two tasks, however many its script asks for, and two lives. In each, `--signal=TERM@SECONDS` comes once every
task has written that it trains. As in Slurm, options count only above the first command of a script, the signal goes to
the tasks and not to the shell (unless it begins with `B:`), and `srun` ends with the highest code of a task.
"""

import argparse
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading

TASKS, LIVES, FIRST_PORT = 2, 2, 65535 - 2**12 + 1  # jax's coordinator listens at FIRST_PORT + job id
OPTIONS = ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "open-mode", "export")


def sbatch(argv):
  parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
  for option in OPTIONS:
    parser.add_argument(f"--{option}")
  parser.add_argument("--requeue", action="store_true")
  parser.add_argument("script", type=pathlib.Path)
  script = parser.parse_args(argv).script
  options = []
  for line in script.read_text().splitlines():
    if line.startswith("#SBATCH "):
      options += shlex.split(line.removeprefix("#SBATCH "))
    elif line and not line.startswith("#"):
      break
  job = parser.parse_args([*options, *argv])
  variables = dict(v.split("=", 1) for v in (job.export or "ALL").split(",") if "=" in v)
  with socket.socket() as s:  # a port that is free, among those that jax takes
    port = next(p for p in range(FIRST_PORT + os.getpid() % 4000, 65536) if s.connect_ex(("127.0.0.1", p)))
  env = {
    **os.environ,
    **variables,
    "SLURM_JOB_ID": str(port - FIRST_PORT),
    "SLURM_GPUS_ON_NODE": job.gpus_per_node or "0",
    "STAND_IN_SIGNAL": job.signal or "",
    "STAND_IN_REQUEUE": str(int(job.requeue)),
  }
  requeued = pathlib.Path("requeued")
  for _ in range(LIVES):
    requeued.unlink(missing_ok=True)
    with open("slurm.out", "a" if job.open_mode == "append" else "w") as out:
      code = subprocess.run(["bash", script], env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL).returncode
    print(f"life ended with {code}, {'requeued' if requeued.exists() else 'not requeued'}", flush=True)
    if not requeued.exists():
      return code
  return 0


def srun(argv):
  command = [a for i, a in enumerate(argv) if not all(b.startswith("--") for b in argv[: i + 1])]
  env = {**os.environ, "SLURM_NTASKS": str(TASKS), "SLURM_STEP_NUM_TASKS": str(TASKS), "SLURM_STEP_NUM_NODES": "1"}
  env["SLURM_STEP_NODELIST"] = "127.0.0.1"
  tasks = [
    subprocess.Popen(
      command, env={**env, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, stdout=subprocess.PIPE, text=True
    )
    for i in range(TASKS)
  ]
  trains = threading.Event()
  readers = [threading.Thread(target=_read, args=(task, trains)) for task in tasks]
  for reader in readers:
    reader.start()
  trains.wait(120)
  if os.environ["STAND_IN_SIGNAL"].startswith("TERM@"):
    for task in tasks:
      task.send_signal(signal.SIGTERM)
  for reader in readers:
    reader.join()
  codes = [task.wait() for task in tasks]
  return max(128 - code if code < 0 else code for code in codes)


def _read(task, trains):
  for line in task.stdout:
    print(line, end="", flush=True)
    if line.startswith("step "):
      trains.set()
  trains.set()  # it has ended


def scontrol(argv):
  assert argv == ["requeue", os.environ["SLURM_JOB_ID"]] and os.environ["STAND_IN_REQUEUE"] == "1", argv
  pathlib.Path("requeued").touch()
  return 0


if __name__ == "__main__":
  sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[pathlib.Path(sys.argv[0]).name](sys.argv[1:]))
