"""ckpt_jax and plain Orbax as people use them, behind the same calls."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

Verdict = tuple[bool, str]


class Ours:
  """ckpt_jax as its README uses it."""

  name = "ckpt_jax"

  def open(self, path: Any, *, every: int | None = None, last: int | None = None) -> Any:
    import ckpt_jax as ckpt

    config: dict[str, Any] = {"schedule": {"every_steps": every}} if every else {}
    return ckpt.Checkpointer(path, config | ({"retention": {"last": last}} if last else {}))

  def save(self, m: Any, step: int, state: Any, *, final: bool = False) -> bool:
    return m.save(step, state, final=final)

  def wait(self, m: Any) -> None:
    m.wait()

  def steps(self, path: Any) -> list[int]:
    """The committed steps, whichever program wrote them."""
    from ckpt_jax.run.steps import list_steps

    return [s.step for s in list_steps(path)]

  def restore(self, m: Any, step: int | None = None, like: Any = None) -> Any:
    return m.restore(step, like=like).state

  def start(self, m: Any, init: Callable[[], Any]) -> int:
    """The step at which training begins."""
    return m.restore_or_init(init).next_step


class Orbax:
  """`ocp.CheckpointManager` with StandardSave and StandardRestore, as Orbax's documentation uses it."""

  name = "orbax"

  def open(self, path: Any, *, every: int | None = None, last: int | None = None) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(save_interval_steps=every or 1, max_to_keep=last)
    return ocp.CheckpointManager(path, options=options)

  def save(self, m: Any, step: int, state: Any, *, final: bool = False) -> bool:
    import orbax.checkpoint as ocp

    return m.save(step, args=ocp.args.StandardSave(state))

  def wait(self, m: Any) -> None:
    m.wait_until_finished()

  def steps(self, path: Any) -> list[int]:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(path) as m:
      return sorted(m.all_steps(read=True))

  def restore(self, m: Any, step: int | None = None, like: Any = None) -> Any:
    import jax
    import orbax.checkpoint as ocp

    if step is None:
      m.reload()
      step = m.latest_step()
    if step is None:
      raise FileNotFoundError("no step")
    target = None if like is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return m.restore(step, args=ocp.args.StandardRestore(target))

  def start(self, m: Any, init: Callable[[], Any]) -> int:
    step = m.latest_step()
    if step is not None:
      self.restore(m, step, init())
    return 0 if step is None else step + 1


Side = Ours | Orbax
SIDES: dict[str, type[Ours] | type[Orbax]] = {"ckpt_jax": Ours, "orbax": Orbax}


where = "/nowhere"  # the scenario's directory, which messages leave out


def line(error: BaseException) -> str:
  """The beginning of an error, in one line."""
  return f"{type(error).__name__}: {brief(str(error))}"


def brief(text: str) -> str:
  """A message as one line of a table, without TensorStore's source locations."""
  text = " ".join(text.replace(where, "").split())
  text = re.sub(r" ?\[(source locations|tensorstore_spec|os_error_code).*", "", text)
  text = re.sub(r'Failed to open: "[^"]*": ', "", text)
  text = re.sub(r'Error (opening|reading) "[^"]*"( driver)?( in OCDBT database at local file "[^"]*")?: ', "", text)
  return textwrap.shorten(text, 125, placeholder=" ...")


def small(step: int = 0) -> dict[str, Any]:
  """A small state, which depends on the step."""
  import jax.numpy as jnp

  return {"w": jnp.full(1000, step, jnp.float32)}


def large(step: int) -> dict[str, Any]:
  """A state of 200 MB, whose write is long enough for an event in the middle of it."""
  import jax.numpy as jnp

  return {f"w{i}": jnp.full((2048, 2048), step + i, jnp.float32) for i in range(12)}


def is_right(state: Any, wanted: Any) -> bool:
  """Whether a state has every bit of the wanted one."""
  import jax
  import numpy as np

  a, b = jax.tree.leaves(state), jax.tree.leaves(wanted)
  return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
