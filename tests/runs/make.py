"""Makes the runs that tests/run/test_old_runs.py reads: small ones, by early versions of Orbax and flax, in all forms.

  python3.11 tests/runs/make.py [VERSION ...]     # all of them take 15 minutes, and the network

For each version it makes a virtual environment, runs itself in there, and packs what that wrote.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import venv

OLD = ["numpy<2", "setuptools"]
VERSIONS = {
  "0.2.4": ["jax==0.4.13", "jaxlib==0.4.13", "flax==0.6.11", "scipy<1.11", "tensorstore==0.1.39", "ml_dtypes<0.3"],
  "0.3.5": ["jax==0.4.13", "jaxlib==0.4.13", "flax==0.7.2", "scipy<1.11", "tensorstore==0.1.41", "orbax==0.1.9"],
  "0.4.8": ["jax==0.4.23", "jaxlib==0.4.23", "flax==0.8.0", "scipy<1.13", "tensorstore==0.1.52", "ml_dtypes<0.5"],
  "0.5.3": ["jax==0.4.25", "jaxlib==0.4.25", "flax==0.8.1", "scipy<1.13", "tensorstore==0.1.54"],
  "0.5.20": ["jax==0.4.26", "jaxlib==0.4.26", "flax==0.8.4", "scipy<1.14", "tensorstore==0.1.59"],
  "0.6.4": ["jax==0.4.31", "jaxlib==0.4.31", "flax==0.9.0", "tensorstore==0.1.64"],
  "0.7.0": ["jax==0.4.34", "jaxlib==0.4.34", "flax==0.10.0", "tensorstore==0.1.66"],
  "0.8.0": ["jax==0.4.35", "jaxlib==0.4.35", "flax==0.10.1", "tensorstore==0.1.67"],
  "0.9.1": ["jax==0.4.35", "jaxlib==0.4.35", "flax==0.10.1", "tensorstore==0.1.68"],
  "0.10.3": ["jax==0.4.37", "jaxlib==0.4.36", "flax==0.10.2", "tensorstore==0.1.71"],
  "0.11.25": ["jax==0.7.0", "jaxlib==0.7.0", "flax==0.11.2", "tensorstore==0.1.76"],
}


def values(seed=0):
  """The state that was saved, with numpy in place of jax arrays: always the same for a seed."""
  import ml_dtypes
  import numpy as np

  rng = np.random.default_rng(seed)
  return {
    "layers": [
      {"kernel": rng.standard_normal((3, 4)).astype(np.float32)},
      {"kernel": rng.integers(-9, 9, (2, 2)).astype(np.int8)},
    ],
    "bf16": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
    "mask": np.array([True, False, True]),
    "words": rng.integers(0, 2**32, (2,), dtype=np.uint32),
    "empty": {},
    "count": np.array(7, np.int32),
    "lr": 0.125,
    "step": 12,
  }


def state(seed=0):
  """What training held: all arrays but `words` are jax's."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  def on_device(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) and x.dtype != np.uint32 else x

  return jax.tree_util.tree_map(on_device, values(seed))


def write_all(out):
  """Writes the run of each form that the installed Orbax knows into a directory of its own."""
  import orbax.checkpoint as ocp

  early = ocp.__version__.startswith(("0.2.", "0.3.", "0.4."))  # without ocp.args

  @contextlib.contextmanager
  def manager(directory, *checkpointers, **options):
    if not checkpointers and early:
      checkpointers = (ocp.PyTreeCheckpointer(),)
    opened = ocp.CheckpointManager(directory, *checkpointers, **options)
    yield opened
    for method in ("wait_until_finished", "close"):
      getattr(opened, method, lambda: None)()

  def standard(directory):
    with manager(directory) as m:
      m.save(5, args=ocp.args.StandardSave(state()))
      m.save(6, args=ocp.args.StandardSave(state(1)))

  def pytree(directory):
    with manager(directory, options=ocp.CheckpointManagerOptions(best_fn=lambda m: m["loss"])) as m:
      m.save(5, args=ocp.args.PyTreeSave(state()), metrics={"loss": 0.5})

  def composite(directory):
    items = {"state": ocp.args.StandardSave(state()), "params": ocp.args.PyTreeSave(state(2))}
    with manager(directory, item_names=("state", "params", "data")) as m:
      m.save(5, args=ocp.args.Composite(**items, data=ocp.args.JsonSave({"position": 3})))

  def named(**options):
    def write(directory):
      with manager(directory, options=ocp.CheckpointManagerOptions(**options)) as m:
        m.save(12, state()) if early else m.save(12, args=ocp.args.StandardSave(state()))

    return write

  def legacy(directory):
    with manager(directory, ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True))) as m:
      m.save(5, state())

  def legacy_zarr(directory):
    with manager(directory, ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))) as m:
      m.save(5, state())

  def legacy_items(directory):
    data = ocp.Checkpointer(ocp.JsonCheckpointHandler())
    with manager(directory, {"state": ocp.PyTreeCheckpointer(), "data": data}) as m:
      m.save(5, {"state": state(), "data": {"position": 3}})

  def bare(kind):
    def write(directory):
      checkpointer = getattr(ocp, kind)()
      checkpointer.save(directory, state())
      getattr(checkpointer, "wait_until_finished", lambda: None)()

    return write

  def flax(through_orbax):
    def write(directory):
      import flax
      from flax.training import checkpoints

      flax.config.update("flax_use_orbax_checkpointing", through_orbax)
      for step in (1, 12):
        checkpoints.save_checkpoint(directory, state(step), step, keep=5)

    return write

  forms = {
    "standard": standard,
    "pytree": pytree,
    "composite": composite,
    "prefixed": named(step_prefix="ckpt"),
    "padded": named(step_format_fixed_length=8),
    "legacy": legacy,
    "legacy-zarr": legacy_zarr,
    "legacy-items": legacy_items,
    "bare-standard": bare("StandardCheckpointer"),
    "bare-pytree": bare("PyTreeCheckpointer"),
    "flax-msgpack": flax(False),
    "flax-orbax": flax(True),
  }
  for name, write in forms.items():
    directory = os.path.join(out, name)
    try:
      write(directory)
    except (TypeError, AttributeError) as e:
      print(f"  {name}: not known to this version: {e}")
      with contextlib.suppress(OSError):
        os.rmdir(directory)


def make(version):
  """One version: environment, runs, archive."""
  with tempfile.TemporaryDirectory() as scratch:
    home = pathlib.Path(scratch, "venv")
    venv.create(home, with_pip=True)
    pins = [f"orbax-checkpoint=={version}", *VERSIONS[version], *(OLD if version != "0.11.25" else [])]
    subprocess.run([home / "bin/pip", "install", "-q", *pins], check=True)
    out = pathlib.Path(scratch, version)
    subprocess.run(
      [home / "bin/python", __file__, "--inside", str(out)], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    with tarfile.open(pathlib.Path(__file__).parent / f"orbax-{version}.tar.xz", "w:xz") as archive:
      archive.add(out, version)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--inside"]:
    write_all(sys.argv[2])
  else:
    for wanted in sys.argv[1:] or VERSIONS:
      print(wanted)
      make(wanted)
