"""Intervals against SciPy's and against simulations of what they promise."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fastres.report.statistics import anytime_interval, decided, difference, judge, more_seeds


def by_seed(*values, first=0):
    return pd.Series(values, range(first, first + len(values)))


@pytest.mark.parametrize(
    ("published", "ours", "verdict"),
    [
        (90.4, (90.0,), "consistent"),  # within the error of the test set
        (91.4, (90.0,), "cannot be told by 1 seed"),
        (90.9, (90.0, 90.5, 89.5), "consistent"),
        (
            92.0,
            (90.0, 90.5, 89.5),
            "cannot be told by 3 seeds; about 1 more would",
        ),  # 2.57 wide now, 1.90 with a fourth
        (93.0, (90.0, 90.5, 89.5), "not consistent"),
    ],
)
def test_a_published_figure_is_judged(published, ours, verdict):
    assert judge(published, by_seed(*ours), error=0.3, rounding=0.005).verdict == verdict


def test_a_figure_without_spread_is_judged_by_its_digits():
    assert judge(11.17, by_seed(11.173962, 11.173962), 0.0, 0.005).verdict == "consistent"
    assert judge(11.18, by_seed(11.173962, 11.173962), 0.0, 0.005).verdict == "not consistent"
    assert judge(11.17, by_seed(11.173962), 0.0, 0.005, constant=True).verdict == "consistent"
    assert judge(11.18, by_seed(11.173962), 0.0, 0.005, constant=True).verdict == "not consistent"


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("error", [0.0, 0.4])
def test_another_seed_is_judged_wrongly_in_5_percent(seeds, error):
    rng, wrong, studies = np.random.default_rng(0), 0, 2000
    for _ in range(studies):
        *ours, published = rng.normal(90, 0.4, seeds + 1)
        published += rng.normal(0, error)  # of its other test images
        wrong += judge(published, by_seed(*ours), error, 0.0).verdict == "not consistent"
    assert 0.005 < wrong / studies < 0.065  # 0.05 and three standard errors
    if not error:
        assert wrong / studies > 0.035


def test_shared_seeds_are_paired():
    ours, theirs = by_seed(91.0, 93.0, 92.5, 80.0), by_seed(90.5, 92.0, 91.8)
    found = difference(ours, theirs)
    expected = stats.ttest_rel(ours[:3], theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.pairs, found.df, found.sign) == (3, 2, 1)
    assert found.value == pytest.approx((0.5 + 1.0 + 0.7) / 3)  # without the seed that has no partner


def test_pairs_are_told_apart_where_the_groups_are_not():
    ours = by_seed(80.0, 90.0, 70.0)
    assert difference(ours + by_seed(1.0, 1.1, 0.9), ours).sign == 1
    assert difference(ours + by_seed(1.0, 1.1, 0.9), by_seed(80.0, 90.0, 70.0, first=5)).sign == 0


def test_other_seeds_are_unpaired():
    ours, theirs = by_seed(91.0, 93.0, 92.5), by_seed(90.5, 92.0, first=2)  # one seed is shared
    found = difference(ours, theirs)
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.pairs == 0


@pytest.mark.parametrize(("ours", "theirs"), [((91.0,), (90.0,)), ((91.0, 92.0), (90.0,))])
def test_one_run_has_no_interval(ours, theirs):
    found = difference(by_seed(*ours), by_seed(*theirs, first=1))
    assert found.sign is None
    assert found.value == np.mean(ours) - np.mean(theirs)
    assert found.text() == f"{found.value:+.2f}"


def test_equal_runs_differ_by_exactly_nothing():
    found = difference(by_seed(1.0, 2.0), by_seed(1.0, 2.0))
    assert (found.value, found.low, found.high, found.sign) == (0, 0, 0, 0)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (0.35, 0.3), (-0.2, 0.1)])
def test_deciding_is_wrong_in_at_most_5_percent_over_all_arms_and_looks(mean, spread):
    """Three arms, up to 20 seeds, a look after each: an interval that misses the mean, or a wrong decision."""
    rng = np.random.default_rng(0)
    studies, arms, margin = 300, 3, 0.3
    missed = wrong = 0
    for _ in range(studies):
        samples = rng.normal(mean, spread, (arms, 20))
        looks = [[anytime_interval(pd.Series(arm[:n]), 0.05 / arms) for n in range(2, 21)] for arm in samples]
        missed += any(not found.low <= mean <= found.high for arm in looks for found in arm)
        stops = [next((found for found in arm if decided(found, margin)), None) for arm in looks]
        wrong += any(stop and (abs(stop.value) < margin) != (abs(mean) < margin) for stop in stops)
    assert missed <= 0.05 * studies
    assert wrong <= 0.05 * studies


def test_an_interval_for_any_time_is_wider_than_one_for_a_single_look_but_shrinks():
    values = np.random.default_rng(1).normal(0.0, 1.0, 200)
    widths = []
    for n in (5, 20, 200):
        sample = by_seed(*values[:n])
        found, once = anytime_interval(sample, 0.05), difference(sample, 0 * sample)
        assert found.low < once.low < once.high < found.high
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < 3 * (once.high - once.low)


def test_one_change_decides_nothing():
    assert anytime_interval(by_seed(5.0), 0.05).low == -math.inf
    assert not decided(anytime_interval(by_seed(5.0), 0.05), 0.3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.31, 1.0, True), (-1.0, -0.31, True), (-0.2, 0.2, True), (0.2, 0.4, False), (-0.4, 0.2, False), (-1, 1, False)],
)
def test_decided_beyond_or_within_the_margin(low, high, expected):
    middle = (low + high) / 2
    found = difference(by_seed(middle, middle), by_seed(0.0, 0.0))._replace(low=low, high=high)
    assert decided(found, 0.3) == expected


def test_seeds_that_are_missing_to_a_decision():
    changes = by_seed(0.1, -0.1, 0.2)
    more = more_seeds(changes, 0.3, 0.05)
    enough = np.resize([1.0, -1.0], len(changes) + more)
    like = pd.Series(enough / enough.std(ddof=1) * changes.std() + changes.mean())
    assert decided(anytime_interval(like, 0.05), 0.3)
    assert not decided(anytime_interval(changes, 0.05), 0.3)
    assert more_seeds(by_seed(0.3, 0.1, 0.5), 0.3, 0.05) is None  # the mean is the margin
