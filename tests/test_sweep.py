"""benchmark/sweep.py: its plan, in this process; slow: sweeps from the shell, and what kills them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import BATCH_SIZE, ROOT, TINY, error_message, flags, read_points, save_agent
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


def plan(output: Path, *words: str, variant: str = "") -> sweep.Run:
    """Of a short PPO run with more flags of the script."""
    args = sweep.Args(output=output)
    return sweep.plan_run(args, "ppo", "fruitbot", 1, variant, [*SHORT, *words])


def make_run(output: Path, name: str = PPO, step: int | None = 10 * BATCH_SIZE, **settings) -> Path:
    """The files that tell of a finished run; without a step, of an interrupted one."""
    folder = output / "runs" / f"{name}__1700000000"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    settings = SETTINGS | {"env_id": "fruitbot"} | settings
    (folder / "args.json").write_text(json.dumps(settings))
    if step is not None:
        (folder / "final_test.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_every_combination_is_planned_once(tmp_path, monkeypatch, capsys):
    """With whole iterations of 64 steps. What is finished is not to be done; a dry run writes nothing."""
    make_run(tmp_path, "maze__mdpo_procgen+wide__7", 640_000, env_id="maze", channels=[8, 8, 8])
    words = "--algorithms ppo mdpo --games fruitbot maze --seeds 1 7 --dry-run --output".split()
    words += [tmp_path, "--variants", "", "wide=--channels 8 8 8"]
    run_tool("sweep", monkeypatch, *words, "--", *SHORT, "--total-timesteps", "640063")
    _, *rows, last = capsys.readouterr().out.splitlines()
    expected = []
    for variant in ("", "+wide"):
        for game in ("fruitbot", "maze"):
            for script in ("ppo", "mdpo"):
                for seed in (1, 7):
                    expected.append([f"{game}__{script}_procgen{variant}__{seed}", "new", "0.64"])
    expected[-1][1] = "finished"
    assert [row.split() for row in rows] == expected
    assert last == "1 finished, 0 interrupted, 15 new"
    assert len(list(tmp_path.rglob("*"))) == 5


def test_when_all_is_finished_it_ends_there(tmp_path, monkeypatch, capsys):
    """Without Ray."""
    monkeypatch.setattr("ray.init", pytest.fail)
    make_run(tmp_path)
    words = "--algorithms ppo --games fruitbot --seeds 1 --output".split()
    run_tool("sweep", monkeypatch, *words, tmp_path, "--", *SHORT)
    assert "1 finished, 0 interrupted, 0 new" in capsys.readouterr().out


def test_a_plan(tmp_path):
    """Later words win in the script: what a variant says before what is said for all."""
    run = plan(tmp_path, variant="wide=--channels 8 8 8")
    assert (run.name, run.script) == ("fruitbot__ppo_procgen+wide__1", "ppo_procgen")
    line = " ".join(run.words)
    assert 0 < line.index("--channels 4 4 4 ") < line.index("--channels 8 8 8 ")
    assert line.endswith("--env-id fruitbot --exp-name ppo_procgen+wide --seed 1 --resume auto")


def test_placeholders(tmp_path):
    """{game}, {seed}, and the newest of the paths that fit."""
    for seed, unix_time in ((1, 1700000000), (1, 1800000000), (2, 1900000000)):
        path = tmp_path / f"runs/fruitbot__mdpo_procgen__{seed}__{unix_time}/agent.pt"
        save_agent(path, Agent(channels=(4, 4, 4)))
    variant = "v=--pretrained-encoder runs/{game}__mdpo_procgen__{seed}__*/agent.pt"
    line = " ".join(plan(tmp_path, variant=variant).words)
    assert f"--pretrained-encoder {tmp_path}/runs/fruitbot__mdpo_procgen__1__1800000000/agent.pt " in line
    with pytest.raises(SystemExit):
        plan(tmp_path, variant=variant.replace("mdpo", "spo"))  # there is none


def test_states(tmp_path):
    """What final_test.json and checkpoint.pt say, of runs of that very name."""
    for name in (
        "fruitbot__ppo_procgen+other__1",
        "fruitbot__ppo_procgen__12",
        "fruitbot__ppo_procgen__1__2",
    ):
        make_run(tmp_path, name)
    assert plan(tmp_path).state == "new"
    folder = make_run(tmp_path)
    for steps, state in ((640, "finished"), (703, "finished"), (704, "interrupted")):
        assert plan(tmp_path, "--total-timesteps", str(steps)).state == state
    (folder / "final_test.json").unlink()
    assert plan(tmp_path).state == "interrupted"
    (folder / "checkpoint.pt").unlink()
    assert plan(tmp_path).state == "new"


@pytest.mark.parametrize("step", [640, None], ids=["finished", "interrupted"])
def test_other_settings(step, tmp_path, capsys):
    """The channels too, which are a list in the file."""
    folder = make_run(tmp_path, step=step, gamma=0.5)
    for flag, value, name in (("gamma", "0.999", "0.5"), ("channels", "[4, 4, 4]", "[8, 8, 8]")):
        with pytest.raises(SystemExit):
            plan(tmp_path)
        expected = f"{folder} was made with --{flag} {name}, not {value}: take --variants"
        assert expected in capsys.readouterr().err
        (folder / "args.json").write_text('{"channels": [8, 8, 8]}')


def test_settings_that_may_differ(tmp_path):
    """Those that do not change the result."""
    make_run(tmp_path, bf16=True, compile=True, track=True)
    words = "--no-compile --torch-deterministic --device auto --eval-interval 7"
    words += " --final-eval-episodes 9 --checkpoint-interval 3"
    assert plan(tmp_path, *words.split()).state == "finished"


BAD = {  # a command line, and words of its message
    "--algorithms pong": "--algorithms mdspo",
    "--algorithms": "--algorithms",
    "--games pong": "--games bigfish pong",
    "--games maze maze": "--games different",
    "--seeds -1": "--seed",
    "--variants wide": "--variants NAME=FLAGS",
    "--variants wide=--chanels": "--chanels",
    "--variants a/b=": "--variants",
    "--cpus 0": "--cpus 1",
    "--gpus 1.5": "--gpus whole",
    "--gpus -1": "--gpus",
    "--gpus nan": "--gpus",
    "--address 127.0.0.1:1": "--address 127.0.0.1:1 refused",
    "--no-such-flag": "--no-such-flag",
    "-- --gamma 2": "ppo_procgen.py --gamma",
    "-- --no-such-flag": "ppo_procgen.py --no-such-flag",
    "-- --exp_name=x": "--exp-name sets it",
    "-- --resume auto": "--resume sets it",
    "-- --eval-interval 0": "--eval-interval",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(command, tmp_path, capsys, monkeypatch):
    """Status 2, and nothing written."""
    own, _, rest = command.partition("--" if command.startswith("-- ") else " -- ")
    words = ["--output", tmp_path, *own.split()]
    for flag, value in (("--algorithms", "ppo"), ("--games", "fruitbot")):
        if flag not in own:
            words += [flag, value]
    with pytest.raises(SystemExit) as stop:
        run_tool("sweep", monkeypatch, *words, "--", *rest.split())
    message = error_message(stop.value.code, "", capsys.readouterr().err)  # the plan may stand before it
    for word in BAD[command].split():
        assert word in message
    assert not list(tmp_path.iterdir())


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

    def start(*words: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, ROOT / "benchmark/sweep.py", "--output", tmp_path / "out"]
        command += "--algorithms ppo mdpo --games fruitbot --seeds 1 --cpus 1".split()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | variables
        process = subprocess.Popen([*command, *words], env=environment, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def workers(folder: Path) -> dict[str, int]:
    """{run: process} of those at work in the folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title, *_ = (path / "cmdline").read_bytes().decode().split("\0")
            if (path / "cwd").resolve() == folder:
                found[title.removeprefix("ray::")] = int(path.name)
        except OSError:  # it has ended in between
            continue
    return found


