"""benchmark/runs.py: which runs are found, read and left out; bad command lines of figures and tables."""

import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from common import ROOT, error_message
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import runs
from runs import FINAL_TEST, FINAL_TRAIN, TEST, TRAIN

PPO = "ppo_procgen"
MDPO = "mdpo_procgen"


def run_tool(name: str, monkeypatch, *words):
    """A tool of benchmark/ from its command line, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    runpy.run_path(str(ROOT / f"benchmark/{name}.py"), run_name="__main__")


def write_run(root: Path, name: str, curves: list[dict], finals=(), end=0, **settings) -> Path:
    """A run folder as the scripts leave it. curves: {tag: {step: value}} of each agent; finals: the final
    return of each agent on the full distribution, which is 1 less than that on training levels."""
    run = root / name
    for number, tags in enumerate(curves, 1):
        folder = run / f"agent_{number}" if len(curves) > 1 else run
        with SummaryWriter(folder) as writer:
            for tag, curve in tags.items():
                for step, value in curve.items():
                    writer.add_scalar(tag, value, step)
    settings = {"distribution_mode": "hard"} | settings
    (run / "args.json").write_text(json.dumps(settings))
    agents = []
    for mean in finals:
        agents.append({"training_levels": {"mean": mean + 1}, "full_distribution": {"mean": mean}})
    if agents:
        final_test = {"global_step": end, "agents": agents}
        (run / "final_test.json").write_text(json.dumps(final_test))
    return run


def line(slope: float, start=0, end=1000, step=100) -> dict[int, float]:
    return {x: slope * x for x in range(start, end + 1, step)}


def write_ppo(root: Path, game="maze", seed=1, time=1, curve=None, **settings) -> Path:
    name = f"{game}__{PPO}__{seed}__{time}"
    return write_run(root, name, [{TEST: curve or line(1.0)}], **settings)


def read(*paths: Path, needed=None, **options) -> pd.DataFrame:
    choice = runs.Choice(paths=paths, **options)
    return runs.read_runs(choice, [TEST], needed or {})


def test_curves_and_final_tests(tmp_path):
    """Of any number of agents: the tenth of twelve is no other than the second."""
    curves = [{TEST: line(slope), TRAIN: line(1.0)} for slope in range(1, 13)]
    finals = [number**2 for number in range(1, 13)]
    name = f"maze__{MDPO}+wide__3__1700000000"
    write_run(tmp_path / "deep/down", name, curves, finals, 1000)
    data = read(tmp_path)
    assert data.run.nunique() == 12
    of_tenth = data[data.run == f"{name}/agent_10"]
    assert (of_tenth[["game", "algorithm", "seed"]] == ["maze", f"{MDPO}+wide", "3"]).all(axis=None)
    points = {tag: rows.value.tolist() for tag, rows in of_tenth.groupby("tag")}
    assert points == {TEST: list(range(0, 10001, 1000)), FINAL_TEST: [100], FINAL_TRAIN: [101]}
    curve = of_tenth[of_tenth.tag == TEST]
    assert curve.step.tolist() == list(range(0, 1001, 100))
    assert set(of_tenth.step[of_tenth.tag != TEST]) == {1000}


def test_links_and_what_is_no_run(tmp_path, monkeypatch):
    """Links to runs and to folders of them; the folder itself is a run."""
    first = write_ppo(tmp_path / "far")
    write_ppo(tmp_path / "deeper", "heist")
    here = tmp_path / "here"
    pair = write_run(here, f"maze__{MDPO}__2__1", [{TEST: line(2.0)}] * 2)
    (here / "latest").symlink_to(first)
    (here / "more").symlink_to(tmp_path / "deeper")
    write_run(here, "not a run", [{TEST: line(1.0)}])
    write_ppo(here, "pong")
    expected = {first.name, f"heist__{PPO}__1__1"}
    expected |= {f"{pair.name}/agent_1", f"{pair.name}/agent_2"}
    assert set(read(here).run) == expected
    monkeypatch.chdir(first)
    assert set(read(Path(".")).run) == {first.name}


def test_a_file_that_is_cut_short(tmp_path):
    run = write_ppo(tmp_path, curve=line(1.0, step=1))
    (events,) = run.glob("events*")
    content = events.read_bytes()
    events.write_bytes(content[: len(content) // 2])
    empty = tmp_path / f"maze__{PPO}__2__1"  # it was killed before it wrote anything
    empty.mkdir()
    (empty / "events.out.tfevents.1").touch()
    data = read(tmp_path)
    assert set(data.run) == {run.name}
    assert 300 < data.step.max() < 700
    assert (data.value == data.step).all()


def test_the_newest_run_counts(tmp_path, capsys):
    """A pair as a whole."""
    older = write_ppo(tmp_path, time=900000000)
    newer = write_run(tmp_path, f"maze__{PPO}__1__1800000000", [{TEST: line(2.0)}] * 2)
    other = write_ppo(tmp_path, seed=2, time=800000000)
    names = set(read(tmp_path).run)
    assert names == {f"{newer.name}/agent_1", f"{newer.name}/agent_2", other.name}
    out = capsys.readouterr().out
    assert out.startswith(f"left out: {older.name}, since there is a newer run")
    assert out.count("left out") == 1


def test_csv_and_folder_together(tmp_path):
    """What is in both is there once."""
    run = write_ppo(tmp_path / "runs")
    rows = [(run.name, TEST, 100, 100.0), (f"maze__{MDPO}__1__1/agent_2", TEST, 100, 7.0)]
    table = pd.DataFrame(rows, columns=["run", "tag", "step", "value"])
    table.to_csv(tmp_path / "more.csv", index=False)
    paths = [tmp_path / "runs", tmp_path / "more.csv"]
    counts = read(*paths).groupby("algorithm").size()
    assert counts.to_dict() == {PPO: 11, MDPO: 1}
    assert len(read(*paths, algorithms=(MDPO,))) == 1


def test_settings_that_are_needed(tmp_path, capsys):
    """By those that are asked for alone."""
    run = write_ppo(tmp_path, num_levels=200)
    write_run(tmp_path, f"heist__{MDPO}__1__1", [{TEST: line(1.0)}], distribution_mode="easy")
    assert set(read(tmp_path, games=("maze",)).game) == {"maze"}
    assert set(read(tmp_path, algorithms=(PPO,), needed={"num_levels": 200}).game) == {"maze"}
    with pytest.raises(SystemExit):
        read(tmp_path, games=("maze",), needed={"num_levels": 500})
    expected = f"{run} was made with --num-levels 200, and --num-levels 500 is needed"
    assert expected in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path, capsys):
    write_ppo(tmp_path, "bigfish", seed=1)
    write_ppo(tmp_path, "bigfish", seed=3)
    write_ppo(tmp_path, "maze", seed=3, curve=line(1.0, end=500))
    write_run(tmp_path, f"maze__{MDPO}__3__1", [{TEST: line(1.0, end=300)}])
    runs.print_missing(read(tmp_path))
    expected = f"""
