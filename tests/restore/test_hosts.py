"""The cluster lab, on network namespaces, and what its results are shown as."""

import json
import pathlib
import subprocess

import pytest

from ckpt_jax.bench import hosts
from ckpt_jax.bench.cluster import available, cluster

DOCS = pathlib.Path(__file__).parents[2] / "docs"
needs_root = pytest.mark.skipif(not available(), reason="needs root and iproute2")


@needs_root
def test_hosts_have_their_own_names_and_storages_link_is_limited_and_counted():
  with cluster(2, mbit=80) as lab:
    first, second = lab.hosts
    name = subprocess.run([*second.prefix, "hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert name == second.name
    server = "import socket as s; l = s.create_server(('0.0.0.0', 7000)); c, _ = l.accept(); c.sendall(bytes(10**7))"
    client = (
      "import socket as s, time; t = time.time(); c = s.create_connection(('{0}', 7000)); n = 0\n"
      "while b := c.recv(1 << 20): n += len(b)\n"
      "print(n, time.time() - t)"
    )
    before = lab.storage_nbytes()[0]
    with subprocess.Popen([*lab.storage.prefix, "python3", "-c", server]) as sending:
      for _ in range(50):
        got = subprocess.run(
          [*first.prefix, "python3", "-c", client.format(lab.storage.address)], capture_output=True, text=True
        )
        if got.returncode == 0:
          break
      sending.wait(30)
    nbytes, seconds = got.stdout.split()
    assert int(nbytes) == 10**7
    assert float(seconds) > 0.7  # 80 Mbit/s: 1 s, less the megabyte that may burst
    assert 1.0 < (lab.storage_nbytes()[0] - before) / 10**7 < 1.1
  left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
  assert first.name not in left and not pathlib.Path("/etc/netns", first.name).exists()


@needs_root
@pytest.mark.multiprocess
def test_gather_on_real_hosts_reads_one_copy_over_the_link_and_is_exact():
  found = hosts.run([2], mbit=200, megabytes=24, repeats=1, peers=False, local=False)
  variants = found["hosts"]["2"]
  assert min(variants["direct"]["link_copies"]) > 1.95
  for name in ("gather", "broadcast"):
    assert max(variants[name]["link_copies"]) < 1.05
    assert variants[name]["bitwise"], name
  assert "| 2 | gather |" in hosts.table(found)


def test_document_shows_the_figures_that_were_measured():
  found = json.loads((DOCS / "hosts.json").read_text())
  assert hosts.table(found) in (DOCS / "many-hosts.md").read_text()
  assert all(v["bitwise"] for variants in found["hosts"].values() for n, v in variants.items() if n in hosts.OURS)