def curves(folder: Path) -> list[list[int]]:
    """The steps of the curves of each agent."""
    found = []
    for agent in runs.find_curves(folder / "runs"):
        points = read_points(agent).get("losses/value_loss", [])
        found.append([step for step, _ in points])
    return found


def wait_until(condition, folder: Path):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, [path.read_text()[-2000:] for path in folder.glob("runs/logs/*")]
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_stopped_and_started_again(start_sweep, tmp_path):
    """A run is killed: it goes on. Ctrl-C: all save and end. The sweep is killed: so are its runs. Then the
    same command, of fewer steps, finishes them all."""
    out = tmp_path / "out"
    log = out / f"runs/logs/{PPO}.log"

    first = start_sweep("--", *LONG)
    wait_until(lambda: len(list(out.glob("runs/*/checkpoint.pt"))) == 2, out)
    before = workers(out)
    assert before.keys() == {PPO, MDPO}
    os.kill(before[PPO], signal.SIGKILL)
    wait_until(lambda: log.read_text().count("run folder") == 2, out)
    assert workers(out)[MDPO] == before[MDPO]
    os.killpg(first.pid, signal.SIGINT)
    printed, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert not workers(out)
    assert "0 finished, 0 interrupted, 2 new" in printed
    assert "0 of 2 finished" in printed
    assert "Traceback" not in errors
    assert log.read_text().count("started on") == 2

    second = start_sweep("--", *LONG)
    wait_until(lambda: len(workers(out)) == 2, out)
    second.kill()
    assert "0 finished, 2 interrupted, 0 new" in second.communicate(timeout=60)[0]
    wait_until(lambda: not workers(out), out)

    end = max(max(steps, default=0) for steps in curves(out)) + 10 * BATCH_SIZE
    third = start_sweep("--", *LONG, "--total-timesteps", str(end))
    printed, errors = third.communicate(timeout=300)
    assert third.returncode == 0, errors
    assert "2 of 2 finished" in printed
    finals = [json.loads(path.read_text()) for path in out.glob("runs/*/final_test.json")]
    assert [final["global_step"] for final in finals] == [end, end]
    assert curves(out) == [list(range(BATCH_SIZE, end + 1, BATCH_SIZE))] * 3  # all in the first folders


@pytest.mark.slow
def test_runs_that_fail_are_named(start_sweep, tmp_path):
    """With the last of their words. So is, at once, that there are fewer cores than a run needs."""
    encoder = save_agent(tmp_path / "small.pt", Agent(channels=(4, 4, 4), obs_shape=(32, 32, 3)))
    process = start_sweep("--", *SHORT, "--pretrained-encoder", str(encoder))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "0 of 2 finished" in printed
    (line,) = [line for line in printed.splitlines() if f"{PPO}: exit status 2: " in line]
    assert "small.pt" in line
    process = start_sweep("--cpus", "999", "--", *SHORT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "--cpus 999" in errors


@pytest.mark.slow
def test_a_temporary_path_that_is_too_long(start_sweep, tmp_path):
    """Ray's sockets are in it."""
    folder = tmp_path / (90 * "x")
    folder.mkdir()
    each = start_sweep("--", *SHORT, TMPDIR=str(folder))
    _, errors = each.communicate(timeout=60)
    assert each.returncode == 2 and "set RAY_TMPDIR to a folder with a short path" in errors
    assert "Traceback" not in errors
