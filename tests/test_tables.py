"""benchmark/tables.py: its intervals, its tables, and what it leaves out."""

import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from common import ROOT, error_message
from scipy.stats import ttest_ind
from test_runs import MDPO, PPO, line, run_tool, write_run

sys.path.insert(0, str(ROOT / "benchmark"))
import runs
import tables
from runs import FINAL_TEST, FINAL_TRAIN, TEST, TRAIN

RESULTS = ROOT / "benchmark/results/few_levels"


def test_interval_of_the_mean():
    """Student's t of 4 degrees of freedom is 2.776, and 4.743 is beyond 0.9910 of it."""
    mean, low, high, p = tables.mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.776 * np.sqrt(2.5 / 5)
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-3)
    assert p == pytest.approx(0.0132, abs=1e-4)


def test_interval_of_a_difference():
    """Of as many values with the same variance Student's, and here of 8 degrees of freedom. Else the many
    values that are sure add nearly nothing to what the few unsure ones leave open."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.306 * np.sqrt(2 * 2.5 / 5)
    found = tables.difference_interval((values + 2, values))
    assert found[:3] == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    few = np.array([0.0, 1.0, 2.0])
    many = np.linspace(-0.001, 0.001, 100)
    assert tables.difference_interval((few, many)) == pytest.approx(tables.mean_interval(few), abs=1e-3)


def test_interval_of_a_mean_over_pairs():
    """Twice the same pair is as far from 0, and as twice as many values it is surer: by hand, with 2 * 8
    degrees of freedom. Of one pair it is scipy's."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = tables.difference_interval((values + 2, values), (values + 2, values))
    half = 2.120 * np.sqrt(4 * 2.5 / 5) / 2
    assert found[:3] == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    few = np.array([0.0, 1.0, 3.0])
    test = ttest_ind(few, values, equal_var=False)
    expected = [few.mean() - 3, *test.confidence_interval(0.95), test.pvalue]
    assert tables.difference_interval((few, values)) == pytest.approx(expected)


def test_interval_of_a_ratio():
    """Of geometric means: here 4 times as much, and as much lower as higher in parts."""
    values = np.array([1.0, 2.0, 4.0])
    middle, low, high, p = tables.ratio_interval(4 * values, values)
    assert middle == pytest.approx(4)
    assert low * high == pytest.approx(16)
    assert low < 4
    difference = tables.difference_interval((np.log(4 * values), np.log(values)))
    assert (np.log(high), p) == pytest.approx((difference.high, difference.p))


