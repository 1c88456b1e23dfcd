"""Real processes: the launcher, the report of writes, resharding between process counts, preemption."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from jobs import together

import ckpt_jax as ckpt
from ckpt_jax import multihost
from ckpt_jax.multihost import Job, launch, who_wrote

TRAIN = str(pathlib.Path(__file__).parent / "programs" / "train.py")
pytestmark = pytest.mark.multiprocess


def run_all(mode, run, processes):
  return together("train.py", run, mode, processes=processes)


def run_afresh(mode, run, returncode=0):
  """Runs in fresh processes, which are signalled or fork."""
  results = launch([TRAIN, str(run), mode], processes=2, devices=2, timeout=180)
  assert [r.returncode for r in results] == [returncode] * 2, results[0].log
  return results


def test_each_process_writes_a_quarter_and_nothing_twice_and_any_mesh_restores(tmp_path):
  run_all("save", tmp_path, 4)
  report = who_wrote(tmp_path, 0)
  assert [p.process for p in report.processes] == [0, 1, 2, 3]
  assert report.overlaps == {}
  state_bytes = 20 * 64 * 1024 * 4
  for p in report.processes:
    assert p.nbytes == pytest.approx(state_bytes / 4, rel=0.1), report.table()
  run_all("restore", tmp_path, 2)
  run_all("restore", tmp_path, 1)
  run_all("restore", tmp_path, 4)


def test_chunk_that_two_processes_wrote_is_reported(tmp_path):
  run_all("save", tmp_path, 2)
  item = tmp_path / "0" / "default"
  shutil.copytree(item / "ocdbt.process_1", item / "ocdbt.process_7")
  report = who_wrote(tmp_path, 0)
  assert report.overlaps and set(map(tuple, report.overlaps.values())) == {(1, 7)}


def test_sigterm_to_one_process_saves_on_all_and_exits_cleanly(tmp_path):
  results = run_afresh("sigterm", tmp_path, returncode=143)
  assert "preempted" in "".join(r.log for r in results)
  with ckpt.Checkpointer(tmp_path) as c:
    assert len(c.steps()) == 1 and c.latest_step() >= 20


@pytest.mark.parametrize("users_handler", [False, True])
def test_sigterm_in_a_single_process_saves_and_exits_cleanly(users_handler, tmp_path):
  job = Job([TRAIN, str(tmp_path), "sigterm", *["handler"] * users_handler], processes=1, devices=2)
  try:
    deadline = time.monotonic() + 60
    while "ready" not in job.log(0):
      assert time.monotonic() < deadline, job.log(0)
      time.sleep(0.05)
    job.kill(0, signal.SIGTERM)
    (result,) = job.wait(60)
  finally:
    job.stop(grace=0)
  assert result.returncode == 143, result.log
  assert ("users handler" in result.log) == users_handler
  with ckpt.Checkpointer(tmp_path) as c:
    assert c.latest_step() >= 20


def test_cell_that_is_run_again_takes_over_on_all_processes_and_workers_can_be_terminated(tmp_path):
  run_afresh("cells", tmp_path)


def test_every_minutes_agrees_across_processes(tmp_path):
  results = run_all("minutes", tmp_path, 2)
  saved = {re.search(r"saved \[.*\]", r.log)[0] for r in results}
  assert len(saved) == 1 and saved != {"saved []"}


def test_process_local_array_in_a_job_of_many_is_refused_by_name(tmp_path):
  run_all("local", tmp_path, 2)


def test_first_failure_ends_the_others_and_shows_its_log(tmp_path):
  script = tmp_path / "fail.py"
  script.write_text(
    "import os, sys, time\n"
    "if os.environ['CKPT_JAX_PROCESS_INDEX'] == '1': sys.exit('disk on fire')\n"
    "print('my pid', os.getpid(), flush=True); time.sleep(600)\n"
  )
  begin = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", "ckpt_jax.multihost", "--processes", "3", str(script)],
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert time.monotonic() - begin < 300, "the others would sleep for 600 s"
  assert done.returncode == 1
  assert "process 1 failed with exit code 1" in done.stderr and "disk on fire" in done.stderr
  for pid in re.findall(r"my pid (\d+)", done.stdout):
    with pytest.raises(ProcessLookupError):
      os.kill(int(pid), 0)


def test_hanging_job_is_ended_with_a_message_that_names_its_processes(tmp_path):
  script = tmp_path / "hang.py"
  script.write_text("import time; time.sleep(600)\n")
  with pytest.raises(TimeoutError, match=r"waited 1 s for processes \[0, 1\] of 2"):
    launch([str(script)], processes=2, timeout=1)


def test_process_id_of_an_ended_process_is_not_reused_until_the_job_is_stopped(tmp_path, monkeypatch):
  """Process ids are reused, within minutes on a busy machine: a kill by a free id would hit another program."""
  script = tmp_path / "ends.py"
  script.write_text("import os, time; time.sleep(600 * int(os.environ['CKPT_JAX_PROCESS_INDEX']))\n")
  job = Job([str(script)], processes=2)
  try:
    os.waitid(os.P_PID, job.children[0].pid, os.WEXITED | os.WNOWAIT)
    job.kill(0)
    assert job.children[0].returncode is None
  finally:
    job.stop(grace=0)
  killed = []
  monkeypatch.setattr(os, "killpg", lambda pid, sig: killed.append(pid))
  job.stop(grace=0)
  assert killed == [] and [child.returncode for child in job.children] == [0, -signal.SIGKILL]


def test_ports_of_a_job_are_outside_the_range_of_outgoing_connections():
  low, high = map(int, pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
  assert not [port for port in (multihost.free_port() for _ in range(50)) if low <= port <= high]


def test_mistyped_script_exits_2(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "ckpt_jax.multihost", "nope.py"], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2 and "no such script: nope.py" in done.stderr


def test_uncaught_exception_in_one_process_ends_the_job_and_is_the_one_reported(tmp_path):
  program = tmp_path / "fails.py"
  program.write_text(
    "from ckpt_jax import multihost\n"
    "multihost.initialize()\n"
    "import jax, time\n"
    "if jax.process_index() == 1:\n"
    "  raise ValueError('process one is broken')\n"
    "time.sleep(600)\n"
  )
  started = time.monotonic()
  command = [sys.executable, "-m", "ckpt_jax.multihost", "--processes", "2", "--grace", "2", str(program)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=500)
  assert time.monotonic() - started < 300
  assert done.returncode != 0 and "process one is broken" in done.stderr and "process 1 failed" in done.stderr


def test_empty_launcher_variables_mean_one_process(monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "")
  monkeypatch.setenv("SLURM_NTASKS", "8")  # set by sbatch too, where nothing else runs
  multihost.initialize()


def test_failed_write_of_one_process_is_raised_on_all_and_the_next_save_works(tmp_path):
  results = run_all("one_fails", tmp_path, 4)
  for r in results:
    raised = re.search(r"raised after (\d+\.\d) s: .*step 1 was not saved: .*", r.log)
    assert raised and float(raised[1]) < 120, r.log
    assert "too large" in raised[0] and "newest committed step is 0" in raised[0]
  for r in (results[0], results[2], results[3]):
    assert "process 1 failed" in r.log
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [0, 2]


def test_processes_that_wait_for_the_directory_of_a_step_learn_that_it_cannot_be_made(tmp_path):
  for r in run_all("first_fails", tmp_path, 4):
    raised = re.search(r"raised after (\d+\.\d) s: .*step 1 was not saved: .*No space left", r.log)
    assert raised and float(raised[1]) < 120, r.log
    assert r.process == 0 or "process 0 failed" in r.log


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_process_that_does_not_see_the_run_of_the_others_is_named_at_once(tmp_path):
  own = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
  job = Job([str(pathlib.Path(TRAIN).with_name("own_disks.py")), str(tmp_path)], processes=2, prefixes=[[], own])
  try:
    results = job.wait(120)
  finally:
    job.stop(grace=0)
  for r in results:
    assert r.returncode == 0 and "made by another process of this job and is not there for this one" in r.log, r.log
  assert "process 1 failed" in results[0].log and not (tmp_path / "1").exists()


def test_processes_that_do_not_arrive_are_named(tmp_path):
  for r in run_all("one_is_late", tmp_path, 4):
    if r.process != 1:
      assert "timeout: waited 2 s for the late one; of 4 processes these did not arrive: 1" in r.log


def test_run_opened_again_and_again_by_the_same_processes_goes_on_saving(tmp_path):
  run_all("reopen", tmp_path, 2)
  with ckpt.Checkpointer(tmp_path) as c:
    assert [s.step for s in c.steps()] == [0, 1, 2, 3, 4, 5]