missing: {MDPO} on bigfish, seed 1
missing: {MDPO} on bigfish, seed 3
missing: {MDPO} on maze, seed 1
missing: {PPO} on maze, seed 1
short: {PPO} on maze, seed 3: 500 of 1,000 steps
"""
    assert sorted(capsys.readouterr().out.split("\n")) == sorted(expected[1:].split("\n"))


def test_labels():
    assert runs.label_of("ppo_procgen") == "PPO"
    assert runs.label_of("mdspo_procgen+wide") == "MDSPO, wide"
    assert runs.label_of("my_own") == "my_own"
    data = pd.DataFrame({"algorithm": ["b", "a", "b"]})
    everything = runs.Choice(paths=(ROOT,))
    assert runs.name_algorithms(data, everything) == {"a": "a", "b": "b"}
    choice = runs.Choice(paths=(ROOT,), algorithms=("b", "a"), labels=("one", "two"))
    names = runs.name_algorithms(data, choice)
    assert list(names) == ["b", "a"]
    assert list(names.values()) == ["one", "two"]


BAD = {  # a command line, and words of its message
    "figures": "PATHS",
    "figures nowhere": "nowhere",
    "figures RUNS --games pong": "--games: pong, only of maze",
    "figures RUNS --algorithms a2c": f"--algorithms: a2c, only of {MDPO}, {PPO}",
    f"figures RUNS --algorithms {PPO} {PPO}": "--algorithms differ",
    "figures RUNS --labels A": "--labels --algorithms",
    f"figures RUNS --algorithms {PPO} {MDPO} --labels A A": "--labels differ",
    "figures RUNS --distribution-mode easy": "made with --distribution-mode hard easy",
    "figures EMPTY": "no runs",
    "figures bad.csv": "bad.csv run, tag, step, value",
    "figures bad.bin": "bad.bin run, tag, step, value",
    "figures NO_ARGS": f"maze__{PPO}__1__1 has no args.json",
    "figures BAD_ARGS": f"cannot read maze__{PPO}__1__1/args.json",
    "figures MANY": "--algorithms 10",
    "figures RUNS --smooth 0": "--smooth 1",
    "figures RUNS --bootstrap 1": "--bootstrap 10",
    "figures RUNS --reference bad.csv": "--reference --distribution-mode easy",
    "figures RUNS --distribution-mode easy --reference bad.csv": "--reference bad.csv",
    "tables RUNS": "no run has a final test",
    "tables RUNS --robustness bad.csv": "--robustness: bad.csv is not a table of robustness_eval.py",
    "tables RUNS --robustness bad.bin": "--robustness: bad.bin is not a table of robustness_eval.py",
    "tables RUNS --robustness nowhere.csv": "--robustness nowhere.csv",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{word in BAD: folder}"""
    root = tmp_path_factory.mktemp("runs")
    for algorithm in (PPO, MDPO):
        write_run(root / "runs", f"maze__{algorithm}__1__1", [{TEST: line(1.0)}])
    for number in range(11):
        write_run(root / "many", f"maze__{PPO}+{number}__1__1", [{TEST: line(1.0)}])
    run = write_ppo(root / "no_args")
    (run / "args.json").unlink()
    run = write_ppo(root / "bad_args")
    (run / "args.json").write_text("{")
    (root / "empty").mkdir()
    return {path.name.upper(): path for path in root.iterdir()}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(command, folders, tmp_path, monkeypatch, capsys):
    """Status 2, a message, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("run,tag,value\na,b,1\n")
    (tmp_path / "bad.bin").write_bytes(bytes(range(256)))
    tool, *words = command.split()
    words = [folders.get(word, word) for word in words]
    with pytest.raises(SystemExit) as stop:
        run_tool(tool, monkeypatch, *words)
    message = error_message(stop.value.code, "", capsys.readouterr().err)
    for word in BAD[command].split():
        assert word in message
    assert {path.name for path in tmp_path.iterdir()} == {"bad.csv", "bad.bin"}
