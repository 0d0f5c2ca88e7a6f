"""What TensorBoard's page shows of runs, asked of its own server, with either of its readers."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from common import TINY, copy_run, flags, read_points, train, train_straight

# 4 iterations, with a checkpoint after the second and a test after the third.
STEPS = [128, 256, 384, 512]
SETTINGS = TINY | {
    "num_steps": 32,
    "total_timesteps": 512,
    "checkpoint_interval": 2,
    "final_eval_episodes": 2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of one agent, of the same one killed and resumed, and of a pair; and for each of
    their names on the page the script."""
    folder = tmp_path_factory.mktemp("logs")
    for each in ("one", "pair", "resumed"):
        (folder / each).mkdir()
    one = train_straight("ppo_procgen", folder / "one", SETTINGS)
    pair = train_straight("mdpo_procgen", folder / "pair", SETTINGS)
    resumed = copy_run(one, 2, folder / "resumed", finished=False)
    assert train(one.script, folder / "resumed", "--resume", resumed, *flags(device="cpu")) == 0
    scripts = {
        one.run_dir: one.script,
        resumed: one.script,
        pair.run_dir / "agent_1": pair.script,
        pair.run_dir / "agent_2": pair.script,
    }
    return SimpleNamespace(
        folder=folder,
        scripts={str(path.relative_to(folder)): script for path, script in scripts.items()},
        resumed=str(resumed.relative_to(folder)),
        mutual=pair.script,
    )


class Page:
    """What the page asks its server for."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str, **query):
        with urlopen(f"{self.address}data/plugin/{path}?{urlencode(query)}") as answer:
            return json.load(answer)

    def descriptions(self) -> dict[str, dict[str, str]]:
        """{run: {tag: what the tab Scalars says of it}}"""
        found = {}
        for run, tags in self.get("scalars/tags").items():
            found[run] = {}
            for tag, about in tags.items():
                found[run][tag] = re.sub("<[^>]*>", "", about["description"])
        return found

    def steps(self, run: str, tag: str) -> list[int]:
        points = self.get("scalars/scalars", run=run, tag=tag)
        return [step for _, step, _ in points]

    def layout(self) -> list[tuple]:
        """Category, title and tags of each chart in the tab Custom Scalars."""
        found = []
        for category in self.get("custom_scalars/layout")["category"]:
            for chart in category["chart"]:
                tags = chart["multiline"]["tag"]
                found.append((category["title"], chart["title"], tags))
        return found

    def drawn(self, run: str, tags: list[str]) -> set[str]:
        """The curves of a run in a chart there, whose tags are regular expressions."""
        found = set()
        for tag in tags:
            answer = self.get("custom_scalars/scalars", run=run, tag=tag)
            found |= answer["tag_to_events"].keys()
        return found

    def wait_for(self, runs):
        """Until it has read as many iterations as they have."""
        expected = {}
        for run in runs.scripts:
            points = read_points(runs.folder / run)
            expected[run] = len(points["charts/SPS"])
        found = {}
        deadline = time.time() + 30
        while found != expected:
            assert time.time() < deadline, found
            found = {}
            for run, tags in self.descriptions().items():
                if "charts/SPS" in tags:
                    found[run] = len(self.steps(run, "charts/SPS"))


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "slow"])
def page(runs, request):
    command = [sys.executable, "-m", "tensorboard.main"]
    command += ["--logdir", str(runs.folder), "--port", "0", f"--load_fast={request.param}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = None
            while address is None:
                line = server.stderr.readline()
                assert line, "the server has ended"
                address = re.search(r"TensorBoard \S+ at (\S+)", line)
            page = Page(address[1])
            page.wait_for(runs)
            yield page
        finally:
            server.terminate()


def test_every_curve_is_described_and_no_other(runs, page):
    expected = {run: script.DESCRIPTIONS for run, script in runs.scripts.items()}
    assert page.descriptions() == expected


def test_a_resumed_run_has_each_point_once(runs, page):
    assert page.steps(runs.resumed, "losses/value_loss") == STEPS
    assert page.steps(runs.resumed, "charts/test_episodic_return") == STEPS[2:3]


def test_several_runs_have_each_chart_once(runs, page):
    charts = []
    for category, content in runs.mutual.LAYOUT.items():
        for title, (_, tags) in content.items():
            charts.append((category, title, tags))
    assert sorted(page.layout()) == sorted(charts)


def test_a_chart_shows_the_curves_that_it_names(runs, page):
    """Of every run, but for those that only a pair has."""
    for _, title, tags in page.layout():
        for run, script in runs.scripts.items():
            expected = set(tags) & script.DESCRIPTIONS.keys()
            assert page.drawn(run, tags) == expected, title
            assert expected or tags == ["losses/mutual_kl"]


def test_one_chart_has_training_and_test_of_all_agents(runs, page):
    both = {"charts/episodic_return", "charts/test_episodic_return"}
    (tags,) = [tags for _, _, tags in page.layout() if both <= set(tags)]
    assert len(runs.scripts) == 4
    for run in runs.scripts:
        assert page.drawn(run, tags) == both
