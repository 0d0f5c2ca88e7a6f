"""benchmark/sweep.py: its plan and its parts, in this process; slow: a local Ray, and what kills it."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from common import BATCH_SIZE, ROOT, TINY, agent_folders, error_message, flags, read_curves
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import sweep
from helpers import Failure, parse_args, run_tool

SETTINGS = {name: value for name, value in TINY.items() if name not in ("env_id", "total_timesteps")}
LONG = flags(**SETTINGS | {"total_timesteps": 10_000_000, "checkpoint_interval": 2})


def plan(output: Path, *words: str, script_flags: list[str] = LONG) -> list[sweep.Run]:
    """Of one game and seed unless told otherwise."""
    words = ["--games", "fruitbot", "--seeds", "1", "--output", str(output), *words]
    return sweep.make_plan(parse_args(sweep.Args, "", words), script_flags)


def run_main(monkeypatch, *words: str):
    """sweep.py from its command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    own_words, script_flags = sweep.split_words(list(words))
    run_tool(partial(sweep.main, script_flags=script_flags), sweep.Args, "", own_words)


def finish(output: Path, name: str, step: int, args_json: bool = True, **settings) -> Path:
    """The files that tell of a finished run; older ones have no args.json."""
    folder = output / "runs" / f"{name}__1700000000"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    env_id, exp_name, seed = name.split("__")
    args = SETTINGS | {"env_id": env_id, "exp_name": exp_name, "seed": int(seed), "total_timesteps": step}
    args |= {"channels": [4, 4, 4]} | settings
    if args_json:
        (folder / "args.json").write_text(json.dumps(args))
    (folder / "final_test.json").write_text(json.dumps({"args": args, "global_step": step}))
    return folder


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


def test_cost(tmp_path, monkeypatch, capsys):
    """Whole iterations of 64 steps: 7,200,000 at 1,000 a second are two hours, at 250 eight. Each of three
    agents learns from three minibatches, not two, and has the others' time to wait."""
    words = ["--games", "fruitbot", "--seeds", "1", "--output", str(tmp_path), "--dry-run"]
    words += ["--algorithms", "ppo", "mdpo", "--steps-per-second", "1000", "250", "--gpus", "0.5"]
    script_flags = flags(**SETTINGS | {"total_timesteps": 7_200_063})
    run_main(monkeypatch, *words, "--", *script_flags)
    out, err = capsys.readouterr()
    assert err == "" and not list(tmp_path.iterdir())
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert rows == [
        ["fruitbot__ppo_procgen__1", "new", "7.20", "2.00"],
        ["fruitbot__mdpo_procgen__1", "new", "7.20", "8.00"],
    ]
    assert "0 finished, 0 interrupted, 2 new" in out and "10.0 hours of runs" in out
    assert "5.0 GPU hours" in out and "1,000 steps a second" in out
    words = ["--algorithms", "mdpo", "--steps-per-second", "1000", "250"]
    (run,) = plan(tmp_path, *words, script_flags=[*script_flags, "--num-agents", "3"])
    assert run.hours == pytest.approx(8 * 9 / 4)


def test_what_is_finished_costs_nothing(tmp_path, monkeypatch, capsys):
    """And if all is, the command ends there, without Ray."""
    words = ["--games", "fruitbot", "--algorithms", "ppo", "--output", str(tmp_path), "--seeds"]
    script_flags = flags(**SETTINGS | {"total_timesteps": 32_000_000})
    finish(tmp_path, "fruitbot__ppo_procgen__1", 32_000_000)
    run_main(
        monkeypatch, *words, "1", "2", "--dry-run", "--steps-per-second", "1000", "1", "--", *script_flags
    )
    out = capsys.readouterr().out
    assert "1 finished, 0 interrupted, 1 new" in out and "at most 8.9 hours" in out
    run_main(monkeypatch, *words, "1", "--", *script_flags)
    assert "1 finished, 0 interrupted, 0 new" in capsys.readouterr().out


def test_threads_are_the_cores_unless_told(tmp_path):
    """The script counts a flag's last value."""
    for script_flags, expected in ((LONG, 3), ([*LONG, "--num-env-threads", "1"], 1)):
        (run,) = plan(tmp_path, "--algorithms", "ppo", "--cpus", "3", script_flags=script_flags)
        words = run.command[1 : run.command.index("--resume")]
        settings, _ = sweep.read_flags("ppo_procgen", words)
        assert settings["num_env_threads"] == expected


