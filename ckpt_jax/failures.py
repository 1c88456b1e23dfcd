"""The root cause of an error of Orbax, TensorStore or the operating system, without the secrets that it may quote."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator

from ckpt_jax.errors import CheckpointError, StorageError


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
  """Turns OSError into StorageError, with `what` in front."""
  try:
    yield
  except OSError as e:
    if isinstance(e, CheckpointError):
      raise
    path = os.fsdecode(e.filename) if e.filename is not None and not isinstance(e.filename, int) else what
    why = why_read_only(path, e) if is_read_only(e) else str(e.strerror or e)
    raise StorageError(f"{what}: {without_secrets(why)}") from e


def root_cause(error: BaseException) -> str:
  """The innermost message, on one line: Orbax wraps it in several layers of tasks and barriers."""
  *_, root = _causes(error)
  text = without_secrets(" ".join(str(root).split())) or type(root).__name__
  text = re.sub(r" ?\[tensorstore_spec(\[\d+\])?='\{.*?\}'\]", "", text)  # a page of JSON, before the reason
  text = re.sub(r" ?\[source locations=.*", "", text)
  # TensorStore's own words for an error of the operating system, which stands in the text already.
  text = re.sub(r"^[A-Z_]+: (.*) \[os_error_code='\d+'.*", r"\1", text)
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


# What TensorStore's status codes and gRPC's call a store that does not answer, or does not let us in ...
_UNREACHABLE = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b"
)
_OS_ERROR, _HTTP_STATUS = re.compile(r"os_error_code='(\d+)'"), re.compile(r"http_response_code='(\d+)'")
# ... and one that answers, with something else than was written.
_DAMAGED = re.compile(r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT)\b")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def is_unreachable(error: BaseException | None) -> bool:
  """Whether the storage failed to answer or refused access, rather than holding something damaged.

  Permissions, expired credentials, too many open files, stale handles, I/O errors, requests that are refused.
  """
  return any(map(_is_unreachable, _causes(error)))


def _is_unreachable(error: BaseException) -> bool:
  if isinstance(error, OSError):
    return isinstance(error, StorageError) or not isinstance(
      error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    )
  text = str(error)
  if (code := _OS_ERROR.search(text)) is not None:  # TensorStore gives it a status that says less
    return int(code[1]) not in _NOT_THERE
  if (code := _HTTP_STATUS.search(text)) is not None:
    return code[1] not in ("404", "410", "412", "416")
  return bool(_UNREACHABLE.search(text))


def is_damage(error: BaseException | None) -> bool:
  """Whether TensorStore found a file to be gone, cut short or undecodable. Anything else proves nothing of a step."""
  return any(isinstance(e, FileNotFoundError) or _DAMAGED.search(str(e)) for e in _causes(error))


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


def os_errors(error: BaseException | None) -> set[int]:
  """The numbers (`errno`) of the operating system's errors among the causes, TensorStore's too."""
  found: set[int] = set()
  for cause in _causes(error):
    if isinstance(cause, OSError) and cause.errno:
      found.add(cause.errno)
    found |= {int(code) for code in re.findall(r"os_error_code='(\d+)'", str(cause))}
  return found


def is_read_only(error: BaseException | None) -> bool:
  """Whether a file system that is mounted read-only, or missing permission, is among the causes."""
  return bool(os_errors(error) & {errno.EROFS, errno.EACCES, errno.EPERM})


def why_read_only(path: str, error: BaseException | None) -> str:
  """What `is_read_only` found, in words, with the way out.

  Args:
    path: what could not be written, or opened.
    error: why.
  """
  if errno.EROFS in os_errors(error):
    return "its file system is mounted read-only. Mount it writable, or use another directory"
  shown = path
  while not os.path.lexists(shown) and shown != os.path.dirname(shown):
    shown = os.path.dirname(shown)
  whose = ""
  with contextlib.suppress(OSError):
    info = os.lstat(shown)
    whose = f" ({shown} belongs to user {info.st_uid}, group {info.st_gid}, mode {stat.S_IMODE(info.st_mode):04o})"
  who = f"user {os.geteuid()}" if hasattr(os, "geteuid") else "this user"
  folder = os.path.isdir(shown)
  readable = os.access(
    shown, os.R_OK | os.X_OK if folder else os.R_OK, effective_ids=os.access in os.supports_effective_ids
  )
  what = f"it is read-only for {who}" if readable else f"{who} may not read it"
  return f"{what}: no permission{whose}. Change mode or owner, or use another directory"


def is_out_of_space(error: BaseException | None) -> bool:
  """Whether a full disk or quota is among the causes."""
  full = (errno.ENOSPC, errno.EDQUOT)
  return any(getattr(e, "errno", None) in full or "No space left" in str(e) for e in _causes(error))


def is_timeout(error: BaseException | None) -> bool:
  """Whether something that did not answer in time is among the causes."""
  return any(isinstance(e, TimeoutError) for e in _causes(error))
