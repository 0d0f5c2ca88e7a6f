"""benchmark/speed.py: exact numbers of a script whose parts take known times, and the comparison with
CleanRL's script, here with a stand-in for that."""

import re
import sys
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from common import ROOT, TINY, error_message, flags

sys.path.insert(0, str(ROOT / "benchmark"))
import speed

import ppo_procgen

SETTINGS = {name: value for name, value in TINY.items() if name not in ("env_id", "total_timesteps")}


def run_here(monkeypatch, *words):
    """As from the shell."""
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, words)])
    speed.main(*tyro.cli(speed.Args, return_unknown_args=True))


class TimedScript:
    """Has what speed.py takes from a training script. An iteration has two steps, its parts take known times
    of a clock that only they move, and the first four iterations take twice as long."""

    SCRIPT = "ppo_procgen"
    Args = ppo_procgen.Args

    def __init__(self, num_agents: int):
        self.num_agents = num_agents
        self.time = 0.0
        self.iterations = 0
        for name in ("make_envs", "speed_up", "rollout", "update", "evaluate", "save_checkpoint"):
            setattr(self, name, getattr(self, "plain_" + name))

    def pass_time(self, seconds: float):
        slow = 0 < self.iterations < 5
        self.time += 2 * seconds if slow else seconds

    def plain_make_envs(self, args):
        act = partial(self.pass_time, 0.25)
        observe = partial(self.pass_time, 0.75)
        return SimpleNamespace(num=4, act=act, observe=observe)

    def plain_speed_up(self):
        policy = partial(self.pass_time, 1.5)
        return self.num_agents * [policy], "loss"

    def plain_rollout(self, policy, envs):
        for _ in range(2):
            envs.observe()
            policy()
            envs.act()
        self.pass_time(1)

    def plain_update(self, loss_function):
        assert loss_function == "loss"
        self.pass_time(14)
        return "metrics"

    def plain_evaluate(self, policies, args, num, levels, seed, device, stop):
        assert len(policies) == 1
        assert (num, levels) == (2, (0, 0))
        self.pass_time(3)

    def plain_save_checkpoint(self):
        pytest.fail("takes time")

    def main(self, args):
        assert args.eval_interval == 0
        print("cpu, the encoder in float32")
        print(f"run folder: {self.make_run_dir(args)}")
        envs = self.make_envs(args)
        (policy, *_), loss_function = self.speed_up()
        while self.iterations < args.total_timesteps // args.batch_size:
            self.iterations += 1
            self.rollout(policy, envs)
            assert self.update(loss_function) == "metrics"
            self.save_checkpoint()


@pytest.mark.parametrize(("num_agents", "each"), [(1, ""), (2, " of each agent")])
def test_numbers(num_agents, each, monkeypatch, capsys):
    """An iteration takes 2 x (0.25 + 0.75 + 1.5) + 1 + 14 = 20 s, for 64 steps of training."""
    script = TimedScript(num_agents)
    monkeypatch.setattr(speed, "copy_script", lambda name: script)
    monkeypatch.setattr(speed, "step_environments", lambda settings: 12345.6)
    clock = SimpleNamespace(perf_counter=lambda: script.time)
    monkeypatch.setattr(speed, "time", clock)
    run_here(monkeypatch, "ppo_procgen", "--warmup", 4, "--iterations", 3, *flags(**SETTINGS))
    assert script.iterations == 4 + 2 * 3
    first, *lines = capsys.readouterr().out.strip().splitlines()
    assert "cores, " in first
    assert lines[1].startswith("ppo_procgen, bigfish, --num-envs 4 ")
    assert lines[2:-2] == [
        "cpu, the encoder in float32",
        "| part | ms an iteration | share |",
        "| --- | --- | --- |",
        "| environments | 2000.0 | 10.0% |",
        "| inference | 3000.0 | 15.0% |",
        "| update | 14000.0 | 70.0% |",
        "| everything else | 1000.0 | 5.0% |",
        f"steps a second{each}: 3 (from 3 to 3)",
        "environments alone: 12,346 steps a second",
        "a test of an agent, 2 episodes: 3.00 s",
    ]
    assert lines[-2].startswith("peak host memory: ")


def test_speed_of_the_environments(monkeypatch):
    """Of 8, each step of which takes half a second."""
    clock = SimpleNamespace(seconds=0.0)

    def act(actions):
        assert actions.shape == (8,) and actions.dtype == np.int32
        clock.seconds += 0.5

    envs = SimpleNamespace(num=8, act=act, observe=lambda: None)
    monkeypatch.setattr(speed, "make_envs", lambda *inputs: envs)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.seconds)
    assert speed.step_environments(ppo_procgen.Args(), num_steps=4) == 16


