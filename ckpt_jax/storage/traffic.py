"""What this process has exchanged with storage so far: TensorStore's own counters, and those of the metadata requests.

They are totals of the whole process: of two Checkpointers that write at the same time each sees the traffic of both.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

_BUCKETS = ("gcs", "gcs_grpc", "s3")
_REQUESTS = ("read", "batch_read", "write", "list", "delete_range")
_metadata = {False: 0, True: 0}  # requests that gcsfs and s3fs sent, and those that they sent again
_counting = threading.Lock()


class Traffic(NamedTuple):
  """Totals since the process began, or the difference of two such.

  Attributes:
    requests: sent to object stores, retries included; 0 on disks.
    retries: requests that were sent again.
    nbytes_written, nbytes_read: through TensorStore, as stored: compressed, with its indexes.
  """

  requests: int = 0
  retries: int = 0
  nbytes_written: int = 0
  nbytes_read: int = 0

  def since(self, before: Traffic) -> Traffic:
    """What came after `before`."""
    return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


def traffic() -> Traffic:
  """The totals so far; takes some 50 microseconds."""
  import tensorstore as ts  # which takes a tenth of a second, and commands that read metadata do without

  found: dict[str, int] = {}
  for metric in ts.experimental_collect_matching_metrics("/tensorstore/kvstore/"):
    found[metric["name"]] = sum(int(v["value"]) for v in metric["values"] if isinstance(v.get("value"), int))

  def total(kinds: tuple[str, ...], names: tuple[str, ...]) -> int:
    return sum(found.get(f"/tensorstore/kvstore/{kind}/{name}", 0) for kind in kinds for name in names)

  retries = total(_BUCKETS, ("retries",)) + _metadata[True]
  everywhere = ("file", *_BUCKETS)
  return Traffic(
    total(_BUCKETS, _REQUESTS) + retries + _metadata[False],
    retries,
    total(everywhere, ("bytes_written",)),
    total(everywhere, ("bytes_read",)),
  )


def count_request(*, again: bool) -> None:
  """Counts a metadata request, or a retry of one."""
  with _counting:
    _metadata[again] += 1
