"""Whole runs: what they print and leave, levels, known numbers and signals; and what import does."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
from common import (
    BOTH,
    MUTUAL,
    ROOT,
    SCRIPTS,
    TINY,
    agent_folders,
    flags,
    load,
    load_agent,
    parse,
    read_curves,
    run_folder,
    run_script,
    same,
    start_script,
    step_of,
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
KINDS_OF_LEVELS = ["training_levels", "full_distribution"]


@pytest.fixture(scope="module", params=BOTH)
def finished(request, tmp_path_factory):
    """A run from the shell to its end."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    result = run_script(name, folder, *flags(**SETTINGS))
    err = result.stderr.decode()
    assert result.returncode == 0, err
    run_dir = run_folder(folder / "work")
    return SimpleNamespace(
        name=name,
        script=importlib.import_module(name),
        folder=folder,
        run_dir=run_dir,
        folders=agent_folders(name, run_dir),
        final_test=json.loads((run_dir / "final_test.json").read_text()),
        out=result.stdout.decode(),
        err=err,
    )


# Files and output.


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
    assert content == args | {"channels": [4, 4, 4]}


def test_same_seed_same_agents(finished, tmp_path):
    """agent.pt makes an agent: the one that is trained by the same run in this process, to the bit."""
    script = finished.script
    agents = []
    with pytest.MonkeyPatch.context() as patch:
        make_agent = script.Agent
        patch.setattr(script, "Agent", lambda *inputs: agents.append(make_agent(*inputs)) or agents[-1])
        assert train(script, tmp_path, *flags(**SETTINGS)) == 0
    assert len(agents) == len(finished.folders)
    for folder, agent in zip(finished.folders, agents, strict=True):
        saved = load_agent(folder / "agent.pt")
        assert saved["script"] == finished.name
        assert saved["global_step"] == 5 * BATCH_SIZE
        assert saved["args"] == asdict(script.Args(**SETTINGS))
        rebuilt = script.Agent(channels=saved["args"]["channels"])
        rebuilt.load_state_dict(saved["agent"])
        assert same(dict(rebuilt.state_dict()), dict(agent.state_dict()))


def test_final_test_file(finished):
    """Raw returns and what is made of them, with the interval that is printed."""
    content = finished.final_test
    assert content["global_step"] == 5 * BATCH_SIZE
    assert len(content["agents"]) == len(finished.folders)
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
    """Where the run is, how to stop it and to go on, and one bar; no warning."""
    run_dir = finished.run_dir.relative_to(finished.folder / "work")
    lines = finished.out.splitlines()
    assert lines[0] == "cpu, the encoder in float32"
    assert lines[1].startswith(f"run folder: {run_dir}; Ctrl-C stops")
    assert f"--resume {run_dir} " in lines[1]
    assert lines[-1] == f"finished after 160 steps: {run_dir}"
    assert len(lines) == 5 + 2 * len(finished.folders)
    assert "warn" not in (finished.out + finished.err).lower()
    last_bar = finished.err.rstrip().split("\r")[-1]
    assert "100%" in last_bar
    assert "160/160" in last_bar
    assert re.search(r"returns=\[" + ", ".join(["-?[0-9.]+"] * len(finished.folders)) + r"\]", last_bar)


