"""Fixtures. A name added to SINGLE or MUTUAL in common.py extends every shared test to that script."""

import os

# One thread each: these networks are too small for more, and the subprocesses are to compute the same.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib
import sys

import pytest
from common import MUTUAL, ROOT, SCRIPTS

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
