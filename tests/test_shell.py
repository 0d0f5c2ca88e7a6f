"""Whole runs, from the shell and in this process: files, curves, output, seeds, levels, signals."""

import importlib
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, fields
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    BOTH,
    MUTUAL,
    ROOT,
    SCRIPTS,
    TINY,
    Fork,
    agent_folders,
    flags,
    get_handlers,
    iteration_of,
    load,
    load_agent,
    parse,
    read_curves,
    read_events,
    run,
    run_folder,
    run_script,
    same,
    set_handlers,
    shell,
    start_script,
    train,
    without_boxes,
)

# 5 iterations of two epochs and 160 steps, with a test after the second and the fourth.
BATCH_SIZE = 32
SETTINGS = TINY | {
    "total_timesteps": 5 * BATCH_SIZE + 10,
    "num_envs": 2,
    "num_steps": 16,
    "update_epochs": 2,
    "eval_interval": 2,
    "checkpoint_interval": 2,
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
KINDS_OF_LEVELS = ["training_levels", "full_distribution"]


def what_it_left(name: str, folder, out: str, err: str) -> SimpleNamespace:
    """Of a tiny run that worked in folder / "work"."""
    run_dir = run_folder(folder / "work")
    folders = agent_folders(name, run_dir)
    return SimpleNamespace(
        name=name,
        script=importlib.import_module(name),
        folder=folder,
        run_dir=run_dir,
        folders=folders,
        curves=[read_curves(each) for each in folders],
        out=out,
        err=err,
    )


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """A run as from the shell."""
    folder = tmp_path_factory.mktemp("ppo")
    for each in ("work", "home"):
        (folder / each).mkdir()
    script = importlib.import_module("ppo_procgen")
    result = run(script, folder / "work", flags(**SETTINGS))
    assert result.status == 0, result.err
    return what_it_left("ppo_procgen", folder, result.out, result.err)


@pytest.fixture(scope="module")
def mdpo(tmp_path_factory):
    """A run from the shell."""
    folder = tmp_path_factory.mktemp("mdpo")
    result = run_script("mdpo_procgen", folder, *flags(**SETTINGS))
    out = result.stdout.decode()
    err = result.stderr.decode()
    assert result.returncode == 0, err
    return what_it_left("mdpo_procgen", folder, out, err)


@pytest.fixture(params=["ppo", "mdpo"])
def finished(request):
    return request.getfixturevalue(request.param)


class Noted:
    """Environments that note the levels and the actions that are played, in each step."""

    def __init__(self, envs, options):
        self.envs = envs
        self.num, self.num_levels, self.start_level, self.seed = options
        self.first_obs = envs.observe()[1]["rgb"].copy()
        self.levels = []
        self.actions = []

    def act(self, actions):
        self.actions.append(actions.tolist())
        levels = [info["level_seed"] for info in self.envs.get_info()]
        self.levels.append(levels)
        self.envs.act(actions)

    def __getattr__(self, name):
        return getattr(self.envs, name)


def train_here(name: str, folder, **settings) -> SimpleNamespace:
    """A run in this process, with its agents and environments noted as they were made."""
    script = importlib.import_module(name)
    noted = SimpleNamespace(agents=[], first_weights=[], envs=[])
    make_agent = script.Agent
    make_envs = script.make_envs

    def note_agent(*inputs, **options):
        agent = make_agent(*inputs, **options)
        noted.agents.append(agent)
        noted.first_weights.append(deepcopy(agent.state_dict()))
        return agent

    def note_envs(args, *options):
        envs = Noted(make_envs(args, *options), options)
        noted.envs.append(envs)
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "Agent", note_agent)
        patch.setattr(script, "make_envs", note_envs)
        script.main(script.Args(**(SETTINGS | settings)))
    noted.run_dir = run_folder(folder)
    folders = agent_folders(name, noted.run_dir)
    noted.saved = [load_agent(each / "agent.pt") for each in folders]
    return noted


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same run as `mdpo`, in this process."""
    return train_here("mdpo_procgen", tmp_path_factory.mktemp("here"))


# Files, curves and output.


def test_only_the_run_folder_is_written(finished):
    assert os.listdir(finished.folder / "work") == ["runs"]
    for temporary in os.listdir(finished.folder / "home"):
        assert temporary.startswith("torchinductor_")  # a folder that PyTorch makes where there is none yet
    assert re.fullmatch(rf"fruitbot__{finished.name}__1__\d{{10}}", finished.run_dir.name)
    files = set()
    for path in finished.run_dir.rglob("*"):
        if path.is_file():
            file = str(path.relative_to(finished.run_dir))
            files.add(re.sub("tfevents.*", "tfevents", file))
    expected = {".lock", "args.json", "checkpoint.pt", "final_test.json"}
    for prefix in ["agent_1/", "agent_2/"] if finished.name in MUTUAL else [""]:
        expected |= {prefix + "agent.pt", prefix + "events.out.tfevents"}
    assert files == expected


def test_args_file(finished):
    """A flat object of all settings, tuples as lists."""
    content = json.loads((finished.run_dir / "args.json").read_text())
    args = asdict(finished.script.Args(**SETTINGS))
    assert content.pop("channels") == [4, 4, 4]
    assert args.pop("channels") == (4, 4, 4)
    assert content == args


def test_tags(finished):
    expected = TRAINING_TAGS | TEST_TAGS
    if finished.name in MUTUAL:
        expected |= {"losses/mutual_kl"}
    for curves in finished.curves:
        assert expected <= curves.keys()
        assert finished.name in MUTUAL or "losses/mutual_kl" not in curves


def test_steps(finished):
    """Every curve in every iteration, except for episodes, which do not end in all, and tests."""
    iterations = [BATCH_SIZE * i for i in range(1, 6)]
    for curves in finished.curves:
        for tag, curve in curves.items():
            if tag.startswith("charts/episodic_"):
                assert set(curve) <= set(iterations)
                assert len(curve) >= 1
            elif tag in TEST_TAGS:
                assert list(curve) == iterations[1::2]
            else:
                assert list(curve) == iterations


# Tag, and the range of its values; finite for all that are not named.
RANGES = {
    "losses/entropy": (0, math.log(15) + 1e-5),
    "losses/clipfrac": (0, 1),
    "losses/explained_variance": (-1e9, 1),
    "losses/approx_kl": (-1e-6, 1e9),
    "losses/mutual_kl": (-1e-6, 1e9),
    "charts/learning_rate": (4.999e-4, 5.001e-4),
    "charts/SPS": (1e-9, 1e9),
    "charts/episodic_length": (1, 1e9),
}


def test_values(finished):
    for curves in finished.curves:
        for tag, curve in curves.items():
            low, high = RANGES.get(tag, (-1e9, 1e9))
            for value in curve.values():
                assert low <= value <= high, tag


def test_agents_have_curves_of_their_own(finished):
    assert len(finished.curves) == (2 if finished.name in MUTUAL else 1)
    if finished.name in MUTUAL:
        first, second = finished.curves
        assert first["losses/value_loss"] != second["losses/value_loss"]
        assert first["losses/mutual_kl"] != second["losses/mutual_kl"]


def test_hyperparameters_are_logged(finished):
    args = asdict(finished.script.Args(**SETTINGS))
    for folder in finished.folders:
        (event,) = read_events(folder).Tensors("hyperparameters/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        for name, value in args.items():
            assert f"|{name}|{value}|" in text


def test_final_test_file(finished):
    """Raw returns, what is made of them, and the table that is printed."""
    content = json.loads((finished.run_dir / "final_test.json").read_text())
    assert content["global_step"] == 5 * BATCH_SIZE
    settings = (finished.run_dir / "args.json").read_text()
    assert content["args"] == json.loads(settings)
    assert len(content["agents"]) == len(finished.folders)
    for number, agent in enumerate(content["agents"], 1):
        train, test = (agent[kind] for kind in KINDS_OF_LEVELS)
        gap = agent["generalization_gap"]
        for each in (train, test):
            returns = np.array(each["returns"])
            assert each["episodes"] == len(returns) == 4  # 3, rounded up to a quota for 2 environments
            assert each["mean"] == pytest.approx(returns.mean())
            error = returns.std(ddof=1) / 2
            assert each["standard_error"] == pytest.approx(error)
        assert gap["mean"] == pytest.approx(train["mean"] - test["mean"])
        both_errors = math.hypot(train["standard_error"], test["standard_error"])
        assert gap["standard_error"] == pytest.approx(both_errors)
        lines = finished.out.splitlines()
        (line,) = [line for line in lines if line.startswith(f"agent {number} ")]
        cells = ["agent", str(number)]
        for each in (train, test, gap):
            interval = 1.96 * each["standard_error"]
            cells += [f"{each['mean']:.2f}", "+-", f"{interval:.2f}"]
        assert line.split() == cells


def test_output(finished):
    """No warning, no escape sequence outside a terminal, every line of progress a line."""
    assert "warn" not in (finished.out + finished.err).lower()
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", finished.err)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", finished.out)
    first, *progress = finished.err.split("\r")
    assert first == ""
    assert all(line.endswith("\n") for line in progress)
    training = [line for line in progress if "step/s" in line]
    assert "100%" in training[-1]
    assert "160/160" in training[-1]
    assert "return" in training[-1]
    run_dir = finished.run_dir.relative_to(finished.folder / "work")
    first_line, second_line, *_ = finished.out.splitlines()
    assert first_line == f"run folder: {run_dir}"
    assert second_line.startswith("training on the CPU, which is slow")
    assert finished.out.endswith(f"finished after 160 steps: {run_dir}\n")


def test_the_final_test_can_be_seen(finished):
    """A bar for each agent and kind of levels, that counts the episodes."""
    lines = finished.err.replace("\r", "").splitlines()
    for number in range(1, len(finished.folders) + 1):
        for levels in ("training levels", "full distribution"):
            bar = [line for line in lines if line.startswith(f"agent {number}, {levels}: ")]
            assert " 0/4 " in bar[0]
            assert " 4/4 " in bar[-1]
            assert "episode" in bar[-1]
    assert "final test, of 3 episodes on each kind of levels\n" in finished.out


# The same run in another process, and others in this one.


def test_agent_file(mdpo, trained):
    """agent.pt makes the very agent that was trained."""
    script = mdpo.script
    for saved, agent in zip(trained.saved, trained.agents, strict=True):
        assert saved["script"] == mdpo.name
        assert saved["args"] == asdict(script.Args(**SETTINGS))
        assert saved["global_step"] == 5 * BATCH_SIZE
        rebuilt = script.Agent(channels=saved["args"]["channels"])
        rebuilt.load_state_dict(saved["agent"])
        assert same(dict(rebuilt.state_dict()), dict(agent.state_dict()))


def test_same_seed_same_weights(mdpo, trained):
    """To the bit, in another process."""
    for folder, saved in zip(mdpo.folders, trained.saved, strict=True):
        assert same(load_agent(folder / "agent.pt")["agent"], saved["agent"])


def test_every_agent_is_trained(trained):
    for weights, saved in zip(trained.first_weights, trained.saved, strict=True):
        for name, weight in weights.items():
            assert not torch.equal(weight, saved["agent"][name])


def test_agents_start_apart(trained):
    """Other weights, other environments: every environment has its own seed, the tests' too."""
    first, second = trained.first_weights
    for name in first:
        if name.endswith("weight"):
            assert not torch.equal(first[name], second[name])
    for one, other in combinations(trained.envs, 2):
        assert one.seed != other.seed
        if one.num == other.num:
            assert (one.first_obs != other.first_obs).any()
            assert one.levels[0] != other.levels[0]


