"""benchmark/helpers.py: limits of numbers, exit statuses, files that are whole or not there."""

import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
from common import ROOT

import ppo_procgen

sys.path.insert(0, str(ROOT / "benchmark"))
import helpers
from helpers import Count, CountOrZero

MOST = 2**31 - 1


@dataclass
class Args:
    number: Count = 1
    zero: CountOrZero = 0
    share: Annotated[float, (0, 0.5)] = 0.25
    pair: Annotated[tuple[int, int], (2, 3)] = (2, 3)
    without_limits: int = -5

    def __post_init__(self):
        helpers.check_limits(self)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("number", 0, "--number must be from 1 to 2147483647, not 0"),
        ("number", MOST + 1, "not 2147483648"),
        ("zero", -1, "--zero must be from 0 to 2147483647, not -1"),
        ("share", float("nan"), "--share must be from 0 to 0.5, not nan"),
        ("pair", (2, 4), "--pair must be from 2 to 3, not 4"),
    ],
)
def test_out_of_limits(name, value, message):
    Args(number=MOST, zero=0, share=0.5)  # the ends are within
    with pytest.raises(ValueError, match=message):
        Args(**{name: value})


def test_fail(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/tool.py", "--flag"])
    with pytest.raises(SystemExit) as stop:
        helpers.fail("--number: wrong")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "tool.py: error: --number: wrong\n")


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    """By one of the same suffix. Who reads the one of before goes on."""
    path = tmp_path / "deep" / "down" / "a.csv"
    with helpers.replacing(path) as unfinished:
        unfinished.write_text("before")
        assert not path.exists()
    with path.open() as before, pytest.raises(OSError):
        with helpers.replacing(path) as unfinished:
            assert unfinished.suffix == ".csv"
            unfinished.write_text("after")
        assert (before.read(), path.read_text()) == ("before", "after")
        with helpers.replacing(path) as unfinished:
            unfinished.write_text("half")
            raise OSError(28, "No space left on device")
    assert path.read_text() == "after"
    assert list(path.parent.iterdir()) == [path]


def test_a_copy_of_a_script_is_its_own(monkeypatch):
    copy = helpers.copy_script("ppo_procgen")
    monkeypatch.setattr(copy, "compute_gae", None)
    assert ppo_procgen.compute_gae is not None
    assert copy.Args(env_id="maze").env_id == "maze"
