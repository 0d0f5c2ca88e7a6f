"""Whole runs on Procgen from the shell, and in this process: files, curves, output, seeds, signals."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
import torch
from common import (
    BATCH_SIZE,
    MUTUAL,
    ROOT,
    SCRIPTS,
    TINY,
    agent_folders,
    flags,
    load_agent,
    make_runner,
    read_curves,
    read_events,
    run_folder,
    run_script,
    shell,
)

TRAINING_TAGS = {
    *(f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "learning_rate")),
    *(f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl")),
    *(f"losses/{name}" for name in ("clipfrac", "explained_variance")),
}
TEST_TAGS = {"charts/test_episodic_return", "charts/generalization_gap"}


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    """A tiny run from the shell."""
    folder = tmp_path_factory.mktemp(request.param)
    result = run_script(request.param, folder, *flags(**TINY))
    assert result.returncode == 0, result.stderr.decode()
    run_dir = run_folder(folder / "work")
    folders = agent_folders(request.param, run_dir)
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        run_dir=run_dir,
        folders=folders,
        curves=[read_curves(each) for each in folders],
        out=result.stdout.decode(),
        err=result.stderr.decode(),
    )


def train_here(name: str, folder, **settings):
    """A run in this process, with its agents and environments noted as they were made."""
    script = importlib.import_module(name)
    noted = SimpleNamespace(agents=[], first_weights=[], envs=[], levels=[], first_obs=[], folder=folder)
    make_agent, make_envs = script.Agent, script.make_envs

    def note_agent(*inputs, **options):
        agent = make_agent(*inputs, **options)
        noted.agents.append(agent)
        noted.first_weights.append({key: weight.clone() for key, weight in agent.state_dict().items()})
        return agent

    def note_envs(args, *options):
        envs = make_envs(args, *options)
        noted.envs.append(options)
        noted.first_obs.append(envs.observe()[1]["rgb"].copy())
        noted.levels.append([info["level_seed"] for info in envs.get_info()])
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "Agent", note_agent)
        patch.setattr(script, "make_envs", note_envs)
        script.main(script.Args(**(TINY | settings)))
    noted.run_dir = run_folder(folder)
    noted.saved = [load_agent(each / "agent.pt") for each in agent_folders(name, noted.run_dir)]
    return noted


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """The same run as `finished`, in this process."""
    return train_here(finished.name, tmp_path_factory.mktemp("here"))


def same_weights(weights, other) -> bool:
    assert weights.keys() == other.keys()
    return all(torch.equal(weights[name], other[name]) for name in weights)


def test_only_the_run_folder_is_written(finished):
    assert [each.name for each in (finished.folder / "work").iterdir()] == ["runs"]
    temporary = [each.name.rsplit("_", 1)[0] for each in (finished.folder / "home").iterdir()]
    assert temporary in ([], ["torchinductor"])  # a folder that PyTorch makes where there is none yet
    assert re.fullmatch(rf"fruitbot__{finished.name}__1__\d{{10}}", finished.run_dir.name)
    files = {
        str(each.relative_to(finished.run_dir)) for each in finished.run_dir.rglob("*") if each.is_file()
    }
    kinds = {re.sub(r"tfevents.*", "tfevents", file) for file in files}
    prefixes = ["agent_1/", "agent_2/"] if finished.name in MUTUAL else [""]
    per_agent = {prefix + file for prefix in prefixes for file in ("agent.pt", "events.out.tfevents")}
    assert kinds == {".lock", "checkpoint.pt", "final_test.json", *per_agent}


def test_tags(finished):
    expected = TRAINING_TAGS | TEST_TAGS | ({"losses/mutual_kl"} if finished.name in MUTUAL else set())
    for curves in finished.curves:
        assert expected <= curves.keys()
        assert finished.name in MUTUAL or "losses/mutual_kl" not in curves


def test_steps(finished):
    """Every curve in every iteration, except for episodes, which do not end in all, and tests."""
    iterations = [BATCH_SIZE * i for i in range(1, 8)]
    for curves in finished.curves:
        for tag, curve in curves.items():
            if tag.startswith("charts/episodic_"):
                assert set(curve) <= set(iterations) and len(curve) >= 3
            else:
                assert list(curve) == (iterations[2::3] if tag in TEST_TAGS else iterations), tag


def test_values(finished):
    for curves in finished.curves:
        assert all(math.isfinite(value) for curve in curves.values() for value in curve.values())
        assert list(curves["charts/learning_rate"].values()) == pytest.approx([5e-4] * 7)
        assert all(0 < entropy <= math.log(15) + 1e-5 for entropy in curves["losses/entropy"].values())
        assert all(0 <= fraction <= 1 for fraction in curves["losses/clipfrac"].values())
        assert all(sps > 0 for sps in curves["charts/SPS"].values())
        assert all(value <= 1 for value in curves["losses/explained_variance"].values())
        assert all(value >= -1e-6 for value in curves["losses/approx_kl"].values())
        assert all(length >= 1 for length in curves["charts/episodic_length"].values())
        assert all(value >= -1e-6 for value in curves.get("losses/mutual_kl", {}).values())


def test_generalization_gap(finished):
    for curves in finished.curves:
        gaps = curves["charts/generalization_gap"]
        assert len(gaps) == 2
        for step, gap in gaps.items():
            trained = [value for at, value in curves["charts/episodic_return"].items() if at <= step][-1]
            assert gap == pytest.approx(trained - curves["charts/test_episodic_return"][step], abs=1e-5)


def test_agents_have_curves_of_their_own(finished):
    if finished.name in MUTUAL:
        first, second = finished.curves
        assert first["losses/value_loss"] != second["losses/value_loss"]
        assert first["losses/mutual_kl"] != second["losses/mutual_kl"]
    assert len(finished.curves) == (2 if finished.name in MUTUAL else 1)


def test_hyperparameters_are_logged(finished):
    args = importlib.import_module(finished.name).Args(**TINY)
    for folder in finished.folders:
        (event,) = read_events(folder).Tensors("hyperparameters/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert [name for name, value in asdict(args).items() if f"|{name}|{value}|" not in text] == []


def test_final_test_file(finished):
    content = json.loads((finished.run_dir / "final_test.json").read_text())
    assert content["global_step"] == 7 * BATCH_SIZE and content["args"]["env_id"] == "fruitbot"
    assert len(content["agents"]) == len(finished.folders)
    for number, agent in enumerate(content["agents"], 1):
        train, test, gap = (
            agent[name] for name in ("training_levels", "full_distribution", "generalization_gap")
        )
        assert train["episodes"] == test["episodes"] == 4  # 3, rounded up to a quota for 2 environments
        assert gap["mean"] == pytest.approx(train["mean"] - test["mean"])
        assert gap["standard_error"] == pytest.approx(
            math.hypot(train["standard_error"], test["standard_error"])
        )
        for each in (train, test):
            assert math.isfinite(each["mean"]) and each["standard_error"] >= 0
        (line,) = [line for line in finished.out.splitlines() if line.startswith(f"agent {number}")]
        cells = [f"{each['mean']:.2f} +- {1.96 * each['standard_error']:.2f}" for each in (train, test, gap)]
        assert line.split(maxsplit=2)[2].split() == " ".join(cells).split()


def test_standard_error(script, monkeypatch, tmp_path):
    """Of the mean, with the unbiased variance: returns 1, 2, 3, 6 have mean 3 and sqrt((14/3) / 4)."""
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64).numpy()
    monkeypatch.setattr(script, "evaluate", lambda policy, envs, episodes_per_env, device: returns)
    args = script.Args(**TINY)
    runner = make_runner(script, args, tmp_path)
    result = runner.final_test()
    runner.close()
    assert result["training_levels"] == pytest.approx(
        {"mean": 3.0, "standard_error": (14 / 12) ** 0.5, "episodes": 4}
    )


def test_output(finished):
    """No warning, no escape sequence outside a terminal, every line of progress a line."""
    assert "Warning" not in finished.out + finished.err and "warn" not in finished.err.lower()
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", finished.err)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", finished.out)
    first, *progress = finished.err.split("\r")
    assert first == "" and len(progress) >= 2
    assert all(line.endswith("\n") for line in progress)
    assert "100%" in progress[-1] and "return" in progress[-1]
    assert finished.out.startswith("training on the CPU")
    assert finished.out.endswith(
        f"finished after 448 steps: {finished.run_dir.relative_to(finished.folder / 'work')}\n"
    )


def test_agent_file(finished, trained):
    """agent.pt makes the very agent that was trained."""
    script = importlib.import_module(finished.name)
    obs = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8)
    for saved, agent in zip(trained.saved, trained.agents, strict=True):
        assert saved["script"] == finished.name and saved["args"] == asdict(script.Args(**TINY))
        rebuilt = script.Agent(channels=saved["args"]["channels"])
        rebuilt.load_state_dict(saved["agent"])
        vars(agent.encoder).pop("forward", None)  # what bfloat16 put there
        for one, other in zip(rebuilt(obs), agent(obs), strict=True):
            torch.testing.assert_close(one, other)


def test_same_seed_same_weights(finished, trained):
    """To the bit, in another process."""
    for folder, saved in zip(finished.folders, trained.saved, strict=True):
        assert same_weights(load_agent(folder / "agent.pt")["agent"], saved["agent"])


def test_every_agent_is_trained(trained):
    for weights, saved in zip(trained.first_weights, trained.saved, strict=True):
        assert not any(torch.equal(weights[name], saved["agent"][name]) for name in weights)


def test_agents_start_apart(trained):
    """Other weights, other environments: every environment has its own seed, the tests' too."""
    seeds = [options[-1] for options in trained.envs]
    assert len(set(seeds)) == len(seeds) == (4 if len(trained.agents) == 1 else 6)
    if len(trained.agents) == 2:
        first, second = trained.first_weights
        assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))
        assert (trained.first_obs[2] != trained.first_obs[5]).any()
        assert trained.levels[2] != trained.levels[5]
    else:
        assert (trained.first_obs[2] != trained.first_obs[3]).any()