def test_track(tmp_path, monkeypatch):
    """With an imitation of wandb: it is told of the run before the curves begin, and of the same run when it
    goes on. WANDB_PROJECT and WANDB_ENTITY, which wandb itself reads, say where to."""
    script = importlib.import_module("mdpo_procgen")
    package = tmp_path / "packages"
    package.mkdir()
    (package / "wandb.py").write_text("calls = []\ndef init(**options):\n    calls.append(options)\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    calls_before = []
    make_writer = script.SummaryWriter

    def note_calls(*inputs, **options):
        calls_before.append(len(wandb.calls))
        return make_writer(*inputs, **options)

    monkeypatch.setattr(script, "SummaryWriter", note_calls)
    settings = SETTINGS | {"total_timesteps": BATCH_SIZE, "eval_interval": 0, "track": True}
    assert train(script, tmp_path, *flags(**settings)) == 0
    run_dir = run_folder(tmp_path)
    words = ["--resume", run_dir, "--device", "cpu", "--total-timesteps"]
    assert train(script, tmp_path, *words, 2 * BATCH_SIZE) == 0
    assert train(script, tmp_path, *words, 3 * BATCH_SIZE, "--no-track") == 0
    assert calls_before == [1, 1, 2, 2, 2, 2]
    for call, step in zip(wandb.calls, (1, 2), strict=True):
        config = asdict(script.Args(**settings | {"total_timesteps": step * BATCH_SIZE}))
        assert call == {"id": run_dir.name, "resume": "allow", "config": config, "sync_tensorboard": True}
    assert not (run_dir / "final_test.json").exists()  # with --eval-interval 0 there is no test
    for folder in agent_folders("mdpo_procgen", run_dir):
        assert "charts/test_episodic_return" not in read_curves(folder)


# Levels and numbers that are known.


class KnownReturns:
    """Noise to look at, and episodes whose lengths and returns are known: environment i's last 3 + i steps,
    and bring `base` + i, and 10 more with every episode. Notes (step, return, length) of those that ended."""

    def __init__(self, num: int, base: float, levels: tuple):
        self.num = num
        self.base = base
        self.levels = levels  # their number, the first, and what chooses
        self.rng = np.random.default_rng(levels)
        self.step = 0
        self.clock = np.zeros(num, int)
        self.episode = np.zeros(num, int)
        self.reward = np.zeros(num, np.float32)
        self.ended = []

    def act(self, actions):
        self.step += 1
        self.clock += 1
        lengths = 3 + np.arange(self.num)
        ends = self.clock == lengths
        self.reward = np.where(ends, self.base + np.arange(self.num) + 10 * self.episode, 0)
        for i in np.flatnonzero(ends):
            self.ended.append((self.step, self.reward[i], lengths[i]))
        self.episode[ends] += 1
        self.clock[ends] = 0

    def observe(self):
        obs = self.rng.integers(256, size=(self.num, 16, 16, 3), dtype=np.uint8)
        return self.reward.astype(np.float32), {"rgb": obs}, self.clock == 0

    def get_state(self):
        return []


BASES = {"training": 100.0, "test": 2000.0, "full_distribution": 3000.0, "training_levels": 5000.0}
KNOWN_BATCH_SIZE = 64


@pytest.fixture(scope="module", params=[("spo_procgen", 1), ("mdpo_procgen", 2), ("mdpo_procgen", 3)])
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
        per_agent = 2 if kind == "training" and num_agents == 1 else 1
        agent = len(known.envs[kind]) // per_agent % num_agents
        known.envs[kind].append(KnownReturns(num, BASES[kind] + 10_000 * agent, levels))
        return known.envs[kind][-1]

    compute_loss = script.compute_loss

    def note_loss(*inputs):
        loss, metrics = compute_loss(*inputs)
        known.losses.append(metrics)
        return loss, metrics

    settings = SETTINGS | {"total_timesteps": 4 * KNOWN_BATCH_SIZE, "num_levels": 3, "start_level": 1000}
    settings |= {"num_envs": 4, "num_steps": 16, "num_eval_envs": 6, "final_eval_episodes": 5}
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
    for kind, levels in [
        ("training", (3, 1000)),
        ("training_levels", (3, 1000)),
        ("full_distribution", (0, 0)),
    ]:
        assert {envs.levels[:2] for envs in known.envs[kind]} == {levels}
    tests = known.envs["test"]
    assert {envs.levels[:2] for envs in tests} == {(0, 0)}
    assert len(tests) == 2 * known.num_agents
    assert len({envs.levels for envs in tests}) == 2
    assert len({envs.levels for envs in known.envs["training"]}) == len(known.envs["training"]) >= 2


def test_training_returns_are_means_over_all_episodes(known):
    """Those of the agent's own that ended in the iteration."""
    per_agent = 2 if known.num_agents == 1 else 1
    for agent, curves in enumerate(known.curves):
        ended = []
        for envs in known.envs["training"][agent * per_agent :][:per_agent]:
            ended += envs.ended
        for iteration in range(1, 5):
            steps = range(16 * (iteration - 1) + 1, 16 * iteration + 1)
            means = np.mean([episode[1:] for episode in ended if episode[0] in steps], axis=0)
            step = iteration * KNOWN_BATCH_SIZE
            assert curves["charts/episodic_return"][step] == pytest.approx(means[0])
            assert curves["charts/episodic_length"][step] == pytest.approx(means[1])


def test_test_returns_are_means_over_first_episodes(known):
    """One episode in each environment, the short ones no more often than the long ones; in the final test in
    the order of the environments."""
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
    per_iteration = 2 * SETTINGS["num_minibatches"]
    assert len(known.losses) == 4 * per_iteration
    for iteration in range(1, 5):
        calls = known.losses[(iteration - 1) * per_iteration : iteration * per_iteration]
        for agent, curves in enumerate(known.curves):
            for name in calls[0][agent]:
                mean = np.mean([call[agent][name].item() for call in calls])
                logged = curves[f"losses/{name}"][iteration * KNOWN_BATCH_SIZE]
                assert logged == pytest.approx(mean, rel=1e-4, abs=1e-6), name


# Signals.

ENDLESS = SETTINGS | {"total_timesteps": 10_000_000, "eval_interval": 0, "checkpoint_interval": 10**9}
SAYS_SO = "stopping after this iteration or in this test; once more kills"


def wait_for_checkpoint(folder):
    """Until the run in this folder has written the one of its beginning."""
    deadline = time.time() + 100
    while not list(folder.glob("runs/*/checkpoint.pt")):
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_signal_ends_the_iteration(tmp_path):
    """It says so, and what it has saved is of one step, from which the run goes on."""
    process = start_script("mdspo_procgen", tmp_path, *flags(**ENDLESS))
    folder = tmp_path / "work"
    try:
        wait_for_checkpoint(folder)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count(SAYS_SO) == 1
    assert "Traceback" not in err
    run_dir = run_folder(folder)
    step = step_of(run_dir)
    assert step >= BATCH_SIZE
    assert not (run_dir / "final_test.json").exists()
    for agent_folder in agent_folders("mdspo_procgen", run_dir):
        assert load_agent(agent_folder / "agent.pt")["global_step"] == step
    words = ["--resume", run_dir, *flags(device="cpu", total_timesteps=step + BATCH_SIZE)]
    assert train(importlib.import_module("mdspo_procgen"), folder, *words) == 0
    assert step_of(run_dir) == step + BATCH_SIZE


def test_a_second_signal_kills(tmp_path):
    """In an iteration that would take hours."""
    process = start_script("ppo_procgen", tmp_path, *flags(**ENDLESS | {"update_epochs": 10_000_000}))
    try:
        wait_for_checkpoint(tmp_path / "work")
        process.send_signal(signal.SIGINT)
        line = ""
        while SAYS_SO not in line:
            line = process.stderr.readline()
            assert line
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
    assert step_of(run_folder(tmp_path / "work")) == 0


@pytest.mark.parametrize("last", [True, False], ids=["final", "on_the_way"])
def test_a_signal_ends_a_test_at_once(last, tmp_path, monkeypatch):
    """The training before it is saved, and --resume makes the test anew."""
    script = importlib.import_module("ppo_procgen")
    evaluate = script.evaluate
    steps = 0

    def act(agent, obs, act=script.act):
        nonlocal steps
        steps += 1
        return act(agent, obs)

    def evaluate_with_signal(*inputs):
        nonlocal steps
        stop.append(signal.SIGTERM)
        steps = 0
        return evaluate(*inputs)

    stop = []
    monkeypatch.setattr(script, "act", act)
    monkeypatch.setattr(script, "evaluate", evaluate_with_signal)
    settings = SETTINGS | {"eval_interval": 2 if last else 1, "total_timesteps": BATCH_SIZE}
    assert train(script, tmp_path, *flags(**settings), stop=stop) == 128 + signal.SIGTERM
    assert steps == 0
    monkeypatch.undo()
    run_dir = run_folder(tmp_path)
    assert not (run_dir / "final_test.json").exists()
    trained = load(run_dir / "checkpoint.pt")
    assert trained["global_step"] == BATCH_SIZE
    assert train(script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
    assert (run_dir / "final_test.json").exists()
    assert same(load(run_dir / "checkpoint.pt")["agents"], trained["agents"])
    assert ("charts/test_episodic_return" in read_curves(run_dir)) != last


# Import and help.


def run_python(code: str, folder, **env: str) -> str:
    """What the code prints, in a process that finds the scripts, and first what is in the folder."""
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"} | env
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_import_does_nothing(tmp_path):
    code = "import random, signal, numpy, torch\n"
    state = (
        "signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_rng_state().tolist(), "
    )
    state += "random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_num_threads(), "
    state += "torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32"
    code += f"before = {state}\nimport {', '.join(SCRIPTS)}\nassert before == ({state})\n"
    assert run_python(code, tmp_path, HOME=str(tmp_path)) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_give_way(given, spin_count, tmp_path, monkeypatch):
    """What says so to OpenMP must be set before torch is imported; what the user has set stays."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    stand_in = "import os\nraise ImportError(os.environ.get('GOMP_SPINCOUNT'))\n"
    (tmp_path / "torch.py").write_text(stand_in)
    for name in SCRIPTS:
        code = f"try:\n    import {name}\nexcept ImportError as error:\n    print(error)\n"
        assert run_python(code, tmp_path, **given) == f"{spin_count}\n"


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
