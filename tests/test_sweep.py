"""benchmark/sweep.py: its plan, in this process, and a local Ray whose workers and driver are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import BATCH_SIZE, ROOT, TINY, agent_folders, flags, read_curves

sys.path.insert(0, str(ROOT / "benchmark"))
import sweep

SETTINGS = {name: value for name, value in TINY.items() if name not in ("env_id", "total_timesteps")}
LONG = flags(**SETTINGS | {"total_timesteps": 10_000_000, "checkpoint_interval": 2})


def plan(output: Path, *words: str, extra: list[str] = LONG) -> list[sweep.Run]:
    """Of one game and seed unless told otherwise."""
    args = sweep.parse_args(
        sweep.Args, "", ["--games", "fruitbot", "--seeds", "1", "--output", str(output), *words]
    )
    return sweep.make_plan(args, extra)


def finish(output: Path, name: str, step: int, **settings):
    """The files that tell of a finished run."""
    folder = output / "runs" / f"{name}__1700000000"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    args = SETTINGS | {"env_id": "fruitbot", "channels": [4, 4, 4], "total_timesteps": step} | settings
    (folder / "final_test.json").write_text(json.dumps({"args": args, "global_step": step}))


def test_every_combination_is_planned_once(tmp_path):
    words = ["--algorithms", "ppo", "mdpo", "--games", "fruitbot", "maze", "--seeds", "1", "7"]
    runs = plan(tmp_path, *words, "--variants", "", "wide=--channels 8 8 8 --gamma 0.9")
    expected = {
        f"{game}__{script}_procgen{variant}__{seed}"
        for game in ("fruitbot", "maze")
        for script in ("ppo", "mdpo")
        for variant in ("", "+wide")
        for seed in (1, 7)
    }
    assert {run.name for run in runs} == expected and len(runs) == 16
    (run,) = [run for run in runs if run.name == "maze__mdpo_procgen+wide__7"]
    line = " ".join(run.command)
    assert line.startswith(str(ROOT / "mdpo_procgen.py")) and line.endswith("--resume auto")
    for part in ("--env-id maze", "--exp-name mdpo_procgen+wide", "--seed 7", "--channels 8 8 8 --gamma 0.9"):
        assert part in line
    assert "--channels 8 8 8" not in " ".join(runs[0].command)


def test_cost(tmp_path, capsys):
    """Whole iterations of 64 steps: 7,200,000 at 1,000 a second are two hours, at 250 eight."""
    words = ["--algorithms", "ppo", "mdpo", "--steps-per-second", "1000", "250", "--gpus", "0.5", "--dry-run"]
    extra = flags(**SETTINGS | {"total_timesteps": 7_200_063})
    args = sweep.parse_args(
        sweep.Args, "", ["--games", "fruitbot", "--seeds", "1", "--output", str(tmp_path), *words]
    )
    sweep.main(args, extra)
    out, err = capsys.readouterr()
    assert err == "" and not list(tmp_path.iterdir())
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert rows == [
        ["fruitbot__ppo_procgen__1", "new", "7.20", "2.00"],
        ["fruitbot__mdpo_procgen__1", "new", "7.20", "8.00"],
    ]
    assert "0 finished, 0 interrupted, 2 new" in out and "10.0 hours of runs" in out
    assert "5.0 GPU hours" in out and "1,000 steps a second" in out


def test_threads_are_the_cores_unless_told(tmp_path):
    (run,) = plan(tmp_path, "--algorithms", "ppo", "--cpus", "3")
    assert "--num-env-threads 3" in " ".join(run.command)
    (run,) = plan(tmp_path, "--algorithms", "ppo", "--cpus", "3", extra=[*LONG, "--num-env-threads", "1"])
    assert run.command.index("3") < run.command.index("--resume") - 1
    assert (
        sweep.parse_args(
            sweep.importlib.import_module("ppo_procgen").Args, "", run.command[1:]
        ).num_env_threads
        == 1
    )


def test_placeholders(tmp_path):
    """{game}, {seed}, and the newest of the paths that fit."""
    for unix_time in (1700000000, 1800000000):
        (tmp_path / f"runs/fruitbot__mdpo_procgen__4__{unix_time}").mkdir(parents=True)
    variant = "v=--wandb-project-name runs/{game}__mdpo_procgen__{seed}__* --wandb-entity {game}"
    (run,) = plan(tmp_path, "--algorithms", "ppo", "--seeds", "4", "--variants", variant)
    newest = tmp_path / "runs/fruitbot__mdpo_procgen__4__1800000000"
    assert f"--wandb-project-name {newest} --wandb-entity fruitbot" in " ".join(run.command)


def test_states(tmp_path):
    """What final_test.json and checkpoint.pt say, of runs of that very name."""
    extra = flags(**SETTINGS | {"total_timesteps": 10 * BATCH_SIZE})

    def state(**options):
        (run,) = plan(tmp_path, "--algorithms", "ppo", **options)
        return run.state

    assert state(extra=extra) == "new"
    finish(tmp_path, "fruitbot__ppo_procgen+other__1", 10 * BATCH_SIZE)
    finish(tmp_path, "fruitbot__ppo_procgen__1__2", 10 * BATCH_SIZE)
    assert state(extra=extra) == "new"
    finish(tmp_path, "fruitbot__ppo_procgen__1", 10 * BATCH_SIZE, checkpoint_interval=3, device="cuda")
    assert state(extra=extra) == "finished"
    assert state(extra=[*extra, "--total-timesteps", str(11 * BATCH_SIZE - 1)]) == "finished"
    assert state(extra=[*extra, "--total-timesteps", str(11 * BATCH_SIZE)]) == "interrupted"
    (tmp_path / "runs/fruitbot__ppo_procgen__1__1700000000/final_test.json").write_text("{")
    assert state(extra=extra) == "interrupted"


def test_finished_with_other_settings(tmp_path, capsys):
    finish(tmp_path, "fruitbot__ppo_procgen__1", 10 * BATCH_SIZE, gamma=0.5)
    with pytest.raises(SystemExit) as stop:
        plan(tmp_path, "--algorithms", "ppo")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert "--gamma 0.5, not 0.999" in err and "--variants" in err


def test_pretrained_encoder(tmp_path, capsys):
    """Its channels count, not those of the flags. It must be there for a new run, or be one that may come."""
    extra = flags(**SETTINGS | {"total_timesteps": 10 * BATCH_SIZE})
    words = [tmp_path, "--algorithms", "ppo", "--variants", "v=--pretrained-encoder agent.pt"]
    with pytest.raises(SystemExit) as stop:
        plan(*words, extra=extra)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert "--pretrained-encoder: there is no agent.pt, for fruitbot__ppo_procgen+v__1" in err
    (tmp_path / "agent.pt").touch()
    assert plan(*words, extra=extra)[0].state == "new"
    assert plan(*words[:-1], "v=--pretrained-encoder runs/*/agent.pt", extra=extra)[0].state == "new"
    finish(tmp_path, "fruitbot__ppo_procgen+v__1", 10 * BATCH_SIZE, channels=[8, 8, 8])
    (tmp_path / "agent.pt").unlink()
    assert plan(*words, extra=extra)[0].state == "finished"


@pytest.mark.parametrize("output", ["file", "file/deep", "/proc/x"])
def test_output_that_cannot_be(output, tmp_path, monkeypatch, capsys):
    """Is said before a plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc")  # root may write to any
    words = ["--games", "fruitbot", "--output", output, "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        sweep.main(sweep.parse_args(sweep.Args, "", words), LONG)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "error: --output: /" in err
    assert (tmp_path / "file").read_text() == "kept"


BAD = [  # what is written on the command line, and words that the message has
    ("--algorithms pong", ["--algorithms", "mdspo"]),
    ("--algorithms", ["--algorithms"]),
    ("--games pong", ["--env-id", "bigfish"]),
    ("--games maze maze", ["--games", "different"]),
    ("--seeds one", ["--seeds", "one"]),
    ("--seeds -1", ["--seed"]),
    ("--variants wide", ["--variants", "NAME=FLAGS"]),
    ("--variants wide=--chanels", ["--chanels"]),
    ("--variants a/b=", ["--variants"]),
    ("--cpus 0", ["--cpus", "1"]),
    ("--gpus 1.5", ["--gpus", "whole"]),
    ("--gpus -1", ["--gpus"]),
    ("--gpus nan", ["--gpus"]),
    ("--retries -1", ["--retries"]),
    ("--steps-per-second 0 1", ["--steps-per-second"]),
    ("--address here", ["--address", "HOST:PORT"]),
    ("--address 127.0.0.1:1", ["--address", "127.0.0.1:1", "refused"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("-- --gamma 2", ["ppo_procgen.py", "--gamma"]),
    ("-- --seed 1", ["--seed", "sets it"]),
    ("-- --exp_name=x", ["--exp-name", "sets it"]),
    ("-- --resume auto", ["--resume", "sets it"]),
    ("-- --eval-interval 0", ["--eval-interval"]),
    ("-- --num-envs 3 --num-minibatches 5", ["--num-minibatches"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[words for words, _ in BAD])
def test_bad_input(words, expected, tmp_path, capsys, monkeypatch):
    """One line, status 2, and nothing written."""
    own, _, extra = words.partition("--" if words.startswith("-- ") else " -- ")
    defaults = ["--algorithms", "ppo"] * ("--algorithms" not in own)
    defaults += ["--games", "fruitbot"] * ("--games" not in own)
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    with pytest.raises(SystemExit) as stop:
        args = sweep.parse_args(sweep.Args, "", [*defaults, "--output", str(tmp_path), *own.split()])
        sweep.main(args, extra.split())
    _, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("sweep.py: error: ")
    assert [word for word in expected if word not in err] == [] and not list(tmp_path.iterdir())


@pytest.fixture
def start_sweep(tmp_path):
    """Starts sweeps that do not outlive the test, whatever happens in it."""
    started = []

    def start(*options, **more) -> Sweep:
        started.append(Sweep(tmp_path, *options, **more))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()


class Sweep:
    """A sweep of PPO and MDPO from the shell, in a session of its own as in a terminal."""

    def __init__(self, output: Path, extra: list[str], cpus: int = 1):
        command = [sys.executable, str(ROOT / "benchmark/sweep.py"), "--cpus", str(cpus)]
        command += ["--output", str(output), "--algorithms", "ppo", "mdpo", "--games", "fruitbot"]
        command += ["--seeds", "1", "--", *extra]
        self.output = output
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )

    def children(self) -> dict[str, int]:
        """{script: process} of the training scripts at work in the output folder."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if len(words) > 1 and (folder / "cwd").resolve() == self.output.resolve():
                    found[Path(words[1]).stem] = int(folder.name)
            except OSError:  # it has ended in between
                continue
        return {name: pid for name, pid in found.items() if name.endswith("_procgen")}

    def steps(self, name: str) -> int:
        """How far the newest curves on disk go."""
        folders = sorted((self.output / "runs").glob(f"fruitbot__{name}__1__*/checkpoint.pt"))
        curves = [read_curves(agent_folders(name, each.parent)[-1]) for each in folders[-1:]]
        return max((max(curve) for each in curves for curve in each.values()), default=0)

    def wait_for(self, condition):
        end = time.monotonic() + 120
        while not condition():
            logs = [path.read_text()[-2000:] for path in (self.output / "runs/logs").glob("*")]
            assert time.monotonic() < end, logs
            assert self.process.poll() in (None, -signal.SIGKILL), (self.process.communicate(), logs)
            time.sleep(0.1)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_more_cores_than_there_are(start_sweep, tmp_path):
    """To be said at once: Ray would wait for a machine that has them."""
    each = start_sweep(LONG, cpus=999)
    _, err = each.process.communicate(timeout=60)
    assert each.process.returncode == 2 and err.count("\n") == 1 and "--cpus 999" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs at once take two cores")
def test_killed_stopped_and_started_again(start_sweep, tmp_path):
    """A worker is killed: its run goes on. Ctrl-C: all save and end. The sweep is killed: so are its runs.
    Then the same command, of fewer steps, finishes them all, and once more there is nothing to do."""
    names = ["ppo_procgen", "mdpo_procgen"]
    first = start_sweep(LONG)
    first.wait_for(lambda: all(first.steps(name) >= 3 * BATCH_SIZE for name in names))
    before, reached = first.children(), first.steps("ppo_procgen")
    os.kill(parent_of(before["ppo_procgen"]), signal.SIGKILL)
    first.wait_for(lambda: first.children().get("ppo_procgen", 0) not in (0, before["ppo_procgen"]))
    first.wait_for(lambda: first.steps("ppo_procgen") > reached + 3 * BATCH_SIZE)
    assert first.children()["mdpo_procgen"] == before["mdpo_procgen"]
    os.killpg(first.process.pid, signal.SIGINT)
    out, err = first.process.communicate(timeout=60)
    assert first.process.returncode == 130 and not first.children(), err
    assert "0 finished, 0 interrupted, 2 new" in out and "0 of 2 finished" in out and "Traceback" not in err
    for name in names:
        log = (tmp_path / f"runs/logs/fruitbot__{name}__1.log").read_text()
        assert log.rstrip().splitlines()[-1].startswith("stopped after")
        assert log.count("started on") == (2 if name == "ppo_procgen" else 1)

    stopped = {name: first.steps(name) for name in names}
    second = start_sweep(LONG)
    second.wait_for(lambda: all(second.steps(name) > stopped[name] for name in names))
    second.process.kill()
    assert "0 finished, 2 interrupted, 0 new" in second.process.communicate(timeout=60)[0]
    second.wait_for(lambda: not second.children())

    end = (max(map(second.steps, names)) // BATCH_SIZE + 5) * BATCH_SIZE
    extra = [*LONG, "--total-timesteps", str(end)]
    third = start_sweep(extra)
    out, err = third.process.communicate(timeout=120)
    assert third.process.returncode == 0 and "2 of 2 finished" in out, err
    assert "2 finished, 0 running, 0 waiting, 0 not finished" in err
    assert len(list((tmp_path / "runs").glob("fruitbot__*"))) == 2  # all went on in the first folders
    for name in names:
        (run_dir,) = (tmp_path / "runs").glob(f"fruitbot__{name}__1__*")
        assert json.loads((run_dir / "final_test.json").read_text())["global_step"] == end
        for folder in agent_folders(name, run_dir):
            steps = list(read_curves(folder)["losses/value_loss"])
            assert steps == list(range(BATCH_SIZE, end + 1, BATCH_SIZE))

    fourth = start_sweep(extra)
    out, err = fourth.process.communicate(timeout=60)
    assert fourth.process.returncode == 0 and "2 finished, 0 interrupted, 0 new" in out and err == ""

    command = [
        sys.executable,
        str(ROOT / "benchmark/figures.py"),
        str(tmp_path / "runs"),
        "--bootstrap",
        "50",
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "figures")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| test return | MDPO | PPO |" in done.stdout and done.stderr == ""
    assert {path.stem for path in (tmp_path / "figures").glob("*.pdf")} == {
        *("training_return", "test_return", "generalization_gap", "aggregate")
    }
