"""benchmark/helpers.py: ranges, exit statuses, files that are whole or not there."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from common import ROOT, error_message

sys.path.insert(0, str(ROOT / "benchmark"))
from helpers import Count, CountOrZero, Failure, Range, check_folder, check_ranges, fail, replacing, run_tool


@dataclass
class Args:
    number: Count = 1
    zero: CountOrZero = 0
    share: Annotated[float, Range(0, 0.5)] = 0.25
    sizes: tuple[Count, ...] = (1,)
    pair: Annotated[tuple[int, int], Range(2, 3)] = (2, 3)
    perhaps: Annotated[float | None, Range(0, 1)] = None
    any_number: int = -5
    path: Path = Path("x")

    def __post_init__(self):
        check_ranges(self)


def test_ranges_include_their_ends():
    Args(number=2**31 - 1, zero=0, share=0.5, sizes=(1, 2), pair=(3, 2), perhaps=1.0)
    Args(share=0, perhaps=0.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("number", 0, "--number must be from 1 to 2147483647, not 0"),
        ("zero", -1, "--zero must be from 0 to 2147483647, not -1"),
        ("zero", 2**31, "not 2147483648"),
        ("share", 0.51, "--share must be from 0 to 0.5, not 0.51"),
        ("share", float("nan"), "not nan"),
        ("sizes", (5, 0), "--sizes must be from 1 to 2147483647, not 0"),
        ("sizes", (), "--sizes needs one or more numbers from 1"),
        ("pair", (2, 4), "--pair must be from 2 to 3, not 4"),
        ("perhaps", 2.0, "--perhaps must be from 0 to 1, not 2.0"),
    ],
)
def test_out_of_range(name, value, message):
    with pytest.raises(ValueError) as error:
        Args(**{name: value})
    assert message in str(error.value)


def run_words(main, monkeypatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["tool.py", *words])
    return run_tool(main, Args, "what it does")


def test_arguments_reach_main(monkeypatch):
    seen = []
    run_words(seen.append, monkeypatch, "--number", "3", "--sizes", "4", "5")
    assert seen == [Args(number=3, sizes=(4, 5))]
    run_tool(seen.append, Args, "", ["--zero", "7"])  # in place of those of the shell
    assert seen[1] == Args(zero=7)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--number 0", "--number must be from 1"),
        ("--number x", "--number"),
        ("--nope", "--nope"),
        ("--sizes", "--sizes"),
    ],
)
def test_bad_words(words, expected, monkeypatch, capsys):
    """main is not even begun."""
    with pytest.raises(SystemExit) as stop:
        run_words(pytest.fail, monkeypatch, *words.split())
    assert expected in error_message(stop.value.code, *capsys.readouterr())


def test_what_a_file_does_to_main(monkeypatch, capsys, tmp_path):
    def missing(args):
        (tmp_path / "missing").read_text()

    def full(args):
        raise OSError(28, "No space left on device")

    for main, expected in (
        (lambda args: fail("--number: wrong"), "--number: wrong"),
        (missing, f"{tmp_path}/missing: No such file or directory"),
        (full, "No space left on device"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_words(main, monkeypatch)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err) == (2, "", f"tool.py: error: {expected}\n")


def test_ctrl_c(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_words(interrupt, monkeypatch)
    assert stop.value.code == 130


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def wrong(args):
        raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"):
        run_words(wrong, monkeypatch)


def test_replacing(tmp_path):
    """Makes folders; the file is there under its name only when it is whole."""
    path = tmp_path / "deep" / "down" / "a.csv"
    with replacing("--csv", path) as unfinished:
        assert unfinished.suffix == ".csv"
        unfinished.write_text("all")
        assert not path.exists()
    assert [each.name for each in path.parent.iterdir()] == ["a.csv"] and path.read_text() == "all"


def test_who_reads_the_file_of_before_goes_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")
    with path.open() as before:
        with replacing("--csv", path) as unfinished:
            unfinished.write_text("after")
        assert (before.read(), path.read_text()) == ("before", "after")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("ours")])
def test_what_was_there_before_stays(error, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises((Failure, KeyError)) as raised, replacing("--csv", path) as unfinished:
        unfinished.write_text("half")
        raise error
    if isinstance(error, OSError):
        assert raised.type is Failure and str(raised.value) == f"--csv {path}: No space left on device"
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.csv", "before")]


def test_check_folder(tmp_path, monkeypatch):
    """Makes none; a file in the way, or a folder that is not the user's, is named."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    check_folder("--output", Path("new/and/deeper"))
    check_folder("--output", tmp_path)
    for path in ("file", "file/deep/down"):
        with pytest.raises(Failure, match=f"--output: {tmp_path}/file is no folder"):
            check_folder("--output", Path(path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write to any
    with pytest.raises(Failure, match=f"--output: {tmp_path} is no folder"):
        check_folder("--output", Path("new"))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