def test_another_seed_and_no_tests(tmp_path):
    """With --eval-interval 0 no test runs, during training or after."""
    runs = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        settings = {"total_timesteps": BATCH_SIZE, "eval_interval": 0, "seed": seed}
        runs.append(train_here("mdpo_procgen", folder, **settings))
        assert not (runs[-1].run_dir / "final_test.json").exists()
        for each in agent_folders("mdpo_procgen", runs[-1].run_dir):
            curves = read_curves(each)
            assert "losses/value_loss" in curves
            assert not TEST_TAGS & curves.keys()
    one, other = runs
    assert not same(one.saved[0]["agent"], other.saved[0]["agent"])
    assert not same(one.first_weights[0], other.first_weights[0])
    seeds = {envs.seed for envs in one.envs}
    assert seeds.isdisjoint(envs.seed for envs in other.envs)


@pytest.mark.parametrize("name", BOTH)
def test_levels_that_are_played(name, tmp_path):
    """The protocol of the paper: training, and one of the two final tests, on the training levels alone; the
    other tests on levels from all that there are. That is looked up in the environments, in every step."""
    settings = {"num_levels": 3, "start_level": 1000, "num_eval_envs": 3, "eval_interval": 2}
    noted = train_here(name, tmp_path, total_timesteps=4 * BATCH_SIZE, update_epochs=1, **settings)
    steps = {"training": [], "test on training levels": [], "test": []}
    levels = {kind: set() for kind in steps}
    for envs in noted.envs:
        kind = "training"
        if envs.num == 3:
            kind = "test" if envs.num_levels == 0 else "test on training levels"
        steps[kind].append(len(envs.actions))
        for row in envs.levels:
            levels[kind] |= set(row)
    assert len({envs.seed for envs in noted.envs}) == len(noted.envs)
    assert len(steps["test"]) == len(steps["test on training levels"]) == len(noted.agents)
    assert steps["training"] == [4 * SETTINGS["num_steps"]] * 2
    assert {1000, 1001, 1002} >= levels["training"]
    assert {1000, 1001, 1002} >= levels["test on training levels"]
    assert len(levels["training"]) >= 2
    assert len(levels["test"]) > 6
    assert not levels["test"] & {1000, 1001, 1002}
    assert max(levels["test"]) > 10_000


