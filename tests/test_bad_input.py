"""What a user does wrong on the command line: a message on stderr that names the flag and what would do, exit
status 2, and nothing written."""

import importlib
import os
import sys
from itertools import cycle
from typing import get_type_hints

import pytest
import torch
from common import MUTUAL, ROOT, SCRIPTS, SINGLE, TINY, error_message, flags, run, train

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
    ("--env-id", ["--env-id"]),
    ("--env-id bigfish fruitbot", ["fruitbot"]),
    # batches
    ("--num-envs 3 --num-steps 5 --num-minibatches 4", ["--num-minibatches", "15"]),
    ("--num-envs 2 --num-steps 2 --num-minibatches 4", ["--num-minibatches", "4", "2 rows"]),
    ("--total-timesteps 16383", ["--total-timesteps", "16384"]),
    ("--total-timesteps 1e6", ["--total-timesteps", "1e6"]),
    # distribution modes and levels
    ("--distribution-mode medium", ["--distribution-mode", "easy", "hard"]),
    ("--distribution-mode exploration", ["--distribution-mode"]),  # a mode of Procgen's, of one level
    ("--env-id maze --distribution-mode extreme", ["--distribution-mode", "maze", "easy", "hard", "memory"]),
    ("--start-level 2147483647 --num-levels 1", ["--start-level", "--num-levels"]),
    ("--start-level 3 --num-levels 0", ["--start-level", "0", "--num-levels"]),
    # one above or below what would do
    ("--num-envs 0", ["--num-envs", "from 1 to"]),
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
    ("--channels None", ["--channels", "None"]),
    ("--num-envs 4.5", ["--num-envs", "4.5"]),
    ("--num-env 4", ["--num-env"]),
    ("--gamma 0,9", ["--gamma", "0,9"]),
    # switches are not followed by a value: not to be taken for True
    ("--torch-deterministic False", ["False"]),
    ("--bf16 None", ["None"]),
    # names, files and devices
    ("--exp-name a/b", ["--exp-name", "a/b"]),
    (f"--exp-name {100 * 'a'}", ["--exp-name", "99"]),
    (f"--exp-name {99 * chr(0x4E00)}", ["--exp-name"]),  # of 297 bytes, where a file's name may have 255
    ("--device gpu", ["--device", "gpu", "auto", "cpu", "cuda"]),
    ("--device cuda:0", ["--device", "cuda:0"]),
    ("--freeze-encoder", ["--freeze-encoder", "--pretrained-encoder"]),
    ("--pretrained-encoder nowhere.pt", ["--pretrained-encoder", "nowhere.pt"]),
    (f"--pretrained-encoder {NO_AGENT}", ["--pretrained-encoder", NO_AGENT]),
    ("--resume nowhere", ["--resume", "nowhere"]),
    (f"--resume {100 * 'long'}", ["--resume", "long"]),
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


@pytest.mark.parametrize(("name", "words", "expected"), ALL_CASES, ids=[case[1][:50] for case in ALL_CASES])
def test_rejected(name, words, expected, tmp_path, capfd, monkeypatch):
    """Before main, so that nothing is made."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "main", lambda args, stop: pytest.fail("it was accepted"))
    status = train(script, tmp_path, *words.split())
    message = error_message(status, *capfd.readouterr())
    assert [word for word in expected if word not in message] == []
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(("device", "num_gpus"), [("cuda", 0), ("auto", 1)])
def test_a_gpu_that_cannot_be_used(device, num_gpus, tmp_path):
    """There is none, or its driver is too old: no run goes on for a week on the CPU unasked."""

    def hide_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.cuda.device_count = lambda: num_gpus

    script = importlib.import_module("mdpo_procgen")
    result = run(script, tmp_path, flags(**TINY | {"device": device}), hide_gpus)
    message = error_message(result.status, result.out, result.err)
    assert "error: --device: this PyTorch cannot use a GPU here" in message
    assert "--device cpu" in message
    assert list(tmp_path.iterdir()) == []


def test_device_is_chosen(script, monkeypatch):
    for num_gpus, device in [(0, "cpu"), (1, "cuda"), (8, "cuda")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda num=num_gpus: num)
        assert script.Args().device == device
        assert script.Args(device="cpu").device == "cpu"


@pytest.mark.parametrize("left", ["nothing", "folder"])
def test_track_without_wandb(left, tmp_path, monkeypatch):
    """A folder wandb/ with the runs of an earlier wandb is not the package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)] if left == "folder" else [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="--track needs wandb: `pip install wandb`"):
        importlib.import_module("ppo_procgen").Args(track=True)
