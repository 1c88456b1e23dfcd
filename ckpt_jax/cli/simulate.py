"""`ckpt-jax simulate`: how often to save and what to keep, before the cluster is rented."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_jax.cli.common import Json, duration, grouped, print_json, print_table, size
from ckpt_jax.cli.hosts import HostOptions
from ckpt_jax.cli.retention import RetentionOptions
from ckpt_jax.config.units import duration_text, size_text
from ckpt_jax.errors import ConfigError

if TYPE_CHECKING:
  from ckpt_jax.planning import simulate as model

_TICKS = (0.1, 1, 10, 60, 300, 1800, 7200, 6 * 3600, 2 * 86400, 10 * 86400)  # seconds between saves
_UNITS = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class JobOptions:
  """The job to simulate besides its hosts: its state, and how fast it saves and restores."""

  nbytes: Annotated[int | None, size("--bytes", help="Bytes of the whole state, e.g. 782GiB.")] = None
  node_mtti: Annotated[float, duration(help="Mean time to interruption of one host (default: 90d).")] = 90 * 86400
  strategy: Annotated[str, typer.Option(help="Restore: direct, gather or broadcast.")] = "direct"
  blocking: Annotated[float | None, duration(help="Pause of training for a save (default: a copy at 5 GB/s).")] = None
  background: Annotated[float | None, duration(help="The write behind training (default: by the bandwidth).")] = None
  restart: Annotated[float, duration(help="From an interruption to the restore (default: 5m).")] = 300
  calibrate: Annotated[str | None, typer.Option(help="Take size, costs, MTTI and retention from this run.")] = None

  def job(self, of: HostOptions) -> tuple[model.Job, int, str]:
    """The job, the bytes of its state, and where the figures come from."""
    from ckpt_jax.planning import simulate as model
    from ckpt_jax.planning.estimate import copy_seconds, estimate

    if self.calibrate is not None:
      return model.calibrated(self.calibrate, self.restart)
    nbytes = self.nbytes
    if nbytes is None:
      if of.params is None:
        raise ConfigError("give --params, --bytes or --calibrate")
      nbytes = estimate(of.params).training_nbytes
    storage = of.storage()
    job = model.Job(
      self.node_mtti / of.hosts,
      self.blocking or copy_seconds(nbytes / of.hosts),
      self.background or storage.seconds(nbytes, of.hosts),
      self.restart,
      storage.restore_seconds(nbytes, of.hosts, self.strategy, of.copies),
    )
    return (
      job,
      nbytes,
      "given" if of.is_measured else "assumed: 1 GB/s a host; give --bandwidth or --bandwidth-per-host",
    )


@grouped
def simulate(
  hosts: HostOptions,
  of: JobOptions,
  retention: RetentionOptions,
  interval: Annotated[float | None, duration(help="Work between saves to look at, beside the best.")] = None,
  days: Annotated[float, typer.Option(help="How long storage is followed.")] = 30.0,
  thin_share: Annotated[float, typer.Option(help="What --thin leaves of a step; params without Adam: 1/3.")] = 1 / 3,
  seed: Annotated[int, typer.Option(help="Seed of the random interruptions.")] = 0,
  plot: Annotated[str | None, typer.Option(help="Draw goodput by interval, and storage, into this file.")] = None,
  as_json: Json = False,
) -> None:
  """Predict goodput, lost work and storage of a schedule and a retention: Monte Carlo beside Daly's closed form."""
  from ckpt_jax.planning import simulate as model

  job, nbytes, source = of.job(hosts)
  best = model.best_interval(job)
  lengths = sorted({best * factor for factor in _FACTORS} | ({interval} if interval else set()))
  rows = {
    length: dataclasses.asdict(model.simulate(job, length, seed=seed)) | {"closed_form": model.closed_form(job, length)}
    for length in lengths
  }
  own = of.calibrate is not None and retention == RetentionOptions()
  rules = model.retention_of(of.calibrate) if own else retention.rules()
  use = model.storage_use(rules, (interval or best) + job.blocking_s, nbytes, days, thin_share=thin_share)
  cost = retention.monthly_cost(use.mean_nbytes)
  if as_json:
    print_json(
      {"nbytes": nbytes, "hosts": hosts.hosts, "source": source}
      | dataclasses.asdict(job)
      | {"best": rows[best], "chosen": rows[interval] if interval else None, "intervals": list(rows.values())}
      | {"storage": {"steps": use.steps[-1:], "mean_nbytes": use.mean_nbytes, "peak_nbytes": use.peak_nbytes}}
      | {"cost_per_month": cost}
    )
  else:
    mtti, blocking, background, restart, restore = (
      duration_text(t) for t in (job.mtti, job.blocking_s, job.background_s, job.restart_s, job.restore_s)
    )
    typer.echo(
      f"state {size_text(nbytes)}; job interrupted every {mtti}; a save takes {blocking} from training and commits "
      f"{background} later; back after {restart} + {restore} of restore ({source})"
    )
    _print_rows(rows, {best: " best", interval: " asked"})
    if use.steps:
      typer.echo(retention.use_text(use, days))
  if plot is not None:
    _draw(plot, job, best, interval, use, retention, seed)