def test_tests_sample_their_actions(trained):
    """As training does. A new policy is nearly uniform: greedy play would do the same thing all the time."""
    for envs in trained.envs:
        played = [action for row in envs.actions for action in row if action >= 0]
        counts = np.bincount(played, minlength=15)
        assert len(played) > 50
        assert counts.max() < 0.4 * len(played)
        assert (counts > 0).sum() > 8


# Curves and final tests whose numbers are known.


class KnownReturns:
    """Noise to look at, and episodes whose lengths and returns are known: environment i's last 3 + i steps,
    and bring `base` + i, and 10 more with every episode. Notes (number of the step, return, length) of those
    that end by themselves."""

    def __init__(self, num: int, base: float, rand_seed: int):
        self.num = num
        self.base = base
        self.rng = np.random.default_rng(rand_seed)
        self.step = 0
        self.clock = np.zeros(num, int)
        self.episode = np.zeros(num, int)
        self.reward = np.zeros(num, np.float32)
        self.ended = []

    def act(self, actions):
        self.step += 1
        self.clock += 1
        self.reward = np.zeros(self.num, np.float32)
        for i in range(self.num):
            if actions[i] == -1:
                self.clock[i] = 0
            if self.clock[i] == 3 + i:
                bonus = 10 * self.episode[i]
                self.reward[i] = self.base + i + bonus
                self.ended.append((self.step, self.reward[i], 3 + i))
                self.clock[i] = 0
                self.episode[i] += 1

    def observe(self):
        shape = (self.num, 16, 16, 3)
        obs = self.rng.integers(256, size=shape, dtype=np.uint8)
        return self.reward, {"rgb": obs}, self.clock == 0

    def get_state(self):
        return [pickle.dumps(vars(self))]

    def set_state(self, states):
        vars(self).update(pickle.loads(states[0]))

    def close(self):
        pass


