"""benchmark/helpers.py: limits of numbers, exit statuses, files that are whole or not there."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from common import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import helpers
from helpers import Count, CountOrZero, check_limits, fail, replacing


@dataclass
class Args:
    number: Count = 1
    zero: CountOrZero = 0
    share: Annotated[float, (0, 0.5)] = 0.25
    sizes: tuple[Count, ...] = (1,)
    pair: Annotated[tuple[int, int], (2, 3)] = (2, 3)
    any_number: int = -5
    path: Path = Path("x")

    def __post_init__(self):
        check_limits(self)


def test_limits_include_their_ends():
    Args(number=2**31 - 1, zero=0, pair=(3, 2), share=0.5)
    Args(share=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("number", 0, "--number must be from 1 to 2147483647, not 0"),
        ("zero", -1, "--zero must be from 0 to 2147483647, not -1"),
        ("zero", 2**31, "not 2147483648"),
        ("share", 0.51, "--share must be from 0 to 0.5, not 0.51"),
        ("share", float("nan"), "not nan"),
        ("pair", (2, 4), "--pair must be from 2 to 3, not 4"),
    ],
)
def test_out_of_limits(name, value, message):
    with pytest.raises(ValueError) as error:
        Args(**{name: value})
    assert message in str(error.value)


def test_fail(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/tool.py", "--flag"])
    with pytest.raises(SystemExit) as stop:
        fail("--number: wrong")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "tool.py: error: --number: wrong\n")


def test_replacing(tmp_path):
    """Makes folders; the file is there under its name only when it is whole; who reads the one of before goes
    on."""
    path = tmp_path / "deep" / "down" / "a.csv"
    with replacing(path) as unfinished:
        assert unfinished.suffix == ".csv"
        unfinished.write_text("before")
        assert not path.exists()
    with path.open() as before:
        with replacing(path) as unfinished:
            unfinished.write_text("after")
        assert (before.read(), path.read_text()) == ("before", "after")
    assert [each.name for each in path.parent.iterdir()] == ["a.csv"]


def test_what_was_there_before_stays(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(OSError, match="No space left"), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise OSError(28, "No space left on device")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.csv", "before")]


def test_a_copy_of_a_script_is_its_own(monkeypatch):
    """What is replaced in it stays as it is in the script; its Args can be read by tyro."""
    import ppo_procgen

    copy = helpers.copy_script("ppo_procgen")
    monkeypatch.setattr(copy, "compute_gae", None)
    assert ppo_procgen.compute_gae is not None
    assert copy.Args is not ppo_procgen.Args
    assert copy.Args(env_id="maze").env_id == "maze"
