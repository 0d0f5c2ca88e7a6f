"""benchmark/intervals.py: what a few trainings say."""

import sys
import warnings

import numpy as np
import pytest
from common import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import intervals


def test_interval_of_the_mean():
    """Student's t of 4 degrees of freedom is 2.776."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    mean, low, high = intervals.mean_interval(values)
    assert mean == 3.0
    half = 2.776 * np.sqrt(2.5 / 5)
    assert low == pytest.approx(3 - half, abs=1e-3)
    assert high == pytest.approx(3 + half, abs=1e-3)


def test_interval_of_a_difference():
    """Of as many values with the same variance Student's, and here of 8 degrees of freedom."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    middle, low, high = intervals.difference_interval(values + 2, values)
    assert middle == 2.0
    half = 2.306 * np.sqrt(2 * 2.5 / 5)
    assert low == pytest.approx(2 - half, abs=1e-3)
    assert high == pytest.approx(2 + half, abs=1e-3)


def test_variances_may_differ():
    """Then the many values that are sure add nearly nothing to what the few unsure ones leave open."""
    few = np.array([0.0, 1.0, 2.0])
    many = np.linspace(-0.001, 0.001, 100)
    _, low, high = intervals.difference_interval(few, many)
    _, low_alone, high_alone = intervals.mean_interval(few)
    assert low == pytest.approx(low_alone, abs=1e-3)
    assert high == pytest.approx(high_alone, abs=1e-3)


def test_one_training_has_no_interval():
    one = np.array([0.5])
    assert str(intervals.mean_interval(one)) == "0.500 (nan to nan)"
    assert str(intervals.difference_interval(one, np.array([0.1, 0.3]))) == "0.300 (nan to nan)"


def test_trainings_that_all_come_to_the_same():
    """Without a warning."""
    same = np.array([0.1, 0.1, 0.1])
    assert str(intervals.mean_interval(same)) == "0.100 (0.100 to 0.100)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        middle, low, high = intervals.difference_interval(same, np.array([1.0, 2.0, 3.0]))
    assert middle == pytest.approx(-1.9)
    assert low < middle < high


def single_agents(x, y) -> list[tuple]:
    """Trainings with one agent each."""
    return [(np.array([a]), np.array([b])) for a, b in zip(x, y)]


def test_rank_correlation():
    """By hand: 1 - 6 sum d^2 / (n (n^2 - 1)) where no values are equal."""
    x = [0.1, 0.2, 0.3, 0.4, 5.0]
    differences = np.array([0, 1, 2, 3, 4]) - np.array([1, 0, 4, 3, 2])
    expected = 1 - 6 * (differences**2).sum() / (5 * 24)
    found = intervals.rank_correlation(single_agents(x, [0.2, 0.1, 0.9, 0.5, 0.4]))
    assert found == pytest.approx(expected)
    falling = single_agents(x, [0.5, 0.4, 0.3, 0.2, 0.1])
    assert intervals.rank_correlation(falling) == pytest.approx(-1.0)
    assert np.isnan(intervals.rank_correlation(single_agents(x, 5 * [0.5])))
    assert np.isnan(intervals.rank_correlation(single_agents(5 * [0.5], x)))


def test_interval_of_a_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    middle, low, high = intervals.correlation_interval(single_agents(x, x + rng.normal(size=60)))
    assert low < middle < high
    assert 0.5 < middle < 0.8
    assert 0.1 < high - low < 0.5
    assert np.isnan(intervals.correlation_interval(single_agents([1.0] * 9, [2.0] * 9))).all()


def test_few_trainings_say_nothing_of_a_correlation():
    """Nearly all samples of them give 1 or none."""
    x = np.arange(5.0)
    assert str(intervals.correlation_interval(single_agents(x[:4], x[:4]))) == "1.000 (nan to nan)"
    assert str(intervals.correlation_interval([(x, x)])) == "1.000 (nan to nan)"
    assert str(intervals.correlation_interval(single_agents(x, x))) == "1.000 (1.000 to 1.000)"


def test_the_agents_of_a_training_are_resampled_together():
    """Ten agents that agree are no better known than one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    single = single_agents(x, x + rng.normal(size=20))
    many = [(np.repeat(a, 10), np.repeat(b, 10)) for a, b in single]
    _, low, high = intervals.correlation_interval(single)
    _, low_of_many, high_of_many = intervals.correlation_interval(many)
    assert high_of_many - low_of_many == pytest.approx(high - low, rel=0.2)


def test_a_table():
    table = intervals.markdown([["a", "b"], ["1", "2"], ["3", "4"]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n"