BASES = {"training": 100.0, "test": 2000.0, "test on training levels": 5000.0}  # and 10,000 for each agent


KNOWN_BATCH_SIZE = 64
NUMBERS_OF_AGENTS = [("ppo_procgen", 1), ("mdpo_procgen", 2), ("mdpo_procgen", 3)]


@pytest.fixture(scope="module", params=NUMBERS_OF_AGENTS)
def known(request, tmp_path_factory):
    """A run of 6 iterations, with a test in every second, with known returns; and each call of the loss."""
    name, num_agents = request.param
    script = importlib.import_module(name)
    folder = tmp_path_factory.mktemp("known")
    noted = SimpleNamespace(name=name, num_agents=num_agents, losses=[])
    noted.envs = {kind: [] for kind in BASES}

    def make_known(args, num, num_levels, start_level, rand_seed):
        kind = "training"
        if num == args.num_eval_envs:
            kind = "test" if num_levels == 0 else "test on training levels"
        groups_per_agent = 2 if kind == "training" and num_agents == 1 else 1
        agent = len(noted.envs[kind]) // groups_per_agent
        envs = KnownReturns(num, BASES[kind] + 10_000 * agent, rand_seed)
        noted.envs[kind].append(envs)
        return envs

    compute_loss = script.compute_loss

    def note_loss(*inputs):
        loss, metrics = compute_loss(*inputs)
        noted.losses.append(metrics)
        return loss, metrics

    settings = SETTINGS | {"total_timesteps": 6 * KNOWN_BATCH_SIZE, "eval_interval": 2, "num_eval_envs": 3}
    settings |= {"num_envs": 4, "num_steps": 16, "final_eval_episodes": 6}
    if num_agents > 1:
        settings["num_agents"] = num_agents
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "make_envs", make_known)
        patch.setattr(script, "compute_loss", note_loss)
        script.main(script.Args(**settings))
    noted.run_dir = run_folder(folder)
    folders = agent_folders(name, noted.run_dir, num_agents)
    noted.curves = [read_curves(each) for each in folders]
    return noted


