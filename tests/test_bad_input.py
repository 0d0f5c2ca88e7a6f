"""What a user does wrong on the command line: a message on stderr that names the flag and what would do, exit
status 2, and nothing written."""

import importlib
import os
import signal
import sys
from itertools import cycle
from typing import get_type_hints

import pytest
import torch
from common import MUTUAL, ROOT, SCRIPTS, SINGLE, TINY, error_message, flags, run_script, train

GAMES = (
    "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze".split()
)
GAMES += "miner ninja plunder starpilot".split()
MODES = {
    "easy": GAMES,
    "hard": GAMES,
    "extreme": ["chaser", "dodgeball", "leaper", "starpilot"],
    "memory": ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"],
}
NO_AGENT = str(ROOT / "LICENSE")  # a file that is neither an agent nor a checkpoint

# What is written on the command line, and words that the message has.
CASES = [
    ("--env-id pong", ["--env-id", "pong", *GAMES]),
    ("--env-id Bigfish", ["--env-id", "Bigfish"]),
    ("--env-id", ["--env-id"]),
    ("bigfish", ["bigfish"]),
    ("--env-id bigfish fruitbot", ["fruitbot"]),
    # batches
    ("--num-envs 3 --num-steps 5 --num-minibatches 4", ["--num-minibatches", "15"]),
    ("--num-envs 2 --num-steps 2 --num-minibatches 4", ["--num-minibatches", "4", "2 rows"]),
    ("--total-timesteps 16383", ["--total-timesteps", "16384"]),
    ("--total-timesteps 1e6", ["--total-timesteps", "1e6"]),
    # distribution modes and levels
    ("--distribution-mode medium", ["--distribution-mode", "easy", "hard"]),
    ("--distribution-mode exploration", ["--distribution-mode"]),  # a mode of Procgen's, of one level
    ("--distribution-mode memory", ["--distribution-mode", "bigfish", "easy", "hard"]),
    ("--env-id maze --distribution-mode extreme", ["--distribution-mode", "maze", "easy", "hard", "memory"]),
    ("--env-id chaser --distribution-mode memory", ["--distribution-mode", "chaser", "extreme"]),
    ("--start-level 2147483647 --num-levels 1", ["--start-level", "--num-levels"]),
    ("--start-level 3 --num-levels 0", ["--start-level", "0", "--num-levels"]),
    # one above or below what would do
    ("--num-envs 0", ["--num-envs", "from 1 to"]),
    ("--num-steps 0", ["--num-steps", "from 1 to"]),
    ("--num-minibatches 0", ["--num-minibatches", "from 1 to"]),
    ("--update-epochs 0", ["--update-epochs", "from 1 to"]),
    ("--total-timesteps 0", ["--total-timesteps", "from 1 to"]),
    ("--num-eval-envs 0", ["--num-eval-envs", "from 1 to"]),
    ("--checkpoint-interval 0", ["--checkpoint-interval", "from 1 to"]),
    ("--final-eval-episodes 1", ["--final-eval-episodes", "from 2 to"]),  # has no standard error
    ("--final-eval-episodes 65537", ["--final-eval-episodes", "65536"]),
    ("--seed 2147483648", ["--seed", "from 0 to 2147483647"]),
    ("--learning-rate 0", ["--learning-rate"]),
    ("--clip-coef 0", ["--clip-coef"]),
    ("--max-grad-norm 0", ["--max-grad-norm"]),
    ("--gamma 1.0001", ["--gamma", "from 0 to 1"]),
    ("--gae-lambda 1.0001", ["--gae-lambda", "from 0 to 1"]),
    ("--channels 4 0 4", ["--channels", "from 1 to 4096"]),
    ("--channels 4 4 4097", ["--channels", "from 1 to 4096"]),
    # what cannot be read
    ("--channels 4 4 4 4", ["--channels"]),
    ("--channels 4 4 wide", ["--channels", "wide"]),
    ("--channels None", ["--channels", "None"]),
    ("--channels", ["--channels"]),
    ("--num-envs 4.5", ["--num-envs", "4.5"]),
    ("--num-env 4", ["--num-env"]),
    ("--gamma 0,9", ["--gamma", "0,9"]),
    ("--gamma --seed 1", ["--gamma"]),
    # switches are not followed by a value: not to be taken for True
    ("--torch-deterministic False", ["False"]),
    ("--compile False", ["False"]),
    ("--bf16 None", ["None"]),
    # names, files and devices
    ("--exp-name a/b", ["--exp-name", "a/b"]),
    ("--exp-name *", ["--exp-name", "*"]),
    (f"--exp-name {100 * 'a'}", ["--exp-name", "99"]),
    (f"--exp-name {99 * chr(0x4E00)}", ["--exp-name"]),  # of 297 bytes, where a file's name may have 255
    ("--exp-name", ["--exp-name"]),
    ("--device gpu", ["--device", "gpu", "auto", "cpu", "cuda"]),
    ("--device cuda:0", ["--device", "cuda:0"]),
    ("--freeze-encoder", ["--freeze-encoder", "--pretrained-encoder"]),
    ("--pretrained-encoder nowhere.pt", ["--pretrained-encoder", "nowhere.pt"]),
    ("--pretrained-encoder .", ["--pretrained-encoder", "."]),
    (f"--pretrained-encoder {NO_AGENT}", ["--pretrained-encoder", NO_AGENT]),
    ("--pretrained-encoder", ["--pretrained-encoder"]),
    ("--resume nowhere", ["--resume", "nowhere"]),
    ("--resume .", ["--resume", "checkpoint.pt"]),
    (f"--resume {NO_AGENT}", ["--resume", NO_AGENT]),
    ("--resume", ["--resume"]),
    ("--resume --seed 2", ["--resume"]),
    ("--resume auto --env-id pong", ["--env-id", "pong"]),
    ("--resume auto --total-timesteps 5", ["--total-timesteps"]),
    # flags that there are not
    ("--no-such-flag 1", ["--no-such-flag"]),
    ("--batch-size 64", ["--batch-size"]),  # derived
    ("--res nowhere", ["Unrecognized", "--res"]),
    ("-x", ["-x"]),
]
OF_SINGLE_SCRIPTS = [
    ("--distill-coef 1", ["--distill-coef"]),
    ("--detach-peer", ["--detach-peer"]),
    ("--num-agents 2", ["--num-agents"]),
]
OF_MUTUAL_SCRIPTS = [
    ("--num-agents 1", ["--num-agents", "from 2 to 16"]),
    ("--num-agents 17", ["--num-agents", "from 2 to 16"]),
    ("--num-agents two", ["--num-agents", "two"]),
    ("--detach-peer False", ["False"]),
]


