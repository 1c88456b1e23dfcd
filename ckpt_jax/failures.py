"""What lies at the bottom of an error of Orbax, TensorStore or the operating system."""

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
  seen = error
  while (inner := seen.__cause__ or seen.__context__) is not None and inner is not seen:
    seen = inner
  text = without_secrets(" ".join(str(seen).split())) or type(seen).__name__
  text = re.sub(r" ?\[source locations=.*", "", text)
  if "more bytes than we reserved" in text:
    text += " (a shard is larger than limits.save_concurrency or limits.restore_concurrency; raise the limit above it)"
  # TensorStore's messages name the file first and the reason last.
  return text if len(text) <= 500 else f"{text[:250]} ... {text[-250:]}"


# What TensorStore's status codes and gRPC's call a store that does not answer, or does not let us in.
_UNREACHABLE = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b"
)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def is_unreachable(error: BaseException | None) -> bool:
  """Whether the storage failed to answer or refused access, rather than holding something damaged."""
  while error is not None:
    if isinstance(error, StorageError) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
      return True
    if _UNREACHABLE.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def without_secrets(text: str) -> str:
  """`text` with the values of credential variables and the signatures of signed URLs struck out."""
  for name in _SECRETS:
    value = os.environ.get(name)
    if value and len(value) > 3:
      text = text.replace(value, f"<{name}>")
  text = re.sub(r"<AWSAccessKeyId>.*?</AWSAccessKeyId>", "", text)
  return re.sub(r"(Signature|X-Amz-Credential|X-Amz-Security-Token|access_token)=[^&\s]+", r"\1=...", text)


def is_out_of_space(error: BaseException | None) -> bool:
  """Whether a full disk or quota is among the causes."""
  while error is not None:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def is_timeout(error: BaseException | None) -> bool:
  """Whether something that did not answer in time is among the causes."""
  while error is not None:
    if isinstance(error, TimeoutError):
      return True
    error = error.__cause__ or error.__context__
  return False
