"""What a user does wrong on the command line: a message on stderr that names the flag and what would do, exit
status 2, and nothing written."""

import importlib
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from common import BOTH, MUTUAL, SCRIPTS, SINGLE, TINY, error_message, flags, run_script, train

GAMES = [
    "bigfish",
    "bossfight",
    "caveflyer",
    "chaser",
    "climber",
    "coinrun",
    "dodgeball",
    "fruitbot",
    "heist",
    "jumper",
    "leaper",
    "maze",
    "miner",
    "ninja",
    "plunder",
    "starpilot",
]

# What is written on the command line, and words that the message has.
CASES = [
    ("--env-id pong", ["--env-id", "pong", *GAMES]),
    ("--num-envs 3 --num-steps 5 --num-minibatches 4", ["--num-minibatches", "15"]),
    ("--num-envs 2 --num-steps 2 --num-minibatches 4", ["--num-minibatches", "half"]),  # minibatches of one
    ("--total-timesteps 16383", ["--total-timesteps", "16384"]),
    ("--total-timesteps 0", ["--total-timesteps"]),
    ("--num-envs 0", ["--num-envs", "from 1 to"]),
    ("--num-steps 0", ["--num-steps", "from 1 to"]),
    ("--num-minibatches 0", ["--num-minibatches", "from 1 to"]),
    ("--update-epochs 0", ["--update-epochs", "from 1 to"]),
    ("--num-eval-envs 0", ["--num-eval-envs", "from 1 to"]),
    ("--final-eval-episodes 1", ["--final-eval-episodes", "from 2 to"]),  # has no standard error
    ("--distribution-mode medium", ["--distribution-mode", "easy", "hard"]),
    ("--distribution-mode extreme", ["--distribution-mode", "bigfish", "easy", "hard"]),
    ("--distribution-mode memory", ["--distribution-mode", "bigfish", "easy", "hard"]),
    ("--distribution-mode exploration", ["--distribution-mode"]),  # a mode of Procgen's, of one level
    ("--env-id maze --distribution-mode extreme", ["--distribution-mode", "maze", "easy", "hard", "memory"]),
    ("--env-id chaser --distribution-mode memory", ["--distribution-mode", "chaser", "extreme"]),
    ("--start-level 2147483647 --num-levels 500", ["--start-level", "--num-levels"]),
    ("--start-level 3 --num-levels 0", ["--start-level", "0", "not 3"]),
    ("--learning-rate 0", ["--learning-rate"]),
    ("--clip-coef 0", ["--clip-coef"]),
    ("--max-grad-norm 0", ["--max-grad-norm"]),
    ("--gamma 1.01", ["--gamma", "from 0 to 1"]),
    ("--gae-lambda 1.01", ["--gae-lambda", "from 0 to 1"]),
    ("--channels 4 0 4", ["--channels", "from 1 to 4096"]),
    ("--channels 4 4 5000", ["--channels", "from 1 to 4096"]),
    ("--channels 4 4", ["--channels", "3"]),
    ("--channels 4 4 4 4", ["4"]),  # to the parser the fourth belongs to no flag
    ("--device foo", ["--device", "foo", "cpu"]),
    ("--device cuda:x", ["--device", "cuda:x"]),
    ("--exp-name a/b", ["--exp-name", "a/b"]),
    ("--exp-name", ["--exp-name"]),
    ("--num-envs", ["--num-envs"]),
    ("--num-envs many", ["--num-envs", "many"]),
    ("--num-envs 4.5", ["--num-envs", "4.5"]),
    ("--gamma high", ["--gamma", "high"]),
    ("--torch-deterministic False", ["False"]),  # not to be taken for True
    ("--freeze-encoder", ["--freeze-encoder", "--pretrained-encoder"]),
    ("--batch-size 64", ["--batch-size"]),  # derived: not a flag
    ("--no-such-flag 1", ["--no-such-flag"]),
    ("bigfish", ["bigfish"]),
]
OF_MUTUAL_SCRIPTS = [
    ("--num-agents 1", ["--num-agents", "from 2 to"]),
    ("--num-agents two", ["--num-agents", "two"]),
    ("--distill-coef -1", ["--distill-coef"]),
    ("--detach-peer False", ["False"]),
]