def test_levels_of_training_and_tests(trained):
    """(number of environments, number of levels, first level): 500 levels to train, all of them to test."""
    groups = [(2, 500, 0)] * 2 if len(trained.agents) == 1 else [(4, 500, 0)]
    expected = [(2, 500, 0), (2, 0, 0), *groups] * len(trained.agents)
    assert [options[:3] for options in trained.envs] == expected


def test_another_seed_and_no_tests(finished, tmp_path):
    """With --eval-interval 0 no test runs, during training or after."""
    settings = {"total_timesteps": BATCH_SIZE, "eval_interval": 0}
    runs = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        runs.append(train_here(finished.name, folder, seed=seed, **settings))
        assert not (runs[-1].run_dir / "final_test.json").exists()
        for each in agent_folders(finished.name, runs[-1].run_dir):
            curves = read_curves(each)
            assert "losses/value_loss" in curves and not TEST_TAGS & curves.keys()
    one, other = runs
    assert not same_weights(one.saved[0]["agent"], other.saved[0]["agent"])
    assert not same_weights(one.first_weights[0], other.first_weights[0])
    assert not {options[-1] for options in one.envs} & {options[-1] for options in other.envs}
    assert one.levels[2] != other.levels[2]


@pytest.mark.parametrize(
    ("name", "signum"), [(name, (signal.SIGINT, signal.SIGTERM)[i % 2]) for i, name in enumerate(SCRIPTS)]
)
def test_signal(name, signum, tmp_path):
    """The iteration under way is finished and its agents are saved."""
    command, options = shell(name, tmp_path)
    words = flags(**(TINY | {"total_timesteps": 10_000_000}))
    process = subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        assert process.stdout.readline().startswith("training on the CPU")
        assert process.stdout.readline().startswith("run folder: runs/")
        time.sleep(1)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert "stopping after this iteration or test" in err and "Traceback" not in err
    steps = int(
        re.fullmatch(r"stopped after ([\d,]+) steps; to go on: --resume runs/\S+\n", out)[1].replace(",", "")
    )
    assert steps > 0 and steps % BATCH_SIZE == 0
    run_dir = run_folder(tmp_path / "work")
    assert not (run_dir / "final_test.json").exists()
    for folder in agent_folders(name, run_dir):
        assert max(read_curves(folder)["losses/value_loss"]) == steps
        script = importlib.import_module(name)
        script.Agent(channels=TINY["channels"]).load_state_dict(load_agent(folder / "agent.pt")["agent"])


