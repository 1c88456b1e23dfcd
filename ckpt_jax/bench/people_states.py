"""Scenarios of `people_worker` about the states that are saved. Their descriptions are `people.PEOPLE`."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ckpt_jax.bench.common import public_functions
from ckpt_jax.bench.people_sides import Verdict, brief, is_right, line, small


def _back(side: Any, path: pathlib.Path, state: Any, like: Any = None) -> tuple[Any, str]:
  """Saves and restores a state. Returns it, or the error of the save or of the restore in words."""
  with side.open(path) as m:
    try:
      side.save(m, 0, state)
      side.wait(m)
    except Exception as e:
      return None, f"save refuses it: {line(e)}"
    try:
      return side.restore(m, 0, like=state if like is None else like), ""
    except Exception as e:
      return None, f"saved, and restore fails: {line(e)}"


def hydra_path(side: Any, work: pathlib.Path) -> Verdict:
  got, wrong = _back(side, work / "layers=[64,64],lr=0.1" / "run", small(3))
  if wrong:
    return wrong.startswith("save refuses"), wrong
  return is_right(got, small(3)), "saved and restored"


def odd_names(side: Any, work: pathlib.Path) -> Verdict:
  import jax.numpy as jnp

  state = {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)}
  got, wrong = _back(side, work / "run", state)
  if wrong:
    return wrong.startswith("save refuses"), wrong
  right = is_right(got, state)
  return right, "saved and restored" if right else "saved, and one leaf comes back with the other's values"


def nnx_sequential(side: Any, work: pathlib.Path) -> Verdict:
  import jax
  from flax import nnx

  def model(seed: int) -> Any:
    return nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(seed)), nnx.relu, nnx.Linear(2, 2, rngs=nnx.Rngs(seed + 1)))

  got, wrong = _back(side, work / "run", model(0), model(5))
  if wrong:
    return wrong.startswith("save refuses"), wrong
  right = is_right(jax.tree.leaves(got), jax.tree.leaves(model(0)))
  return right, "restored as a module" if right else "other values"


def single_array(side: Any, work: pathlib.Path) -> Verdict:
  import jax.numpy as jnp

  got, wrong = _back(side, work / "run", jnp.arange(4.0))
  if wrong:
    return wrong.startswith("save refuses"), wrong
  return is_right(got, jnp.arange(4.0)), f"comes back as {str(got)[:40]}"


def float_into_float32(side: Any, work: pathlib.Path) -> Verdict:
  import jax
  import jax.numpy as jnp

  def init() -> Any:
    return {"w": jnp.ones(4), "lr": 0.5}

  with side.open(work / "run") as m:
    for step in range(2):
      side.save(m, step, init() | {"lr": 0.1 * step})
    side.wait(m)
    try:
      got = side.restore(m, like=jax.eval_shape(init))
    except Exception as e:
      return False, line(e)
  steps = side.steps(work / "run")
  good = abs(float(got["lr"]) - 0.1) < 1e-6 and steps == [0, 1]
  return good, f"lr is {float(got['lr']):.3g}, steps {steps}"


def weak_types(side: Any, work: pathlib.Path) -> Verdict:
  import jax
  import jax.numpy as jnp

  def init() -> Any:
    return {"w": jnp.ones(4, jnp.bfloat16), "lr": jnp.asarray(0.1)}

  traced = []

  @jax.jit
  def step(s: Any) -> Any:
    traced.append(s)
    return {"w": s["w"] - s["lr"] * 0.3, "lr": s["lr"] * 0.9}

  state = step(init())
  want = step(state)
  compiled = len(traced)
  got, wrong = _back(side, work / "run", state, init())
  if wrong:
    return False, wrong
  resumed = step(got)
  more = len(traced) - compiled
  return not more and resumed["w"].dtype == want["w"].dtype, (
    f"uninterrupted the weights are {want['w'].dtype}, resumed {resumed['w'].dtype}; {more} new compilations"
  )


def x64_to_x32(side: Any, work: pathlib.Path) -> Verdict:
  import jax
  import jax.numpy as jnp

  with jax.enable_x64(True), side.open(work / "run") as m:
    side.save(m, 0, {"n": jnp.array([2**40 + 5])})
    side.wait(m)
  with side.open(work / "run") as m:
    try:
      got = side.restore(m, 0, like={"n": jax.ShapeDtypeStruct((1,), "int64")})["n"]
    except Exception as e:
      return True, f"an error: {line(e)}"
  return int(got[0]) == 2**40 + 5, f"2^40 + 5 comes back as {got.dtype} {int(got[0])}"


def abstract_mesh(side: Any, work: pathlib.Path) -> Verdict:
  import jax
  from flax import nnx
  from jax.sharding import AxisType

  jax.config.update("jax_num_cpu_devices", 8)
  seen = []
  for kind in (AxisType.Auto, AxisType.Explicit):
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)):
      init = nnx.with_partitioning(nnx.initializers.ones, ("x", "y"))

      def make(init: Any = init) -> Any:
        return nnx.Linear(8, 8, rngs=nnx.Rngs(0), kernel_init=init)

      path = work / str(kind)
      with side.open(path) as m:
        side.save(m, 0, nnx.state(make()))
        side.wait(m)
        try:
          got = side.restore(m, 0, like=nnx.state(nnx.eval_shape(make)))
          right = is_right(jax.tree.leaves(got), jax.tree.leaves(nnx.state(make())))
          seen.append("" if right else "other values")
        except BaseException as e:
          seen.append(f"{kind.name}: {line(e)}")
  wrong = [text for text in seen if text]
  return not wrong, "; ".join(wrong) or "restored on meshes of Auto and of Explicit axes"


def destroyed_item(side: Any, work: pathlib.Path) -> Verdict:
  import jax.numpy as jnp
  import numpy as np
  import orbax.checkpoint as ocp

  state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000, dtype=np.float32))}
  with ocp.CheckpointManager(work / "run") as m:
    m.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(small()), params=ocp.args.StandardSave(state)))
  for file in (work / "run" / "0" / "params").rglob("d/*"):
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
  if side.name == "ckpt_jax":
    import ckpt_jax as ckpt

    found = ckpt.verify(work / "run")
    return bool(found), f"verify: {len(found)} findings" + (f", first: {brief(found[0].message)}" if found else "")
  with ocp.CheckpointManager(work / "run") as m:
    try:
      got = m.restore(0, args=ocp.args.Composite(params=ocp.args.StandardRestore(state)))["params"]["w"]
    except Exception as e:
      return True, f"restore: {line(e)}"
  same = np.array_equal(got, state["w"])
  return same, "restored with other values, no error" if not same else "restored"


def unreadable(side: Any, work: pathlib.Path) -> Verdict:
  with side.open(work / "run") as m:
    for step in range(2):
      side.save(m, step, small(step))
    side.wait(m)
    file = work / "run" / "1" / "default" / "manifest.ocdbt"
    file.chmod(0)
    if os.access(file, os.R_OK):
      return False, "not tried: this process may read everything"
    try:
      got = float(side.restore(m, like=small())["w"][0])
      seen = f"restored step {got:.0f}"
    except Exception as e:
      seen = f"an error: {line(e)}"
    stays = file.exists()
    if stays:
      file.chmod(0o644)
    again = float(side.restore(m, like=small())["w"][0]) if stays else -1
  steps = side.steps(work / "run")
  return steps == [0, 1] and seen.startswith("an error") and again == 1, f"{seen}; steps afterwards {steps}"


def donation(side: Any, work: pathlib.Path) -> Verdict:
  import jax
  import jax.numpy as jnp

  state = {f"w{i}": jnp.full((256, 256), i, jnp.float32) for i in range(40)}
  got, wrong = _back(side, work / "run", state)
  if wrong:
    return False, wrong
  before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(got)}
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(jax.block_until_ready(step(got)))}
  count = len(before & after)
  return count == 40, f"{count} of 40 restored arrays are donated in place"


def infinity_meant(side: Any, work: pathlib.Path) -> Verdict:
  import jax.numpy as jnp

  state = {"w": jnp.ones(4), "mask": jnp.full(3, -jnp.inf), "best_loss": jnp.float32(jnp.inf)}
  got, wrong = _back(side, work / "run", state)
  return not wrong and is_right(got, state), wrong or "saved and restored"


def nan_by_accident(side: Any, work: pathlib.Path) -> Verdict:
  import jax.numpy as jnp
  import numpy as np

  error = ""
  with side.open(work / "run", last=1) as m:
    side.save(m, 0, small())
    side.wait(m)
    try:
      side.save(m, 1, {"w": jnp.full(1000, jnp.nan)})
      side.wait(m)
    except Exception as e:
      error = line(e)
  with side.open(work / "run") as m:
    finite = bool(np.isfinite(side.restore(m, like=small())["w"]).all())
  return finite, f"an error: {error}" if error else "saved without a word, and the last finite step is deleted"


STATES = public_functions(globals())
