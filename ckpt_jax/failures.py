"""The root cause of an error of Orbax, TensorStore or the operating system, without the secrets that it may quote."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from ckpt_jax.errors import StorageError


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
  """Turns OSError into StorageError, with `what` in front."""
  try:
    yield
  except OSError as e:
    raise StorageError(f"{what}: {without_secrets(str(e.strerror or e))}") from e


def root_cause(error: BaseException) -> str:
  """The innermost message, on one line: Orbax wraps it in several layers of tasks and barriers."""
  *_, root = _causes(error)
  text = without_secrets(" ".join(str(root).split())) or type(root).__name__
  text = re.sub(r" ?\[source locations=.*", "", text)
  if "more bytes than we reserved" in text:
    text += " (a shard is larger than limits.save_concurrency or limits.restore_concurrency; raise the limit above it)"
  # TensorStore's messages name the file first and the reason last.
  return text if len(text) <= 500 else f"{text[:250]} ... {text[-250:]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """`error` and what it was raised because of, outermost first: what a traceback shows, `from None` respected."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:  # threads that raise each other's errors make circles
    seen.add(id(error))
    yield error
    inner = error.__cause__
    error = error.__context__ if inner is None and not error.__suppress_context__ else inner


# What TensorStore's status codes and gRPC's call a store that does not answer, or does not let us in.
_UNREACHABLE = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b"
)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def is_unreachable(error: BaseException | None) -> bool:
  """Whether the storage failed to answer or refused access, rather than holding something damaged."""
  return any(
    isinstance(e, StorageError)
    or (isinstance(e, OSError) and not isinstance(e, FileNotFoundError))
    or _UNREACHABLE.search(str(e))
    for e in _causes(error)
  )


def without_secrets(text: str) -> str:
  """`text` without the values of credential variables, what signs URLs and headers, and passwords in URLs."""
  for name in _SECRETS:
    value = os.environ.get(name)
    if value and len(value) > 3:
      text = text.replace(value, f"<{name}>")
  text = re.sub(r"<AWSAccessKeyId>.*?</AWSAccessKeyId>", "", text)
  text = re.sub(r"(?i)(Signature|Credential|X-Amz-Security-Token|access_token)(=|: ?)[^&\s,]+", r"\1\2...", text)
  text = re.sub(r"(?i)(Authorization\W{1,5}Bearer )[^\s'\",]+", r"\1...", text)
  return re.sub(r"(\w://)[^/\s@:]*:[^/\s@]+@", r"\1...@", text)


def is_out_of_space(error: BaseException | None) -> bool:
  """Whether a full disk or quota is among the causes."""
  full = (errno.ENOSPC, errno.EDQUOT)
  return any(getattr(e, "errno", None) in full or "No space left" in str(e) for e in _causes(error))


def is_timeout(error: BaseException | None) -> bool:
  """Whether something that did not answer in time is among the causes."""
  return any(isinstance(e, TimeoutError) for e in _causes(error))