def numbers_out_of_range() -> list[tuple[str, list[str]]]:
    """Of every numeric flag that a mutual script has, those included that will be added."""
    cases = []
    for name, kind in get_type_hints(importlib.import_module("mdpo_procgen").Args).items():
        flag = "--" + name.replace("_", "-")
        values = {float: ["-1", "nan", "inf", "-inf"], int: ["-1", "99999999999999999999"]}
        for value in values.get(kind, []):
            cases.append((f"{flag} {value}", [flag, "must be from", "not"]))
    assert len(cases) > 50
    return cases


ALL_CASES = [(name, *case) for name, case in zip(cycle(SCRIPTS), CASES)]  # they share Args
ALL_CASES += [(name, *case) for name, case in zip(cycle(SINGLE), OF_SINGLE_SCRIPTS)]
ALL_CASES += [(name, *case) for name, case in zip(cycle(MUTUAL), OF_MUTUAL_SCRIPTS + numbers_out_of_range())]


def reject(script, folder, capfd, words: list[str]) -> str:
    """The message about a command line that must be rejected."""
    status = train(script, folder, *words)
    out, err = capfd.readouterr()
    assert list(folder.iterdir()) == []
    return error_message(status, out, err)


@pytest.mark.parametrize(("name", "words", "expected"), ALL_CASES, ids=[case[1][:50] for case in ALL_CASES])
def test_rejected(name, words, expected, tmp_path, capfd, monkeypatch):
    """Before main, so that nothing is made."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "main", lambda args, stop: pytest.fail("it was accepted"))
    message = reject(script, tmp_path, capfd, words.split())
    assert [word for word in expected if word not in message] == []


def test_what_is_just_right(mutual):
    """The ends of the ranges, and derived sizes."""
    mutual.Args(seed=2**31 - 1, num_levels=1, start_level=2**31 - 2, channels=(1, 1, 4096), num_agents=16)
    mutual.Args(gamma=1, gae_lambda=0, ent_coef=0, vf_coef=0, distill_coef=0, eval_interval=0, seed=0)
    mutual.Args(gamma=0, gae_lambda=1, num_levels=0, exp_name=99 * "a", final_eval_episodes=2)
    mutual.Args(exp_name="wide_x+2=a-b.c", final_eval_episodes=2**16)
    args = mutual.Args(num_envs=1, num_steps=2, num_minibatches=1, total_timesteps=2)
    assert (args.batch_size, args.minibatch_size) == (2, 2)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_games(script, mode):
    """Exactly the pairs for which Procgen does not abort."""
    for game in GAMES:
        if game in MODES[mode]:
            assert script.Args(env_id=game, distribution_mode=mode).distribution_mode == mode
        else:
            with pytest.raises(ValueError, match="--distribution-mode"):
                script.Args(env_id=game, distribution_mode=mode)


def test_args_raise_value_error(script):
    """Who makes Args in Python gets an exception that names the flag."""
    with pytest.raises(ValueError, match="--num-envs must be from 1"):
        script.Args(num_envs=0)
    with pytest.raises(ValueError, match="--env-id"):
        script.Args(env_id="pong")


def test_defaults_are_those_of_the_paper(script):
    args = script.Args()
    assert (args.num_envs, args.num_steps, args.num_minibatches, args.update_epochs) == (64, 256, 8, 3)
    assert (args.batch_size, args.minibatch_size, args.total_timesteps) == (16384, 2048, 50_000_000)
    assert (args.learning_rate, args.max_grad_norm, args.clip_coef) == (5e-4, 0.5, 0.2)
    assert (args.gamma, args.gae_lambda, args.ent_coef, args.vf_coef) == (0.999, 0.95, 0.01, 0.5)
    assert (args.num_levels, args.start_level, args.distribution_mode) == (500, 0, "hard")
    assert args.channels == (16, 32, 32)
    if script.__name__ in MUTUAL:
        assert (args.distill_coef, args.detach_peer, args.num_agents) == (1.0, False, 2)


# Devices, packages and folders.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("device", "num_gpus"), [("cuda", 0), ("cuda", 1), ("auto", 1)])
def test_a_gpu_that_cannot_be_used(device, num_gpus, tmp_path, capfd, monkeypatch):
    """There is none, or its driver is too old: no run goes on for a week on the CPU unasked."""
    script = importlib.import_module("mdpo_procgen")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    message = reject(script, tmp_path, capfd, flags(**TINY | {"device": device}))
    assert "--device" in message
    assert "GPU" in message
    assert "--device cpu" in message


def test_device_is_chosen(script, monkeypatch):
    for num_gpus, device in [(0, "cpu"), (1, "cuda"), (8, "cuda")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda num=num_gpus: num)
        assert script.Args().device == device
        assert script.Args(device="cpu").device == "cpu"


@pytest.mark.parametrize("left", ["nothing", "folder"])
def test_track_without_wandb(left, tmp_path, capfd, monkeypatch):
    """A folder wandb/ with the runs of an earlier wandb is not the package."""
    script = importlib.import_module("ppo_procgen")
    places = tmp_path / "places"
    work = tmp_path / "work"
    (places / "wandb").mkdir(parents=True)
    work.mkdir()
    monkeypatch.setattr(sys, "path", [str(places)] if left == "folder" else [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(script, "main", lambda args, stop: pytest.fail("it was accepted"))
    message = reject(script, work, capfd, ["--track"])
    assert "--track needs wandb" in message
    assert "pip install wandb" in message


def test_a_file_in_the_place_of_runs(tmp_path):
    """It stays, and the error is Python's."""
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(OSError, match="runs"):
        train(importlib.import_module("ppo_procgen"), tmp_path, *flags(**TINY))
    assert (tmp_path / "runs").read_text() == "a file in the way"


def test_a_runs_link_that_leads_nowhere_is_an_error(tmp_path, monkeypatch):
    """As where a disk is not mounted. It does not look for a free name for ever."""
    script = importlib.import_module("ppo_procgen")

    def give_up(number, frame):
        pytest.fail("it does not end")

    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "gone" / "runs", "runs")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    try:
        with pytest.raises(OSError):
            script.make_run_dir(script.Args())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


SHELL_CASES = [
    (SINGLE[0], "--env-id pong"),
    pytest.param(SINGLE[1], "--no-such-flag 1", marks=pytest.mark.slow),
    (MUTUAL[0], "--device cuda"),
    pytest.param(MUTUAL[1], "--resume nowhere", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "words"), SHELL_CASES)
def test_rejected_in_the_shell(name, words, tmp_path):
    result = run_script(name, tmp_path, *words.split())
    flag = words.split()[0]
    assert flag in error_message(result.returncode, result.stdout.decode(), result.stderr.decode())
    assert list((tmp_path / "work").iterdir()) == []
