"""benchmark/final_tests.py: its tables, what it leaves out, and its errors."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from common import ROOT, error_message
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import final_tests
from helpers import run_tool

TRAIN = "final_test/training_levels"
TEST = "final_test/full_distribution"
PPO = "ppo_procgen"
MDPO = "mdpo_procgen"


def name_run(algorithm: str, seed: int, agent: int | None = None, game: str = "bigfish") -> str:
    run = f"{game}__{algorithm}__{seed}__170000000{seed}"
    return f"{run}/agent_{agent}" if agent else run


def points(run: str, train: float, test: float, step: int = 1000) -> list[tuple]:
    """The final test of an agent, and a curve that ends with it."""
    curve = [(run, "charts/test_episodic_return", at, test) for at in (500, 1000)]
    return [*curve, (run, TRAIN, step, train), (run, TEST, step, test)]


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


def write_robustness(path, distances: dict[str, float]):
    """A table of robustness_eval.py, of agents whose policies change by so much."""
    rows = [("random-conv", "all", 3.0, 3.0, 3.0)]
    for run, distance in distances.items():
        rows.append(("random-conv", f"somewhere/{run}/agent.pt", distance, distance / 2, 1 - distance))
    columns = ["perturbation", "checkpoint", "kl_mean", "tv_mean", "encoding_shift_mean"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def tables(capsys, *words) -> tuple[str, list[list[str]]]:
    """What is printed, and the cells of its lines that are tables'."""
    run_tool(final_tests.main, final_tests.Args, "", list(map(str, words)))
    text = capsys.readouterr().out
    rows = []
    for row in text.splitlines():
        if row.startswith("| ") and "---" not in row:
            rows.append(row.strip("| ").split(" | "))
    return text, rows


def test_returns_and_differences(curves, tmp_path, capsys):
    """Agents that learned together are one seed. Student's t of a degree of freedom is 12.706."""
    output = tmp_path / "out" / "tables.md"
    text, rows = tables(capsys, curves, "--algorithms", PPO, MDPO, "--output", output)
    assert output.read_text() in text
    head, ppo, mdpo, _, difference = rows
    assert head == ["algorithm", "seeds", "training levels", "full distribution", "gap"]
    half = 12.706 * 2
    assert ppo[:2] == ["PPO", "2"]
    assert ppo[3] == f"6.000 ({6 - half:.3f} to {6 + half:.3f})"
    assert [cell.split()[0] for cell in ppo[2:]] == ["15.000", "6.000", "9.000"]
    assert mdpo[:2] == ["MDPO", "2"]
    assert [cell.split()[0] for cell in mdpo[2:]] == ["30.000", "15.000", "15.000"]
    assert difference[0] == "MDPO"
    assert [cell.split()[0] for cell in difference[1:]] == ["15.000", "9.000", "6.000"]


def test_the_first_algorithm_is_the_one_to_compare_with(curves, tmp_path, capsys):
    words = ["--algorithms", MDPO, PPO, "--labels", "ours", "theirs", "--output", tmp_path / "t.md"]
    text, rows = tables(capsys, curves, *words)
    assert "Difference from ours:" in text
    assert rows[-1][0] == "theirs"
    assert rows[-1][2].split()[0] == "-9.000"


def test_games_are_apart(curves, tmp_path, capsys):
    other = points(name_run(PPO, 1, game="maze"), train=3.0, test=1.0)
    more = write(tmp_path / "more.csv", other)
    text, rows = tables(capsys, curves, more, "--output", tmp_path / "t.md")
    assert text.index("## bigfish") < text.index("## maze")
    assert ["PPO", "1", "3.000 (nan to nan)", "1.000 (nan to nan)", "2.000 (nan to nan)"] in rows
    assert text.count("Difference from MDPO:\n\nMDPO has no final test here.") == 1


def test_what_has_no_final_test(curves, tmp_path, capsys):
    """None at all, one half of it, or one of an earlier end."""
    rows = points(name_run(PPO, 3), train=1.0, test=1.0)[:2]
    rows += points(name_run(PPO, 4), train=1.0, test=1.0)[:3]
    rows += points(name_run(PPO, 5), train=1.0, test=1.0, step=500)
    more = write(tmp_path / "more.csv", rows)
    text, found = tables(capsys, curves, more, "--output", tmp_path / "t.md")
    for seed in (3, 4, 5):
        assert f"left out: {name_run(PPO, seed)}, which has no final test" in text
    assert found[2][:2] == ["PPO", "2"]


