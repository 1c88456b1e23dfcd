"""Paths with the meaning that the file system or bucket gives them: no part of a name is a pattern, a URL or an escape.

TensorStore, epath and fsspec give more meaning to a path than the file system does. This module corrects what it can,
and refuses the rest, with the reason, before anything is written.
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
# First names of an absolute path that epath takes for the scheme of a URL: it stores gs://bucket/x as /gs/bucket/x.
_SCHEME_NAMES = ("gs", "s3", "az", "hf")
# Bytes for the longest path below a run, such as STEP.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp/
# ocdbt.process_N/d/ID.__lock, also below .ckpt_jax/rewriting/STEP/new.
_BELOW = 200
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def url_scheme(path: str | os.PathLike[str]) -> str:
  """`gs` of gs://bucket/x; empty for a path, also for one with `://` somewhere inside."""
  match = _SCHEME.match(os.fspath(path))
  return match[1] if match else ""


_Base: Any = type(epath.Path("/"))  # what epath.Path() makes on this system; the class itself is in a private module


class LiteralPath(_Base):
  """An epath path that is no pattern itself; only the argument of `glob` is one.

  epath joins path and pattern and passes both to `glob.glob`, so that a run in `layers=[64,64]/` finds none of its own
  files: Orbax then merges no OCDBT database and commits a step without its data. All paths of a run derive from that of
  `run_directory`, and stay of this class.
  """

  def glob(self, pattern: str) -> Iterator[epath.Path]:
    """Paths whose last part matches that of the pattern; parts before it name subdirectories."""
    *folders, last = pattern.split("/")
    if "**" in pattern or any(_MAGIC.search(folder) for folder in folders):
      raise NotImplementedError(f"{pattern}: only the last part may be a pattern")
    directory = self.joinpath(*folders)
    try:
      found = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
      return iter(())
    return iter([path for path in found if fnmatch.fnmatchcase(path.name, last)])


def given(path: Any) -> str:
  """The text of a path that a user passes, with the values of variables such as `$RUN`, unless a file is called so.

  Raises:
    ConfigError: if it is empty or no path, as from a variable that is not set, or a URL with one slash. The empty path
      would be the working directory.
    StorageError: if it is bytes.
  """
  try:
    text = os.fspath(path)
  except TypeError:
    text = ""
  if not isinstance(text, str):
    raise StorageError(f"{text!r}: a path must be text, not bytes", topic="run-directory")
  if not text.strip():
    raise ConfigError(
      f"the directory of a run is {path!r}; pass a path, gs://BUCKET/PATH or s3://BUCKET/PATH. Is the variable or the "
      'argument that should hold it set? The working directory is "."',
      topic="run-directory",
    )
  if (short := re.match(r"(gs|s3):/(?!/)", text)) is not None:
    raise ConfigError(
      f"{text}: a URL has two slashes: {short[1]}://{text[short.end() :]}; a directory of that name is ./{text}",
      topic="run-directory",
    )
  names = [match[1] or match[2] for match in _VARIABLE.finditer(text)]
  if not names or (not url_scheme(text) and os.path.lexists(os.path.expanduser(text))):
    return text
  for name in names:
    if not os.environ.get(name, "").strip():
      state = "is empty" if name in os.environ else "is not set"
      raise ConfigError(f"{text}: ${name} {state}; set it, or write the directory out", topic="run-directory")
  return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)


def literal(path: str | os.PathLike[str]) -> epath.Path:
  """An epath path for a local path or a gs:// or s3:// URL. Local ones become absolute, with `~` expanded.

  Raises:
    StorageError: for a path that TensorStore, which writes the data, cannot take, with the reason.
  """
  text = os.fspath(path)
  if isinstance(text, bytes):
    raise StorageError(f"{text!r}: a path must be text, not bytes", topic="run-directory")
  if url_scheme(text):
    check_url(text)
    return LiteralPath(text.rstrip("/"))
  text = absolute(text)
  check_local(text)
  return LiteralPath(text)


def absolute(text: str) -> str:
  """The absolute path of a local one. As for the system, `..` after a link means the parent of the link's target."""
  text = os.path.expanduser(text)
  parts = text.split("/")
  if ".." in parts:
    last = len(parts) - parts[::-1].index("..")
    text = os.path.join(os.path.realpath("/".join(parts[:last])), *parts[last:])
  return "/" + os.path.abspath(text).lstrip("/")


def check_local(text: str) -> None:
  """Refuses an absolute local path that TensorStore's file driver, epath or Orbax would take for another one.

  Raises:
    StorageError: with the reason, and what to do.
  """
  first = text.split("/")[1]
  problems = {
    "a path holds no null character": "\0" in text,
    "TensorStore reads a backslash in a path as a slash, and would write elsewhere": "\\" in text,
    "TensorStore reserves names that end with .__lock": any(part.endswith(".__lock") for part in text.split("/")),
    f"epath reads /{first}/ at the beginning of a path as {first}://": first in _SCHEME_NAMES,
    "Orbax reads gs:/ inside a path as gs://": "gs:/" in text,
    "the name is no UTF-8, which is all that TensorStore takes": not is_utf8(text),
  }
  for problem, found in problems.items():
    if found:
      raise StorageError(
        f"{text!r}: {problem}. Use another directory, or reach this one by a link with a plain name",
        topic="run-directory",
      )
  try:
    most = os.pathconf("/", "PC_PATH_MAX")
  except (OSError, ValueError, AttributeError):
    return
  if 0 < most < len(text.encode()) + _BELOW:
    raise StorageError(
      f"{text[:80]}...: {len(text.encode())} bytes are too long for a run: the system takes paths of {most}, and the "
      f"files of a step need {_BELOW} of them. Use a shorter path, or a link",
      topic="run-directory",
    )


def check_url(text: str) -> None:
  """Refuses a URL whose key a bucket or its client would not keep as it is.

  Raises:
    StorageError: with the reason.
  """
  key = text.partition("://")[2]
  if {".", ".."} & set(key.split("/")):
    raise StorageError(
      f"{text}: to a bucket . and .. are names, not directories; write the URL without them", topic="run-directory"
    )
  if re.search(r"[\x00-\x1f\x7f]", key):
    raise StorageError(
      f"{text!r}: control characters do not survive in the keys of a bucket; use another name", topic="run-directory"
    )
  if text.startswith("s3:") and "?versionId=" in key:
    raise StorageError(
      f"{text}: s3fs reads ?versionId= as the version of an object; use another name", topic="run-directory"
    )
  if not is_utf8(text):
    raise StorageError(f"{text!r}: is no UTF-8, which is all that a bucket takes", topic="run-directory")


def is_utf8(text: str) -> bool:
  """Whether a text has a form in UTF-8: not one with lone surrogates."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def files_beneath(directory: str) -> Iterator[str]:
  """The paths of all files beneath a local directory, and of links; what cannot be listed is left out."""
  return (os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names)