def ended_in_training(known, agent: int, iteration: int) -> list[tuple[float, int]]:
    """(return, length) of the agent's episodes that ended in that iteration, the first being 1."""
    groups_per_agent = 2 if known.num_agents == 1 else 1
    all_envs = known.envs["training"][agent * groups_per_agent :][:groups_per_agent]
    first_step = 16 * (iteration - 1) + 1
    last_step = 16 * iteration
    ended = []
    for envs in all_envs:
        for step, episode_return, length in envs.ended:
            if first_step <= step <= last_step:
                ended.append((episode_return, length))
    return ended


def test_training_returns_are_means_over_all_episodes(known):
    """Of the agent's own."""
    for agent, curves in enumerate(known.curves):
        for iteration in range(1, 7):
            ended = ended_in_training(known, agent, iteration)
            assert len(ended) > 6
            mean_return, mean_length = np.mean(ended, axis=0)
            step = iteration * KNOWN_BATCH_SIZE
            assert curves["charts/episodic_return"][step] == pytest.approx(mean_return)
            assert curves["charts/episodic_length"][step] == pytest.approx(mean_length)


def test_test_returns_are_means_over_the_first_episodes(known):
    """On the full distribution, one episode in each of three environments, which take 3, 4 and 5 steps; and
    how far they are below the last training return."""
    for agent, curves in enumerate(known.curves):
        ended = known.envs["test"][agent].ended
        base = BASES["test"] + 10_000 * agent
        returns = curves["charts/test_episodic_return"]
        assert list(returns) == [2 * KNOWN_BATCH_SIZE, 4 * KNOWN_BATCH_SIZE, 6 * KNOWN_BATCH_SIZE]
        assert returns[2 * KNOWN_BATCH_SIZE] == pytest.approx(base + 1)
        for step, value in returns.items():
            assert value == pytest.approx(base + 1, abs=60)
            gap = curves["charts/episodic_return"][step] - value
            assert curves["charts/generalization_gap"][step] == pytest.approx(gap, abs=1e-2)
        assert len(ended) >= 3 * 3 + 6


def test_final_test_returns(known):
    """Two whole episodes in each of three environments, in the order of the environments."""
    content = json.loads((known.run_dir / "final_test.json").read_text())
    for agent, result in enumerate(content["agents"]):
        base = BASES["test on training levels"] + 10_000 * agent
        expected = [base, base + 10, base + 1, base + 11, base + 2, base + 12]
        assert result["training_levels"]["returns"] == expected
        assert result["training_levels"]["mean"] == base + 6
        test = result["full_distribution"]
        envs = known.envs["test"][agent]
        played = {episode_return for _, episode_return, _ in envs.ended}
        assert played >= set(test["returns"])
        assert test["mean"] == pytest.approx(envs.base + 6, abs=100)


def test_loss_curves_are_means_over_the_iteration(known):
    """Of the agent's own numbers, over all minibatches of all epochs."""
    per_iteration = 2 * SETTINGS["num_minibatches"]
    assert len(known.losses) == 6 * per_iteration
    for iteration in range(1, 7):
        calls = known.losses[(iteration - 1) * per_iteration : iteration * per_iteration]
        for agent, curves in enumerate(known.curves):
            for name in calls[0][agent]:
                values = [call[agent][name].item() for call in calls]
                mean = np.mean(values)
                logged = curves[f"losses/{name}"][iteration * KNOWN_BATCH_SIZE]
                assert logged == pytest.approx(mean, rel=1e-4, abs=1e-7), name


# Signals.

SIGNALS = [("ppo_procgen", signal.SIGINT), ("mdpo_procgen", signal.SIGTERM)]


