"""benchmark/sweep.py: its plan, in this process; slow: sweeps from the shell, and what kills them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import BATCH_SIZE, ROOT, TINY, error_message, flags, save_agent
from test_runs import run_tool

sys.path.insert(0, str(ROOT / "benchmark"))
import runs
import sweep

from ppo_procgen import Agent

SETTINGS = {name: value for name, value in TINY.items() if name not in ("env_id", "total_timesteps")}
LONG = flags(**SETTINGS | {"total_timesteps": 10_000_000, "checkpoint_interval": 2, "eval_interval": 50})
SHORT = flags(**SETTINGS | {"total_timesteps": 10 * BATCH_SIZE})
PPO = "fruitbot__ppo_procgen__1"
MDPO = "fruitbot__mdpo_procgen__1"


def plan(output: Path, algorithm: str = "ppo", seed: int = 1, variant: str = "", words: list = LONG):
    args = sweep.Args(output=output, cpus=3)
    return sweep.plan_run(args, algorithm, "fruitbot", seed, variant, words)


def make_run(output: Path, name: str, step: int | None = 10 * BATCH_SIZE, **settings) -> Path:
    """The files that tell of a finished run; without a step, of an interrupted one."""
    folder = output / "runs" / f"{name}__1700000000"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    args = SETTINGS | {"env_id": "fruitbot", "exp_name": name.split("__")[1], "seed": 1} | settings
    (folder / "args.json").write_text(json.dumps(args))
    if step is not None:
        (folder / "final_test.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_every_combination_is_planned_once(tmp_path, monkeypatch, capsys):
    """With whole iterations of 64 steps. What is finished is not to be done; a dry run writes nothing."""
    make_run(tmp_path, "maze__mdpo_procgen+wide__7", 640_000, env_id="maze", seed=7, channels=[8, 8, 8])
    words = ["--algorithms", "ppo", "mdpo", "--games", "fruitbot", "maze", "--seeds", "1", "7", "--dry-run"]
    words += ["--variants", "", "wide=--channels 8 8 8", "--output", tmp_path, "--"]
    run_tool("sweep", monkeypatch, *words, *SHORT, "--total-timesteps", "640063")
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[1:]]
    expected = []
    for variant in ("", "+wide"):
        for game in ("fruitbot", "maze"):
            for script in ("ppo", "mdpo"):
                for seed in (1, 7):
                    expected.append([f"{game}__{script}_procgen{variant}__{seed}", "new", "0.64"])
    expected[-1][1] = "finished"
    assert rows == [*expected, "1 finished, 0 interrupted, 15 new".split()]
    assert len(list(tmp_path.rglob("*"))) == 5


def test_when_all_is_finished_it_ends_there(tmp_path, monkeypatch, capsys):
    """Without Ray."""
    monkeypatch.setattr("ray.init", pytest.fail)
    make_run(tmp_path, PPO)
    words = ["--algorithms", "ppo", "--games", "fruitbot", "--seeds", "1", "--output", tmp_path]
    run_tool("sweep", monkeypatch, *words, "--", *SHORT)
    assert "1 finished, 0 interrupted, 0 new" in capsys.readouterr().out


def test_a_plan(tmp_path):
    """Later words win in the script: what a variant says before what is said for all."""
    run = plan(tmp_path, seed=7, variant="wide=--channels 8 8 8")
    assert (run.name, run.script, run.state) == ("fruitbot__ppo_procgen+wide__7", "ppo_procgen", "new")
    line = " ".join(run.words)
    assert line.startswith("--num-envs 4 ")
    assert "--channels 4 4 4 " in line and " --channels 8 8 8 " in line
    assert line.endswith("--env-id fruitbot --exp-name ppo_procgen+wide --seed 7 --resume auto")


def test_placeholders(tmp_path):
    """{game}, {seed}, and the newest of the paths that fit."""
    for unix_time in (1700000000, 1800000000):
        folder = tmp_path / f"runs/fruitbot__mdpo_procgen__4__{unix_time}"
        newest = save_agent(folder / "agent.pt", Agent(channels=(4, 4, 4)))
    path = "runs/{game}__mdpo_procgen__{seed}__*/agent.pt"
    run = plan(tmp_path, seed=4, variant=f"v=--pretrained-encoder {path}")
    assert f"--pretrained-encoder {newest} " in " ".join(run.words)
    with pytest.raises(SystemExit):
        plan(tmp_path, seed=5, variant=f"v=--pretrained-encoder {path}")  # there is none


def test_states(tmp_path):
    """What final_test.json and checkpoint.pt say, of runs of that very name."""
    make_run(tmp_path, "fruitbot__ppo_procgen+other__1")
    make_run(tmp_path, "fruitbot__ppo_procgen__12")
    make_run(tmp_path, "fruitbot__ppo_procgen__1__2")
    assert plan(tmp_path, words=SHORT).state == "new"
    folder = make_run(tmp_path, PPO)
    for steps, state in ((640, "finished"), (703, "finished"), (704, "interrupted")):
        assert plan(tmp_path, words=[*SHORT, "--total-timesteps", str(steps)]).state == state
    newer = folder.with_name(f"{PPO}__1800000000")
    newer.mkdir()
    (newer / "checkpoint.pt").touch()
    assert plan(tmp_path, words=SHORT).state == "finished"
    (folder / "final_test.json").unlink()
    assert plan(tmp_path, words=SHORT).state == "interrupted"
    (folder / "checkpoint.pt").unlink()
    (newer / "checkpoint.pt").unlink()
    assert plan(tmp_path, words=SHORT).state == "new"


@pytest.mark.parametrize("step", [640, None], ids=["finished", "interrupted"])
def test_other_settings(step, tmp_path, capsys):
    folder = make_run(tmp_path, PPO, step, gamma=0.5)
    with pytest.raises(SystemExit):
        plan(tmp_path)
    expected = f"{folder} was made with --gamma 0.5, not 0.999: take --variants"
    assert expected in capsys.readouterr().err


def test_settings_that_may_differ(tmp_path, capsys):
    """Those that do not change the result. One that is not in the file had its default."""
    make_run(tmp_path, MDPO)
    words = [*SHORT, "--no-bf16", "--no-compile", "--torch-deterministic", "--device", "auto"]
    words += ["--eval-interval", "7", "--final-eval-episodes", "9", "--checkpoint-interval", "3"]
    assert plan(tmp_path, "mdpo", words=words).state == "finished"
    with pytest.raises(SystemExit):
        plan(tmp_path, "mdpo", words=[*SHORT, "--num-agents", "3"])
    assert "--num-agents 2, not 3" in capsys.readouterr().err


def test_the_channels_of_a_pretrained_encoder_are_its_own(tmp_path, capsys):
    encoder = str(save_agent(tmp_path / "agent.pt", Agent(channels=(8, 8, 8)), channels=(8, 8, 8)))
    make_run(tmp_path, PPO, channels=[8, 8, 8], pretrained_encoder=encoder)
    settings = SETTINGS | {"total_timesteps": 10 * BATCH_SIZE, "pretrained_encoder": encoder}
    del settings["channels"]
    assert plan(tmp_path, words=flags(**settings)).state == "finished"
    with pytest.raises(SystemExit):
        plan(tmp_path, words=SHORT)
    assert "--channels [8, 8, 8], not [4, 4, 4]" in capsys.readouterr().err


BAD = [  # what is written on the command line, and words that the message has
    ("--algorithms pong", ["--algorithms", "mdspo"]),
    ("--algorithms", ["--algorithms"]),
    ("--games pong", ["--games", "bigfish", "pong"]),
    ("--games maze maze", ["--games", "different"]),
    ("--seeds one", ["--seeds", "one"]),
    ("--seeds -1", ["--seed"]),
    ("--variants wide", ["--variants", "NAME=FLAGS"]),
    ("--variants wide=--chanels", ["--chanels"]),
    ("--variants a/b=", ["--variants"]),
    ("--variants wide= wide=--gamma=0.9", ["--variants", "different"]),
    ("--cpus 0", ["--cpus", "1"]),
    ("--gpus 1.5", ["--gpus", "whole"]),
    ("--gpus -1", ["--gpus"]),
    ("--gpus nan", ["--gpus"]),
    ("--retries -1", ["--retries"]),
    ("--address 127.0.0.1:1", ["--address 127.0.0.1:1", "refused"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("-- --gamma 2", ["ppo_procgen.py", "--gamma"]),
    ("-- --no-such-flag", ["ppo_procgen.py", "--no-such-flag"]),
    ("-- --seed 1", ["--seed", "sets it"]),
    ("-- --exp_name=x", ["--exp-name", "sets it"]),
    ("-- --resume auto", ["--resume", "sets it"]),
    ("-- --eval-interval 0", ["--eval-interval"]),
    ("-- --num-envs 3 --num-minibatches 5", ["--num-minibatches"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[words for words, _ in BAD])
def test_bad_input(words, expected, tmp_path, capsys, monkeypatch):
    """Status 2, and nothing written."""
    words = words.split()
    at = words.index("--") if "--" in words else len(words)
    own_words = ["--output", tmp_path, *words[:at]]
    for flag, value in (("--algorithms", "ppo"), ("--games", "fruitbot")):
        if flag not in own_words:
            own_words += [flag, value]
    with pytest.raises(SystemExit) as stop:
        run_tool("sweep", monkeypatch, *own_words, *words[at:])
    message = error_message(stop.value.code, "", capsys.readouterr().err)  # the plan may stand before it
    assert [word for word in expected if word not in message] == [] and not list(tmp_path.iterdir())


def test_gpus_of_a_run(tmp_path, monkeypatch, capsys):
    """One, or as much as a machine has, unless told otherwise. What no machine has is said at once."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4, "GPU": 2}},
        {"Alive": True, "Resources": {"CPU": 6}},
        {"Alive": False, "Resources": {"CPU": 99, "GPU": 9}},
    ]
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    for cpus, gpus, expected in ((6, None, 1), (1, 0.5, 0.5), (1, 2, 2), (1, 0, 0)):
        assert sweep.start_ray(sweep.Args(cpus=cpus, gpus=gpus)) == expected
    for cpus, gpus in ((7, None), (1, 3)):
        with pytest.raises(SystemExit):
            sweep.start_ray(sweep.Args(cpus=cpus, gpus=gpus))
        assert "than any machine has: at most 6 cores and 2 GPUs" in capsys.readouterr().err
    del nodes[0]
    assert sweep.start_ray(sweep.Args(cpus=1)) == 0


