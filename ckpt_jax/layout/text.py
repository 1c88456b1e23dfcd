"""Leaves that are text: one JSON file for all of an item's, as Orbax writes it.

Orbax writes the file leaf by leaf through TensorStore, with the names of leaves as JSON pointers: a tilde in a name
fails the save, and a slash opens an object: `a/b` is `{"a": {"b": ...}}`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from ckpt_jax.orbax.format import TEXTS


class TextHandler(ocp.type_handlers.StringHandler):
  """Orbax's handler of text, for leaves of any name."""

  async def serialize(
    self, values: Sequence[str], infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None
  ) -> Sequence[ocp.future.Future]:
    """See Orbax's."""
    del args
    write = self._write(dict(zip([info.name for info in infos], values, strict=True)), infos)
    return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="ckpt_jax_text")]

  async def _write(self, texts: Mapping[str, str], infos: Sequence[ocp.type_handlers.ParamInfo]) -> None:
    for info in infos:
      await info.await_path_creation()
    if jax.process_index() == 0:
      await asyncio.to_thread((infos[0].parent_dir / TEXTS).write_text, json.dumps(nested(texts)))


def nested(texts: Mapping[str, Any]) -> dict[str, Any]:
  """The content of the file."""
  top: dict[str, Any] = {}
  for name, text in texts.items():
    *parts, last = name.split("/")
    node = top
    for part in parts:
      node = node.setdefault(part, {})
    node[last] = text
  return top


def find(data: Any, name: str) -> Any:
  """The text of a leaf in the content of the file, ours or Orbax's.

  Raises:
    ValueError: if it is not there.
  """
  for parts in (name.split("/"), name.replace("~1", "/").replace("~0", "~").split("/")):
    node = data
    for part in parts:
      node = node.get(part) if isinstance(node, dict) else None
    if node is not None and not isinstance(node, dict):
      return node
  raise ValueError(f"{TEXTS} has no text for {name!r}")


def select(data: Any, names: Collection[str]) -> dict[str, Any]:
  """The content of the file, reduced to some leaves."""
  found = {}
  for name in names:
    try:
      found[name] = find(data, name)
    except ValueError:  # it is no text
      continue
  return nested(found)


def collisions(names: Iterable[str]) -> dict[str, str]:
  """Leaves that cannot be stored beside another one, and that one: text at `a` leaves no place for `a/b`."""
  taken = set(names)
  found = {}
  for name in taken:
    parts = name.split("/")
    above = next((a for n in range(1, len(parts)) if (a := "/".join(parts[:n])) in taken), None)
    if above is not None:
      found[name] = above
  return found
