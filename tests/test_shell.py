"""Whole runs: what they print and leave, levels, known numbers and signals; and what import does."""

import importlib
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    ROOT,
    TINY,
    Fork,
    agent_folders,
    flags,
    load,
    parse,
    read_curves,
    run_folder,
    same,
    step_of,
    train,
    without_boxes,
)

# 3 iterations of two epochs, with a test after the second.
BATCH_SIZE = 32
SETTINGS = TINY | {
    "total_timesteps": 3 * BATCH_SIZE + 10,
    "num_envs": 2,
    "update_epochs": 2,
    "eval_interval": 2,
    "checkpoint_interval": 2,
}
KINDS_OF_LEVELS = ["training_levels", "full_distribution"]


def run_python(words: list[str], folder, **env: str) -> SimpleNamespace:
    """A process in that folder, which finds the scripts, and first what is in the folder. Its output is not
    changed, as text=True would do with \\r."""
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"} | env
    result = subprocess.run([sys.executable, *words], capture_output=True, cwd=folder, env=env, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    return SimpleNamespace(out=result.stdout.decode(), err=result.stderr.decode())


# Files and output.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the shell to its end."""
    folder = tmp_path_factory.mktemp("work")
    words = [str(ROOT / "mdpo_procgen.py"), *flags(**SETTINGS)]
    finished = run_python(words, folder, CUDA_VISIBLE_DEVICES="")
    finished.folder = folder
    finished.run_dir = run_folder(folder)
    finished.folders = agent_folders("mdpo_procgen", finished.run_dir)
    return finished


def test_files(finished):
    """The run folder alone, with these. args.json is a flat object of all settings, tuples as lists."""
    assert os.listdir(finished.folder) == ["runs"]
    assert re.fullmatch(r"fruitbot__mdpo_procgen__1__\d{10}", finished.run_dir.name)
    files = set()
    for path in finished.run_dir.rglob("*"):
        if path.is_file():
            file = str(path.relative_to(finished.run_dir))
            files.add(re.sub("tfevents.*", "tfevents", file))
    expected = {".lock", "args.json", "checkpoint.pt", "final_test.json"}
    for folder in ("agent_1", "agent_2"):
        expected |= {f"{folder}/agent.pt", f"{folder}/events.out.tfevents"}
    assert files == expected
    content = json.loads((finished.run_dir / "args.json").read_text())
    args = asdict(importlib.import_module("mdpo_procgen").Args(**SETTINGS))
    assert content == args | {"channels": [4, 4, 4]}


def test_same_seed_same_agents(finished, tmp_path):
    """As of a run without tests in this process, to the bit; agent.pt makes an agent."""
    script = importlib.import_module("mdpo_procgen")
    assert train(script, tmp_path, *flags(**SETTINGS | {"eval_interval": 0})) == 0
    without_tests = run_folder(tmp_path)
    assert not (without_tests / "final_test.json").exists()
    for folder, other in zip(finished.folders, agent_folders("mdpo_procgen", without_tests), strict=True):
        saved = load(folder / "agent.pt")
        assert saved["script"] == "mdpo_procgen"
        assert saved["global_step"] == 3 * BATCH_SIZE
        assert saved["args"] == asdict(script.Args(**SETTINGS))
        assert same(saved["agent"], load(other / "agent.pt")["agent"])
        script.Agent(channels=saved["args"]["channels"]).load_state_dict(saved["agent"])


def test_final_test_file(finished):
    """Raw returns and what is made of them, with the interval that is printed."""
    content = json.loads((finished.run_dir / "final_test.json").read_text())
    assert content["global_step"] == 3 * BATCH_SIZE
    assert len(content["agents"]) == 2
    for kind in KINDS_OF_LEVELS:
        after = finished.out.split(f"final test on {kind}, 3 episodes\n")[1].splitlines()
        for number, agent in enumerate(content["agents"], 1):
            returns = np.array(agent[kind]["returns"])
            error = returns.std(ddof=1) / 3**0.5
            assert agent[kind]["episodes"] == len(returns) == 3
            assert agent[kind]["mean"] == pytest.approx(returns.mean())
            assert agent[kind]["standard_error"] == pytest.approx(error)
            assert after[number - 1] == f"agent {number}: {returns.mean():.2f} +- {1.96 * error:.2f}"


def test_output(finished):
    """Where the run is, how to stop it and to go on, and one bar."""
    run_dir = finished.run_dir.relative_to(finished.folder)
    lines = finished.out.splitlines()
    assert lines[0] == "cpu, the encoder in float32"
    assert lines[1].startswith(f"run folder: {run_dir}; Ctrl-C stops")
    assert f"--resume {run_dir} " in lines[1]
    assert lines[-1] == f"finished after 96 steps: {run_dir}"
    assert len(lines) == 9
    last_bar = finished.err.rstrip().split("\r")[-1]
    assert "96/96" in last_bar
    assert re.search(r"returns=\[-?[0-9.]+, -?[0-9.]+\]", last_bar)


def test_track(tmp_path, monkeypatch):
    """With an imitation of wandb: it is told of the run before the curves begin, and of the same run when it
    goes on. WANDB_PROJECT and WANDB_ENTITY, which wandb itself reads, say where to."""
    script = importlib.import_module("mdpo_procgen")
    calls = []
    calls_before = []
    make_writer = script.SummaryWriter

    def note_calls(*inputs, **options):
        calls_before.append(len(calls))
        return make_writer(*inputs, **options)

    wandb = ModuleType("wandb")
    wandb.__spec__ = SimpleNamespace(origin="wandb.py")
    wandb.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(script, "SummaryWriter", note_calls)
    settings = SETTINGS | {"total_timesteps": BATCH_SIZE, "eval_interval": 0, "track": True}
    assert train(script, tmp_path, *flags(**settings)) == 0
    run_dir = run_folder(tmp_path)
    assert train(script, tmp_path, *flags(resume=run_dir, total_timesteps=2 * BATCH_SIZE)) == 0
    assert train(script, tmp_path, *flags(resume=run_dir, track=False)) == 0
    assert calls_before == [1, 1, 2, 2, 2, 2]
    for call, step in zip(calls, (1, 2), strict=True):
        config = asdict(script.Args(**settings | {"total_timesteps": step * BATCH_SIZE}))
        assert call == {"id": run_dir.name, "resume": "allow", "config": config, "sync_tensorboard": True}


# Levels and numbers that are known.


class KnownReturns:
    """Noise to look at, and episodes whose returns are known: environment i's last 3 + i steps, and bring
    `base` + i, and 10 more with every episode."""

    def __init__(self, num: int, base: float, levels: tuple):
        self.num = num
        self.base = base
        self.levels = levels  # their number, the first, and what chooses
        self.rng = np.random.default_rng(levels)
        self.step = 0

    def act(self, actions):
        self.step += 1

    def observe(self):
        index = np.arange(self.num)
        episode, clock = np.divmod(self.step, 3 + index)
        first = clock == 0
        reward = first * (self.base + index + 10 * (episode - 1))
        obs = self.rng.integers(256, size=(self.num, 16, 16, 3), dtype=np.uint8)
        return reward.astype(np.float32), {"rgb": obs}, first

    def get_state(self):
        return []


BASES = {"training": 100.0, "test": 2000.0, "full_distribution": 3000.0, "training_levels": 5000.0}
KNOWN_BATCH_SIZE = 64


@pytest.fixture(scope="module", params=[("spo_procgen", 1), ("mdpo_procgen", 3)])
def known(request, tmp_path_factory):
    """A run of 4 iterations, a test in every second, with known returns, 10,000 apart between agents, and
    each call of the loss."""
    name, num_agents = request.param
    script = importlib.import_module(name)
    folder = tmp_path_factory.mktemp("known")
    known = SimpleNamespace(num_agents=num_agents, envs={kind: [] for kind in BASES}, losses=[])

    def make_known(args, num, *levels):
        kind = {5: "full_distribution", 6: "test"}.get(num, "training")
        if num == 5 and levels[0] > 0:
            kind = "training_levels"
        agent = len(known.envs[kind]) % num_agents
        known.envs[kind].append(KnownReturns(num, BASES[kind] + 10_000 * agent, levels))
        return known.envs[kind][-1]

    compute_loss = script.compute_loss

    def note_loss(*inputs):
        loss, metrics = compute_loss(*inputs)
        known.losses.append(metrics)
        return loss, metrics

    settings = SETTINGS | {"total_timesteps": 4 * KNOWN_BATCH_SIZE, "num_levels": 3, "start_level": 1000}
    settings |= {"num_envs": 4, "num_eval_envs": 6, "final_eval_episodes": 5}
    if num_agents > 1:
        settings["num_agents"] = num_agents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_envs", make_known)
        patch.setattr(script, "compute_loss", note_loss)
        assert train(script, folder, *flags(**settings)) == 0
    run_dir = run_folder(folder)
    known.final_test = json.loads((run_dir / "final_test.json").read_text())
    known.curves = [read_curves(each) for each in agent_folders(name, run_dir, num_agents)]
    return known


def test_levels(known):
    """The protocol of the paper: training, and one of the two final tests, on the training levels alone; the
    other tests on the full distribution, each on other levels."""
    expected = {
        "training": (3, 1000),
        "training_levels": (3, 1000),
        "full_distribution": (0, 0),
        "test": (0, 0),
    }
    for kind, levels in expected.items():
        assert {envs.levels[:2] for envs in known.envs[kind]} == {levels}
    assert len(known.envs["test"]) == 2 * known.num_agents
    assert len({envs.levels for envs in known.envs["test"]}) == 2
    assert len({envs.levels for envs in known.envs["training"]}) == len(known.envs["training"]) >= 2


def test_test_returns_are_means_over_first_episodes(known):
    """One episode in each environment; in the final test in the order of the environments."""
    assert len(known.final_test["agents"]) == known.num_agents
    for agent, curves in enumerate(known.curves):
        base = 10_000 * agent
        tests = curves["charts/test_episodic_return"]
        assert tests == dict.fromkeys((128, 256), BASES["test"] + base + 2.5)
        for step, value in tests.items():
            gap = curves["charts/episodic_return"][step] - value
            assert curves["charts/generalization_gap"][step] == pytest.approx(gap, abs=1e-2)
        for kind in KINDS_OF_LEVELS:
            expected = [BASES[kind] + base + i for i in range(5)]
            assert known.final_test["agents"][agent][kind]["returns"] == expected


def test_loss_curves_are_means_over_the_iteration(known):
    """Of the agent's own numbers, over all minibatches of all epochs."""
    for agent, curves in enumerate(known.curves):
        for name in known.losses[0][agent]:
            values = [call[agent][name].item() for call in known.losses]
            means = np.array(values).reshape(4, 2 * SETTINGS["num_minibatches"]).mean(axis=1)
            assert list(curves[f"losses/{name}"].values()) == pytest.approx(means, rel=1e-4, abs=1e-6), name


# Signals.

SAYS_SO = "stopping after this iteration or in this test; once more kills"


def start_endless_run(name: str, folder, **settings) -> Fork:
    """Which has written the checkpoint of its beginning."""
    settings = SETTINGS | {"total_timesteps": 10_000_000, "eval_interval": 0} | settings
    process = Fork(importlib.import_module(name), folder, flags(**settings))
    while not list(folder.glob("runs/*/checkpoint.pt")):
        assert process.is_alive()
        time.sleep(0.05)
    return process


def test_a_signal_ends_the_iteration(tmp_path):
    """It says so, and what it has saved is of one step."""
    process = start_endless_run("mdspo_procgen", tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    ended = process.finish()
    assert ended.status == 128 + signal.SIGTERM, ended.err
    assert ended.err.count(SAYS_SO) == 1
    assert "Traceback" not in ended.err
    run_dir = run_folder(tmp_path)
    assert step_of(run_dir) >= BATCH_SIZE
    assert not (run_dir / "final_test.json").exists()
    for agent_folder in agent_folders("mdspo_procgen", run_dir):
        assert load(agent_folder / "agent.pt")["global_step"] == step_of(run_dir)


def test_a_second_signal_kills(tmp_path):
    """In an iteration that would take hours."""
    process = start_endless_run("ppo_procgen", tmp_path, update_epochs=10_000_000)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    ended = process.finish()
    assert ended.status == -signal.SIGINT
    assert ended.err.count(SAYS_SO) == 1
    assert "Traceback" not in ended.err
    assert step_of(run_folder(tmp_path)) == 0


# Import and help.


def test_import_does_nothing(script, tmp_path, monkeypatch, capfd):
    """To signals, random numbers, threads and settings of PyTorch, and to no file."""

    def state():
        signals = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
        numbers = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        cudnn = (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32)
        return signals, numbers, torch.get_num_threads(), cudnn

    monkeypatch.chdir(tmp_path)
    before = state()
    runpy.run_path(script.__file__)
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_waiting_threads_give_way(tmp_path, monkeypatch):
    """What says so to OpenMP must be set before torch is imported; what the user has set stays."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    (tmp_path / "torch.py").write_text(
        "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nraise SystemExit\n"
    )
    words = ["-c", "import ppo_procgen"]
    assert run_python(words, tmp_path).out == "3000\n"
    assert run_python(words, tmp_path, GOMP_SPINCOUNT="7").out == "7\n"
    assert run_python(words, tmp_path, OMP_WAIT_POLICY="active").out == "None\n"


def test_help(script, tmp_path, capsys):
    """Every flag, each with some words about it, and the docstring with its equation."""
    with pytest.raises(SystemExit) as stop:
        parse(script, tmp_path, "--help")
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert err == ""
    for line in script.__doc__.splitlines():
        assert line.strip() in out
    helps = {}
    for entry in re.split(r"\n[\u2500-\u257f ] (?=-)", out)[1:]:
        words = without_boxes(entry)
        flag = re.search(r"--([\w-]+)", words)[1]
        text = re.sub(r"--?[\w-]+,?|\b[A-Z|]{2,}\b|\(default:.*", "", words)
        helps[flag.replace("-", "_")] = text.strip()
    assert helps.keys() == {each.name for each in fields(script.Args)} | {"help"}
    for flag, text in helps.items():
        assert re.search("[a-z]{2}", text), flag