def reject(script, folder, capfd, words: list[str]) -> str:
    """The message about a command line that must be rejected."""
    status = train(script, folder, *words)
    out, err = capfd.readouterr()
    assert list(folder.iterdir()) == []
    return error_message(status, out, err)


@pytest.mark.parametrize(("words", "expected"), CASES, ids=[words for words, _ in CASES])
def test_rejected(words, expected, tmp_path, capfd):
    script = importlib.import_module("ppo_procgen")
    message = reject(script, tmp_path, capfd, words.split())
    assert [word for word in expected if word not in message] == []


@pytest.mark.parametrize(("words", "expected"), OF_MUTUAL_SCRIPTS)
def test_rejected_by_mutual_scripts(words, expected, tmp_path, capfd):
    script = importlib.import_module("mdpo_procgen")
    message = reject(script, tmp_path, capfd, words.split())
    assert [word for word in expected if word not in message] == []


def numbers_out_of_range() -> list[tuple[str, str]]:
    """(field, value), of all that a mutual script has; --total-timesteps has no upper end."""
    args = importlib.import_module("mdpo_procgen").Args
    cases = []
    for name, kind in get_type_hints(args).items():
        if kind is float:
            cases += [(name, "-1"), (name, "nan"), (name, "inf")]
        if kind is int:
            cases.append((name, "-1"))
        if kind is int and name != "total_timesteps":
            cases.append((name, "99999999999999999999"))
    return cases


@pytest.mark.parametrize(("field", "value"), numbers_out_of_range())
def test_numbers_out_of_range(field, value, tmp_path, capfd):
    """Every numeric flag, those included that will be added. Half of them are given to the other script."""
    words = flags(**{field: value})
    args = importlib.import_module("ppo_procgen").Args
    name = "ppo_procgen" if value == "-1" and hasattr(args, field) else "mdpo_procgen"
    message = reject(importlib.import_module(name), tmp_path, capfd, words)
    assert words[0] in message


def test_every_number_is_looked_at():
    """The cases above are those of all fields: of each script, which share them."""
    tested = {field for field, _ in numbers_out_of_range()}
    assert len(tested) > 20
    for name in SCRIPTS:
        args = importlib.import_module(name).Args
        hints = get_type_hints(args)
        assert {each.name for each in fields(args) if hints[each.name] in (int, float)} <= tested


@pytest.mark.parametrize("words", [["--distill-coef", "1"], ["--detach-peer"], ["--num-agents", "2"]])
def test_mutual_flags_belong_to_mutual_scripts(words, tmp_path, capfd):
    assert words[0] in reject(importlib.import_module("ppo_procgen"), tmp_path, capfd, words)


def test_defaults_of_mutual_scripts(mutual):
    args = mutual.Args()
    assert (args.distill_coef, args.detach_peer, args.num_agents) == (1.0, False, 2)


# Devices.


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_cuda(tmp_path, capfd, monkeypatch, device):
    script = importlib.import_module("ppo_procgen")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = reject(script, tmp_path, capfd, ["--device", device])
    assert f"--device {device} needs GPU" in message
    assert "cpu would do" in message


@pytest.mark.parametrize("words", [[], ["--device", "auto"], ["--device", "cuda"], ["--device", "cuda:0"]])
def test_a_gpu_that_cannot_be_used(tmp_path, capfd, monkeypatch, words):
    """As with a driver too old for PyTorch: no run goes on for a week on the CPU unasked."""
    script = importlib.import_module("mdpo_procgen")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = reject(script, tmp_path, capfd, words)
    assert "--device" in message
    assert "driver" in message
    assert "cpu would do" in message
    assert script.Args(device="cpu").device == "cpu"


