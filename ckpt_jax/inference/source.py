"""What an export takes of a run: a step of it, and the part of the step that holds the parameters."""

from __future__ import annotations

import os
from collections.abc import Collection

from ckpt_jax.config.arguments import step_number
from ckpt_jax.config.sections import BestConfig
from ckpt_jax.errors import ConfigError, NoCheckpointError
from ckpt_jax.layout.description import ONCE
from ckpt_jax.policies.retention import best_steps
from ckpt_jax.restore.step import Step
from ckpt_jax.run import foreign
from ckpt_jax.run.steps import latest_committed, list_steps, newest_step, run_directory, step_directory

# Names of the node with the parameters, the usual ones first: flax's TrainState, then modules of nnx and others.
_PARAMS = (("params",), ("model", "module", "weights", "variables"))
_EMA = (("ema_params", "params_ema", "ema"),)
EVERYTHING = "."


def open_step(run: str | os.PathLike[str], step: int | str, item: str | None = None) -> tuple[int, Step]:
  """Opens a step, the training state of it or another `item`.

  `step` is its number; `latest`; `best`: that with the lowest metric `loss`, or `best:METRIC`, `best:METRIC:max`.

  Raises:
    NoCheckpointError: if there is no such step.
    ConfigError: for another word.
  """
  directory = run_directory(run)
  if newest_step(directory) is None:
    foreign.refuse(directory)
  if not isinstance(step, str):
    number = step_number(step)
  elif step == "latest":
    number = latest_committed(directory)
  elif step.split(":")[0] == "best":
    _, metric, mode = [*step.split(":"), "", ""][:3]
    wanted = BestConfig(metric=metric or "loss", mode=mode or "min")  # type: ignore[arg-type]
    found = best_steps(list_steps(directory), wanted)
    if not found:
      raise NoCheckpointError(
        f"{directory}: no step has a metric {wanted.metric!r}; name another: best:METRIC",
        topic="export-and-safetensors",
      )
    number = found[0]
  elif step.isdecimal():
    number = int(step)
  else:
    raise ConfigError(f"step: {step!r:.40}: expected a number, 'latest' or 'best:METRIC'")
  return number, Step(step_directory(directory, number), ONCE, item)


def parameters(paths: Collection[str], subtree: str | None, *, ema: bool, where: str) -> str:
  """The node of a state that holds the parameters, as a path; empty for the whole state.

  It is `subtree`, of which `.` is all of the state; else the node nearest to the top with a name that parameters have,
  with `ema` averaged ones, and it must be the only one.

  Args:
    paths: of all leaves.
    where: the step, for messages.

  Raises:
    ConfigError: if there is no such node, or several; the message names what there is at the top.
  """
  tops = ", ".join(sorted({path.split("/")[0] for path in paths})[:20])
  if subtree is not None:
    node = subtree.strip("/")
    if node == EVERYTHING:
      return ""
    if not any(path == node or path.startswith(f"{node}/") for path in paths):
      raise ConfigError(f"{where}: no leaf below {subtree!r}; at the top there are {tops}")
    return node
  for names in _EMA if ema else _PARAMS:
    split = [path.split("/") for path in paths]
    nodes = {"/".join(keys[: i + 1]) for keys in split for i, key in enumerate(keys) if key in names}
    depth = min((node.count("/") for node in nodes), default=0)
    nearest = sorted(node for node in nodes if node.count("/") == depth)
    if len(nearest) == 1:
      return nearest[0]
    if nearest:
      raise ConfigError(f"{where}: parameters may be {' or '.join(nearest)}; say which: subtree={nearest[0]!r}")
  what = "averaged parameters" if ema else "parameters"
  raise ConfigError(
    f"{where}: no node is called like {what}; at the top there are {tops}. Say which: subtree='NAME', or '.' for all"
  )
