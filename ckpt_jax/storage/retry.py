"""Retries of HTTP requests to object stores: capped exponential backoff with full jitter under one total deadline.

For the small metadata requests, which go through fsspec. The retries of gcsfs start at one second, those of botocore at
up to one: a save makes some ten requests one after another, and with one in five failing that adds tens of seconds.
TensorStore, which moves the data, gets the same figures in its own terms (clients.py).
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

from ckpt_jax.config import RetryConfig
from ckpt_jax.storage.traffic import count_request

RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_NAMES = {429: "429 Too Many Requests", 503: "503 Service Unavailable"}


_LARGE_NBYTES = 2**20  # of a body that is not sent before the store wants it
_UNRESOLVED_S = 5.0  # for a host that never answered and whose name is not known: it will not be in a minute either
_answered: set[str] = set()  # hosts
# Not the module's generator: hosts that a trainer has seeded alike would retry at the same moments, and a retry would
# change the numbers that the trainer draws.
_jitter = random.SystemRandom()


class GaveUpError(Exception):
  """The deadline of a request has passed. Not an OSError, which aiohttp and gcsfs would retry."""


def longest_delay(retry: RetryConfig, attempt: int) -> float:
  """The longest wait before retry number `attempt` (from 0) in seconds: min(max_delay, initial_delay * 2**attempt)."""
  return min(retry.max_delay, retry.initial_delay * 2 ** min(attempt, 60))


def delay(retry: RetryConfig, attempt: int) -> float:
  """Seconds to wait before retry number `attempt`, from 0: uniform between 0 and the longest, called full jitter.

  M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015.
  """
  return _jitter.uniform(0, longest_delay(retry, attempt))


def max_retries(retry: RetryConfig) -> int:
  """How many retries fit the deadline when each waits its longest: for clients that count instead of timing."""
  spent, count = 0.0, 0
  while spent < retry.deadline:
    spent += longest_delay(retry, count)
    count += 1
  return count


async def send(
  attempt: Callable[[], Awaitable[tuple[int, Any]]],
  discard: Callable[[Any], Any],
  transient: tuple[type[BaseException], ...],
  retry: RetryConfig,
  what: str,
) -> Any:
  """The answer to a request once its HTTP status is not one of RETRIED_STATUS.

  Args:
    attempt: sends the request and returns the status and the answer.
    discard: releases an answer that is not used; an awaitable that it returns is awaited.
    transient: exceptions after which the request may succeed later.
    retry: the limits.
    what: names the request in the error.

  Raises:
    GaveUpError: when the deadline has passed, with the last failure.
  """
  started = time.monotonic()
  deadline, tries = retry.deadline, 0
  host = urllib.parse.urlsplit(what.split(" ", 1)[-1]).hostname or ""
  while True:
    count_request(again=tries > 0)
    try:
      status, answer = await attempt()
      _answered.add(host)
      if status not in RETRIED_STATUS:
        return answer
      failure = _NAMES.get(status, f"status {status}")
      released = discard(answer)
      if released is not None:
        await released
    except transient as e:
      failure = f"{type(e).__name__}: {e}"
      if host not in _answered and _is_unresolved(e):
        deadline = min(deadline, _UNRESOLVED_S)
        failure = f"the name of its host, {host}, is not known here; check the URL and the endpoint ({failure})"
    wait = delay(retry, tries)
    tries += 1
    spent = time.monotonic() - started
    if spent + wait > deadline:
      raise GaveUpError(
        f"{what}: gave up after {tries} tries in {spent:.1f} s: {failure}. The store is overloaded or cannot be "
        "reached; storage.retry.deadline sets how long to go on"
      )
    await asyncio.sleep(wait)


def _is_unresolved(error: BaseException | None) -> bool:
  while error is not None and not isinstance(error, socket.gaierror):
    error = error.__cause__ or error.__context__
  return error is not None


def gcs_middleware(retry: RetryConfig) -> Any:
  """An aiohttp client middleware that retries."""
  import aiohttp

  transient = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)

  async def middleware(request: Any, handler: Any) -> Any:
    async def attempt() -> tuple[int, Any]:
      answer = await handler(request)
      return answer.status, answer

    what = f"{request.method} {request.url.with_query(None)}"
    return await send(attempt, lambda answer: answer.release(), transient, retry, what)

  return middleware


def s3_session_class(retry: RetryConfig) -> type:
  """An aiobotocore HTTP session that retries; botocore's own retries are to be switched off."""
  from aiobotocore.httpsession import AIOHTTPSession
  from botocore import exceptions

  transient = (exceptions.HTTPClientError, exceptions.ConnectionError, asyncio.TimeoutError)

  class RetryingSession(AIOHTTPSession):
    async def send(self, request: Any) -> Any:
      async def attempt() -> tuple[int, Any]:
        if hasattr(request.body, "seek"):
          request.body.seek(0)
        # botocore has every body wait for the server's leave to be sent: a round trip, as long as a small one takes.
        if int(request.headers.get("Content-Length") or _LARGE_NBYTES) < _LARGE_NBYTES:
          request.headers.pop("Expect", None)
        answer = await AIOHTTPSession.send(self, request)
        return answer.status_code, answer

      what = f"{request.method} {request.url.partition('?')[0]}"
      return await send(attempt, lambda answer: answer.content, transient, retry, what)

  return RetryingSession