def test_placeholders(tmp_path):
    """{game}, {seed}, and the newest of the paths that fit."""
    for unix_time in (1700000000, 1800000000):
        (tmp_path / f"runs/fruitbot__mdpo_procgen__4__{unix_time}").mkdir(parents=True)
    variant = "v=--wandb-project-name runs/{game}__mdpo_procgen__{seed}__* --wandb-entity {game}"
    (run,) = plan(tmp_path, "--algorithms", "ppo", "--seeds", "4", "--variants", variant)
    newest = tmp_path / "runs/fruitbot__mdpo_procgen__4__1800000000"
    assert f"--wandb-project-name {newest} --wandb-entity fruitbot" in " ".join(run.command)
    variant = "v=--wandb-project-name=runs/{game}__mdpo_procgen__{seed}__* --wandb-entity 'two words'"
    (run,) = plan(tmp_path, "--algorithms", "ppo", "--seeds", "4", "--variants", variant)
    assert f"--wandb-project-name={newest}" in run.command
    assert "two words" in run.command


def test_states(tmp_path):
    """What final_test.json and checkpoint.pt say, of runs of that very name."""
    script_flags = flags(**SETTINGS | {"total_timesteps": 10 * BATCH_SIZE})

    def state(*more: str) -> str:
        (run,) = plan(tmp_path, "--algorithms", "ppo", script_flags=[*script_flags, *more])
        return run.state

    assert state() == "new"
    finish(tmp_path, "fruitbot__ppo_procgen+other__1", 10 * BATCH_SIZE)
    finish(tmp_path, "fruitbot__ppo_procgen__12", 10 * BATCH_SIZE)
    other = finish(tmp_path, "fruitbot__ppo_procgen__2", 10 * BATCH_SIZE)
    other.rename(other.with_name("fruitbot__ppo_procgen__1__2__1700000000"))
    assert state() == "new"
    folder = finish(tmp_path, "fruitbot__ppo_procgen__1", 10 * BATCH_SIZE)
    assert state() == "finished"
    assert state("--total-timesteps", str(11 * BATCH_SIZE - 1)) == "finished"
    assert state("--total-timesteps", str(11 * BATCH_SIZE)) == "interrupted"
    newer = folder.with_name("fruitbot__ppo_procgen__1__1800000000")
    newer.mkdir()
    (newer / "checkpoint.pt").touch()
    assert state() == "finished"
    for text in ("{", "3", "[1]", '{"global_step": null}', '{"args": 5}'):
        (folder / "final_test.json").write_text(text)
        assert state() == "interrupted"
    (folder / "final_test.json").unlink()
    (folder / "checkpoint.pt").unlink()
    (newer / "checkpoint.pt").unlink()
    assert state() == "new"


def test_what_does_not_change_the_result_may_differ(tmp_path):
    finish(tmp_path, "fruitbot__ppo_procgen__1", 10 * BATCH_SIZE)
    script_flags = flags(**SETTINGS | {"total_timesteps": 10 * BATCH_SIZE})
    script_flags += ["--no-bf16", "--no-compile", "--no-cudagraphs", "--torch-deterministic"]
    script_flags += ["--device", "auto", "--eval-interval", "7", "--final-eval-episodes", "9"]
    script_flags += ["--checkpoint-interval", "3", "--wandb-entity", "x"]
    (run,) = plan(tmp_path, "--algorithms", "ppo", "--cpus", "7", script_flags=script_flags)
    assert run.state == "finished"


