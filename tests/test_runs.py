"""benchmark/runs.py: which runs are found, read and left out. And the command lines of figures.py and
tables.py, which share its flags."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
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


def write_run(
    root: Path, name: str, curves: list[dict], finals: tuple = (), end: int = 0, **settings
) -> Path:
    """A run folder as the scripts leave it. curves: {tag: {step: value}} of each agent; finals: the final
    return of each agent on the full distribution, which is 1 less than that on training levels."""
    run = root / name
    for number, tags in enumerate(curves, 1):
        with SummaryWriter(run / f"agent_{number}" if len(curves) > 1 else run) as writer:
            for tag, curve in tags.items():
                for step, value in curve.items():
                    writer.add_scalar(tag, value, step)
    (run / "args.json").write_text(json.dumps({"distribution_mode": "hard", **settings}))
    if finals:
        agents = []
        for mean in finals:
            agents.append({"training_levels": {"mean": mean + 1}, "full_distribution": {"mean": mean}})
        (run / "final_test.json").write_text(json.dumps({"global_step": end, "agents": agents}))
    return run


def line(slope: float, start: int = 0, end: int = 1000, step: int = 100) -> dict[int, float]:
    return {x: slope * x for x in range(start, end + 1, step)}


def read(*paths: Path, tags: tuple = (TEST,), needed=None, **options) -> pd.DataFrame:
    choice = runs.Choice(paths=paths, **options)
    return runs.read_runs(choice, list(tags), needed or {})


def test_curves_and_final_tests(tmp_path):
    """Of any number of agents: the tenth of twelve is no other than the second."""
    slopes = range(1, 13)
    curves = [{TEST: line(slope), TRAIN: line(1.0)} for slope in slopes]
    finals = tuple(float(slope**2) for slope in slopes)
    write_run(tmp_path / "deep/down", f"maze__{MDPO}+wide__3__1700000000", curves, finals, 1000)
    data = read(tmp_path)
    assert set(data.game) == {"maze"} and set(data.algorithm) == {f"{MDPO}+wide"} and set(data.seed) == {"3"}
    assert set(data.tag) == {TEST, FINAL_TEST, FINAL_TRAIN} and data.run.nunique() == 12
    agent = data[data.run == f"maze__{MDPO}+wide__3__1700000000/agent_10"]
    test = agent[agent.tag == TEST]
    assert test.step.tolist() == list(range(0, 1001, 100)) and (test.value == 10 * test.step).all()
    finals = agent[agent.tag.isin([FINAL_TEST, FINAL_TRAIN])].sort_values("value")
    assert finals.value.tolist() == [100, 101] and finals.step.tolist() == [1000, 1000]


def test_links_and_what_is_no_run(tmp_path, monkeypatch):
    """Links to runs, to folders of them, and under a run's name to another; the folder itself is a run."""
    first = write_run(tmp_path / "far", f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    second = write_run(tmp_path / "far", f"maze__{PPO}__2__1", [{TEST: line(2.0)}] * 2)
    write_run(tmp_path / "deeper", f"heist__{PPO}__1__1", [{TEST: line(1.0)}])
    here = tmp_path / "here"
    here.mkdir()
    (here / "latest").symlink_to(first)
    (here / second.name).symlink_to(second)
    (here / "maze__other__1__1").symlink_to(first)
    (here / "more").symlink_to(tmp_path / "deeper")
    write_run(here, "not a run", [{TEST: line(1.0)}])
    write_run(here, f"pong__{PPO}__1__1", [{TEST: line(1.0)}])
    pair = {f"{second.name}/agent_1", f"{second.name}/agent_2"}
    assert set(read(here).run) == pair | {first.name, "maze__other__1__1", f"heist__{PPO}__1__1"}
    monkeypatch.chdir(first)
    assert set(read(Path(".")).run) == {first.name}


def test_a_file_that_is_cut_short(tmp_path):
    run = write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0, step=1)}])
    (events,) = run.glob("events*")
    events.write_bytes(events.read_bytes()[: events.stat().st_size // 2])
    empty = tmp_path / f"maze__{PPO}__2__1"  # it was killed before it wrote anything
    empty.mkdir()
    (empty / "events.out.tfevents.1").touch()
    data = read(tmp_path)
    assert set(data.run) == {run.name}
    assert 300 < data.step.max() < 700 and (data.value == data.step).all()


def test_the_newest_run_counts(tmp_path, capsys):
    write_run(tmp_path, f"maze__{PPO}__1__1700000000", [{TEST: line(1.0)}])
    write_run(tmp_path, f"maze__{PPO}__1__1800000000", [{TEST: line(2.0)}] * 2)
    write_run(tmp_path, f"maze__{PPO}__2__1600000000", [{TEST: line(3.0)}])
    names = {run.split("/")[0] for run in read(tmp_path).run}
    assert names == {f"maze__{PPO}__1__1800000000", f"maze__{PPO}__2__1600000000"}
    out = capsys.readouterr().out
    assert out.startswith(f"left out: maze__{PPO}__1__1700000000, since there is a newer run")
    assert out.count("left out") == 1


def test_csv_and_folder_together(tmp_path):
    """What is in both is there once."""
    run = write_run(tmp_path / "runs", f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    rows = [(run.name, TEST, 100, 100.0), (f"maze__{MDPO}__1__1/agent_2", TEST, 100, 7.0)]
    pd.DataFrame(rows, columns=["run", "tag", "step", "value"]).to_csv(tmp_path / "more.csv", index=False)
    data = read(tmp_path / "runs", tmp_path / "more.csv")
    assert len(data) == 12 and set(data.algorithm) == {PPO, MDPO}
    assert len(read(tmp_path / "runs", tmp_path / "more.csv", algorithms=(MDPO,))) == 1


def test_what_is_not_asked_for_may_be_of_another_mode(tmp_path):
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0)}], num_levels=200)
    write_run(tmp_path, f"heist__{MDPO}__1__1", [{TEST: line(1.0)}] * 2, distribution_mode="easy")
    assert set(read(tmp_path, games=("maze",)).game) == {"maze"}
    assert set(read(tmp_path, algorithms=(PPO,), needed={"num_levels": 200}).game) == {"maze"}
    assert set(read(tmp_path, games=("heist",), distribution_mode="easy").game) == {"heist"}


