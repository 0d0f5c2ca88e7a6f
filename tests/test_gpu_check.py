"""benchmark/gpu_check.py: its parts run without a GPU, what fails or hangs takes no other part with it."""

import re
import sys

import pytest
import torch
import tyro
from common import ROOT, error_message, flags

sys.path.insert(0, str(ROOT / "benchmark"))
import gpu_check
import speed

import mdpo_procgen
import ppo_procgen

SMALL = {"device": "cpu", "channels": (4, 4, 4), "num_envs": 4, "num_steps": 8, "num_minibatches": 2}
SLEEP = "-c __import__('time').sleep(100)"
# One word after -c, or a file of the repository.
FAKES = {
    "good": (60, "-c print(2**20)"),
    "bad": (60, "-c 1/0"),
    "hanging": (1, SLEEP),
    "of-cuda": (60, "-c print('cuda')"),
    "script": (60, "benchmark/helpers.py"),
    "last": (60, "-c print(2**21,__import__('os').environ['TQDM_DISABLE'])"),
}


def run_here(monkeypatch, *words):
    """As from the shell; the exit status."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, words)])
    try:
        gpu_check.main(*tyro.cli(gpu_check.Args, return_unknown_args=True))
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def run_fakes(monkeypatch, tmp_path, capfd):
    """Runs parts that are no commands for a GPU: which failed, and what was printed, which is the log too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "PARTS", FAKES | {"long": (60, SLEEP)})

    def run(parts, has_gpu=False, **settings) -> tuple[list[str], str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        args = gpu_check.Args(parts=parts, **settings)
        failed = gpu_check.run_parts(args)
        out, err = capfd.readouterr()
        assert err == ""
        assert args.log.read_text() == out
        return failed, re.sub(r"took \d+ s", "took", out)

    return run


def test_each_part_runs_whatever_the_others_do(run_fakes):
    failed, out = run_fakes(tuple(FAKES))
    assert failed == ["bad", "hanging", "of-cuda"]
    good, bad, hanging, of_cuda, script, last = re.split(r"\n## .*\n", out)[1:]
    assert good == "1048576\ntook\n"
    assert "ZeroDivisionError" in bad
    assert bad.endswith("FAILED: status 1\ntook\n")
    assert hanging == "FAILED: stopped after 1 s\ntook\n"
    assert of_cuda == "FAILED: there is no GPU\ntook\n"
    assert script == "took\n"
    assert last == "2097152 1\ntook\n\nfailed: bad, hanging, of-cuda\n"
    assert "\n## good: python -c print(2**20)\n" in out


def test_some_parts(run_fakes):
    """In the order of the command line; on a GPU those of it run."""
    failed, out = run_fakes(("of-cuda", "good"), has_gpu=True)
    assert failed == []
    assert out.index("\ncuda\n") < out.index("## good") < out.index("failed: nothing")


def test_all_together_keep_the_limit(run_fakes):
    failed, out = run_fakes(("long", "good"), seconds=2)
    assert failed == ["long", "good"]
    assert out.count("FAILED: stopped after 2 s") == 1
    assert out.count("FAILED: no time is left") == 1


def test_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for failed, status in (([], 0), (["numbers"], 1)):
        monkeypatch.setattr(gpu_check, "run_parts", lambda args, failed=failed: failed)
        assert run_here(monkeypatch) == status


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_commands_are_understood(name):
    """By the tool that they name; on a GPU, but for the first."""
    seconds, command = gpu_check.PARTS[name]
    assert 0 < seconds <= 300
    first, *words = command.split()
    if name == "tests":
        assert (ROOT / words[-1]).is_file()
        assert "-k cuda" in command
        return
    assert (ROOT / first).is_file()
    if first == "benchmark/speed.py":
        _, words = tyro.cli(speed.Args, args=words, return_unknown_args=True)
    elif first == "benchmark/gpu_check.py":
        _, words = tyro.cli(gpu_check.Args, args=words, return_unknown_args=True)
    script = ppo_procgen if "ppo_procgen" in command.split() or name == "acting" else mdpo_procgen
    settings = tyro.cli(script.Args, args=words)
    if name != "machine":
        assert settings.device == "cuda"


def test_numbers(monkeypatch, capsys):
    """On a CPU compilation is off, so plain and compiled are the same."""
    assert run_here(monkeypatch, "--here", "numbers", *flags(**SMALL, update_epochs=1)) == 0
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^([a-z0-9 ]+): cosine ([\d.-]+), length [\d.]+$", out, re.M))
    assert [*rows] == ["plain", "bf16", "compile", "bf16 compile"]
    assert out.count("plain: cosine 1.000000, length 1.0000\n") == 2
    assert rows["compile"] == "1.000000"
    assert 0.5 < float(rows["bf16"]) < 1
    assert rows["bf16 compile"] == rows["bf16"]


def test_acting(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CALLS", 3)
    assert run_here(monkeypatch, "--here", "acting", *flags(**SMALL)) == 0
    pattern = r"^compile (\w+, \d+) rows: host ([\d.]+) ms, all ([\d.]+) ms$"
    found = re.findall(pattern, capsys.readouterr().out, re.M)
    assert [name for name, _, _ in found] == ["False, 32", "False, 64", "True, 32", "True, 64"]
    assert all(0 < float(host) <= float(whole) for _, host, whole in found)


def test_kernels(monkeypatch, capsys):
    """The slowest first, among them the convolutions of one update."""
    assert run_here(monkeypatch, "--here", "kernels", *flags(**SMALL | {"bf16": False})) == 0
    rows = re.findall(r"^ *([\d.]+) ms +(\d+) x (\S+)", capsys.readouterr().out, re.M)
    times = [float(milliseconds) for milliseconds, _, _ in rows]
    assert len(rows) == 20
    assert times == sorted(times, reverse=True) and times[0] > 0
    counts = {name: int(count) for _, count, name in rows}
    # 15 convolutions of two agents, in 3 epochs of 2 minibatches.
    assert counts["aten::convolution_backward"] == 15 * 2 * 3 * 2


def test_machine(monkeypatch, capfd):
    assert run_here(monkeypatch, "--here", "machine", "--num-envs", 4) == 0
    out, _ = capfd.readouterr()
    assert f"torch {torch.__version__}" in out
    for game in ("bigfish", "starpilot", "bossfight"):
        assert re.search(rf"^{game}: [\d,]+ steps a second of the environments alone$", out, re.M)


BAD = {
    "--num-steps 64": "--num-steps 64: flags of a training script go with --here",
    "--parts numbers nothing": "nothing",
    "--seconds 0": "--seconds must be from 1",
    "--here tests": "tests",
    "--here numbers --gamma 2": "--gamma",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_flags(words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    status = run_here(monkeypatch, *words.split())
    assert BAD[words] in error_message(status, *capsys.readouterr())
    assert list(tmp_path.iterdir()) == []
