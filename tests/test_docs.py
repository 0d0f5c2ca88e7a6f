"""README.md and docs/: links, pictures, flags and names lead somewhere, and commands are understood."""

import ast
import importlib
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import tyro
from common import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
sys.path.insert(0, str(ROOT / "docs"))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "benchmark").rglob("README.md")]
ON_EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
PLACEHOLDERS = {"GAME": "starpilot", "SEED": "1", "SCRIPT.py": "ppo_procgen.py"}


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def code_in(text: str) -> list[str]:
    """What stands between backticks in sentences and tables."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(text))


def anchors_of(page: Path) -> set[str]:
    """What a heading can be linked by."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(words.replace(" ", "-"))
    return anchors


@ON_EVERY_PAGE
def test_links_lead_somewhere(page):
    """To files that are there, pictures too, and to headings."""
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(page.read_text())):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_is_one_page_and_links_to_the_others():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in readme


# Commands.


def commands_of(page: Path) -> list[str]:
    """Each `python SCRIPT.py ...`, from blocks, from tables and from sentences."""
    text = page.read_text()
    commands = []
    for place in re.findall(r"```sh\n(.*?)```", text, re.S) + code_in(text):
        for line in place.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|#", line):
                if re.match(r"\s*(python|uv run) .*\.py\b", command):
                    commands.append(command.strip())
    return commands


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run commands in, with wandb, and with a network in every file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    agent = {"agent": {}, "args": {"channels": (16, 32, 32)}}
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "read_torch", lambda *inputs: agent)


def understand(command: str):
    """Reads it as the script or tool that it names would. What stands after --, or in a word NAME=--FLAG ...,
    is for training scripts, and so is what a tool hands on since it does not know it."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    start = next(index for index, word in enumerate(words) if word.endswith(".py"))
    file = ROOT / words[start]
    assert file.is_file()
    module = importlib.import_module(file.stem)
    words = words[start + 1 :]
    if "--help" in words:
        return
    for word in words:
        if re.fullmatch(r"runs[\w/]*", word):
            Path(word).mkdir(parents=True, exist_ok=True)
        if re.fullmatch(r"[\w./+-]+\.(pt|csv|whl|json)", word):
            assert not word.startswith(("benchmark/", "docs/")) or (ROOT / word).exists()
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).touch()
    end = words.index("--") if "--" in words else len(words)
    own_words = words[:end]
    for_scripts = [words[end + 1 :]]
    for_scripts += [shlex.split(word.partition("=")[2]) for word in own_words if "=--" in word]
    if "return_unknown_args=True" in file.read_text():
        _, unknown = tyro.cli(module.Args, args=own_words, return_unknown_args=True)
        for_scripts.append(unknown)
    else:
        tyro.cli(module.Args, args=own_words)
    for flags in for_scripts:
        tyro.cli(importlib.import_module("mdpo_procgen").Args, args=flags)  # which has all flags


@ON_EVERY_PAGE
def test_commands_are_understood(page, place):
    for command in commands_of(page):
        understand(command)


def test_commands_are_found():
    found = [command for page in PAGES for command in commands_of(page)]
    assert len(found) > 20


# Flags and names.

SOURCES = [
    path.read_text()
    for folder in (".", "benchmark", "docs", "tests")
    for path in (ROOT / folder).glob("*.py")
]


@cache
def all_flags() -> set[str]:
    """The fields of each class Args."""
    flags = {"--help"}
    for source in SOURCES:
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        flag = field.target.id.replace("_", "-")
                        flags |= {f"--{flag}", f"--no-{flag}"}
    return flags


@ON_EVERY_PAGE
def test_flags_and_names_exist(page):
    """A flag that a piece of code in a sentence begins with is one of the training scripts or the tools. A
    name_with_underscores stands somewhere in the code, or at the head of a table of results."""
    heads = [path.open().readline() for path in (ROOT / "benchmark/results").rglob("*.csv")]
    words = set(re.findall(r"\w+", "\n".join(SOURCES + heads)))
    for code in code_in(page.read_text()):
        for flag in re.findall(r"^--[a-z][\w-]*", code):
            assert flag in all_flags()
        if re.fullmatch(r"[a-z]+(_[a-z]+)+", code):
            assert code in words
