"""Many hosts restore one checkpoint over a storage link of fixed bandwidth: our strategies and Orbax's side by side.

Each host is a network namespace of `bench.cluster`; a bucket server is behind a link that `tc` limits. Bytes are read
from the counters of that link. All hosts share this machine's cores: what the link limits is as on a cluster, what the
cores limit gets worse with each host.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_jax.bench.buckets import gcs_process
from ckpt_jax.bench.cluster import Cluster, cluster
from ckpt_jax.bench.common import conditions, emit, facts_of, job_events, quiet
from ckpt_jax.bench.files import markdown
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import Job, free_port
from ckpt_jax.storage.show import drawn, new_figure

OURS = ("direct", "gather", "broadcast", "auto")
ORBAX = ("orbax", "orbax single replica")
_LEAF_NBYTES = 1024 * 2048 * 4


def run(
  hosts: Sequence[int],
  mbit: float = 400,
  megabytes: int = 100,
  repeats: int = 3,
  progress: Callable[[str], None] = lambda _: None,
  *,
  peers: bool = True,
  local: bool = True,
) -> dict[str, Any]:
  """Restores a state that every host holds whole, on one number of hosts after the other. Returns JSON-able data.

  Args:
    hosts: numbers of hosts.
    mbit: 10**6 bits per second of the storage's link.
    megabytes: 10**6 bytes of the state.
    repeats: restores that count, after one that also compiles.
    progress: called with a line before each measurement.
    peers: measure raw Orbax beside us.
    local: compare auto with direct on this machine's own disk too.
  """
  leaves = max(1, round(megabytes * 1e6 / _LEAF_NBYTES))
  nbytes = leaves * _LEAF_NBYTES
  one_copy_s = nbytes * 8 / (mbit * 1e6)
  found = conditions(mbit=mbit, nbytes=nbytes, leaves=leaves, repeats=repeats, one_copy_s=one_copy_s, hosts={})
  for count in hosts:
    with tempfile.TemporaryDirectory() as objects, cluster(count, mbit) as lab:
      port = free_port()
      on_storage = ("ip", "netns", "exec", lab.storage.name)
      with gcs_process(objects, "bucket", lab.storage.address, port, on_storage) as env:
        variants: dict[str, Any] = {}
        for part, names in (("ours", OURS), ("orbax", ORBAX))[: 1 + peers]:
          progress(f"{count} hosts: {', '.join(names)}")
          variants |= _job(lab, env, part, leaves, repeats, nbytes)
        found["hosts"][str(count)] = variants
  if local:
    progress("this machine's disk: direct and auto in turn")
    found["local disk"] = _local(leaves, max(5, repeats))
  return found


def _local(leaves: int, turns: int) -> dict[str, Any]:
  """Four processes of this machine restore from its own disk, by direct and by auto in turn."""
  with tempfile.TemporaryDirectory() as directory:
    said = job_events("on the local disk", [__name__, "local", str(leaves), str(turns), directory], processes=4)
  events = [event for event in said if "variant" in event]
  seconds = {n: [e["seconds"] for e in events if e["variant"] == n and e["turn"]] for n in ("direct", "auto")}
  return {
    "processes": 4,
    "replicas": 4,
    "nbytes": leaves * _LEAF_NBYTES,
    "turns": turns,
    "direct_s": statistics.median(seconds["direct"]),
    "auto_s": statistics.median(seconds["auto"]),
    "auto_strategy": events[-1]["report"]["strategy"],
    "why": events[-1]["report"]["why"],
    "all": seconds,
  }


def _job(
  lab: Cluster, env: dict[str, str], part: str, leaves: int, repeats: int, nbytes: int
) -> dict[str, dict[str, Any]]:
  variants: dict[str, dict[str, Any]] = {}
  counted = 0

  def line(process: int, text: str) -> None:
    nonlocal counted
    event = facts_of(text)
    if "begins" in event:
      counted = lab.storage_nbytes()[0]
    if "variant" not in event:
      return
    entry = variants.setdefault(
      event["variant"], {"cold_s": None, "warm_s": [], "link_copies": [], "bitwise": True, "report": None}
    )
    if "failed" in event:
      entry["failed"] = event["failed"]
      return
    if event["turn"] == 0:
      entry["cold_s"] = event["seconds"]
    else:
      entry["warm_s"].append(event["seconds"])
    entry["link_copies"].append(round((lab.storage_nbytes()[0] - counted) / nbytes, 4))
    entry["bitwise"] = entry["bitwise"] and event["bitwise"]
    entry["report"] = event["report"]

  coordinator = f"{lab.hosts[0].address}:{free_port()}"
  job = Job(
    ["-m", __name__, part, str(leaves), str(repeats)],
    processes=len(lab.hosts),
    env={**env, "CKPT_JAX_COORDINATOR": coordinator},
    prefixes=[h.prefix for h in lab.hosts],
    on_line=line,
  )
  try:
    results = job.wait(600)
  finally:
    job.stop(grace=0)
  if job.first_failed is not None:
    raise CheckpointError(f"{part} on {len(lab.hosts)} hosts: {results[job.first_failed].log[-2000:]}")
  for entry in variants.values():
    entry["warm_median_s"] = statistics.median(entry["warm_s"]) if entry["warm_s"] else None
  return variants


def table(found: dict[str, Any]) -> str:
  """The results as a Markdown table."""
  times = ("first, s", "compiled, s (median)", "times one copy")
  rows = []
  for count, variants in found["hosts"].items():
    for name, v in variants.items():
      if v.get("warm_median_s") is None:
        continue
      warm_s, copies = v["warm_median_s"], statistics.median(v["link_copies"])
      figures = (f"{x:.2f}" for x in (v["cold_s"], warm_s, warm_s / found["one_copy_s"], copies))
      rows.append((count, name, *figures, "yes" if v["bitwise"] else "NO"))
  return markdown(("hosts", "variant", *times, "copies through the link", "bitwise"), rows)


def plot(found: dict[str, Any], file: str | os.PathLike[str] | None = None) -> Any:
  """Draws seconds over hosts, and copies that went through the link.

  Args:
    found: the result of `run`.
    file: the file to write; None: return matplotlib's figure, for notebooks.

  Raises:
    ConfigError: if matplotlib is not installed, or cannot write the file.
  """
  figure = new_figure(11, 3.6)
  left, right = figure.subplots(1, 2)
  counts = sorted(int(n) for n in found["hosts"])
  for name in (*OURS, *ORBAX):
    there = [n for n in counts if found["hosts"][str(n)].get(name, {}).get("warm_median_s")]
    if not there:
      continue
    style = "s:" if name in ORBAX else "o-"
    left.plot(there, [found["hosts"][str(n)][name]["warm_median_s"] for n in there], style, label=name)
    copies = [statistics.median(found["hosts"][str(n)][name]["link_copies"]) for n in there]
    right.plot(there, copies, style, label=name)
  left.axhline(found["one_copy_s"], color="gray", linestyle="--", label="one copy over the link")
  title = f"{found['nbytes'] / 1e6:.0f} MB on every host, {found['mbit']:.0f} Mbit/s storage link"
  left.set(xlabel="hosts", ylabel="seconds to restore", ylim=(0, None), title=title, xticks=counts)
  right.set(xlabel="hosts", ylabel="copies through the link", ylim=(0, None), title="bytes read", xticks=counts)
  figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
  return drawn(figure, file)


# -- on a host


def _main() -> None:
  quiet()
  part, leaves, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  from ckpt_jax import multihost

  multihost.initialize()
  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("data", "fsdp"))
  sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  host = {}
  for i in range(leaves):
    values = np.random.default_rng(i).standard_normal((1024, 2048), dtype=np.float32)
    values.view(np.uint32)[0, :4] = (0x80000000, 1, 0x7FC00123, 0x80000001)  # -0.0, denormals, a NaN with a payload
    host[f"w{i}"] = values
  like = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for name, v in host.items()}

  def say(**event: Any) -> None:
    if jax.process_index() == 0:
      emit(**event)

  def measure(variant: str, restore: Callable[[], tuple[Any, Any]], turns: Sequence[int] = range(repeats + 1)) -> None:
    for turn in turns:
      multihost_utils.sync_global_devices(f"{variant} {turn}")
      say(begins=variant, turn=turn)
      time.sleep(0.3)  # the parent reads the counters meanwhile
      started = time.perf_counter()
      state, report = restore()
      jax.block_until_ready(state)
      seconds = time.perf_counter() - started
      same = all(
        np.asarray(shard.data).tobytes() == host[name][shard.index].tobytes()
        for name, leaf in state.items()
        for shard in leaf.addressable_shards
      )
      del state
      every = multihost_utils.process_allgather(np.array([seconds, float(same)], np.float32))
      say(
        variant=variant,
        turn=turn,
        seconds=round(float(every[:, 0].max()), 3),
        bitwise=bool(every[:, 1].all()),
        report=report,
      )

  if part in ("ours", "local"):
    _ours(measure, like, host, sharding, "gs://bucket/run" if part == "ours" else sys.argv[4], repeats)
  else:
    _orbax(measure, like)


def _ours(measure: Callable[..., None], like: Any, host: Any, sharding: Any, run: str, repeats: int) -> None:
  import jax

  import ckpt_jax as ckpt

  state = {n: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for n, v in host.items()}
  with ckpt.Checkpointer(run, ckpt.Config(health={"nonfinite": "ignore"})) as c:
    c.save(0, state)
    c.wait()
    del state

    def restore(strategy: str) -> tuple[Any, Any]:
      got = c.restore(0, like=like, strategy=strategy)
      assert got.report is not None
      predicted = {k: round(v, 2) for k, v in got.report.predicted.items()}
      return got.state, {"strategy": got.report.strategy, "why": got.report.why, "predicted": predicted}

    if run.startswith("gs://"):
      for strategy in OURS:
        measure(strategy, functools.partial(restore, strategy))
    else:  # in turn, since the speed of a disk varies
      for turn in range(repeats + 1):
        for strategy in ("direct", "auto"):
          measure(strategy, functools.partial(restore, strategy), [turn])


def _orbax(measure: Callable[..., None], like: Any) -> None:
  import jax
  import orbax.checkpoint as ocp

  def manager(handler: Any) -> ocp.CheckpointManager:
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.CheckpointManager(
      "gs://bucket/run", item_handlers=ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    )

  plain = manager(ocp.type_handlers.ArrayHandler())
  args = ocp.checkpoint_utils.construct_restore_args(like)
  measure("orbax", lambda: (plain.restore(0, args=ocp.args.PyTreeRestore(item=like, restore_args=args)), None))
  plain.close()
  single = manager(ocp.type_handlers.SingleReplicaArrayHandler(replica_axis_index=0, primary_replica_id=0))
  single_args = {
    name: ocp.type_handlers.SingleReplicaArrayRestoreArgs(
      sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, restore_type=jax.Array
    )
    for name, x in like.items()
  }
  measure(
    "orbax single replica",
    lambda: (single.restore(0, args=ocp.args.PyTreeRestore(item=like, restore_args=single_args)), None),
  )
  single.close()


if __name__ == "__main__":
  _main()
