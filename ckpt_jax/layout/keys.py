"""How the names of leaves become keys of a database, as Orbax makes them.

The keys that lead to a leaf are joined by dots; the chunks of an array are stored under that name and a slash,
`params.kernel/0.0`. A state in which two leaves would share a key is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

PACK_INDEX = "ckpt_jax_pack.json"  # in an item: where its packed arrays are
ARRAY_FILES = frozenset({".zarray", ".zattrs", ".zgroup", "zarr.json"})  # beside the chunks of an array
SLABS = "ckpt_jax.slab."  # and the number of the process
UNCHANGED = "unchanged."  # and a number: a database of leaves that do not change, inside that of a process


def prefix(name: str) -> str:
  """The common beginning of the keys of an array."""
  return name if not name or name.endswith("/") else f"{name}/"


def bounds(name: str) -> tuple[str, str]:
  """The least of the keys of an array, and the first key behind them."""
  return prefix(name), f"{prefix(name)[:-1]}0"  # "0" is the character after "/"


def owner(key: str, names: Collection[str]) -> str | None:
  """The one of some leaves to which a key may belong: NAME/.zarray, NAME/0.0, NAME/c/0/0, ...; None if none is."""
  end = key.rfind("/")
  while end > 0:
    for name in (key[:end], key[: end + 1]):
      if name in names:
        return name
    end = key.rfind("/", 0, end)
  return "" if "" in names else None


def problem(name: str) -> str | None:
  """Why a leaf cannot be stored under a name in the database; None if it can."""
  try:
    name.encode()
  except UnicodeEncodeError:
    return f"the name {name!r} is no UTF-8 text; rename it"
  if name.startswith(SLABS):
    return f"the name {name!r} is what ckpt_jax calls the slabs of packed steps; rename it"
  return None


def collisions(names: Iterable[str]) -> dict[str, str]:
  """Arrays that would be stored under the keys of another one, and that one: `a/` under those of `a`."""
  seen: dict[str, str] = {}
  found = {}
  for name in names:
    other = seen.setdefault(prefix(name), name)
    if other != name:
      found[name] = other
  return found
