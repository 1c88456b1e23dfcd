"""One answer for all processes: process 0 looks at storage or the clock, or all say what they have.

Nothing travels between the devices: a collective has no time limit and names nobody, and one that was given up would
hold up whatever the devices do next.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from ckpt_jax import errors
from ckpt_jax.errors import CheckpointError
from ckpt_jax.job.rendezvous import Combine, PeerFailedError, Rendezvous

T = TypeVar("T")
_SHOWN = 3  # processes that differ, and differences of each


def meet(
  rendezvous: Rendezvous,
  what: str,
  text: str = "",
  *,
  timeout: float,
  error: BaseException | None = None,
  combine: Combine = list,
) -> list[str]:
  """Waits for all processes, and returns the texts of all of them, by process. A single process waits for nothing.

  Args:
    rendezvous: where they meet.
    what: what is waited for, the same on all processes.
    text: this process's contribution; short.
    timeout: seconds.
    error: what went wrong on this process; then all of them raise. One that is no CheckpointError, a bug, is raised as
      it is here, and the others raise a PeerFailedError.
    combine: see `Rendezvous.exchange`; called only if no process had an error.

  Raises:
    CheckpointError: of the kind of the first `error`, with the same message on all processes.
    TimeoutError, PeerFailedError: see `Rendezvous.exchange`.
  """
  if error is not None and (jax.process_count() == 1 or not isinstance(error, CheckpointError)):
    rendezvous.fail(f"{type(error).__name__}: {error}")
    raise error
  said = json.dumps({"text": text} if error is None else error_to_json(error))

  def combined(said: list[str]) -> list[str]:
    answers = list(map(json.loads, said))
    if any("error" in answer for answer in answers):
      return said
    return [json.dumps({"text": text}) for text in combine([answer["text"] for answer in answers])]

  answers = [json.loads(answer) for answer in rendezvous.exchange(what, said, timeout, combined)]
  failed = {process: answer for process, answer in enumerate(answers) if "error" in answer}
  if failed:
    raise _common(failed, len(answers)) from error
  return [answer["text"] for answer in answers]


def decided_by_process_zero(
  decide: Callable[[], T], rendezvous: Rendezvous, timeout: float, what: str = "what process 0 decides"
) -> T:
  """The result of `decide` on process 0, or the error that it raises there, on every process.

  A bug, an error that is not a CheckpointError, is raised as it is on process 0 and as a PeerFailedError on the others.

  Args:
    decide: called on process 0 only; may take its time. What it returns fits into JSON.
    rendezvous: where the others wait meanwhile.
    timeout: seconds that the others wait for it, and a minute.
    what: what they wait for.

  Raises:
    PeerFailedError: if not all processes arrive; it names them.
  """
  if jax.process_count() == 1:
    return decide()
  answer: dict[str, Any] = {}
  bug: Exception | None = None
  if jax.process_index() == 0:
    try:
      answer = {"decided": decide()}
    except CheckpointError as e:
      answer = error_to_json(e)
    except Exception as e:
      bug = e
      answer = error_to_json(PeerFailedError(f"process 0 failed: {type(e).__name__}: {e}"))
  try:
    answer = json.loads(rendezvous.exchange(what, json.dumps(answer), timeout + 60)[0])
  except TimeoutError as e:
    raise PeerFailedError(str(e)) from None
  if bug is not None:
    raise bug
  if "error" in answer:
    raise error_from_json(answer)
  return answer["decided"]


def digest(facts: Mapping[str, str]) -> str:
  """A short text, the same on all processes whose facts, and their order, are the same."""
  return hashlib.sha256(_text(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def who_differs(
  facts: Mapping[str, str],
  digests: Sequence[str],
  decided: Callable[[Callable[[], str]], str],
  exchange: Callable[[str], Sequence[str]],
) -> str:
  """Which processes have other facts than process 0, and which; empty if none has. All processes call it alike.

  All that is sent while they agree is a digest: the coordinator passes the texts of all processes to all.

  Args:
    facts: of this process, by name; the order counts, since what is done for each is done in this order.
    digests: of the facts of all processes, by process.
    decided: gives process 0's text to all.
    exchange: gives the texts of all to all.
  """
  if len(set(digests)) == 1:
    return ""
  packed = decided(lambda: base64.b85encode(zlib.compress(_text(facts).encode("utf-8", "surrogatepass"))).decode())
  text = zlib.decompress(base64.b85decode(packed)).decode("utf-8", "surrogatepass")
  first = dict(line.split("\t", 1) for line in text.split("\n") if line)
  found = [f"process {p}: {text}" for p, text in enumerate(exchange(_differences(facts, first))) if text]
  more = f" (and {len(found) - _SHOWN} more processes)" if len(found) > _SHOWN else ""
  return "; ".join(found[:_SHOWN]) + more


def error_to_json(error: BaseException) -> dict[str, Any]:
  """An error, for the other processes."""
  said = {name: getattr(error, name, None) for name in ("step", "topic")}
  return {"error": type(error).__name__, "message": str(error), **said}


def error_from_json(data: dict[str, Any]) -> CheckpointError:
  """The error of another process; a CheckpointError if its class is unknown."""
  kind = getattr(errors, data["error"], CheckpointError)
  if not (isinstance(kind, type) and issubclass(kind, CheckpointError)):
    kind = CheckpointError
  step = [data["step"]] if issubclass(kind, errors.SaveFailedError) else []
  return kind(data["message"], *step, topic=data["topic"])


def _common(failed: dict[int, dict[str, Any]], count: int) -> CheckpointError:
  """The error of the first process that failed, with the processes that share it."""
  first = failed[min(failed)]
  same = [p for p, answer in failed.items() if answer["message"] == first["message"]]
  if len(same) == count:
    return error_from_json(first)
  who = ", ".join(map(str, same[:10])) + (" and others" if len(failed) > min(len(same), 10) else "")
  return error_from_json(
    first | {"message": f"{'process' if len(same) == 1 else 'processes'} {who}: {first['message']}"}
  )


def _text(facts: Mapping[str, str]) -> str:
  return "\n".join(f"{name}\t{fact}" for name, fact in facts.items())


def _differences(mine: Mapping[str, str], first: Mapping[str, str]) -> str:
  if list(mine.items()) == list(first.items()):
    return ""
  both = [(name, fact) for name, fact in first.items() if name in mine]
  found = [f"{name} is {mine[name]}, on process 0 {fact}" for name, fact in both if mine[name] != fact]
  found += [f"{name} ({fact}) is not on process 0" for name, fact in mine.items() if name not in first]
  found += [f"{name} ({fact}) is only on process 0" for name, fact in first.items() if name not in mine]
  more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
  return ", ".join(found[:_SHOWN] or ["the order of what it holds"]) + more