def test_device_is_the_cpu_without_cuda(tmp_path, monkeypatch, capsys):
    """And says so."""
    script = importlib.import_module("ppo_procgen")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = flags(**(TINY | {"device": "auto", "total_timesteps": 64, "eval_interval": 0}))
    assert train(script, tmp_path, *words) == 0
    assert "\ntraining on the CPU, which is slow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("250000 100000", 3),
        ("200000 100000", 2),
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("", 8),
        (None, 8),
    ],
)
def test_available_cores(monkeypatch, quota, cores):
    """Of the process's affinity, here 8, or fewer by the quota of a container, in microseconds."""
    script = importlib.import_module("ppo_procgen")

    def read_text(path):
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if quota is None:
            raise FileNotFoundError
        return quota + "\n"

    monkeypatch.setattr(script.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(script.Path, "read_text", read_text)
    assert script.available_cores() == cores


# Other faults, and what is right.


def test_track_without_wandb(tmp_path, capfd, monkeypatch):
    script = importlib.import_module("ppo_procgen")
    monkeypatch.setattr(sys, "path", [])  # as if not installed
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    message = reject(script, tmp_path, capfd, ["--track"])
    assert "--track needs wandb" in message
    assert "pip install wandb" in message


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """Such as wandb/, with the runs of wandb, beside a script."""
    script = importlib.import_module("ppo_procgen")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "some_folder").mkdir()
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").touch()
    assert not script.can_import("some_folder")
    assert script.can_import("some_package")


def test_args_raise_value_error(script):
    """Who makes Args in Python gets an exception."""
    with pytest.raises(ValueError, match="--env-id must be one of bigfish"):
        script.Args(env_id="pong")


@pytest.mark.parametrize(
    ("mode", "games"),
    [
        ("easy", GAMES),
        ("hard", GAMES),
        ("extreme", ["chaser", "dodgeball", "leaper", "starpilot"]),
        ("memory", ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"]),
    ],
)
def test_modes_of_games(script, mode, games):
    """Exactly the pairs for which Procgen does not abort."""
    for game in GAMES:
        if game in games:
            assert script.Args(env_id=game, distribution_mode=mode).distribution_mode == mode
        else:
            with pytest.raises(ValueError, match="--distribution-mode"):
                script.Args(env_id=game, distribution_mode=mode)


def test_defaults_are_those_of_the_paper(script):
    args = script.Args()
    assert (args.num_envs, args.num_steps, args.num_minibatches, args.update_epochs) == (64, 256, 8, 3)
    assert (args.batch_size, args.minibatch_size, args.total_timesteps) == (16384, 2048, 50_000_000)
    assert (args.learning_rate, args.max_grad_norm, args.clip_coef) == (5e-4, 0.5, 0.2)
    assert (args.gamma, args.gae_lambda, args.ent_coef, args.vf_coef) == (0.999, 0.95, 0.01, 0.5)
    assert (args.num_levels, args.start_level, args.distribution_mode) == (500, 0, "hard")
    assert args.channels == (16, 32, 32)


@pytest.mark.parametrize("name", BOTH)
def test_run_folder_that_cannot_be_made(name, tmp_path, capsys):
    """One line, for it is no fault of the command line."""
    (tmp_path / "runs").write_text("a file in the way")
    assert train(importlib.import_module(name), tmp_path, *flags(**TINY)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"{name}.py: error: run folder runs/")
    assert (tmp_path / "runs").read_text() == "a file in the way"


SHELL_CASES = [
    (SINGLE[0], "--env-id pong"),
    pytest.param(SINGLE[1], "--no-such-flag 1", marks=pytest.mark.slow),
    pytest.param(MUTUAL[0], "--env-id bigfish --distribution-mode memory", marks=pytest.mark.slow),
    pytest.param(MUTUAL[1], "--device cuda", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "words"), SHELL_CASES)
def test_rejected_in_the_shell(name, words, tmp_path):
    result = run_script(name, tmp_path, *words.split())
    flag = words.split()[-2]
    assert flag in error_message(result.returncode, result.stdout.decode(), result.stderr.decode())
    assert list((tmp_path / "work").iterdir()) == []
