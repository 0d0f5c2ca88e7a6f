"""The scripts are one family: the text that they share is the same to the byte."""

import ast
import difflib
import re
import subprocess
import sys
from itertools import combinations

import pytest
from common import ROOT

NAMES = ("ppo", "spo", "mdpo", "mdspo")
FILES = [f"{name}_procgen.py" for name in NAMES] + ["robustness_eval.py"]
PACKAGES = {"sklearn": "scikit-learn"}  # that are imported by another name
# What makes the algorithm may differ, and only between these scripts.
BY_OBJECTIVE = {("ppo", "spo"), ("mdpo", "mdspo"), ("ppo", "mdspo"), ("spo", "mdpo")}
BY_DISTILLATION = {("ppo", "mdpo"), ("spo", "mdspo"), ("ppo", "mdspo"), ("spo", "mdpo")}
MAY_DIFFER = {
    "policy_loss": BY_OBJECTIVE,
    "Args": BY_DISTILLATION,
    "compute_loss": BY_DISTILLATION,
    "main": BY_DISTILLATION,
}
ONLY_MUTUAL = {"mutual_kl"}


def source(name: str) -> str:
    return (ROOT / f"{name}_procgen.py").read_text()


def definitions(text: str) -> dict[str, str]:
    """Source of every function and class at the top level, decorators included."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    decorators = {node.name: [ast.unparse(each) for each in node.decorator_list] for node in nodes}
    return {node.name: f"{decorators[node.name]}{ast.get_source_segment(text, node)}" for node in nodes}


def patch(before: str, after: str) -> list[str]:
    """The changed lines between two scripts, the modules' docstrings aside."""
    texts = []
    for name in (before, after):
        text = source(name)
        texts.append(text.replace(ast.get_docstring(ast.parse(text), clean=False), "", 1).splitlines())
    lines = list(difflib.unified_diff(*texts, n=0, lineterm=""))[2:]
    return [line for line in lines if not line.startswith("@@")]


@pytest.mark.parametrize(("one", "other"), list(combinations(NAMES, 2)))
def test_one_name_one_source(one, other):
    ours, theirs = definitions(source(one)), definitions(source(other))
    assert ours.keys() ^ theirs.keys() == (ONLY_MUTUAL if (one, other) in BY_DISTILLATION else set())
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == {name for name, pairs in MAY_DIFFER.items() if (one, other) in pairs}


def test_the_robustness_script_has_their_text():
    """What it shares by name; its settings and its main are its own."""
    text = (ROOT / "robustness_eval.py").read_text()
    ours, theirs = definitions(text), definitions(source("ppo"))
    shared = ours.keys() & theirs.keys() - {"Args", "main"}
    assert shared >= {"Agent", "ResidualBlock", "fail"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    modes = [re.findall("^MODES.*$", each, re.M) for each in (text, source("ppo"))]
    assert modes[0] == modes[1] and len(modes[0]) == 3


def test_the_two_patches_are_equal():
    assert patch("ppo", "spo") == patch("mdpo", "mdspo")
    assert patch("ppo", "mdpo") == patch("spo", "mdspo")


@pytest.mark.parametrize(
    ("one", "other", "most"),
    [("ppo", "spo", 25), ("mdpo", "mdspo", 25), ("ppo", "mdpo", 120), ("spo", "mdspo", 120)],
)
def test_the_diffs_are_short(one, other, most):
    """Counted as `diff a b | grep -c '^[<>]'` does."""
    command = ["diff", str(ROOT / f"{one}_procgen.py"), str(ROOT / f"{other}_procgen.py")]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", output, re.M)) <= most


@pytest.mark.parametrize("name", NAMES)
def test_no_script_outgrows_a_sitting(name):
    """The aim is 550 lines. Exact resume, its faults and the fast path took them over it; no further."""
    assert len(source(name).splitlines()) <= 820


def pins(text: str) -> set[str]:
    """Requirements without comments, with one way to quote and to space."""
    lines = (line.split("#")[0].replace('"', "'") for line in text.splitlines())
    return {re.sub(r"\s+", "", line) for line in lines if line.strip()}


@pytest.mark.parametrize("name", FILES)
def test_inline_metadata_agrees_with_the_requirements(name):
    text = (ROOT / name).read_text()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.M).group(1)
    dependencies = re.findall(r'"([^"\n]+)"', block.split("dependencies = ", 1)[1])
    assert pins("\n".join(dependencies)) <= pins((ROOT / "requirements.txt").read_text())
    imports = {PACKAGES.get(each, each) for each in re.findall(r"^(?:import|from) (\w+)", text, re.M)}
    assert imports - set(sys.stdlib_module_names) <= {re.split("[=;]", pin)[0] for pin in dependencies}