def test_signal_before_the_first_iteration_lets_it_finish(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**TINY), [signal.SIGTERM])
    assert stop.value.code == 143
    for folder in agent_folders(script.__name__, run_folder(tmp_path)):
        assert list(read_curves(folder)["losses/value_loss"]) == [BATCH_SIZE]
        assert load_agent(folder / "agent.pt")["agent"]


def test_signal_in_the_final_test_comes_too_late(script, tmp_path, monkeypatch, capsys):
    """The run is finished then, and says so."""
    signals, evaluate = [], script.evaluate

    def evaluate_and_signal(*inputs):
        signals.append(signal.SIGTERM)
        return evaluate(*inputs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "evaluate", evaluate_and_signal)
    script.main(script.Args(**(TINY | {"eval_interval": 100})), signals)
    assert signals and capsys.readouterr().out.splitlines()[-1].startswith("finished after 448 steps")
    assert (run_folder(tmp_path) / "final_test.json").exists()


@pytest.mark.parametrize("name", [SCRIPTS[0], SCRIPTS[2]])
def test_more_memory_than_there_is(name, tmp_path):
    """One line that says what to ask less of."""
    command, options = shell(name, tmp_path)
    words = flags(**(TINY | {"num_envs": 65536, "num_steps": 4096, "total_timesteps": 2**30}))  # 3 TB
    result = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, **options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "out of memory" in result.stderr and "--num-envs" in result.stderr


