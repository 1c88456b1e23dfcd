"""Paths as the file system and the bucket take them: nothing in a name is a pattern, a URL or an escape.

TensorStore, epath and fsspec read more into a path than the file system does. What they misread is mended here where it
can be, and refused by name where it cannot, before anything is written.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from ckpt_jax.errors import ConfigError, StorageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MAGIC = re.compile(r"[*?[]")
# First names of an absolute path that epath reads as the scheme of a URL: it keeps gs://bucket/x as /gs/bucket/x.
_SCHEME_NAMES = ("gs", "s3", "az", "hf")
# The longest path below a run, with room for long numbers: STEP.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp/
# ocdbt.process_N/d/ID.__lock, or the like below .ckpt_jax/rewriting/STEP/new.
_BELOW = 200


def url_scheme(path: str | os.PathLike[str]) -> str:
  """`gs` of gs://bucket/x; empty for a path, also for one with `://` somewhere inside."""
  match = _SCHEME.match(os.fspath(path))
  return match[1] if match else ""


_Base: Any = type(epath.Path("/"))  # what epath.Path() makes on this system; the class itself is in a private module


class LiteralPath(_Base):
  """An epath path of which only the argument of `glob` is a pattern.

  epath joins path and pattern and gives both to `glob.glob`, so that a run in `layers=[64,64]/` finds none of its own
  files: Orbax then merges no OCDBT database and commits a step without its data. All paths of a run are made from
  `run_directory`'s, and stay of this class.
  """

  def glob(self, pattern: str) -> Iterator[epath.Path]:
    """The files of this directory, or of one named in front of the pattern's last part, whose names match."""
    *folders, last = pattern.split("/")
    if "**" in pattern or any(_MAGIC.search(folder) for folder in folders):
      raise NotImplementedError(f"{pattern}: only the last part may be a pattern")
    directory = self.joinpath(*folders)
    try:
      found = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
      return iter(())
    return iter([path for path in found if fnmatch.fnmatchcase(path.name, last)])


_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def given(path: Any) -> str:
  """The path that a user means: `$RUN/a` with the variable's value, unless a file is really called so.

  Raises:
    ConfigError: if it is empty or no path, as from a variable that is not set. Nothing may be written then: the empty
      path is the working directory.
    StorageError: if it is bytes.
  """
  try:
    text = os.fspath(path)
  except TypeError:
    raise ConfigError(
      f"the directory of a run is {path!r}; pass a path, gs://BUCKET/PATH or s3://BUCKET/PATH. Is the variable or the "
      "argument that should hold it set?"
    ) from None
  if not isinstance(text, str):
    raise StorageError(f"{text!r}: a path must be text, not bytes")
  if not text.strip():
    raise ConfigError(
      f"the directory of a run is {text!r}; pass a path, gs://BUCKET/PATH or s3://BUCKET/PATH. Is the variable that "
      'should hold it set? The working directory is "."'
    )
  names = [match[1] or match[2] for match in _VARIABLE.finditer(text)]
  if not names or (not url_scheme(text) and os.path.lexists(os.path.expanduser(text))):
    return text
  for name in names:
    if not os.environ.get(name, "").strip():
      state = "is empty" if name in os.environ else "is not set"
      raise ConfigError(f"{text}: ${name} {state}; set it, or write the directory out")
  return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)


def literal(path: str | os.PathLike[str]) -> epath.Path:
  """A path, or a gs:// or s3:// URL, with nothing in it that is a pattern. Local ones become absolute, `~` expanded.

  Raises:
    StorageError: naming what TensorStore, which writes the data, cannot take.
  """
  text = os.fspath(path)
  if isinstance(text, bytes):
    raise StorageError(f"{text!r}: a path must be text, not bytes")
  if url_scheme(text):
    check_url(text)
    return LiteralPath(text.rstrip("/"))
  text = absolute(text)
  check_local(text)
  return LiteralPath(text)


def absolute(text: str) -> str:
  """The absolute path of a local one. `..` behind a link goes where the system goes: up from where the link points."""
  text = os.path.expanduser(text)
  parts = text.split("/")
  if ".." in parts:
    last = len(parts) - parts[::-1].index("..")
    text = os.path.join(os.path.realpath("/".join(parts[:last])), *parts[last:])
  return "/" + os.path.abspath(text).lstrip("/")


def check_local(text: str) -> None:
  """What of an absolute local path TensorStore's file driver would read as another one.

  Raises:
    StorageError: naming it, and the way out.
  """
  problem = ""
  if "\0" in text:
    problem = "a path holds no null character"
  elif "\\" in text:
    problem = "TensorStore reads a backslash in a path as a slash, and would write elsewhere"
  elif any(part.endswith(".__lock") for part in text.split("/")):
    problem = "TensorStore keeps names that end with .__lock to itself"
  elif text.split("/")[1] in _SCHEME_NAMES:
    problem = f"epath reads {'/'.join(text.split('/')[:2])}/ at the beginning of a path as {text.split('/')[1]}://"
  elif "gs:/" in text:
    problem = "Orbax reads gs:/ inside a path as gs://"
  else:
    try:
      text.encode()
    except UnicodeEncodeError:
      problem = "the name is no UTF-8, which is all that TensorStore takes"
  if problem:
    raise StorageError(f"{text!r}: {problem}. Use another directory, or reach this one by a link with a plain name")
  try:
    most = os.pathconf("/", "PC_PATH_MAX")
  except (OSError, ValueError, AttributeError):
    return
  if 0 < most < len(text.encode()) + _BELOW:
    raise StorageError(
      f"{text[:80]}...: {len(text.encode())} bytes are too long for a run: the system takes paths of {most}, and the "
      f"files of a step need {_BELOW} of them. Use a shorter path, or a link"
    )


def check_url(text: str) -> None:
  """What the key of an object may not hold.

  Raises:
    StorageError: naming it.
  """
  key = text.partition("://")[2]
  if {".", ".."} & set(key.split("/")):
    raise StorageError(f"{text}: to a bucket . and .. are names, not directories; write the URL without them")
  if re.search(r"[\x00-\x1f\x7f]", key):
    raise StorageError(f"{text!r}: control characters do not survive in the keys of a bucket; use another name")
  if text.startswith("s3:") and "?versionId=" in key:
    raise StorageError(f"{text}: s3fs reads ?versionId= as the version of an object; use another name")
  try:
    text.encode()
  except UnicodeEncodeError:
    raise StorageError(f"{text!r}: is no UTF-8, which is all that a bucket takes") from None