def test_a_first_algorithm_without_any(curves, tmp_path, capsys):
    """By default the others are compared with the first that has some; one that was chosen stays."""
    untested = points(name_run("dpo_procgen", 1), train=1.0, test=1.0)[:2]
    more = write(tmp_path / "more.csv", untested)
    words = [curves, more, "--output", tmp_path / "t.md"]
    text, rows = tables(capsys, *words)
    assert "Difference from MDPO:" in text
    assert rows[-1][0] == "PPO"
    text, _ = tables(capsys, *words, "--algorithms", "dpo_procgen", PPO)
    assert "Difference from DPO:\n\nDPO has no final test here." in text


def write_run(folder, seed: int, end: int, settings: str = "{}"):
    """A run folder of PPO with training up to a step, and a final test at 1,000."""
    run = folder / name_run(PPO, seed)
    with SummaryWriter(run) as writer:
        writer.add_scalar("charts/test_episodic_return", 2.0, 1000)
        writer.add_scalar("charts/episodic_return", 2.0, end)
    (run / "args.json").write_text(settings)
    agent = {"training_levels": {"mean": 7.0}, "full_distribution": {"mean": 5.0}}
    (run / "final_test.json").write_text(json.dumps({"global_step": 1000, "agents": [agent]}))


def test_run_folders(tmp_path, capsys):
    """One that went on after its final test has none until it ends again."""
    write_run(tmp_path, seed=1, end=1000)
    write_run(tmp_path, seed=2, end=2000)
    text, rows = tables(capsys, tmp_path, "--output", tmp_path / "t.md")
    assert f"left out: {name_run(PPO, 2)}, which has no final test" in text
    assert f"short: {PPO} on bigfish, seed 1" in text
    assert rows[1] == ["PPO", "1", "7.000 (nan to nan)", "5.000 (nan to nan)", "2.000 (nan to nan)"]


