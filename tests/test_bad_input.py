"""What a user does wrong: one line on stderr that names the flag, exit status 2, and nothing written."""

import importlib
import sys
from dataclasses import fields

import pytest
import torch
from common import MUTUAL, SCRIPTS, SINGLE, TINY, flags, run_script

GAMES = "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot".split()
GAMES += "heist jumper leaper maze miner ninja plunder starpilot".split()

# What is written on the command line, and words that the message has.
CASES = [
    ("--env-id pong", ["--env-id", "pong", *GAMES]),
    ("--num-envs 3 --num-steps 5 --num-minibatches 4", ["--num-minibatches", "15"]),
    ("--num-envs 2 --num-steps 2 --num-minibatches 4", ["--num-minibatches", "half"]),  # minibatches of one
    ("--total-timesteps 16383", ["--total-timesteps", "16384"]),
    ("--total-timesteps 0", ["--total-timesteps"]),
    ("--num-envs 0", ["--num-envs"]),
    ("--num-steps 0", ["--num-steps"]),
    ("--num-minibatches 0", ["--num-minibatches"]),
    ("--update-epochs 0", ["--update-epochs"]),
    ("--num-eval-envs 0", ["--num-eval-envs"]),
    ("--final-eval-episodes 1", ["--final-eval-episodes"]),  # has no standard error
    ("--distribution-mode medium", ["--distribution-mode", "easy", "hard"]),
    ("--distribution-mode extreme", ["--distribution-mode", "bigfish", "easy", "hard"]),
    ("--distribution-mode memory", ["--distribution-mode", "bigfish", "easy", "hard"]),
    ("--distribution-mode exploration", ["--distribution-mode"]),  # a mode of Procgen's, of one level
    ("--env-id maze --distribution-mode extreme", ["--distribution-mode", "maze", "easy", "hard", "memory"]),
    ("--env-id chaser --distribution-mode memory", ["--distribution-mode", "chaser", "extreme"]),
    ("--start-level 2147483647 --num-levels 500", ["--start-level", "--num-levels"]),
    ("--learning-rate 0", ["--learning-rate"]),
    ("--clip-coef 0", ["--clip-coef"]),
    ("--max-grad-norm 0", ["--max-grad-norm"]),
    ("--gamma 1.01", ["--gamma"]),
    ("--gae-lambda 1.01", ["--gae-lambda"]),
    ("--channels 4 0 4", ["--channels"]),
    ("--channels 4 4", ["--channels", "3"]),
    ("--channels 4 4 4 4", ["4"]),  # to the parser the fourth belongs to no flag
    ("--device foo", ["--device", "foo", "cpu"]),
    ("--device cuda:x", ["--device", "cuda:x"]),
    ("--exp-name a/b", ["--exp-name"]),
    ("--num-envs", ["--num-envs"]),
    ("--num-envs many", ["--num-envs", "many"]),
    ("--num-envs 4.5", ["--num-envs", "4.5"]),
    ("--gamma high", ["--gamma", "high"]),
    ("--torch-deterministic False", ["False"]),  # not to be taken for True
    ("--batch-size 64", ["--batch-size"]),  # derived: not a flag
    ("--no-such-flag 1", ["--no-such-flag"]),
    ("bigfish", ["bigfish"]),
]


@pytest.fixture
def rejection(tmp_path, monkeypatch, capfd):
    """Parses a command line that must be rejected and returns the line about it."""
    monkeypatch.chdir(tmp_path)

    def reject(script, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        with pytest.raises(SystemExit) as stop:
            script.main(script.parse_args())
        out, err = capfd.readouterr()
        assert stop.value.code == 2 and out == "" and not list(tmp_path.iterdir())
        assert (
            err.count("\n") == 1 and err.endswith("\n") and err.startswith(f"{script.__name__}.py: error: ")
        )
        return err

    return reject


@pytest.mark.parametrize(("words", "expected"), CASES, ids=[words for words, _ in CASES])
def test_rejected(script, rejection, words, expected):
    message = rejection(script, *words.split())
    assert [word for word in expected if word not in message] == []


def numeric_flags():
    for name in SCRIPTS:
        for each in fields(importlib.import_module(name).Args):
            if each.init and each.type in (int, float):
                for value in ("-1", "nan", "inf") if each.type is float else ("-1", "99999999999999999999"):
                    yield name, each.name, value


UNBOUNDED = ("total_timesteps", "99999999999999999999")


@pytest.mark.parametrize(
    ("name", "field", "value"), [case for case in numeric_flags() if case[1:] != UNBOUNDED]
)
def test_numbers_out_of_range(name, field, value, rejection):
    """Every numeric flag, those included that will be added."""
    words = flags(**{field: value})
    assert words[0] in rejection(importlib.import_module(name), *words)


def test_mutual_flags_belong_to_mutual_scripts(rejection):
    for name in SINGLE:
        assert "--distill-coef" in rejection(importlib.import_module(name), "--distill-coef", "1")
        assert "--detach-peer" in rejection(importlib.import_module(name), "--detach-peer")
    for name in MUTUAL:
        args = importlib.import_module(name).Args()
        assert (args.distill_coef, args.detach_peer) == (1.0, False)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_cuda(script, rejection, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = rejection(script, "--device", device)
    assert "--device" in message and device in message and "cpu" in message


def test_device_is_the_cpu_without_cuda(script, monkeypatch, tmp_path, capsys):
    """And says so, as the first line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    script.main(script.Args(**(TINY | {"device": "auto", "total_timesteps": 64, "eval_interval": 0})))
    assert capsys.readouterr().out.startswith("training on the CPU, which is slow")


def test_track_without_wandb(script, rejection, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    message = rejection(script, "--track")
    assert "--track" in message and "pip install wandb" in message


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
    assert (args.batch_size, args.minibatch_size, args.num_iterations) == (16384, 2048, 50_000_000 // 16384)
    assert (args.learning_rate, args.max_grad_norm, args.clip_coef) == (5e-4, 0.5, 0.2)
    assert (args.gamma, args.gae_lambda, args.ent_coef, args.vf_coef) == (0.999, 0.95, 0.01, 0.5)
    assert (args.num_levels, args.start_level, args.distribution_mode) == (500, 0, "hard")


def test_run_folder_that_cannot_be_made(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**TINY))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "runs" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (SINGLE[0], "--env-id pong"),
        (SINGLE[-1], "--no-such-flag 1"),
        (MUTUAL[0], "--env-id bigfish --distribution-mode memory"),
        (MUTUAL[-1], "--device cuda"),
    ],
)
def test_rejected_in_the_shell(name, words, tmp_path):
    result = run_script(name, tmp_path, *words.split())
    err = result.stderr.decode()
    flag = words.split()[-2]
    assert result.returncode == 2 and result.stdout == b""
    assert err.count("\n") == 1 and flag in err and "Traceback" not in err
    assert not list((tmp_path / "work").iterdir())
