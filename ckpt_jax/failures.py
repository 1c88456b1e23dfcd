"""What lies at the bottom of an error of Orbax, TensorStore or the operating system."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from ckpt_jax.errors import StorageError


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
  """Turns OSError into StorageError, with `what` in front."""
  try:
    yield
  except OSError as e:
    raise StorageError(f"{what}: {e.strerror or e}") from e


def root_cause(error: BaseException) -> str:
  """The innermost message, on one line: Orbax wraps it in several layers of tasks and barriers."""
  seen = error
  while (inner := seen.__cause__ or seen.__context__) is not None and inner is not seen:
    seen = inner
  text = " ".join(str(seen).split()) or type(seen).__name__
  if "more bytes than we reserved" in text:
    text += " (a shard is larger than limits.save_concurrency or limits.restore_concurrency; raise the limit above it)"
  return text if len(text) <= 400 else text[:400] + "..."


def is_out_of_space(error: BaseException | None) -> bool:
  """Whether a full disk or quota is among the causes."""
  while error is not None:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False
