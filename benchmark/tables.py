"""What a few trainings say, with its 95 % interval: means, differences of means, rank correlations."""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.stats import sem, spearmanr, ttest_ind
from scipy.stats import t as student_t

RESAMPLES = 2000  # of the bootstrap
FEWEST = 5  # trainings from which it says something


class Interval(NamedTuple):
    """A number and its 95 % interval over trainings."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(values: np.ndarray) -> Interval:
    """Student's, of the values of trainings, (number of trainings,). NaN for the limits of one value."""
    middle = values.mean()
    if len(values) < 2:
        return Interval(middle, np.nan, np.nan)
    half = student_t.ppf(0.975, len(values) - 1) * sem(values)
    return Interval(middle, middle - half, middle + half)


def difference_interval(values: np.ndarray, of_baseline: np.ndarray) -> Interval:
    """Of the difference of the means of two methods, Welch's: their seeds have nothing in common. Both are
    (number of trainings,), which may differ. NaN for the limits if either is one value."""
    middle = values.mean() - of_baseline.mean()
    if min(len(values), len(of_baseline)) < 2:
        return Interval(middle, np.nan, np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss")  # of values that are all the same
        low, high = ttest_ind(values, of_baseline, equal_var=False).confidence_interval(0.95)
    return Interval(middle, low, high)


def rank_correlation(trainings: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Spearman's, of two measures of the agents of each training, both (number of agents,). NaN if either has
    one value only."""
    x = np.concatenate([training[0] for training in trainings])
    y = np.concatenate([training[1] for training in trainings])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return spearmanr(x, y).statistic


def correlation_interval(trainings: list[tuple[np.ndarray, np.ndarray]]) -> Interval:
    """Of rank_correlation, by the bootstrap: trainings are resampled, with all their agents, which are not
    independent. NaN for the limits of fewer than FEWEST trainings, and where there is no correlation. Samples
    that have none are left out."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(RESAMPLES):
        rows = rng.integers(len(trainings), size=len(trainings))
        samples.append(rank_correlation([trainings[row] for row in rows]))
    middle = rank_correlation(trainings)
    if len(trainings) < FEWEST or np.isnan(samples).all():
        return Interval(middle, np.nan, np.nan)
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return Interval(middle, low, high)


def markdown(rows: list[list[str]]) -> str:
    """A table, of which the first row is the head."""
    head, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]
    return "\n".join(lines) + "\n"