@pytest.fixture
def start_sweep(tmp_path):
    """Starts sweeps of PPO and MDPO from the shell, each in a session of its own as in a terminal. None
    outlives the test, whatever happens in it."""
    started = []

    def start(extra: list[str], *words: str, **more: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "benchmark/sweep.py"), "--output", str(tmp_path / "out")]
        command += "--algorithms ppo mdpo --games fruitbot --seeds 1 --cpus 1".split()
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", **more}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += [*words, "--", *extra]
        started.append(subprocess.Popen(command, env=env, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def workers(folder: Path) -> dict[str, int]:
    """{run: process} of those at work in the folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().decode()
            if (path / "cwd").resolve() == folder:
                found[title.split("\0")[0].removeprefix("ray::")] = int(path.name)
        except OSError:  # it has ended in between
            continue
    return found


def curves(folder: Path) -> list[list[int]]:
    """The steps of the curves of each agent."""
    tag = "losses/value_loss"
    found = []
    for each in runs.find_curves(folder / "runs"):
        steps = [step for _, name, step, _ in runs.read_points(each, [tag]) if name == tag]
        found.append(steps)
    return found


def wait_until(condition, folder: Path):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, [path.read_text()[-2000:] for path in folder.glob("runs/logs/*")]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs at once take two cores")
def test_killed_stopped_and_started_again(start_sweep, tmp_path):
    """A run is killed: it goes on. Ctrl-C: all save and end. The sweep is killed: so are its runs. Then the
    same command, of fewer steps, finishes them all."""
    out = tmp_path / "out"

    def all_have_checkpoints() -> bool:
        return len(list(out.glob("runs/*/checkpoint.pt"))) == 2

    first = start_sweep(LONG)
    wait_until(all_have_checkpoints, out)
    before = workers(out)
    assert before.keys() == {PPO, MDPO}
    os.kill(before[PPO], signal.SIGKILL)
    wait_until(lambda: workers(out).get(PPO, before[PPO]) != before[PPO], out)
    log = out / f"runs/logs/{PPO}.log"
    wait_until(lambda: "going on" in log.read_text() or log.read_text().count("run folder") > 1, out)
    assert workers(out)[MDPO] == before[MDPO]
    os.killpg(first.pid, signal.SIGINT)
    printed, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and not workers(out), errors
    assert "0 finished, 0 interrupted, 2 new" in printed and "0 of 2 finished" in printed
    assert "Traceback" not in errors
    assert log.read_text().count("started on") == 2

    second = start_sweep(LONG)
    wait_until(lambda: len(workers(out)) == 2, out)
    second.kill()
    assert "0 finished, 2 interrupted, 0 new" in second.communicate(timeout=60)[0]
    wait_until(lambda: not workers(out), out)

    end = max(max(steps, default=0) for steps in curves(out)) + 10 * BATCH_SIZE
    third = start_sweep([*LONG, "--total-timesteps", str(end)])
    printed, errors = third.communicate(timeout=300)
    assert third.returncode == 0 and "2 of 2 finished" in printed, errors
    finals = [json.loads(path.read_text()) for path in out.glob("runs/*/final_test.json")]
    assert [final["global_step"] for final in finals] == [end, end]
    assert curves(out) == [list(range(BATCH_SIZE, end + 1, BATCH_SIZE))] * 3  # all in the first folders


@pytest.mark.slow
def test_runs_that_fail_are_named(start_sweep, tmp_path):
    """With the last of their words. So is, at once, that there are fewer cores than a run needs."""
    of_small_pictures = Agent(channels=(4, 4, 4), obs_shape=(32, 32, 3))
    script_flags = [*SHORT, "--pretrained-encoder", str(save_agent(tmp_path / "small.pt", of_small_pictures))]
    each = start_sweep(script_flags, "--retries", "0")
    printed, _ = each.communicate(timeout=120)
    assert each.returncode == 1 and "0 of 2 finished" in printed
    assert f"{PPO}: exit status 2: " in printed and "small.pt" in printed
    each = start_sweep(SHORT, "--cpus", "999")
    _, errors = each.communicate(timeout=60)
    assert each.returncode == 2 and errors.count("\n") == 1 and "--cpus 999" in errors


@pytest.mark.slow
def test_a_temporary_path_that_is_too_long(start_sweep, tmp_path):
    """Ray's sockets are in it."""
    folder = tmp_path / (90 * "x")
    folder.mkdir()
    each = start_sweep(SHORT, TMPDIR=str(folder))
    _, errors = each.communicate(timeout=60)
    assert each.returncode == 2 and "set RAY_TMPDIR to a folder with a short path" in errors
    assert "Traceback" not in errors
