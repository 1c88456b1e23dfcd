"""Options that `ckpt-jax estimate` and `simulate` share: the hosts of a job, and how fast storage and network are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_jax.cli.common import number, size

if TYPE_CHECKING:
  from ckpt_jax.planning.estimate import Storage

ASSUMED_PER_HOST = 10**9  # bytes per second: what `tuning.assumed` has for Cloud Storage and S3


@dataclasses.dataclass(frozen=True)
class HostOptions:
  """The hosts of a job and their links."""

  params: Annotated[int | None, number(help="Number of parameters: 7b, 350M, 70e9.")] = None
  hosts: Annotated[int, typer.Option(min=1, help="Hosts of the job.")] = 1
  copies: Annotated[
    int, typer.Option(min=1, help="Replicas of the state over all hosts; 1: it is sharded over them.")
  ] = 1
  bandwidth: Annotated[int | None, size(help="Of the storage, all hosts together, per second.")] = None
  bandwidth_per_host: Annotated[int | None, size(help="Of one host to the storage, per second (default: 1GB).")] = None
  interconnect: Annotated[float, size(help="Between hosts, per second (default: 12.5GB).")] = 12.5e9

  def storage(self) -> Storage:
    """How fast the storage is; a bucket's usual speed if no bandwidth was given."""
    from ckpt_jax.planning.estimate import Storage

    per_host = self.bandwidth_per_host if self.is_measured else ASSUMED_PER_HOST
    return Storage(self.bandwidth, per_host, self.interconnect)

  @property
  def is_measured(self) -> bool:
    """Whether a bandwidth was given."""
    return self.bandwidth is not None or self.bandwidth_per_host is not None
