"""Which item of a step is restored, where a step has several."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath

from ckpt_jax.config import Config
from ckpt_jax.layout import contents
from ckpt_jax.layout.structure import path_name
from ckpt_jax.run.steps import is_tree, our_metadata


def item_to_read(
  step_dir: epath.Path, config: Config, item: str | None, like: Any, ours: dict[str, Any] | None = None
) -> str:
  """The name of the item that a restore takes.

  Args:
    step_dir: a committed step.
    config: its `item` says where the state is in steps that another program wrote.
    item: what was asked for; it must be there.
    like: the tree that is to be restored, or None. Of several trees, none of which is called as a state is, the only
      one with the leaves of `like` is taken.
    ours: `run.our_metadata`, if it was read.

  Raises:
    ConfigError: if there is no such item.
    SeveralItemsError: if it is not clear which is meant; the message names them.
  """
  if item is not None:
    return contents.item_name(step_dir, item)
  if ours is None:
    ours = our_metadata(step_dir)
  try:
    # A step that was saved before `Config.item` was set has its state elsewhere, one without items has but one.
    elsewhere = config.item is None or bool(ours) or is_tree(step_dir)
    return contents.item_name(step_dir, None if elsewhere else config.item, ours)
  except contents.SeveralItemsError as e:
    if like is not None:
      wanted = {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]}
      fitting = [name for name in e.names if {leaf.path for leaf in contents.saved_leaves(step_dir, name)} == wanted]
      if len(fitting) == 1:
        return fitting[0]
    raise
