"""Which settings are faster, by how much and how surely, from trials that scatter.

Trials come in rounds, each of which tries every candidate once in random order: a randomised complete block design, in
which a slow minute of the storage slows all candidates alike and cancels out. The model is

    log(seconds) = candidate + round + noise,

fitted by least squares, since rounds lack the candidates that were dropped before. The noise is pooled over all trials,
so that two rounds of ten candidates give nine degrees of freedom where each pair alone would give one (Montgomery,
"Design and Analysis of Experiments", chapter 4). Differences are tested by Student's t at 5% for all comparisons with
one candidate together (Bonferroni).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_ERROR = 0.05
# Two trials of one setting are never more alike than this share, however alike the few that were made.
_LEAST_NOISE = 0.01


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How candidates compare; they are numbered from 0.

  Attributes:
    logs: log of each candidate's seconds, but for a constant.
    covariance: of `logs`, in units of the noise.
    noise: standard deviation of log(seconds) from trial to trial.
    critical: Student's t from which a difference is no chance; infinite while the noise is not known.
  """

  logs: np.ndarray
  covariance: np.ndarray
  noise: float
  critical: float

  def ratio(self, a: int, b: int) -> float:
    """The seconds of `a` over those of `b`."""
    return math.exp(self.logs[a] - self.logs[b])

  def margin(self, a: int, b: int) -> float:
    """The true ratio is `ratio` times or divided by at most this factor; infinite while that is not known."""
    if a == b:
      return 1.0
    if math.isinf(self.critical):
      return math.inf
    variance = self.covariance[a, a] + self.covariance[b, b] - 2 * self.covariance[a, b]
    return math.exp(min(self.critical * self.noise * math.sqrt(max(variance, 0.0)), 700.0))

  def is_faster(self, a: int, b: int) -> bool:
    """Whether `a` takes less time than `b`, beyond the noise."""
    return self.ratio(a, b) * self.margin(a, b) < 1


def compare(trials: Sequence[tuple[int, int, float]], count: int) -> Comparison:
  """Fits the model.

  Args:
    trials: the candidate, the round and the seconds of each. Every candidate was tried.
    count: number of candidates.
  """
  from scipy.special import stdtrit

  rounds = {number: i for i, number in enumerate(sorted({number for _, number, _ in trials}))}
  design = np.zeros((len(trials), count + len(rounds) - 1))
  for row, (candidate, number, _) in zip(design, trials, strict=True):
    row[candidate] = 1.0
    if rounds[number]:  # the first round is what the others are measured from
      row[count + rounds[number] - 1] = 1.0
  logs = np.log([max(seconds, 1e-9) for _, _, seconds in trials])
  inverse = np.linalg.pinv(design.T @ design)
  fitted = inverse @ design.T @ logs
  freedom = len(trials) - np.linalg.matrix_rank(design)
  noise, critical = math.inf, math.inf
  if freedom > 0:
    noise = max(_LEAST_NOISE, math.sqrt(float(np.sum((logs - design @ fitted) ** 2)) / freedom))
    critical = float(stdtrit(freedom, 1 - _ERROR / max(1, count - 1)))
  return Comparison(fitted[:count], inverse[:count, :count], noise, critical)
