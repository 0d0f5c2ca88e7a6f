"""Fixtures. A name added to SINGLE or MUTUAL in common.py extends every shared test to that script."""

import os

# One thread each: these networks are too small for more, and the subprocesses are to compute the same.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib
import sys

import pytest
import resumed
from common import BOTH, MUTUAL, ROOT, SCRIPTS, SmallPictures, train_straight

sys.path.insert(0, str(ROOT))


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=MUTUAL)
def mutual(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """In a narrow one tyro would break its messages in the middle of a word."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="module")
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        for name in BOTH:
            patch.setattr(importlib.import_module(name), "ProcgenGym3Env", SmallPictures)
        yield


@pytest.fixture(scope="module")
def ppo(small_pictures, tmp_path_factory):
    """A run without a stop."""
    return train_straight("ppo_procgen", tmp_path_factory.mktemp("ppo"), resumed.SETTINGS)


@pytest.fixture(scope="module")
def mdpo(small_pictures, tmp_path_factory):
    return train_straight("mdpo_procgen", tmp_path_factory.mktemp("mdpo"), resumed.SETTINGS)


@pytest.fixture(params=["ppo", "mdpo"])
def straight(request):
    return request.getfixturevalue(request.param)