def test_rank_correlation_of_robustness(curves, tmp_path, capsys):
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
    _, rows = tables(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    *_, head, kl, tv, shift = rows
    assert head == [
        "perturbation",
        "change",
        "agents",
        "seeds",
        "training levels",
        "full distribution",
        "gap",
    ]
    assert kl[:4] == ["random-conv", "KL", "6", "4"]
    assert tv[1] == "total variation"
    assert kl[6] == tv[6] == "1.000 (nan to nan)"  # four seeds
    differences = [1 - 1, 4 - 2, 3 - 3, 2 - 4, 6 - 5, 5 - 6]  # of ranks
    expected = 1 - 6 * sum(each**2 for each in differences) / (6 * 35)
    assert kl[5] == tv[5] == f"{expected:.3f} (nan to nan)"
    assert shift[1] == "encoding shift"
    assert shift[6] == "-1.000 (nan to nan)"
    distances[name_run(PPO, 1)] = 0.7
    write_robustness(path, distances)
    _, rows = tables(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    differences = [6 - 1, 3 - 4, 2 - 3, 1 - 2, 5 - 6, 4 - 5]  # of ranks
    expected = 1 - 6 * sum(each**2 for each in differences) / (6 * 35)
    assert rows[-3][6] == f"{expected:.3f} (nan to nan)"
    del distances[name_run(PPO, 1)]
    write_robustness(path, distances)
    text, _ = tables(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    assert f"left out of what follows on robustness: {name_run(PPO, 1)}, which is not in --robustness" in text


def test_robustness_of_algorithms(curves, tmp_path, capsys):
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
    words = [curves, "--algorithms", PPO, MDPO, "--robustness", path, "--output", tmp_path / "t.md"]
    _, rows = tables(capsys, *words)
    start = rows.index(
        [
            "perturbation",
            "algorithm",
            "seeds",
            "KL",
            "total variation",
            "encoding shift",
            "KL - PPO's",
            "total variation - PPO's",
            "encoding shift - PPO's",
        ]
    )
    ppo, mdpo = rows[start + 1 : start + 3]
    half = 12.706 * 0.2
    assert ppo[:4] == ["random-conv", "PPO", "2", f"0.800 ({0.8 - half:.3f} to {0.8 + half:.3f})"]
    assert mdpo[:3] == ["random-conv", "MDPO", "2"]
    assert [cell.split()[0] for cell in mdpo[3:]] == ["0.300", "0.150", "0.700", "-0.500", "-0.250", "0.500"]
    low, high = (float(word.strip("()")) for word in mdpo[6].split()[1::2])
    half = 6.188 * (0.2**2 + 0.1**2) ** 0.5
    assert (low, high) == pytest.approx((-0.5 - half, -0.5 + half), abs=0.001)


def test_a_table_from_before_the_encoding_shift(curves, tmp_path, capsys):
    path = write_robustness(tmp_path / "results.csv", {name_run(PPO, 1): 0.6, name_run(PPO, 2): 1.0})
    pd.read_csv(path).drop(columns="encoding_shift_mean").to_csv(path, index=False)
    text, rows = tables(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    assert "encoding shift" not in text
    assert [row[1] for row in rows[-2:]] == ["KL", "total variation"]


def test_robustness_without_the_first_algorithm(curves, tmp_path, capsys):
    path = write_robustness(tmp_path / "results.csv", {name_run(MDPO, 1, 1): 0.5})
    words = [curves, "--algorithms", PPO, MDPO, "--robustness", path, "--output", tmp_path / "t.md"]
    text, rows = tables(capsys, *words)
    assert [
        "random-conv",
        "MDPO",
        "1",
        "0.500 (nan to nan)",
        "0.250 (nan to nan)",
        "0.500 (nan to nan)",
    ] in rows
    assert "\n\nPPO, to compare with, has no final test here that is in --robustness.\n" in text


def test_robustness_of_other_runs(curves, tmp_path, capsys):
    path = write_robustness(tmp_path / "robustness.csv", {"another_run": 1.0})
    text, _ = tables(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    assert "No agent of --robustness has a final test here." in text


def rejection(capsys, *words) -> str:
    with pytest.raises(SystemExit) as error:
        run_tool(final_tests.main, final_tests.Args, "", list(map(str, words)))
    captured = capsys.readouterr()
    return error_message(error.value.code, captured.out, captured.err)


def test_bad_input(curves, tmp_path, capsys):
    output = ["--output", tmp_path / "t.md"]
    assert "PATHS needs one or more folders" in rejection(capsys, *output)
    assert "PATHS: there is no" in rejection(capsys, tmp_path / "nothing", *output)
    message = rejection(capsys, curves, "--algorithms", "dqn", *output)
    assert "--algorithms: there are no runs of dqn" in message
    assert "--labels must be as many as --algorithms" in rejection(capsys, curves, "--labels", "a", *output)
    assert "--algorithms must differ" in rejection(capsys, curves, "--algorithms", PPO, PPO, *output)
    assert "is no folder that can be written to" in rejection(capsys, curves, "--output", curves / "t.md")
    assert "--output must be a file" in rejection(capsys, curves, "--output", ".")
    assert "--output must be a file" in rejection(capsys, curves, "--output", tmp_path)
    write_run(tmp_path, seed=1, end=1000, settings='{"distribution_mode": "easy"}')
    assert "--distribution-mode hard is needed" in rejection(capsys, tmp_path, *output)
    only_curve = write(tmp_path / "curve.csv", points(name_run(PPO, 1), 1.0, 1.0)[:2])
    assert "PATHS: no run has a final test" in rejection(capsys, only_curve, *output)
    assert not (tmp_path / "t.md").exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file or directory"),
        ("", "No columns to parse from file"),
        ("run,tag,step,value\n", "in the [columns]"),
        (
            "perturbation,checkpoint,kl_mean,tv_mean,encoding_shift_mean\nconv,a/agent.pt,many,0.1,0.1\n",
            "could not convert",
        ),
        (
            "perturbation,checkpoint,kl_mean,tv_mean,encoding_shift_mean\nconv,a/agent.pt,,0.1,0.1\n",
            "could not convert",
        ),
    ],
)
def test_a_file_that_is_no_table_of_robustness(content, reason, curves, tmp_path, capsys):
    path = tmp_path / "robustness.csv"
    if content is not None:
        path.write_text(content)
    message = rejection(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    assert f"--robustness: {path} is not a table of robustness_eval.py: " in message
    assert reason in message
    assert not (tmp_path / "t.md").exists()


def test_an_agent_that_is_in_the_table_twice(curves, tmp_path, capsys):
    path = write_robustness(tmp_path / "robustness.csv", {name_run(PPO, 1): 0.1})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))
    message = rejection(capsys, curves, "--robustness", path, "--output", tmp_path / "t.md")
    assert f"--robustness: {path} has {name_run(PPO, 1)} twice" in message


def test_from_a_shell(curves, tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/final_tests.py"), str(curves)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "final_tests.md").read_text() in result.stdout