def assert_stopped(name: str, folder, result, signal_number: int) -> int:
    """By a signal: with the line that says how to go on, whole files, no final test. Returns the step."""
    assert result.status == 128 + signal_number, result.err
    assert "Traceback" not in result.err
    assert "once more stops at once" in result.err
    run_dir = run_folder(folder)
    last_line = result.out.splitlines()[-1]
    match = re.fullmatch(r"stopped after ([\d,]+) steps; to go on: --resume (\S+)", last_line)
    assert match[2] == str(run_dir.relative_to(folder))
    step = int(match[1].replace(",", ""))
    assert step % BATCH_SIZE == 0
    assert load(run_dir / "checkpoint.pt")["position"]["global_step"] == step
    assert not (run_dir / "final_test.json").exists()
    agent = importlib.import_module(name).Agent(channels=(4, 4, 4))
    for agent_folder in agent_folders(name, run_dir):
        weights = load_agent(agent_folder / "agent.pt")["agent"]
        agent.load_state_dict(weights)
    return step


def wait_for_checkpoint(folder, iteration: int):
    """Until the run in this folder has written one of this iteration, or a later one."""
    deadline = time.time() + 60
    while time.time() < deadline:
        for path in folder.glob("runs/*/checkpoint.pt"):
            if iteration_of(path.parent) >= iteration:
                return
        time.sleep(0.05)
    raise AssertionError(f"there is no checkpoint of iteration {iteration}")


def check_signal_in_training(name: str, folder, run, signal_number: int):
    """The iteration under way is finished and its agents are saved."""
    wait_for_checkpoint(folder, iteration=2)
    os.kill(run.id, signal_number)
    result = run.finish()
    step = assert_stopped(name, folder, result, signal_number)
    assert step >= 2 * BATCH_SIZE
    for agent_folder in agent_folders(name, run_folder(folder)):
        assert max(read_curves(agent_folder)["losses/value_loss"]) == step


class Shell:
    """A run from the shell with the methods of a Fork."""

    def __init__(self, name: str, folder, words):
        self.process = start_script(name, folder, *words)
        self.id = self.process.pid

    def wait_for_line(self, start: str):
        for line in self.process.stdout:
            if line.startswith(start):
                return
        raise AssertionError(self.process.stderr.read())

    def finish(self, most_seconds: int = 100) -> SimpleNamespace:
        try:
            out, err = self.process.communicate(timeout=most_seconds)
        finally:
            self.process.kill()
        return SimpleNamespace(status=self.process.returncode, out=out, err=err)


ENDLESS = SETTINGS | {"total_timesteps": 10_000_000, "eval_interval": 0, "checkpoint_interval": 1}
LONG_FINAL_TEST = SETTINGS | {"total_timesteps": BATCH_SIZE, "final_eval_episodes": 1_000_000}
# Random play in heist goes on for up to 1000 steps.
LONG_TEST = ENDLESS | {"env_id": "heist", "eval_interval": 1, "num_eval_envs": 64}


@pytest.mark.parametrize(("name", "signal_number"), SIGNALS)
def test_signal(name, signal_number, tmp_path):
    run = Fork(importlib.import_module(name), tmp_path, flags(**ENDLESS))
    run.wait_for_line("run folder: runs/")
    check_signal_in_training(name, tmp_path, run, signal_number)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "signal_number"), SIGNALS)
def test_signal_from_the_shell(name, signal_number, tmp_path):
    run = Shell(name, tmp_path, flags(**ENDLESS))
    run.wait_for_line("run folder: runs/")
    check_signal_in_training(name, tmp_path / "work", run, signal_number)


@pytest.mark.parametrize("name", BOTH)
def test_what_reads_the_output_ends_first(name, tmp_path):
    """The run goes on, and a signal stops it as ever."""
    run = Fork(importlib.import_module(name), tmp_path, flags(**ENDLESS))
    wait_for_checkpoint(tmp_path, iteration=1)
    run.out.close()
    run.err.close()
    reached = iteration_of(run_folder(tmp_path))
    wait_for_checkpoint(tmp_path, reached + 3)
    os.kill(run.id, signal.SIGINT)
    _, wait_status = os.waitpid(run.id, 0)
    assert os.waitstatus_to_exitcode(wait_status) == 128 + signal.SIGINT
    for folder in agent_folders(name, run_folder(tmp_path)):
        assert (folder / "agent.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2>&1", ""])
