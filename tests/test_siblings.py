"""The scripts are one family: the text that they share is the same to the byte."""

import ast
import difflib
import re
import subprocess
import sys
from functools import cache
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
    "set_up": BY_DISTILLATION,  # one agent, or --num-agents
}
ONLY_MUTUAL = {"mutual_kl"}


def source(name: str) -> str:
    """Without the docstring."""
    text = (ROOT / f"{name}_procgen.py").read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    return text.replace(docstring, "", 1)


@cache
def definitions(name: str) -> dict[str, str]:
    """Source of every function and class at the top level, decorators included, and of the rest."""
    lines = source(name).splitlines()
    found = {"": ""}
    for node in ast.parse(source(name)).body:
        first = node.lineno
        if getattr(node, "decorator_list", []):
            first = node.decorator_list[0].lineno
        text = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text
        else:
            found[""] += f"{text}\n"
    return found


def patch(before: str, after: str) -> list[str]:
    """The changed lines between two scripts, the modules' docstrings aside."""
    texts = [source(name).splitlines() for name in (before, after)]
    lines = list(difflib.unified_diff(*texts, n=0, lineterm=""))[2:]
    return [line for line in lines if not line.startswith("@@")]


@pytest.mark.parametrize(("one", "other"), list(combinations(NAMES, 2)))
def test_one_name_one_source(one, other):
    ours = definitions(one)
    theirs = definitions(other)
    assert ours.keys() ^ theirs.keys() == (ONLY_MUTUAL if (one, other) in BY_DISTILLATION else set())
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == {name for name, pairs in MAY_DIFFER.items() if (one, other) in pairs}


def test_the_two_patches_are_equal():
    assert patch("ppo", "spo") == patch("mdpo", "mdspo") != []
    assert patch("ppo", "mdpo") == patch("spo", "mdspo") != []


@pytest.mark.parametrize(
    ("one", "other", "most"),
    [("ppo", "spo", 20), ("mdpo", "mdspo", 16), ("ppo", "mdpo", 60), ("spo", "mdspo", 60)],
)
def test_the_diffs_are_short(one, other, most):
    """Counted as `diff a b | grep -c '^[<>]'` does."""
    command = ["diff", str(ROOT / f"{one}_procgen.py"), str(ROOT / f"{other}_procgen.py")]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", output, re.M)) <= most


def pins(text: str) -> set[str]:
    """Requirements without comments, with one way to quote and to space."""
    lines = (line.split("#")[0].replace('"', "'") for line in text.splitlines())
    return {re.sub(r"\s+", "", line) for line in lines if line.strip()}


@pytest.mark.parametrize("file", FILES)
def test_inline_metadata_agrees_with_the_requirements(file):
    """And has all that is imported, unless it is a script beside it."""
    text = (ROOT / file).read_text()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.M).group(1)
    dependencies = re.findall(r'"([^"\n]+)"', block.split("dependencies = ", 1)[1])
    assert pins("\n".join(dependencies)) <= pins((ROOT / "requirements.txt").read_text())
    imports = set()
    for module in re.findall(r"^(?:import|from) (\w+)", text, re.M):
        if module not in sys.stdlib_module_names and not (ROOT / f"{module}.py").exists():
            imports.add(PACKAGES.get(module, module))
    assert imports <= {re.split("[=;]", pin)[0] for pin in dependencies}