def _print_rows(rows: dict[float, dict[str, Any]], marks: dict[float | None, str]) -> None:
  headers = ("interval", "goodput", "90% of runs", "closed form", "saving", "done again", "down", "lost at a failure")
  cells = []
  for length, row in rows.items():
    shares = [f"{row[name]:.2%}" for name in ("closed_form", "saving", "rework", "down")]
    goodput = (f"{row['goodput']:.2%}", f"{row['low']:.2%} - {row['high']:.2%}")
    cells.append((duration_text(length) + marks.get(length, ""), *goodput, *shares, duration_text(row["lost_s"])))
  print_table(headers, cells)


def _draw(
  file: str,
  job: model.Job,
  best: float,
  interval: float | None,
  use: model.StorageUse,
  retention: RetentionOptions,
  seed: int,
) -> None:
  from ckpt_jax.storage.show import drawn, new_figure

  figure = new_figure(11, 4)
  left, right = figure.subplots(1, 2)
  _draw_goodput(left, job, best, interval, seed)
  _draw_storage(right, use, retention)
  drawn(figure, file)


def _draw_goodput(axes: Any, job: model.Job, best: float, interval: float | None, seed: int) -> None:
  import numpy as np

  from ckpt_jax.planning import simulate as model

  lengths = np.geomspace(best / 20, best * 20, 60).tolist()
  found = [model.simulate(job, length, seed=seed, trials=60) for length in lengths]
  axes.fill_between(lengths, [f.low for f in found], [f.high for f in found], alpha=0.2, label="90% of runs")
  axes.plot(lengths, [f.goodput for f in found], label="Monte Carlo")
  axes.plot(lengths, [model.closed_form(job, length) for length in lengths], "--", label="closed form (Daly)")
  axes.axvline(best, color="k", lw=1, label=f"best: {duration_text(best)}")
  if interval:
    axes.axvline(interval, color="r", lw=1, ls=":", label=f"asked: {duration_text(interval)}")
  axes.set(xscale="log", xlabel="work between saves", ylabel="goodput", ylim=(None, 1))
  ticks = [t for t in _TICKS if lengths[0] <= t <= lengths[-1]]
  axes.set_xticks(ticks, labels=map(duration_text, ticks))
  axes.minorticks_off()
  axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
  axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)  # off the lines


def _draw_storage(axes: Any, use: model.StorageUse, retention: RetentionOptions) -> None:
  """Bytes over days; on the right what they cost, if a price is known."""
  unit, size = next((u for u in _UNITS if use.peak_nbytes >= u[1]), _UNITS[-1])
  axes.plot(use.days, [n / size for n in use.nbytes])
  axes.set(xlabel="days", ylabel=f"{unit} stored", ylim=(0, None))
  if (price := retention.monthly_cost(size)) is not None:
    prices = axes.secondary_yaxis("right", functions=(lambda stored: stored * price, lambda money: money / price))
    prices.set_ylabel(f"{retention.currency} a month".strip())