def test_second_signal_kills(script, capfd):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        signals = script.catch_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # which ends the process
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert "once more stops at once" in capfd.readouterr().err


def test_import_does_nothing(tmp_path):
    code = "import random, signal, numpy, torch\n"
    code += "before = signal.getsignal(signal.SIGINT), torch.initial_seed()\n"
    code += "before += random.getstate(), numpy.random.get_state()[1].tolist()\n"
    code += f"import {', '.join(SCRIPTS)}\n"
    code += "assert before[:2] == (signal.getsignal(signal.SIGINT), torch.initial_seed())\n"
    code += "assert before[2:] == (random.getstate(), numpy.random.get_state()[1].tolist())\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=env, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


def test_help(script, monkeypatch, capsys):
    """Every flag, each with some words about it."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.parse_args()
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    helps = {}
    for entry in re.split(r"\n[│ ] (?=-)", out)[1:]:
        words = " ".join(re.sub("[│╭╮╰╯─]", " ", entry).split())
        flag = re.search(r"--([\w-]+)", words)[1]
        helps[flag.replace("-", "_")] = re.sub(r"--?[\w-]+,?|\b[A-Z|]{2,}\b|\(default:.*", "", words).strip()
    assert helps.keys() == {"help"} | {each.name for each in fields(script.Args) if each.init}
    assert [name for name, text in helps.items() if not re.search("[a-z]{2}", text)] == []
