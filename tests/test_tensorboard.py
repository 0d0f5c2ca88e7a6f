"""The curves of runs: their tags, one point an iteration, and what TensorBoard's page shows of them."""

import importlib
import json
import math
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from common import (
    TINY,
    agent_folders,
    copy_run,
    flags,
    read_curves,
    read_points,
    run_folder,
    train,
    train_straight,
)

# 4 iterations, with a checkpoint and a test after the second and the fourth.
STEPS = [128, 256, 384, 512]
TEST_STEPS = STEPS[1::2]
SETTINGS = TINY | {
    "num_steps": 32,
    "total_timesteps": 600,
    "checkpoint_interval": 2,
    "eval_interval": 2,
    "final_eval_episodes": 2,
}
TRAINING_TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "charts/learning_rate",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/old_approx_kl",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
}
TEST_TAGS = {"charts/test_episodic_return", "charts/generalization_gap"}
# Tag, and the range of its values; finite for all that are not named.
RANGES = {
    "losses/entropy": (1, math.log(15) + 1e-5),
    "losses/clipfrac": (0, 1),
    "losses/ratio_deviation": (0, 1e3),
    "losses/explained_variance": (-1e9, 1),
    "losses/approx_kl": (-1e-6, 1e3),
    "losses/mutual_kl": (0, 1e3),
    "charts/learning_rate": (4.999e-4, 5.001e-4),
    "charts/SPS": (1e-3, 1e9),
    "charts/episodic_length": (1, 1e3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one agent, the same killed after its second iteration and resumed, and a pair: each path, and
    its curves."""
    folder = tmp_path_factory.mktemp("logs")
    for each in ("one", "pair", "resumed"):
        (folder / each).mkdir()
    one = train_straight("spo_procgen", folder / "one", SETTINGS)
    pair = train_straight("mdpo_procgen", folder / "pair", SETTINGS)
    resumed = copy_run(one, 2, folder / "resumed", finished=False)
    assert train(one.script, folder / "resumed", "--resume", resumed, *flags(device="cpu")) == 0
    folders = [one.run_dir, resumed, *agent_folders("mdpo_procgen", pair.run_dir)]
    assert len(folders) == 4
    return SimpleNamespace(folder=folder, folders=folders, resumed=resumed, pair=folders[2:])


def test_tags(runs):
    """CleanRL's, and ours beside them: the same for one agent and for each of a pair, but for mutual_kl."""
    for folder in runs.folders:
        curves = read_curves(folder)
        assert curves.keys() >= TRAINING_TAGS | TEST_TAGS
        assert ("losses/mutual_kl" in curves) == (folder in runs.pair)
        assert {tag.split("/")[0] for tag in curves} == {"charts", "losses"}


def test_one_point_an_iteration(runs):
    """Except for episodes, which do not end in all, and tests. The resumed run has no point twice."""
    for folder in runs.folders:
        for tag, points in read_points(folder).items():
            steps = [step for step, _ in points]
            if tag.startswith("charts/episodic_"):
                assert set(steps) <= set(STEPS)
                assert len(set(steps)) == len(steps) > 0
            elif tag in TEST_TAGS:
                assert steps == TEST_STEPS, tag
            else:
                assert steps == STEPS, tag


def test_values(runs):
    for folder in runs.folders:
        curves = read_curves(folder)
        for tag, curve in curves.items():
            low, high = RANGES.get(tag, (-1e9, 1e9))
            for value in curve.values():
                assert low <= value <= high, tag
        for step, gap in curves["charts/generalization_gap"].items():
            before = [value for at, value in curves["charts/episodic_return"].items() if at <= step]
            assert gap == pytest.approx(before[-1] - curves["charts/test_episodic_return"][step], abs=1e-4)


def test_agents_have_curves_of_their_own(runs):
    first, second = (read_curves(folder) for folder in runs.pair)
    for tag in ("losses/value_loss", "losses/mutual_kl", "losses/explained_variance"):
        assert first[tag] != second[tag]


def test_steps_per_second_are_those_of_this_process(tmp_path, monkeypatch):
    """Of one agent, and of what has been played since it was resumed. Here an iteration takes 10 seconds."""
    for name, num_steps in [("ppo_procgen", 320), ("mdpo_procgen", 192)]:
        script = importlib.import_module(name)
        clock = SimpleNamespace(now=1000.0)
        rollout = script.rollout

        def play_for_ten_seconds(*inputs, rollout=rollout, clock=clock):
            rollout(*inputs)
            clock.now += 10

        times = SimpleNamespace(time=lambda clock=clock: clock.now, perf_counter=time.perf_counter)
        monkeypatch.setattr(script, "time", times)
        monkeypatch.setattr(script, "rollout", play_for_ten_seconds)
        settings = SETTINGS | {"num_steps": 16, "total_timesteps": 128, "eval_interval": 0}
        folder = tmp_path / name
        folder.mkdir()
        assert train(script, folder, *flags(**settings)) == 0
        run_dir = run_folder(folder)
        words = ["--resume", run_dir, *flags(device="cpu", total_timesteps=num_steps)]
        assert train(script, folder, *words) == 0
        speeds = read_curves(agent_folders(name, run_dir)[-1])["charts/SPS"]
        assert list(speeds) == list(range(64, num_steps + 1, 64))
        assert set(speeds.values()) == {pytest.approx(6.4)}


# The page, asked of its own server.


class Page:
    """What the page asks its server for."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str, **query):
        with urlopen(f"{self.address}data/plugin/{path}?{urlencode(query)}", timeout=60) as answer:
            return json.load(answer)

    def steps(self, run: str, tag: str) -> list[int]:
        points = self.get("scalars/scalars", run=run, tag=tag)
        return [step for _, step, _ in points]

    def wait_for(self, names: list[str]):
        """Until it has read the runs to their end."""
        deadline = time.time() + 60
        while time.time() < deadline:
            tags = self.get("scalars/tags")
            read = [name for name in names if "charts/SPS" in tags.get(name, {})]
            if read == names and all(self.steps(name, "charts/SPS")[-1] == STEPS[-1] for name in names):
                return
            time.sleep(0.2)
        raise AssertionError(f"of {names} it has read {read}")


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "slow"])
def page(runs, request):
    """With either of TensorBoard's readers of files."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs.folder)]
    command += ["--port", "0", f"--load_fast={request.param}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = None
            while address is None:
                line = server.stderr.readline()
                assert line, "the server has ended"
                address = re.search(r"TensorBoard \S+ at (\S+)", line)
            page = Page(address[1])
            page.wait_for([str(folder.relative_to(runs.folder)) for folder in runs.folders])
            yield page
        finally:
            server.terminate()


def test_a_resumed_run_has_each_point_once(runs, page):
    name = str(runs.resumed.relative_to(runs.folder))
    assert page.steps(name, "losses/value_loss") == STEPS
    assert page.steps(name, "charts/test_episodic_return") == TEST_STEPS


def test_one_chart_has_training_and_test_of_all_agents(runs, page):
    """Once, however many runs there are, and no other curve."""
    charts = [
        chart for category in page.get("custom_scalars/layout")["category"] for chart in category["chart"]
    ]
    (chart,) = charts
    for folder in runs.folders:
        drawn = set()
        for tag in chart["multiline"]["tag"]:
            name = str(folder.relative_to(runs.folder))
            answer = page.get("custom_scalars/scalars", run=name, tag=tag)
            drawn |= answer["tag_to_events"].keys()
        assert drawn == {"charts/episodic_return", "charts/test_episodic_return"}