def test_settings_that_are_needed(tmp_path, capsys):
    run = write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0)}], num_levels=500)
    with pytest.raises(SystemExit):
        read(tmp_path, needed={"num_levels": 200})
    expected = f"{run} was made with --num-levels 500, and --num-levels 200 is needed"
    assert expected in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path, capsys):
    for name, end in (
        (f"bigfish__{PPO}__1__1", 1000),
        (f"bigfish__{PPO}__2__1", 1000),
        (f"maze__{PPO}__3__1", 500),
        (f"maze__{MDPO}__3__1", 300),
    ):
        write_run(tmp_path, name, [{TEST: line(1.0, end=end)}])
    runs.print_missing(read(tmp_path))
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        [
            *(f"missing: {MDPO} on bigfish, seed {seed}" for seed in (1, 2, 3)),
            *(f"missing: {MDPO} on maze, seed {seed}" for seed in (1, 2)),
            f"missing: {PPO} on bigfish, seed 3",
            *(f"missing: {PPO} on maze, seed {seed}" for seed in (1, 2)),
            f"short: {PPO} on maze, seed 3: 500 of 1,000 steps",
        ]
    )


def test_labels():
    assert runs.label_of("ppo_procgen") == "PPO"
    assert runs.label_of("mdspo_procgen+wide") == "MDSPO, wide"
    assert runs.label_of("my_own") == "my_own"
    data = pd.DataFrame({"algorithm": ["b", "a", "b"]})
    assert runs.name_algorithms(data, runs.Choice(paths=(ROOT,))) == {"a": "a", "b": "b"}
    choice = runs.Choice(paths=(ROOT,), algorithms=("b", "a"), labels=("one", "two"))
    assert list(runs.name_algorithms(data, choice).items()) == [("b", "one"), ("a", "two")]
    ten = tuple("abcdefghij")
    assert len(runs.name_algorithms(data, runs.Choice(paths=(ROOT,), algorithms=ten))) == 10


