"""The launch files, run as they are under stand-ins: they save on SIGTERM, start again and resume."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest
import yaml

import ckpt_jax as ckpt
from ckpt_jax.multihost import Job

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "configs" / "launch"
pytestmark = [pytest.mark.multiprocess, pytest.mark.usefixtures("lenient_jax")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def one_device_and_one_compilation(monkeypatch, compiled):
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setenv("PYTHONUNBUFFERED", "1")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))


def sbatch(cwd, *options):
  programs = cwd / "bin"
  programs.mkdir()
  for name in ("sbatch", "srun", "scontrol"):
    (programs / name).write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "programs" / "slurm.py").read_text())
    (programs / name).chmod(0o755)
  path = f"{programs}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  command = ["sbatch", *options, LAUNCH / "slurm.sh"]
  return subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300)


def test_slurm_script_saves_before_its_limit_requeues_itself_and_resumes(tmp_path):
  done = sbatch(tmp_path, f"--export=ALL,RUN={tmp_path}/run")
  log = (tmp_path / "slurm.out").read_text()
  assert done.stdout.splitlines() == ["life ended with 0, requeued"] * 2, done.stderr + log
  assert "2 processes: from scratch" in log
  resumed = int(re.search(r"2 processes: resumed from step (\d+)", log)[1])
  committed = sorted(int(p.name) for p in (tmp_path / "run").iterdir() if p.name.isdigit())
  assert resumed in committed and committed[-1] > resumed > 0  # the second life saved too


def test_slurm_script_that_fails_is_not_requeued(tmp_path):
  done = sbatch(tmp_path)
  assert done.returncode == 1 and done.stdout == "life ended with 1, not requeued\n"
  assert "set RUN to a shared directory" in (tmp_path / "slurm.out").read_text()


def job_and_pod(name):
  """The Job of a manifest, and the spec of its pods."""
  documents = list(yaml.safe_load_all((LAUNCH / name).read_text()))
  job = documents[-1]["spec"]
  job = job["replicatedJobs"][0]["template"]["spec"] if documents[-1]["kind"] == "JobSet" else job
  return documents, job, job["template"]["spec"]


@pytest.mark.parametrize("name", ["jobset.yaml", "job.yaml"])
def test_pods_are_numbered_find_each_other_and_have_time_to_save(name):
  documents, job, pod = job_and_pod(name)
  env = {v["name"]: v.get("value") or v["valueFrom"]["fieldRef"]["fieldPath"] for v in pod["containers"][0]["env"]}
  assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
  assert len(env) == 3 and env["CKPT_JAX_PROCESS_COUNT"] == str(job["completions"])
  assert env["CKPT_JAX_PROCESS_INDEX"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert pod["terminationGracePeriodSeconds"] >= 300
  own = documents[-1]["metadata"]["name"]
  host = f"{own}-trainer-0-0.{own}" if name == "jobset.yaml" else f"{own}-0.{pod['subdomain']}"
  assert env["CKPT_JAX_COORDINATOR"].split(":")[0] == host
  if name == "job.yaml":
    service = documents[0]
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": own}
  mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
  assert any(pod["containers"][0]["args"][1].startswith(f"{m}/") for m in mounts)


def test_pods_run_the_same_command_in_both_manifests():
  containers = [job_and_pod(name)[2]["containers"][0] for name in ("jobset.yaml", "job.yaml")]
  assert containers[0]["command"] == containers[1]["command"] and containers[0]["args"] == containers[1]["args"]


def test_pods_save_when_one_is_evicted_and_exit_with_143(tmp_path):
  container = job_and_pod("jobset.yaml")[2]["containers"][0]
  assert container["command"][0] == "python"
  argv = [*container["command"][1:], *container["args"]]
  trains = threading.Event()
  job = Job(  # sets the variables of the container
    [str(tmp_path / "run") if word == "/runs/lm" else word for word in argv],
    processes=2,
    on_line=lambda process, line: trains.set() if line.startswith("step ") else None,
  )
  try:
    assert trains.wait(120), job.log(0)
    job.kill(1, signal.SIGTERM)  # only the one whose node goes away
    results = job.wait(120, grace=60)
  finally:
    job.stop(grace=0)
  assert [r.returncode for r in results] == [143, 143], results[0].log
  assert ckpt.Checkpointer(tmp_path / "run").latest_step() > 0  # besides step 0, which the schedule saved


@pytest.mark.parametrize("page, file", [("slurm.md", "slurm.sh"), ("kubernetes.md", "jobset.yaml")])
def test_page_shows_the_file_that_is_shipped(page, file):
  assert (LAUNCH / file).read_text() in (ROOT / "docs" / "howto" / page).read_text()
