"""What repeated runs can tell: better, worse, or can't tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Literal

Verdict = Literal["higher", "lower", "can't tell"]


@dataclass(frozen=True)
class Difference:
    """Mean of one group of runs less the mean of another, with a confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Whether the first group's mean is higher or lower, or whether the interval holds zero."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "can't tell"


def spread(values: Sequence[float]) -> float:
    """Standard deviation between runs; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def difference(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Difference:
    """Welch's interval on the difference of two means (Welch 1947), for at least two runs each.

    With three seeds a side it is wide, as it should be: three runs do not tell much of a spread.
    """
    assert len(first) > 1
    assert len(second) > 1
    mean = fmean(first) - fmean(second)
    parts = [variance(group) / len(group) for group in (first, second)]
    if not sum(parts):
        return Difference(mean, mean, mean)
    from scipy.stats import t

    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(group) - 1) for part, group in zip(parts, (first, second), strict=True)
    )
    reach = float(t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(sum(parts))
    return Difference(mean, mean - reach, mean + reach)
