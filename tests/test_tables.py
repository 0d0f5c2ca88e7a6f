"""benchmark/tables.py: its intervals, its tables, and what it leaves out."""

import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from common import ROOT, error_message
from test_runs import MDPO, PPO, line, run_tool, write_run

sys.path.insert(0, str(ROOT / "benchmark"))
import runs
import tables
from runs import FINAL_TEST, FINAL_TRAIN, TEST, TRAIN

RESULTS = ROOT / "benchmark/results/few_levels"


def test_interval_of_the_mean():
    """Student's t of 4 degrees of freedom is 2.776."""
    mean, low, high = tables.mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.776 * np.sqrt(2.5 / 5)
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-3)


def test_interval_of_a_difference():
    """Of as many values with the same variance Student's, and here of 8 degrees of freedom. Else the many
    values that are sure add nearly nothing to what the few unsure ones leave open."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.306 * np.sqrt(2 * 2.5 / 5)
    found = tables.difference_interval(values + 2, values)
    assert found == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    few = np.array([0.0, 1.0, 2.0])
    many = np.linspace(-0.001, 0.001, 100)
    assert tables.difference_interval(few, many) == pytest.approx(tables.mean_interval(few), abs=1e-3)


def test_few_trainings():
    """One has no interval; those that all come to the same have one of no width, or that of the others."""
    one = np.array([0.5])
    same = np.array([0.1, 0.1, 0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(tables.mean_interval(one)) == "0.500 (nan to nan)"
        assert str(tables.difference_interval(one, np.array([0.1, 0.3]))) == "0.300 (nan to nan)"
        assert str(tables.mean_interval(same)) == "0.100 (0.100 to 0.100)"
        middle, low, high = tables.difference_interval(same, np.array([1.0, 2.0, 3.0]))
    assert middle == pytest.approx(-1.9) and low < middle < high


def single_agents(x, y) -> list[tuple]:
    """Trainings with one agent each."""
    return [(np.array([a]), np.array([b])) for a, b in zip(x, y)]


def test_rank_correlation():
    """By hand: 1 - 6 sum d^2 / (n (n^2 - 1)) where no values are equal."""
    x = [0.1, 0.2, 0.3, 0.4, 5.0]
    differences = np.array([0, 1, 2, 3, 4]) - np.array([1, 0, 4, 3, 2])
    expected = 1 - 6 * (differences**2).sum() / (5 * 24)
    found = tables.rank_correlation(single_agents(x, [0.2, 0.1, 0.9, 0.5, 0.4]))
    assert found == pytest.approx(expected)
    assert tables.rank_correlation(single_agents(x, [0.5, 0.4, 0.3, 0.2, 0.1])) == pytest.approx(-1)
    assert np.isnan(tables.rank_correlation(single_agents(x, 5 * [0.5])))
    assert np.isnan(tables.rank_correlation(single_agents(5 * [0.5], x)))


def test_interval_of_a_correlation():
    """Nearly all samples of fewer than five trainings give 1 or none."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    middle, low, high = tables.correlation_interval(single_agents(x, x + rng.normal(size=60)))
    assert low < middle < high
    assert 0.5 < middle < 0.8
    assert 0.1 < high - low < 0.5
    assert np.isnan(tables.correlation_interval(single_agents([1.0] * 9, [2.0] * 9))).all()
    x = np.arange(5.0)
    assert str(tables.correlation_interval(single_agents(x[:4], x[:4]))) == "1.000 (nan to nan)"
    assert str(tables.correlation_interval([(x, x)])) == "1.000 (nan to nan)"
    assert str(tables.correlation_interval(single_agents(x, x))) == "1.000 (1.000 to 1.000)"


def test_the_agents_of_a_training_are_resampled_together():
    """Ten agents that agree are no better known than one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    single = single_agents(x, x + rng.normal(size=20))
    many = [(np.repeat(a, 10), np.repeat(b, 10)) for a, b in single]
    _, low, high = tables.correlation_interval(single)
    _, low_of_many, high_of_many = tables.correlation_interval(many)
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
    rows = [("random-conv", "all", 3.0, 3.0, 3.0)]
    for run, distance in distances.items():
        rows.append(("random-conv", f"somewhere/{run}/agent.pt", distance, distance / 2, 1 - distance))
    columns = ["perturbation", "checkpoint", "kl_mean", "tv_mean", "encoding_shift_mean"]
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
    """Agents that learned together are one seed. Student's t of a degree of freedom is 12.706."""
    text, rows = make(curves, "--algorithms", PPO, MDPO)
    head, ppo, mdpo, _, difference = rows
    assert head == ["algorithm", "seeds", "training levels", "full distribution", "gap"]
    half = 12.706 * 2
    assert ppo[:2] == ["PPO", "2"] and firsts(ppo[2:]) == ["15.000", "6.000", "9.000"]
    assert ppo[3] == f"6.000 ({6 - half:.3f} to {6 + half:.3f})"
    assert mdpo[:2] == ["MDPO", "2"] and firsts(mdpo[2:]) == ["30.000", "15.000", "15.000"]
    assert "Difference from PPO:" in text
    assert difference[0] == "MDPO" and firsts(difference[1:]) == ["15.000", "9.000", "6.000"]
    text, rows = make(curves, "--algorithms", MDPO, PPO, "--labels", "ours", "theirs")
    assert "Difference from ours:" in text and rows[-1][0] == "theirs" and firsts(rows[-1])[2] == "-9.000"
    text, _ = make(curves, "--algorithms", MDPO)
    assert "Nothing to compare." in text