def test_a_real_script(tmp_path, monkeypatch, capsys):
    """Two games in turn, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    words = ["--games", "fruitbot", "starpilot", "--iterations", 1, "--warmup", 1, "--no-test"]
    settings = SETTINGS | {"num_envs": 2, "num_steps": 4, "update_epochs": 1}
    run_here(monkeypatch, "mdspo_procgen", *words, *flags(**settings))
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert "a test of" not in out
    assert "runs" not in out
    _, *texts = out.split("\nmdspo_procgen, ")
    for game, text in zip(["fruitbot", "starpilot"], texts, strict=True):
        assert text.startswith(game)
        milliseconds = [float(each) for each in re.findall(r"^\| [a-z ]+ \| ([\d.-]+) \|", text, re.M)]
        assert len(milliseconds) == 4 and min(milliseconds) > 0
        assert re.search(r"^steps a second of each agent: \d", text, re.M)
        assert re.search(r"^environments alone: [\d,]+ steps a second$", text, re.M)


# Its iterations take 0.1, 0.2, 0.3 seconds, the first one longer.
STAND_IN = """
import argparse
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

parser = argparse.ArgumentParser()
for name in ("env-id", "num-envs", "num-steps", "num-minibatches", "total-timesteps"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
batch_size = int(args.num_envs) * int(args.num_steps)
num_iterations = int(args.total_timesteps) // batch_size
writer = EventFileWriter("runs/fruitbot/agent_1")
seconds = 0
for iteration in range(num_iterations):
    seconds += 1000 if iteration == 0 else iteration / 10
    for tag in ("charts/SPS", "charts/learning_rate"):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=0)])
        writer.add_event(Event(wall_time=seconds, step=(iteration + 1) * batch_size, summary=summary))
writer.close()
"""
BATCH = ["--num-envs", "4", "--num-steps", "6", "--num-minibatches", "2"]


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "cleanrl.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(speed.CLEANRL, STAND_IN)
    return path


def test_speed_of_each_iteration_but_the_first(tmp_path):
    """Of the first agent."""
    script = tmp_path / "a.py"
    script.write_text(STAND_IN)
    speeds = speed.run(script, ["--env-id", "fruitbot", *BATCH, "--total-timesteps", "96"])
    assert speeds == pytest.approx([240, 120, 80])
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]


def test_cleanrl_and_ours_run_in_turn_on_the_same(wheel, monkeypatch, capsys):
    runs = []
    # The first of each is of the warm-up.
    speeds = iter([[0.0, 10.0, 30.0], [0.0, 50.0, 51.0], [0.0, 8.0, 7.0], [0.0, 70.0, 52.0]])

    def run(path, words):
        runs.append((path.read_text(), words))
        return next(speeds)

    monkeypatch.setattr(speed, "run", run)
    words = ["--warmup", 2, "--iterations", 2, "--games", "fruitbot", *BATCH]
    run_here(monkeypatch, "ppo_procgen", "--cleanrl", wheel, *words)
    shared = ["--env-id", "fruitbot", *BATCH, "--total-timesteps", "96"]
    levels = ["--distribution-mode", "easy", "--num-levels", "0", "--eval-interval", "0"]
    theirs = (STAND_IN, shared)
    ours = ((ROOT / "ppo_procgen.py").read_text(), shared + levels)
    assert runs == [theirs, ours, theirs, ours]
    *_, their_line, our_line, ratio = capsys.readouterr().out.splitlines()
    assert their_line == "CleanRL, steps a second: 9 (from 7 to 30)"
    assert our_line == "ppo_procgen, steps a second: 52 (from 50 to 70)"
    assert ratio == f"ratio {np.median([50, 51, 70, 52]) / 9:.2f}"


BAD = {
    "": "{ppo_procgen,spo_p",
    "dqn_procgen": "dqn_procgen",
    "ppo_procgen --iterations 0": "--iterations must be from 1 to",
    "ppo_procgen --games bigfish chess": "--games",
    "ppo_procgen --gamma 2": "--gamma must be",
    "ppo_procgen --resume auto": "speed.py: error: --env-id, --resume and --track",
    "ppo_procgen --env-id starpilot": "speed.py: error: --env-id",
    "ppo_procgen --cleanrl missing.whl": "--cleanrl cannot use missing.whl: FileNotFoundError",
    "ppo_procgen --cleanrl text.whl": "--cleanrl cannot use text.whl: BadZipFile",
    "ppo_procgen --cleanrl other.whl": "--cleanrl cannot use other.whl: KeyError",
    "ppo_procgen --cleanrl broken.whl": "ended with status 3",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words, tmp_path, monkeypatch, capsys):
    """The first lines may be printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.whl").write_text("text")
    for name, content in {"other.whl": "other.py", "broken.whl": speed.CLEANRL}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(content, "raise SystemExit(3)")
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *words.split())
    assert BAD[words] in error_message(stop.value.code, "", capsys.readouterr().err)
    assert len(list(tmp_path.iterdir())) == 3