def test_ctrl_c_in_a_pipeline(streams, tmp_path):
    """A terminal sends SIGINT to tee, too, which ends at once."""
    command, options = shell("mdpo_procgen", tmp_path)
    command += map(str, flags(**ENDLESS))
    pipeline = f"trap : INT; {shlex.join(map(str, command))} {streams} | tee log; exit ${{PIPESTATUS[0]}}"
    with subprocess.Popen(
        ["bash", "-c", pipeline], stderr=subprocess.PIPE, start_new_session=True, **options
    ) as process:
        folder = tmp_path / "work"
        wait_for_checkpoint(folder, iteration=1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in err
    assert b"Broken pipe" not in err
    for agent_folder in agent_folders("mdpo_procgen", run_folder(folder)):
        assert (agent_folder / "agent.pt").exists()


def test_without_output(tmp_path):
    """As where the shell has closed it: >&- 2>&-"""

    def close_both():
        sys.stdout = None
        sys.stderr = None

    script = importlib.import_module("ppo_procgen")
    words = flags(**(SETTINGS | {"total_timesteps": BATCH_SIZE, "eval_interval": 0}))
    assert Fork(script, tmp_path, words, close_both).finish().status == 0
    assert iteration_of(run_folder(tmp_path)) == 1
    assert (run_folder(tmp_path) / "agent.pt").exists()


def check_signal_in_final_test(name: str, folder, run, signal_number: int):
    """It ends at once, and --resume repeats the test alone."""
    run.wait_for_line("final test, of")
    time.sleep(0.3)
    start_time = time.time()
    os.kill(run.id, signal_number)
    result = run.finish(most_seconds=20)
    assert time.time() - start_time < 4  # one second, where nothing else is at work
    step = assert_stopped(name, folder, result, signal_number)
    assert step == BATCH_SIZE
    assert "stopping; once more" in result.err
    script = importlib.import_module(name)
    words = ["--resume", run_folder(folder), *flags(device="cpu", final_eval_episodes=2)]
    checkpoint = load(run_folder(folder) / "checkpoint.pt")
    assert train(script, folder, *words) == 0
    assert (run_folder(folder) / "final_test.json").exists()
    after = load(run_folder(folder) / "checkpoint.pt")
    assert same(checkpoint["agents"], after["agents"])


@pytest.mark.parametrize(("name", "signal_number"), SIGNALS[:1])
def test_signal_in_the_final_test(name, signal_number, tmp_path):
    run = Fork(importlib.import_module(name), tmp_path, flags(**LONG_FINAL_TEST))
    check_signal_in_final_test(name, tmp_path, run, signal_number)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "signal_number"), SIGNALS)
def test_signal_in_the_final_test_from_the_shell(name, signal_number, tmp_path):
    run = Shell(name, tmp_path, flags(**LONG_FINAL_TEST))
    check_signal_in_final_test(name, tmp_path / "work", run, signal_number)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "signal_number"), SIGNALS)
def test_signal_in_a_test_from_the_shell(name, signal_number, tmp_path):
    """In the middle of a run, of 64 environments: it ends at once, and is still due."""
    run = Shell(name, tmp_path, flags(**LONG_TEST))
    wait_for_checkpoint(tmp_path / "work", iteration=0)
    time.sleep(2)  # the iteration before it takes less
    start_time = time.time()
    os.kill(run.id, signal_number)
    result = run.finish()
    assert time.time() - start_time < 4
    folder = tmp_path / "work"
    step = assert_stopped(name, folder, result, signal_number)
    assert step == BATCH_SIZE
    assert load(run_folder(folder) / "checkpoint.pt")["position"]["test_due"]


def test_second_signal_kills(tmp_path):
    """In an iteration that would take a minute."""
    script = importlib.import_module("ppo_procgen")

    def make_rollout_slow():
        def wait_a_minute(*inputs):
            print("rollout", flush=True)
            time.sleep(60)

        script.rollout = wait_a_minute

    run = Fork(script, tmp_path, flags(**ENDLESS), make_rollout_slow)
    run.wait_for_line("rollout")
    os.kill(run.id, signal.SIGINT)
    time.sleep(0.5)
    assert run.running()
    os.kill(run.id, signal.SIGINT)
    result = run.finish()
    assert result.status == -signal.SIGINT
    assert result.err.count("stopping after this iteration; once more stops at once") == 1
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("seconds", "done", "words"),
    [
        (10, 0.5, " after this iteration, in about 10 seconds"),
        (20, 0.25, " after this iteration, in about 60 seconds"),
        (100, 0.25, " after this iteration, in about 5 minutes"),
        (10, 0.0, " after this iteration"),
    ],
)
def test_a_signal_is_told_how_long_it_takes(monkeypatch, capfd, seconds, done, words):
    script = importlib.import_module("ppo_procgen")
    args = script.Args(**SETTINGS)
    clock = SimpleNamespace(time=lambda: 1000.0)
    monkeypatch.setattr(script, "time", clock)
    stop = script.Stop()
    progress = script.Progress(args, 1, 0, 160)
    stop.progress = progress
    progress.begin_iteration()
    progress.advance(done)
    clock.time = lambda: 1000.0 + seconds
    handlers = get_handlers()
    try:
        stop.catch_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        assert stop.requested
    finally:
        set_handlers(handlers)
    assert f"\nstopping{words}; once more stops at once\n" in capfd.readouterr().err
    progress.end_iteration()
    assert progress.time_left() == ""  # between iterations, as in a test
    progress.close()