def test_few_trainings():
    """Two have no interval; those that all come to the same have one of no width, or that of the others."""
    two = np.array([0.5, 0.7])
    same = np.array([0.1, 0.1, 0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(tables.mean_interval(two)) == "0.600"
        assert str(tables.difference_interval((two, same))) == "0.500"
        assert str(tables.mean_interval(same)) == "0.100 (0.100 to 0.100)"
        middle, low, high, _ = tables.difference_interval((same, np.array([1.0, 2.0, 3.0])))
    assert middle == pytest.approx(-1.9)
    assert low < middle < high


def test_stars_are_holms():
    """The smallest p counts as often as there are p, the next once less, until one is too large."""

    def starred(*p_values: float) -> list[bool]:
        intervals = [tables.Interval(1.0, 0.5, 1.5, p) for p in p_values]
        return ["*" in cell for cell in tables.star_holm(intervals)]

    assert starred(0.04) == [True]
    assert starred(0.03, 0.04) == [False, False]
    assert starred(0.04, 0.02) == [True, True]
    assert starred(0.001, 0.03, 0.02) == [True, True, True]
    assert starred(0.001, 0.03, 0.026, np.nan) == [True, False, False, False]
    assert tables.star_holm([tables.Interval(0.5)]) == ["0.500"]


def frame(x, y, **columns) -> pd.DataFrame:
    """Trainings with one agent each."""
    return pd.DataFrame({"x": x, "y": y, "seed": range(len(x))} | columns)


def correlate(agents: pd.DataFrame, group=()) -> tables.Interval:
    return tables.correlation_interval(agents, ("x", "y"), ["seed"], group)


def test_rank_correlation():
    """By hand: 1 - 6 sum d^2 / (n (n^2 - 1)) where no values are equal."""
    x = [0.1, 0.2, 0.3, 0.4, 5.0]
    differences = np.array([0, 1, 2, 3, 4]) - np.array([1, 0, 4, 3, 2])
    expected = 1 - 6 * (differences**2).sum() / (5 * 24)
    assert correlate(frame(x, [0.2, 0.1, 0.9, 0.5, 0.4])).middle == pytest.approx(expected)
    assert correlate(frame(x, [0.5, 0.4, 0.3, 0.2, 0.1])).middle == pytest.approx(-1)
    assert np.isnan(correlate(frame(x, 5 * [0.5])).middle)


def test_rank_correlation_within_groups():
    """One group has more of both, but within each more of one is less of the other. By hand: the centred
    ranks are -1, 0, 1 and 1, 0, -1, twice."""
    agents = frame([1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11], method=[1, 1, 1, 2, 2, 2])
    assert correlate(agents).middle > 0.5
    assert correlate(agents, ["method"]).middle == pytest.approx(-1)
    agents["y"] = [3, 2, 1, 12, 11, 13]
    assert correlate(agents, ["method"]).middle == pytest.approx((-1 - 1 + 1) / 4)


def test_interval_of_a_correlation():
    """Nearly all samples of fewer than five trainings give 1 or none."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    middle, low, high, _ = correlate(frame(x, x + rng.normal(size=60)))
    assert low < middle < high
    assert 0.5 < middle < 0.8
    assert 0.1 < high - low < 0.5
    x = np.arange(5.0)
    assert str(correlate(frame(x[:4], x[:4]))) == "1.000"
    assert str(correlate(frame(x, x))) == "1.000 (1.000 to 1.000)"


def test_the_agents_of_a_training_are_resampled_together():
    """Ten agents that agree are no better known than one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    single = frame(x, x + rng.normal(size=20))
    _, low, high, _ = correlate(single)
    _, low_of_many, high_of_many, _ = correlate(pd.concat(10 * [single], ignore_index=True))
    assert high_of_many - low_of_many == pytest.approx(high - low, rel=0.2)


def name_run(algorithm: str, seed: int, agent: int | None = None, game: str = "bigfish") -> str:
    run = f"{game}__{algorithm}__{seed}__170000000{seed}"
    return f"{run}/agent_{agent}" if agent else run


def points(run: str, train: float, test: float, step: int = 1000) -> list[tuple]:
    """The final test of an agent, and a curve that ends at 1,000 steps."""
    curve = [(run, TEST, at, test) for at in (500, 1000)]
    return [*curve, (run, FINAL_TRAIN, step, train), (run, FINAL_TEST, step, test)]


@pytest.fixture
def curves(tmp_path):
    """A CSV as figures.py writes it: two seeds of PPO, and two of MDPO with two agents each."""
    rows = []
    for seed in (1, 2):
        rows += points(name_run(PPO, seed), train=10.0 * seed, test=4.0 * seed)
        rows += points(name_run(MDPO, seed, 1), train=20.0 * seed, test=9.0 * seed)
        rows += points(name_run(MDPO, seed, 2), train=20.0 * seed, test=11.0 * seed)
    return write(tmp_path / "curves.csv", rows)


def write(path, rows: list[tuple]):
    pd.DataFrame(rows, columns=["run", "tag", "step", "value"]).to_csv(path, index=False)
    return path


def write_robustness(path, distances: dict[str, float], *more: str):
    """A table of robustness_eval.py, of agents whose policies change by so much."""
    rows = [("random-conv", "all", 3.0, 3.0, 3.0, 3.0)]
    entropy = np.log(15) - 0.5
    for run, distance in distances.items():
        path_of_run = f"somewhere/{run}/agent.pt"
        rows.append(("random-conv", path_of_run, distance, distance / 2, 1 - distance, entropy))
    columns = ["perturbation", "checkpoint", "kl_mean", "tv_mean", "encoding_shift_mean", "entropy_mean"]
    pd.DataFrame(rows, columns=columns).drop(columns=list(more)).to_csv(path, index=False)
    return path


@pytest.fixture
def make(monkeypatch, capsys, tmp_path):
    """Gives what the command line prints, and the cells of the lines that are tables'."""

    def run(*words) -> tuple[str, list[list[str]]]:
        output = tmp_path / "out/tables.md"
        run_tool("tables", monkeypatch, *words, "--output", output)
        text = capsys.readouterr().out
        assert output.read_text() in text
        rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
        return text, [row for row in rows if "---" not in row]

    return run


def firsts(cells: list[str]) -> list[str]:
    """Without their intervals."""
    return [cell.split(" ")[0] for cell in cells]


def test_returns_and_differences(curves, make):
    """Agents that learned together are one seed, and two seeds have no interval."""
    text, rows = make(curves, "--algorithms", PPO, MDPO)
    head, ppo, mdpo, head_of_differences, difference = rows
    assert head == ["game", "algorithm", "seeds", "training levels", "full distribution", "gap"]
    assert ppo == ["bigfish", "PPO", "2", "15.000", "6.000", "9.000"]
    assert mdpo == ["bigfish", "MDPO", "2", "30.000", "15.000", "15.000"]
    assert head_of_differences[2:] == ["training levels - PPO's", "full distribution - PPO's", "gap - PPO's"]
    assert difference == ["MDPO", "bigfish", "15.000", "9.000", "6.000"]
    _, rows = make(curves, "--algorithms", MDPO, PPO, "--labels", "ours", "theirs")
    assert rows[-2][2] == "training levels - ours's"
    assert rows[-1][:3] == ["theirs", "bigfish", "-15.000"]
    text, _ = make(curves, "--algorithms", MDPO)
    assert "Nothing to compare with MDPO." in text


def test_holm_is_over_games(make, tmp_path):
    """Welch's p is 0.027 on each: less than 0.05, but not twice."""
    rows = []
    for game in ("bigfish", "maze"):
        for seed, value in [(1, 1.0), (2, 2.0), (3, 3.0)]:
            rows += points(name_run(PPO, seed, game=game), train=value, test=0.0)
            rows += points(name_run(MDPO, seed, 1, game=game), train=value + 2.8, test=0.0)
    path = write(tmp_path / "both.csv", rows)
    _, of_both = make(path, "--algorithms", PPO, MDPO)
    assert [row[2] for row in of_both[-2:]] == 2 * ["2.800 (0.533 to 5.067)"]
    _, of_one = make(path, "--algorithms", PPO, MDPO, "--games", "maze")
    assert of_one[-1][2] == "2.800 (0.533 to 5.067) *"


def test_games_are_apart(curves, make, tmp_path):
    """And a game that the first algorithm lacks is not compared."""
    more = write(tmp_path / "more.csv", points(name_run(PPO, 1, game="maze"), train=3.0, test=1.0))
    _, rows = make(curves, more)
    assert ["maze", "PPO", "1", "3.000", "1.000", "2.000"] in rows
    assert rows[-1][:2] == ["PPO", "bigfish"]


def test_what_has_no_final_test(curves, make, tmp_path):
    """None at all, one half of it, or one of an earlier end. An algorithm without any is compared with only
    if it was asked for."""
    rows = points(name_run(PPO, 3), train=1.0, test=1.0)[:2]
    rows += points(name_run(PPO, 4), train=1.0, test=1.0)[:3]
    rows += points(name_run(PPO, 5), train=1.0, test=1.0, step=500)
    rows += points(name_run("dpo_procgen", 1), train=1.0, test=1.0)[:2]
    more = write(tmp_path / "more.csv", rows)
    text, found = make(curves, more)
    for seed in (3, 4, 5):
        assert f"left out: {name_run(PPO, seed)}, which has no final test" in text
    assert found[2][:3] == ["bigfish", "PPO", "2"]
    assert found[-1][:3] == ["PPO", "bigfish", "-15.000"]
    text, _ = make(curves, more, "--algorithms", "dpo_procgen", PPO)
    assert "Nothing to compare with DPO." in text


def test_run_folders(make, tmp_path):
    """One that went on after its final test has none until it ends again, though it has tested on the way
    no further."""
    write_run(tmp_path, name_run(PPO, 1), [{TEST: line(1.0)}], (5.0,), 1000)
    write_run(tmp_path, name_run(PPO, 2), [{TEST: line(1.0), TRAIN: line(1.0, end=2000)}], (5.0,), 1000)
    text, rows = make(tmp_path)
    assert f"left out: {name_run(PPO, 2)}, which has no final test" in text
    assert f"short: {PPO} on bigfish, seed 1: 1,000 of 2,000 steps" in text
    assert rows[1] == ["bigfish", "PPO", "1", "6.000", "5.000", "1.000"]


def test_rank_correlation_of_robustness(curves, make, tmp_path):
    """A point for each agent. Gaps: PPO's 6 and 12; MDPO's 11, 9, 22 and 18. Returns on test levels: 4 and 8;
    9, 11, 18 and 22."""
    distances = {
        name_run(PPO, 1): 0.1,
        name_run(PPO, 2): 0.4,
        name_run(MDPO, 1, 1): 0.3,
        name_run(MDPO, 1, 2): 0.2,
        name_run(MDPO, 2, 1): 0.6,
        name_run(MDPO, 2, 2): 0.5,
        "another_run": 5.0,
    }
    path = write_robustness(tmp_path / "robustness.csv", distances)
    _, rows = make(curves, "--robustness", path)
    *_, head, kl, tv, shift = rows
    assert head[:4] == ["perturbation", "change", "agents", "seeds"]
    assert head[4:] == ["training levels", "full distribution", "gap", "gap, within algorithms"]
    assert kl[:4] == ["random-conv", "KL", "6", "4"]
    assert [tv[1], shift[1]] == ["total variation", "encoding shift"]
    assert kl[6] == tv[6] == kl[7] == "1.000"  # four seeds have no interval
    assert shift[6] == "-1.000"
    differences = [1 - 1, 4 - 2, 3 - 3, 2 - 4, 6 - 5, 5 - 6]  # of ranks
    expected = 1 - 6 * sum(each**2 for each in differences) / (6 * 35)
    assert kl[5] == tv[5] == f"{expected:.3f}"
    write_robustness(path, {"another_run": 5.0})
    text, _ = make(curves, "--robustness", path)
    assert f"left out of what follows on robustness: {name_run(PPO, 1)}, which is not in --robustness" in text
    assert "No agent of --robustness has a final test here." in text


def test_robustness_of_algorithms(curves, make, tmp_path):
    """Means over seeds; MDPO's KL of 0.2 and 0.4 in parts of PPO's of 0.6 and 1.0, geometric means. An agent
    whose entropy lacks half a nat has twice as much KL per missing entropy."""
    distances = {
        name_run(PPO, 1): 0.6,
        name_run(PPO, 2): 1.0,
        name_run(MDPO, 1, 1): 0.1,
        name_run(MDPO, 1, 2): 0.3,
        name_run(MDPO, 2, 1): 0.3,
        name_run(MDPO, 2, 2): 0.5,
    }
    path = write_robustness(tmp_path / "results.csv", distances)
    words = [curves, "--algorithms", PPO, MDPO, "--robustness", path]
    _, rows = make(*words)
    changes = ["KL", "KL / missing entropy", "total variation", "encoding shift"]
    start = rows.index(["game", "perturbation", "algorithm", "seeds", *changes])
    ppo, mdpo, head, comparison = rows[start + 1 : start + 5]
    assert ppo == ["bigfish", "random-conv", "PPO", "2", "0.800", "1.600", "0.400", "0.200"]
    assert mdpo == ["bigfish", "random-conv", "MDPO", "2", "0.300", "0.600", "0.150", "0.700"]
    assert head[3:5] == ["KL / PPO's", "KL / missing entropy / PPO's"]
    ratio = f"{(0.2 * 0.4 / (0.6 * 1.0)) ** 0.5:.3f}"
    assert comparison == ["MDPO", "bigfish", "random-conv", ratio, ratio, "-0.250", "0.500"]


def test_paired(make, tmp_path):
    """Seeds are far apart, and within each MDPO is 2 better; in the first it has half the KL. A seed that
    only one has does not count."""
    rows = []
    for seed in (1, 2, 3, 4):
        rows += points(name_run(PPO, seed), train=10.0 * seed, test=0.0)
        if seed < 4:
            rows += points(name_run(MDPO, seed, 1), train=10.0 * seed + 2 + 0.01 * seed, test=0.0)
    distances = {name_run(PPO, 1): 0.4, name_run(MDPO, 1, 1): 0.2, name_run(PPO, 2): 0.8}
    path = write_robustness(tmp_path / "results.csv", distances)
    curves = write(tmp_path / "paired.csv", rows)
    words = [curves, "--algorithms", PPO, MDPO]
    _, rows = make(*words, "--robustness", path, "--paired")
    half = 4.303 * 0.01 / 3**0.5
    (returns,) = [row for row in rows if row[:2] == ["MDPO", "bigfish"] and len(row) == 5]
    assert returns[2] == f"2.020 ({2.02 - half:.3f} to {2.02 + half:.3f}) *"
    (ratios,) = [row for row in rows if row[:3] == ["MDPO", "bigfish", "random-conv"]]
    assert ratios[3] == "0.500"
    _, rows = make(*words)
    assert rows[-1][2].startswith("-2.980 (")


def test_an_agent_that_is_in_the_table_twice(curves, make, tmp_path, capsys):
    path = write_robustness(tmp_path / "robustness.csv", {name_run(PPO, 1): 0.1})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(SystemExit) as stop:
        make(curves, "--robustness", path)
    message = error_message(stop.value.code, *capsys.readouterr())
    assert f"--robustness: {path} has {name_run(PPO, 1)} twice" in message


def test_the_results_give_their_tables(make):
    """The page's numbers, from what lies beside them, as older versions wrote it."""
    words = [RESULTS / "curves.csv", "--distribution-mode", "easy", "--algorithms"]
    labels = ["--labels", "heads on PPO's encoder", "heads on MDPO's encoder"]
    text, _ = make(*words, f"{PPO}+on_ppo", f"{PPO}+on_mdpo", *labels)
    assert (RESULTS / "frozen.md").read_text() in text
    text, _ = make(*words, "spo_procgen", "mdspo_procgen", "--robustness", RESULTS / "robustness.csv")
    assert (RESULTS / "spo.md").read_text() in text


def test_intervals_of_the_page():
    """Of the correlation of KL under random convolutions with the return on training levels, and within
    methods with the gap."""
    methods = (PPO, MDPO, f"{PPO}+both", "spo_procgen", "mdspo_procgen", f"{MDPO}+detached")
    choice = runs.Choice(paths=(RESULTS / "curves.csv",), algorithms=methods, distribution_mode="easy")
    agents = tables.find_agents(runs.read_runs(choice, [TEST], {}))
    agents = tables.in_order(agents, dict.fromkeys(methods))
    joined = agents.merge(tables.read_robustness(RESULTS / "robustness.csv"), on="run")
    rows = joined[joined.perturbation == "random-conv"]
    training = ["algorithm", "seed"]
    found = tables.correlation_interval(rows, ("kl_mean", "train"), training)
    assert str(found) == "0.669 (0.280 to 0.884)"
    found = tables.correlation_interval(rows, ("kl_mean", "gap"), training, ["algorithm"])
    assert str(found) == "-0.030 (-0.589 to 0.452)"
