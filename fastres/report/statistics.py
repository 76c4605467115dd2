"""Differences between the runs of two groups, and how sure they are. The t distribution and its tests are SciPy's."""

import math
import warnings
from typing import NamedTuple

import pandas as pd
import scipy

CONFIDENCE = 0.95
TOST = 0.90  # confidence whose interval is inside the margin when two one-sided tests at 5 % are both significant
EFFECT_VARIANCE = 4.0  # of the prior of mean / standard deviation in ``anytime_interval``
MOST_SEEDS = 1000  # looked ahead to


class Difference(NamedTuple):
    """A difference between two means, and its confidence interval from ``low`` to ``high``.

    df: degrees of freedom of the t distribution. NaN, like the interval, where there are too few runs.
    pairs: the number of seeds by which the runs were paired; 0 for unpaired runs.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    df: float = math.nan
    pairs: int = 0

    def text(self, digits: int = 2) -> str:
        """``+1.50 (+0.25 to +2.75)``; only the value if there is no interval; empty for NaN."""
        interval = "" if math.isnan(self.low) else f" ({self.low:+,.{digits}f} to {self.high:+,.{digits}f})"
        return "" if math.isnan(self.value) else f"{self.value:+,.{digits}f}{interval}"

    @property
    def sign(self) -> int | None:
        """1 or -1 for an interval above or below 0; 0 if it includes 0; None if there is no interval."""
        return None if math.isnan(self.low) else int(self.low > 0) - int(self.high < 0)


def difference(ours: pd.Series, theirs: pd.Series, confidence: float = CONFIDENCE) -> Difference:
    """The mean of ``ours`` minus the mean of ``theirs``, whose index is the seed.

    Paired over the seeds that both have, if there are two of them (Student's t test); otherwise unpaired (Welch's).
    """
    shared = ours.index.intersection(theirs.index)
    paired = len(shared) > 1
    if paired:
        ours, theirs = ours[shared], theirs[shared]
    value = ours.mean() - theirs.mean()
    if min(len(ours), len(theirs)) < 2:
        return Difference(value)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # about equal values, whose error is 0
        test = scipy.stats.ttest_rel(ours, theirs) if paired else scipy.stats.ttest_ind(ours, theirs, equal_var=False)
        low, high = test.confidence_interval(confidence)
        return Difference(value, low, high, test.df, len(shared) * paired)


def anytime_interval(changes: pd.Series, error_rate: float) -> Difference:
    """The mean of ``changes``, and an interval that may be looked at after every one of them.

    The probability that any of the intervals of a growing sample misses the mean is at most ``error_rate``, if the
    changes are normally distributed. It inverts the Bayes factor of the t test with a normal prior of the effect size
    (Gönen et al., "The Bayesian two-sample t test", 2005), which is a test martingale (Wang & Ramdas, "Anytime-valid
    t-tests and confidence sequences for Gaussian means with unknown variance", 2025, arXiv:2310.03722).
    """
    return _anytime_interval(len(changes), changes.mean(), changes.std(), error_rate)


def _anytime_interval(n: int, mean: float, deviation: float, error_rate: float) -> Difference:
    growth = 1 + n * EFFECT_VARIANCE
    ratio = (math.sqrt(growth) / error_rate) ** (2 / n)
    width = math.inf
    if n > 1 and ratio < growth:
        t = math.sqrt((n - 1) * (ratio - 1) / (1 - ratio / growth))
        width = t * deviation / math.sqrt(n)
    return Difference(mean, mean - width, mean + width, n - 1, n)


class Judgement(NamedTuple):
    """Of a published figure: the interval in which another seed of ours would lie, infinite for one seed, and whether
    the figure agrees with ours, in words."""

    low: float
    high: float
    verdict: str


def judge(published: float, ours: pd.Series, error: float, rounding: float, constant: bool = False) -> Judgement:
    """Whether a ``published`` figure of one run, known to +-``rounding``, can be that of another seed of ``ours``.

    The interval is Student's prediction interval of one more run from the spread over seeds, and the normal interval of
    ``error``, the standard error from the finite test set and whatever else is known, added in quadrature. A figure
    outside is not consistent. One inside is consistent if it would be even with so many seeds that their spread is
    known; else it cannot be told. ``constant``: the seed does not change it.
    """
    level, seeds, mean = (1 + CONFIDENCE) / 2, len(ours), ours.mean()
    deviation = ours.std() if seeds > 1 else 0.0
    gap, normal = max(abs(published - mean) - rounding, 0.0), scipy.stats.norm.ppf(level)

    def width(n: int) -> float:
        if n == 1:
            return normal * error if constant else math.inf
        return math.hypot(scipy.stats.t.ppf(level, n - 1) * deviation * math.sqrt(1 + 1 / n), normal * error)

    if gap <= normal * math.hypot(deviation, error):
        verdict = "consistent"
    elif gap > width(seeds):
        verdict = "not consistent"
    else:
        verdict = f"cannot be told by {seeds} seed{'s' * (seeds > 1)}"
        if seeds > 1 and (enough := next((n for n in range(seeds, MOST_SEEDS) if width(n) < gap), None)):
            verdict += f"; about {enough - seeds} more would"
    return Judgement(mean - width(seeds), mean + width(seeds), verdict)


def decided(interval: Difference, margin: float) -> bool:
    """Whether ``interval`` excludes ``margin`` and its negative: it is beyond one of them, or between the two."""
    return all(bound < interval.low or interval.high < bound for bound in (-margin, margin))


def more_seeds(changes: pd.Series, margin: float, error_rate: float) -> int | None:
    """About how many more changes it takes to decide, if their mean and standard deviation stay as they are.

    None if there are too few to know, or if it is more than MOST_SEEDS.
    """
    seeds, mean, deviation = len(changes), changes.mean(), changes.std()
    enough = (n for n in range(seeds, MOST_SEEDS) if decided(_anytime_interval(n, mean, deviation, error_rate), margin))
    return next((n - seeds for n in enough), None)