def test_progress_reaches_its_end(finished):
    """The shares of an iteration's steps and minibatches make one."""
    script = finished.script
    args = script.Args(**SETTINGS)
    progress = script.Progress(args, len(finished.folders), 0, 160)
    progress.begin_iteration()
    for _ in range(args.num_steps + 1):
        progress.advance(progress.share_of_step)
    assert 0 < progress.bar.n < BATCH_SIZE / 2
    for _ in range(args.update_epochs * args.num_minibatches):
        progress.advance(progress.share_of_minibatch)
    assert progress.done == pytest.approx(1)
    assert progress.bar.n == BATCH_SIZE
    progress.close()


@pytest.mark.parametrize("name", BOTH)
def test_progress_shows_returns(name):
    """Of each agent; nan would look like a run that has gone wrong."""
    script = importlib.import_module(name)
    progress = script.Progress(script.Args(**SETTINGS), 2, 0, 160)
    begun = SimpleNamespace(train_return=2.5, test_return=math.nan)
    trained = SimpleNamespace(train_return=3.0, test_return=-1.25)
    progress.show_returns([begun, trained])
    assert progress.bar.postfix == "return 2.50 (test -)/3.00 (test -1.25)"
    progress.close()


# The rest.


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_more_memory_than_there_is(name, tmp_path):
    """One line that says what to ask less of."""
    settings = SETTINGS | {"num_envs": 65536, "num_steps": 4096, "total_timesteps": 2**30}  # 3 TB
    process = start_script(name, tmp_path, *flags(**settings))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1, err
    assert "out of memory" in err
    assert "--num-envs" in err


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, known, tmp_path, monkeypatch, capsys):
    """Those are ours to mend, and come with their traceback."""
    script = importlib.import_module("ppo_procgen")

    def fail(*inputs):
        raise error

    monkeypatch.setattr(script, "set_up", fail)
    if known:
        assert train(script, tmp_path, *flags(**SETTINGS)) == 2
        err = capsys.readouterr().err
        assert err.startswith("ppo_procgen.py: error: out of memory: smaller --num-envs")
        assert err.count("\n") == 1
    else:
        with pytest.raises(RuntimeError, match="shapes"):
            train(script, tmp_path, *flags(**SETTINGS))


def test_import_does_nothing(tmp_path):
    code = "import random, signal, numpy, torch\n"
    code += "before = signal.getsignal(signal.SIGINT), torch.initial_seed()\n"
    code += "before += random.getstate(), numpy.random.get_state()[1].tolist()\n"
    code += f"import {', '.join(SCRIPTS)}\n"
    code += "assert before[:2] == (signal.getsignal(signal.SIGINT), torch.initial_seed())\n"
    code += "assert before[2:] == (random.getstate(), numpy.random.get_state()[1].tolist())\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=60)
    assert result.returncode == 0
    assert result.stdout == result.stderr == b""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BOTH)
def test_help(name, tmp_path, capsys):
    """Every flag, each with some words about it."""
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        parse(script, tmp_path, "--help")
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert err == ""
    helps = {}
    for entry in re.split(r"\n[\u2500-\u257f ] (?=-)", out)[1:]:
        words = without_boxes(entry)
        flag = re.search(r"--([\w-]+)", words)[1]
        text = re.sub(r"--?[\w-]+,?|\b[A-Z|]{2,}\b|\(default:.*", "", words)
        helps[flag.replace("-", "_")] = text.strip()
    names = {each.name for each in fields(script.Args)}
    assert helps.keys() == names | {"help"}
    for flag, text in helps.items():
        assert re.search("[a-z]{2}", text), flag