def test_games_are_apart(curves, make, tmp_path):
    more = write(tmp_path / "more.csv", points(name_run(PPO, 1, game="maze"), train=3.0, test=1.0))
    text, rows = make(curves, more)
    assert text.index("## bigfish") < text.index("## maze")
    assert ["PPO", "1", "3.000 (nan to nan)", "1.000 (nan to nan)", "2.000 (nan to nan)"] in rows
    assert text.count("Difference from MDPO:\n\nMDPO has no final test here.") == 1


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
    assert found[2][:2] == ["PPO", "2"]
    assert "Difference from MDPO:" in text and found[-1][0] == "PPO"
    text, _ = make(curves, more, "--algorithms", "dpo_procgen", PPO)
    assert "Difference from DPO:\n\nDPO has no final test here." in text


def test_run_folders(make, tmp_path):
    """One that went on after its final test has none until it ends again, though it has tested on the way
    no further."""
    write_run(tmp_path, name_run(PPO, 1), [{TEST: line(1.0)}], (5.0,), 1000)
    write_run(tmp_path, name_run(PPO, 2), [{TEST: line(1.0), TRAIN: line(1.0, end=2000)}], (5.0,), 1000)
    text, rows = make(tmp_path)
    assert f"left out: {name_run(PPO, 2)}, which has no final test" in text
    assert f"short: {PPO} on bigfish, seed 1: 1,000 of 2,000 steps" in text
    assert rows[1] == ["PPO", "1", "6.000 (nan to nan)", "5.000 (nan to nan)", "1.000 (nan to nan)"]


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
    assert head[4:] == ["training levels", "full distribution", "gap"]
    assert kl[:4] == ["random-conv", "KL", "6", "4"]
    assert [tv[1], shift[1]] == ["total variation", "encoding shift"]
    assert kl[6] == tv[6] == "1.000 (nan to nan)"  # four seeds
    assert shift[6] == "-1.000 (nan to nan)"
    differences = [1 - 1, 4 - 2, 3 - 3, 2 - 4, 6 - 5, 5 - 6]  # of ranks
    expected = 1 - 6 * sum(each**2 for each in differences) / (6 * 35)
    assert kl[5] == tv[5] == f"{expected:.3f} (nan to nan)"
    del distances[name_run(PPO, 1)]
    write_robustness(path, distances)
    text, _ = make(curves, "--robustness", path)
    assert f"left out of what follows on robustness: {name_run(PPO, 1)}, which is not in --robustness" in text
    write_robustness(path, {"another_run": 5.0})
    text, _ = make(curves, "--robustness", path)
    assert "No agent of --robustness has a final test here." in text


def test_robustness_of_algorithms(curves, make, tmp_path):
    """Means over seeds, and MDPO's of 0.2 and 0.4 from PPO's of 0.6 and 1.0. Welch's t of 1.47 degrees of
    freedom is 6.188."""
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
    changes = ["KL", "total variation", "encoding shift"]
    differences = [f"{change} - PPO's" for change in changes]
    start = rows.index(["perturbation", "algorithm", "seeds", *changes, *differences])
    ppo, mdpo = rows[start + 1 : start + 3]
    half = 12.706 * 0.2
    assert ppo[:4] == ["random-conv", "PPO", "2", f"0.800 ({0.8 - half:.3f} to {0.8 + half:.3f})"]
    assert mdpo[:3] == ["random-conv", "MDPO", "2"]
    assert firsts(mdpo[3:]) == ["0.300", "0.150", "0.700", "-0.500", "-0.250", "0.500"]
    low, high = (float(word.strip("()")) for word in mdpo[6].split()[1::2])
    half = 6.188 * (0.2**2 + 0.1**2) ** 0.5
    assert (low, high) == pytest.approx((-0.5 - half, -0.5 + half), abs=0.001)
    write_robustness(path, {name_run(MDPO, 1, 1): 0.5})
    text, rows = make(*words)
    one = ["0.500 (nan to nan)", "0.250 (nan to nan)", "0.500 (nan to nan)"]
    assert ["random-conv", "MDPO", "1", *one] in rows
    assert "\n\nPPO, to compare with, has no final test here that is in --robustness.\n" in text


def test_a_table_from_before_the_encoding_shift(curves, make, tmp_path):
    distances = {name_run(PPO, 1): 0.6, name_run(PPO, 2): 1.0}
    path = write_robustness(tmp_path / "results.csv", distances, "encoding_shift_mean")
    text, rows = make(curves, "--robustness", path)
    assert "encoding shift" not in text
    assert [row[1] for row in rows[-2:]] == ["KL", "total variation"]


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


def test_an_interval_of_the_page():
    """Of the correlation of KL under random convolutions with the return on training levels."""
    methods = (PPO, MDPO, f"{PPO}+both", "spo_procgen", "mdspo_procgen", f"{MDPO}+detached")
    choice = runs.Choice(paths=(RESULTS / "curves.csv",), algorithms=methods, distribution_mode="easy")
    agents = tables.find_agents(runs.read_runs(choice, [TEST], {}))
    joined = agents.merge(tables.read_robustness(RESULTS / "robustness.csv"), on="run")
    trainings = joined[joined.perturbation == "random-conv"].groupby(["algorithm", "seed"])
    columns = [training[["kl_mean", "train"]].to_numpy().T for _, training in trainings]
    assert str(tables.correlation_interval(columns)) == "0.669 (0.280 to 0.884)"
