"""What `make run` shows: a training job is killed in the middle of a background write and goes on, bit for bit.

1. 4 processes x 2 devices train and save on schedule; process 2 is killed with -9 while a save is being written.
2. 2 processes x 2 devices take over from the newest committed step and train to the end.
3. An uninterrupted 4 x 2 job with the same seed trains to that step: its parameters, optimizer state, step, random key
   and next batch must have the same bits as those that the second job had in memory after its restore.

It ends with `ckpt-jax report` of the run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from ckpt_jax.config.units import count
from ckpt_jax.multihost import Job, Result, who_wrote
from ckpt_jax.observe.report import gather, page
from ckpt_jax.run.steps import committed_steps, run_directory

_TIMEOUT = 240.0


class NoKillError(Exception):
  """The job ended, or committed, before it could be killed in the middle of a write."""


def main(argv: list[str] | None = None) -> int:
  """Returns 0 if the resumed state is bitwise the uninterrupted one."""
  parser = argparse.ArgumentParser(prog="python -m ckpt_jax.examples.survive", description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--every", type=int, default=10)
  parser.add_argument("--kill-after", type=int, default=25, help="kill in the first write of a step above this")
  parser.add_argument("--keep", action="store_true", help="keep the run directory, and print where it is")
  parser.add_argument("--report", metavar="DIRECTORY", help="where the report goes; default: for temporary files")
  args = parser.parse_args(argv)
  console = Console(width=100, highlight=False)
  started = time.monotonic()
  work = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-jax-run-"))
  try:
    return _acts(work, args, console)
  except (NoKillError, JobFailedError, TimeoutError) as e:
    console.print(f"[red]{e}[/red]")
    return 1
  finally:
    if args.keep:
      console.print(f"kept: {work}")
    else:
      shutil.rmtree(work, ignore_errors=True)
    console.print(f"{time.monotonic() - started:.0f} s in all")


def _acts(work: pathlib.Path, args: argparse.Namespace, console: Console) -> int:
  run, notes = work / "run", work / "notes"
  console.rule("1/3  4 processes x 2 devices train; process 2 dies in the middle of a background write")
  victim_step = _train_and_kill(run, notes / "killed", args, console)
  committed = committed_steps(run_directory(run))
  if not committed:
    raise NoKillError("no step was committed before the kill; raise --kill-after")
  resumed_at = committed[-1]
  writes = who_wrote(run, resumed_at)

  console.rule(f"2/3  2 processes x 2 devices take over from step {resumed_at} and finish")
  _finish(_start(run, notes / "resumed", args.steps, args.every, processes=2), "the resumed job")

  console.rule(f"3/3  the proof: an uninterrupted 4 x 2 job trains to step {resumed_at}")
  _finish(_start(work / "reference", notes / "reference", resumed_at + 1, args.every, processes=4), "the reference job")
  want = json.loads((notes / "reference" / f"trained-{resumed_at}.json").read_text())
  got = json.loads((notes / "resumed" / f"restored-{resumed_at}.json").read_text())

  console.print(_costs(notes))
  console.print(f"Who wrote step {resumed_at}\n{writes.table()}")
  different = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
  console.print(_proof(list(want), different, resumed_at))
  lost = victim_step - resumed_at
  console.print(
    f"killed while step {victim_step} was being written; resumed from step {resumed_at}: "
    f"{count(lost)} of work lost and trained again."
  )
  report = pathlib.Path(args.report or tempfile.gettempdir()) / "ckpt-jax-report.html"
  report.write_text(page(gather(run)), encoding="utf-8")
  console.print(f"what happened to the run, as a page: {report}")
  if different:
    console.print(f"[red]not the same: {', '.join(different[:5])}[/red]")
    return 1
  console.print(f"[green]all {len(want)} leaves are bit for bit what an uninterrupted run has.[/green]")
  return 0


def _costs(notes: pathlib.Path) -> Table:
  """What each save cost."""
  table = Table("job", "step", "MB", "blocking s", "background s", title="What each save cost")
  for job in ("killed", "resumed"):
    for file in sorted((notes / job).glob("save-*.json"), key=lambda p: int(p.stem.split("-")[1])):
      save = json.loads(file.read_text())
      seconds = f"{save['blocking_s']:.2f}", f"{save['background_s']:.2f}"
      table.add_row(job, str(save["step"]), f"{save['nbytes'] / 1e6:.0f}", *seconds)
  return table


def _proof(names: list[str], different: list[str], step: int) -> Table:
  """Which parts of the state are bitwise equal."""
  title = f"Uninterrupted (4 x 2) against resumed (2 x 2) at step {step}"
  table = Table("what", "leaves", "bitwise equal", title=title)
  for part, prefix in (
    ("parameters", "['params']"),
    ("optimizer state", "['opt']"),
    ("step", "['step']"),
    ("random key", "['rng']"),
    ("data order (next batch)", "next batch"),
  ):
    leaves = [name for name in names if name.startswith(prefix)]
    differ = sum(name in different for name in leaves)
    table.add_row(part, str(len(leaves)), "yes" if leaves and not differ else f"NO: {differ} differ")
  return table


def _start(run: pathlib.Path, notes: pathlib.Path, steps: int, every: int, *, processes: int) -> Job:
  command = ["-m", "ckpt_jax.examples.lm", "--run", run, "--notes", notes, "--steps", steps, "--every", every]
  return Job([str(part) for part in command], processes=processes, devices=2, on_line=_show)


def _show(process: int, line: str) -> None:
  if process == 0 and not re.match(r"[IWEF]\d{4} |\[Gloo\]", line):  # XLA's own logging
    print(f"  {line}", end="", flush=True)


def _finish(job: Job, name: str) -> list[Result]:
  try:
    results = job.wait(_TIMEOUT)
  finally:
    job.stop(grace=0)
  failed = [r for r in results if r.returncode]
  if failed:
    raise JobFailedError(f"{name}: process {failed[0].process} ended with {failed[0].returncode}:\n{failed[0].log}")
  return results


def _train_and_kill(run: pathlib.Path, notes: pathlib.Path, args: argparse.Namespace, console: Console) -> int:
  """Kills process 2 while a step above `--kill-after` is being written. Returns that step."""
  for _ in range(3):  # the write may win the race; then the job resumes and the next one is tried
    job = _start(run, notes, args.steps, args.every, processes=4)
    try:
      step = _wait_for_write(job, run, args.kill_after)
      job.kill(2, signal.SIGKILL)
      killed = time.monotonic()
      job.wait(_TIMEOUT, grace=1.0)
    finally:
      job.stop(grace=0)
    if step in committed_steps(run_directory(run)):
      console.print(f"step {step} was committed before the kill arrived; trying again")
      continue
    console.print(f"process 2 (pid {job.children[2].pid}) killed with -9 while step {step} was being written;")
    console.print(f"the job was down {time.monotonic() - killed:.1f} s later, step {step} is not there.")
    return step
  raise NoKillError("three writes were faster than the kill; use a larger model or slower storage")


def _wait_for_write(job: Job, run: pathlib.Path, above: int) -> int:
  deadline = time.monotonic() + _TIMEOUT
  while time.monotonic() < deadline:
    if job.children[0].poll() is not None:
      raise NoKillError(f"the job ended before a step above {above} was written:\n{job.log(0)}")
    for leftover in run.glob("*.orbax-checkpoint-tmp*"):
      step = int(leftover.name.split(".")[0])
      if step > above and any(leftover.glob("*/ocdbt.process_2*")):
        return step
    time.sleep(0.001)
  raise NoKillError(f"waited {_TIMEOUT:.0f} s for a write of a step above {above}")


class JobFailedError(Exception):
  """A job that should have succeeded did not."""


if __name__ == "__main__":
  sys.exit(main())