BAD = [  # of both tools, or of one: what is written on the command line, and words that the message has
    ("figures tables", "", ["PATHS"]),
    ("figures tables", "nowhere", ["nowhere"]),
    ("figures tables", "RUNS --games pong", ["--games", "pong, only of maze"]),
    ("figures tables", "RUNS --algorithms a2c", ["--algorithms", f"a2c, only of {MDPO}, {PPO}"]),
    ("figures tables", f"RUNS --algorithms {PPO} {PPO}", ["--algorithms", "differ"]),
    ("figures tables", "RUNS --labels A", ["--labels", "--algorithms"]),
    ("figures tables", f"RUNS --algorithms {PPO} {MDPO} --labels A A", ["--labels", "differ"]),
    ("figures tables", "RUNS --distribution-mode easy", ["made with --distribution-mode hard", "easy"]),
    ("figures tables", "RUNS --no-such-flag", ["--no-such-flag"]),
    ("figures tables", "EMPTY", ["no runs"]),
    ("figures tables", "EMPTY --games maze", ["--games", "only of none"]),
    ("figures tables", "bad.csv", ["bad.csv", "run, tag, step, value"]),
    ("figures tables", "bad.bin", ["bad.bin", "run, tag, step, value"]),
    ("figures tables", "NO_ARGS", [f"maze__{PPO}__7__1 has no args.json"]),
    ("figures tables", "BAD_ARGS", ["cannot read", f"maze__{PPO}__7__1/args.json"]),
    ("figures", "RUNS --smooth 0", ["--smooth", "1"]),
    ("figures", "RUNS --bootstrap 1", ["--bootstrap", "10"]),
    ("figures", "RUNS --reference bad.csv", ["--reference", "--distribution-mode easy"]),
    ("figures", "RUNS --distribution-mode easy --reference bad.csv", ["--reference", "bad.csv"]),
    ("figures", "MANY", ["--algorithms: at most 10"]),
    ("tables", "RUNS", ["no run has a final test"]),
    ("tables", "RUNS --robustness bad.csv", ["--robustness: bad.csv is not a table of robustness_eval.py"]),
    ("tables", "RUNS --robustness bad.bin", ["--robustness: bad.bin is not a table of robustness_eval.py"]),
    ("tables", "RUNS --robustness nowhere.csv", ["--robustness", "nowhere.csv"]),
]
COMMANDS = [(tool, words, expected) for tools, words, expected in BAD for tool in tools.split()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{word in BAD: folder}"""
    root = tmp_path_factory.mktemp("runs")
    for algorithm in (PPO, MDPO):
        write_run(root / "runs", f"maze__{algorithm}__1__1", [{TEST: line(1.0)}])
    for number in range(11):
        write_run(root / "many", f"maze__{PPO}+{number}__1__1", [{TEST: line(1.0)}])
    (write_run(root / "no_args", f"maze__{PPO}__7__1", [{TEST: line(1.0)}]) / "args.json").unlink()
    run = write_run(root / "bad_args", f"maze__{PPO}__7__1", [{TEST: line(1.0)}])
    (run / "args.json").write_text("{")
    (root / "empty").mkdir()
    return {path.name.upper(): path for path in root.iterdir()}


@pytest.mark.parametrize(("tool", "words", "expected"), COMMANDS, ids=[f"{x[0]} {x[1]}" for x in COMMANDS])
def test_bad_input(tool, words, expected, folders, tmp_path, monkeypatch, capsys):
    """Status 2, a message, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("run,tag,value\na,b,1\n")
    (tmp_path / "bad.bin").write_bytes(bytes(np.arange(256, dtype=np.uint8)))
    words = [folders.get(word, word) for word in words.split()]
    with pytest.raises(SystemExit) as stop:
        run_tool(tool, monkeypatch, *words)
    message = error_message(stop.value.code, "", capsys.readouterr().err)
    assert [word for word in expected if word not in message] == []
    assert {path.name for path in tmp_path.iterdir()} == {"bad.csv", "bad.bin"}