@pytest.mark.parametrize("final_test", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("args_json", [True, False], ids=["args.json", "older"])
def test_other_settings(args_json, final_test, tmp_path):
    """A folder of an older version says what it was made with in final_test.json alone."""
    folder = finish(tmp_path, "fruitbot__ppo_procgen__1", 10 * BATCH_SIZE, args_json, gamma=0.5)
    if not final_test:
        (folder / "final_test.json").unlink()
    if args_json or final_test:
        with pytest.raises(Failure, match=r"--gamma 0.5, not 0.999: take --variants") as failure:
            plan(tmp_path, "--algorithms", "ppo")
        assert str(folder) in str(failure.value)
    else:
        assert plan(tmp_path, "--algorithms", "ppo")[0].state == "interrupted"


def test_a_setting_that_was_not_there_had_its_default(tmp_path):
    """Older files do not name --num-agents: there were two."""
    finish(tmp_path, "fruitbot__mdpo_procgen__1", 10_000_000)
    assert plan(tmp_path, "--algorithms", "mdpo")[0].state == "finished"
    with pytest.raises(Failure, match="--num-agents 2, not 3"):
        plan(tmp_path, "--algorithms", "mdpo", script_flags=[*LONG, "--num-agents", "3"])


def test_pretrained_encoder(tmp_path):
    """Its channels count, not those of the flags. It must be there for a new run, or be one that may come."""
    script_flags = flags(**SETTINGS | {"total_timesteps": 10 * BATCH_SIZE})

    def state(flags_of_variant: str) -> str:
        words = ["--algorithms", "ppo", "--variants", f"v={flags_of_variant}"]
        (run,) = plan(tmp_path, *words, script_flags=script_flags)
        return run.state

    missing = "--pretrained-encoder: there is no agent.pt, for fruitbot__ppo_procgen.v__1"
    with pytest.raises(Failure, match=missing):
        state("--pretrained-encoder agent.pt")
    (tmp_path / "agent.pt").touch()
    assert state("--pretrained-encoder agent.pt") == "new"
    assert state("--pretrained-encoder runs/*/agent.pt") == "new"
    settings = {"channels": [8, 8, 8], "pretrained_encoder": "agent.pt"}
    finish(tmp_path, "fruitbot__ppo_procgen+v__1", 10 * BATCH_SIZE, **settings)
    (tmp_path / "agent.pt").unlink()
    assert state("--pretrained-encoder agent.pt") == "finished"
    with pytest.raises(Failure, match="--channels"):
        state("")


@pytest.mark.parametrize("output", ["file", "file/deep", "/proc/x"])
def test_output_that_cannot_be(output, tmp_path, monkeypatch, capsys):
    """Is said before a plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc")  # root may write to any
    words = ["--games", "fruitbot", "--output", output, "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *words, "--", *LONG)
    message = error_message(stop.value.code, *capsys.readouterr())
    assert message.startswith("sweep.py: error: --output: /")
    assert (tmp_path / "file").read_text() == "kept"


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
    ("--variants wide= wide=--gamma=0.9", ["--variants", "wide", "twice"]),
    ("--variants wide='", ["--variants", "quotation"]),
    ("--cpus 0", ["--cpus", "1"]),
    ("--cpus 1001", ["--cpus", "1000"]),
    ("--gpus 1.5", ["--gpus", "whole"]),
    ("--gpus -1", ["--gpus"]),
    ("--gpus nan", ["--gpus"]),
    ("--retries -1", ["--retries"]),
    ("--steps-per-second 0 1", ["--steps-per-second"]),
    ("--address here", ["--address", "HOST:PORT"]),
    ("--address 127.0.0.1:1", ["--address", "127.0.0.1:1", "refused"]),
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
    own_words, script_flags = sweep.split_words(words.split())
    if "--algorithms" not in own_words:
        own_words += ["--algorithms", "ppo"]
    if "--games" not in own_words:
        own_words += ["--games", "fruitbot"]
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *own_words, "--output", str(tmp_path), "--", *script_flags)
    message = error_message(stop.value.code, "", capsys.readouterr().err)  # the plan may stand before it
    assert [word for word in expected if word not in message] == [] and not list(tmp_path.iterdir())


def test_words_for_the_scripts():
    assert sweep.split_words(["--cpus", "1"]) == (["--cpus", "1"], [])
    assert sweep.split_words(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
    assert sweep.split_words(["--"]) == ([], [])


def test_last_line(tmp_path):
    """Of what came after the start; a bar that returns to its line's beginning is a line as well."""
    log = tmp_path / "log"
    assert sweep.last_line(log) == ""
    log.write_bytes(b"one\ntwo\r three\xff \n\n")
    assert sweep.last_line(log) == "three\ufffd"
    before = log.stat().st_size
    assert sweep.last_line(log, before) == ""
    with log.open("ab") as file:
        file.write(5000 * b"x" + b"\nfour")
    assert sweep.last_line(log, before) == "four"


def make_run(tmp_path: Path, text: str, *words: str) -> tuple[sweep.Run, Path]:
    """A run of a script of this text, and its log."""
    script = tmp_path / "script.py"
    script.write_text(text)
    run = sweep.Run("fruitbot__ppo_procgen__1", [str(script), *words], 1000, 1.0, "new")
    return run, tmp_path / "log"


@pytest.fixture
def typed():
    """Something to read at this process's standard input."""
    before = os.dup(0)
    end_to_read, end_to_write = os.pipe()
    os.write(end_to_write, b"typed")
    os.close(end_to_write)
    os.dup2(end_to_read, 0)
    yield
    os.dup2(before, 0)
    os.close(before)
    os.close(end_to_read)


def test_train(tmp_path, typed):
    """Where, with which flags; its words in the log after those of before; what is typed is not for it."""
    text = """
import os, sys
print(os.getcwd(), *sys.argv[1:], flush=True)
print(sys.stdin.read() or "end", file=sys.stderr)
"""
    run, log = make_run(tmp_path, text, "--seed", "1")
    log.write_text("before\n")
    output = tmp_path / "output"
    output.mkdir()
    assert sweep.train(run, output, log) == (0, "end")
    lines = log.read_text().splitlines()
    assert lines[0] == "before" and lines[2].startswith("started on ") and lines[2].endswith("--seed 1")
    assert lines[3:] == [f"{output} --seed 1", "end"]


def test_train_a_script_that_fails(tmp_path):
    run, log = make_run(tmp_path, "import sys; sys.exit('wrong')")
    assert sweep.train(run, tmp_path, log) == (1, "wrong")
    run, log = make_run(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ChildProcessError, match="killed by SIGKILL"):  # Ray tries again
        sweep.train(run, tmp_path, log)


@pytest.mark.parametrize(
    "handler", [signal.default_int_handler, signal.SIG_IGN], ids=["in a terminal", "in a script's background"]
)
def test_train_is_cancelled(handler, tmp_path):
    """As Ray does it, by a KeyboardInterrupt: the script has the time to save."""
    text = """
import os, signal, sys, time
def save(signum, frame):
    time.sleep(0.3)
    print("saved")
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    run, log = make_run(tmp_path, text)
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep.train(run, tmp_path, log)
    finally:
        signal.signal(signal.SIGINT, before)
    assert log.read_text().endswith("ready\nsaved\n")


def test_no_two_at_once(tmp_path):
    """The script keeps its log locked, even when the process that began it has gone; the next one waits."""
    text = """
import fcntl, sys
with open(sys.argv[1]) as log:
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("locked")
"""
    run, log = make_run(tmp_path, text, str(tmp_path / "log"))
    with log.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # even that is in the way of a lock that is one's own
        thread = threading.Thread(target=sweep.train, args=(run, tmp_path, log))
        thread.start()
        time.sleep(0.3)
        assert log.read_text() == ""
    thread.join(timeout=20)
    assert not thread.is_alive() and log.read_text().endswith("locked\n")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_script_does_not_outlive_who_began_it(tmp_path):
    """Not even if that was killed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "with open('new', 'w') as file: file.write(str(os.getpid()))\n"
        "os.rename('new', 'pid')\n"
        "time.sleep(60)"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmark')!r})\n"
        "import sweep\n"
        f"run = sweep.Run('name', [{str(script)!r}], 1000, 1.0, 'new')\n"
        f"sweep.train(run, Path({str(tmp_path)!r}), Path('log'))\n"
    )
    process = subprocess.Popen([sys.executable, str(worker)], cwd=tmp_path)
    try:
        wait_until((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not is_alive(pid))


def test_a_script_whose_parent_has_ended_does_not_begin(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('begun')")
    words = [sys.executable, str(sweep.LAUNCH), "1", str(script)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "its parent has ended\n")


def write_curve(folder: Path, *steps: int, tag: str = "charts/SPS"):
    """As a run that goes on does it, from the first of these steps."""
    with SummaryWriter(folder, purge_step=steps[0]) as writer:
        for step in steps:
            writer.add_scalar(tag, 1.0, step)


def test_how_far_a_run_is(tmp_path):
    """By its curves in its newest folder, those of any agent; also when it has gone on."""
    run, _ = make_run(tmp_path, "")
    watched = sweep.Watched(run, tmp_path)
    assert watched.fraction_done() == 0
    older = tmp_path / "runs" / f"{run.name}__1700000000"
    write_curve(older, 500, 700)
    assert watched.fraction_done() == pytest.approx(0.7)
    write_curve(older, 800, 900)
    assert watched.fraction_done() == pytest.approx(0.9)
    write_curve(older, 600, tag="losses/entropy")  # from its last checkpoint; a curve comes after another
    assert watched.fraction_done() == pytest.approx(0.9)
    write_curve(older, 600)
    assert watched.fraction_done() == pytest.approx(0.6)
    write_curve(older, 650)
    assert watched.fraction_done() == pytest.approx(0.65)
    write_curve(tmp_path / "runs" / f"{run.name}+wide__1__1800000000", 1000)
    newer = tmp_path / "runs" / f"{run.name}__1800000000"
    newer.mkdir()
    assert watched.fraction_done() == 0
    write_curve(newer / "agent_1", 100)
    assert watched.fraction_done() == pytest.approx(0.1)
    write_curve(newer / "agent_1", 1200)
    assert watched.fraction_done() == 1
    shutil.rmtree(newer / "agent_1")
    assert watched.fraction_done() == 0


def test_display(tmp_path, capsys):
    """Runs at work are those whose log grows; what a log held before says nothing."""
    runs = [sweep.Run(name, [], 1000, 1.0, "new") for name in ("a", "b", "c", "d")]
    logs = tmp_path / "runs" / "logs"
    logs.mkdir(parents=True)
    (logs / "b.log").write_text("of yesterday\n")
    watched = [sweep.Watched(run, tmp_path) for run in runs]
    display = sweep.Display(4)
    (logs / "a.log").write_text("started\n")
    write_curve(tmp_path / "runs" / "a__1700000000", 500)
    display.end("c", "finished after 1,000 steps")
    display.end("d", "exit status 2: wrong")
    display.update(watched[:2], num_failed=1)
    display.close()
    err = capsys.readouterr().err
    assert "c: finished after 1,000 steps" in err and "d: exit status 2: wrong" in err
    assert "a: at work" in err and "b: " not in err
    last = err.strip().splitlines()[-1]
    assert " 38%|" in last and "1 finished, 1 running, 1 waiting, 1 not finished" in last  # 1.5 of 4


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


AUTHENTICATION = {"RAY_AUTH_MODE": "token"}  # as the head of a cluster wants it


class Sweep:
    """A sweep of PPO and MDPO from the shell, in a session of its own as in a terminal."""

    def __init__(self, output: Path, extra: list[str], cpus: int = 1, address: str = "local"):
        command = [sys.executable, str(ROOT / "benchmark/sweep.py"), "--cpus", str(cpus)]
        command += [
            "--address",
            address,
            "--output",
            str(output),
            "--algorithms",
            "ppo",
            "mdpo",
            "--games",
            "fruitbot",
        ]
        command += ["--seeds", "1", "--", *extra]
        self.output = output
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", **AUTHENTICATION},
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


@pytest.mark.slow
def test_more_cores_than_there_are(start_sweep, tmp_path):
    """To be said at once: Ray would wait for a machine that has them."""
    each = start_sweep(LONG, cpus=999)
    _, err = each.process.communicate(timeout=60)
    assert each.process.returncode == 2 and err.count("\n") == 1 and "--cpus 999" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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


class Cluster:
    """Of Ray, with machines of one core each, which are processes on this machine."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.head = ["--head", "--port", str(port), "--include-dashboard", "false"]
        self.machines = []

    def add_machine(self, *words: str):
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", "--block", "--num-cpus", "1", "--object-store-memory", "100000000"]
        machine = subprocess.Popen(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | AUTHENTICATION,
        )
        self.machines.append(machine)
        while "Ray runtime started" not in machine.stdout.readline():
            assert machine.poll() is None

    def processes(self, machine: subprocess.Popen) -> set[int]:
        """All that have come of it."""
        found = {machine.pid}
        for pid in sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                if parent_of(pid) in found:
                    found.add(pid)
        return found

    def kill(self, machine: subprocess.Popen):
        """As if somebody pulled its plug."""
        for pid in self.processes(machine):
            with contextlib.suppress(ProcessLookupError):  # it has ended with another
                os.kill(pid, signal.SIGKILL)
        machine.communicate()


@pytest.fixture
def cluster():
    made = Cluster()
    try:
        made.add_machine(*made.head)
        made.add_machine("--address", made.address)
        yield made
    finally:
        for machine in made.machines:
            if machine.poll() is None:
                made.kill(machine)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs at once take two cores")
def test_a_machine_of_a_cluster_dies(start_sweep, tmp_path, cluster):
    """While it is at work. Its run goes on from its last checkpoint, when the other machine is free, and all
    curves are whole."""
    names = ["ppo_procgen", "mdpo_procgen"]
    end = 40 * BATCH_SIZE
    words = [*LONG, "--total-timesteps", str(end)]
    each = start_sweep(words, address=cluster.address)
    each.wait_for(lambda: all(each.steps(name) >= 4 * BATCH_SIZE for name in names))
    machine = cluster.machines[1]
    (name,) = [name for name, pid in each.children().items() if pid in cluster.processes(machine)]
    cluster.kill(machine)
    out, err = each.process.communicate(timeout=240)
    assert each.process.returncode == 0, err
    assert "2 of 2 finished" in out
    log = (tmp_path / f"runs/logs/fruitbot__{name}__1.log").read_text()
    assert log.count("started on") == 2
    for name in names:
        (run_dir,) = (tmp_path / "runs").glob(f"fruitbot__{name}__1__*")
        assert json.loads((run_dir / "final_test.json").read_text())["global_step"] == end
        for folder in agent_folders(name, run_dir):
            steps = list(read_curves(folder)["losses/value_loss"])
            assert steps == list(range(BATCH_SIZE, end + 1, BATCH_SIZE))
