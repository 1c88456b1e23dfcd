"""The root cause and the kind of errors of Orbax, TensorStore and the operating system, without quoted secrets."""

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
  """Within it, an OSError becomes a StorageError whose message begins with `what`."""
  try:
    yield
  except OSError as e:
    if isinstance(e, CheckpointError):
      raise
    path = os.fsdecode(e.filename) if e.filename is not None and not isinstance(e.filename, int) else what
    why = why_read_only(path, e) if is_read_only(e) else str(e.strerror or e)
    raise StorageError(f"{what}: {without_secrets(why)}") from e


def root_cause(error: BaseException) -> str:
  """The innermost message on one line; Orbax wraps it in several layers of tasks and barriers."""
  *_, root = _causes(error)
  text = without_secrets(" ".join(str(root).split())) or type(root).__name__
  text = re.sub(r" ?\[tensorstore_spec(\[\d+\])?='\{.*?\}'\]", "", text)  # a page of JSON, before the reason
  text = re.sub(r" ?\[source locations=.*", "", text)
  # TensorStore's status and code of an operating system's error, whose message is in the text already.
  text = re.sub(r"^[A-Z_]+: (.*) \[os_error_code='\d+'.*", r"\1", text)
  if "more bytes than we reserved" in text:
    text += " (a shard is larger than limits.save_concurrency or limits.restore_concurrency; raise the limit above it)"
  # TensorStore's messages name the file first and the reason last.
  return text if len(text) <= 500 else f"{text[:250]} ... {text[-250:]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """`error` and its causes, outermost first, as a traceback shows them: `from None` ends the chain."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:  # threads that raise each other's errors make cycles
    seen.add(id(error))
    yield error
    inner = error.__cause__
    error = error.__context__ if inner is None and not error.__suppress_context__ else inner


# Status codes of TensorStore and gRPC for a store that does not answer, or refuses access ...
_UNREACHABLE = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b"
)
_OS_ERROR, _HTTP_STATUS = re.compile(r"os_error_code='(\d+)'"), re.compile(r"http_response_code='(\d+)'")
# ... and for one that answers with something else than was written.
_DAMAGED = re.compile(r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT)\b")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def is_unreachable(error: BaseException | None) -> bool:
  """Whether storage did not answer or refused access, rather than holding something damaged.

  Causes are permissions, expired credentials, too many open files, stale handles, I/O errors and refused requests.
  """
  return any(map(_is_unreachable, _causes(error)))


def _is_unreachable(error: BaseException) -> bool:
  if isinstance(error, OSError):
    return isinstance(error, StorageError) or not isinstance(
      error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    )
  text = str(error)
  if (code := _OS_ERROR.search(text)) is not None:  # more precise than the status that TensorStore gives it
    return int(code[1]) not in _NOT_THERE
  if (code := _HTTP_STATUS.search(text)) is not None:
    return code[1] not in ("404", "410", "412", "416")
  return bool(_UNREACHABLE.search(text))


def is_damage(error: BaseException | None) -> bool:
  """Whether TensorStore found a file missing, cut short or undecodable; no other error proves a step to be damaged."""
  return any(isinstance(e, FileNotFoundError) or _DAMAGED.search(str(e)) for e in _causes(error))


def without_secrets(text: str) -> str:
  """`text` without the values of credential variables, signatures in URLs and headers, and passwords in URLs."""
  for name in _SECRETS:
    value = os.environ.get(name)
    if value and len(value) > 3:
      text = text.replace(value, f"<{name}>")
  text = re.sub(r"<AWSAccessKeyId>.*?</AWSAccessKeyId>", "", text)
  text = re.sub(r"(?i)(Signature|Credential|X-Amz-Security-Token|access_token)(=|: ?)[^&\s,]+", r"\1\2...", text)
  text = re.sub(r"(?i)(Authorization\W{1,5}Bearer )[^\s'\",]+", r"\1...", text)
  return re.sub(r"(\w://)[^/\s@:]*:[^/\s@]+@", r"\1...@", text)


def os_errors(error: BaseException | None) -> set[int]:
  """The `errno` numbers of the operating system's errors among the causes, including those that TensorStore reports."""
  found: set[int] = set()
  for cause in _causes(error):
    if isinstance(cause, OSError) and cause.errno:
      found.add(cause.errno)
    found |= {int(code) for code in re.findall(r"os_error_code='(\d+)'", str(cause))}
  return found


def is_read_only(error: BaseException | None) -> bool:
  """Whether a read-only file system or a missing permission is among the causes."""
  return bool(os_errors(error) & {errno.EROFS, errno.EACCES, errno.EPERM})


def why_read_only(path: str, error: BaseException | None) -> str:
  """Explains an error for which `is_read_only` holds, and says what to do.

  Args:
    path: the path that could not be written or opened.
    error: its error.
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
  """Whether a timeout is among the causes."""
  return any(isinstance(e, TimeoutError) for e in _causes(error))
