"""README.md and docs/: links lead somewhere, pictures are there, commands are understood."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from common import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
sys.path.insert(0, str(ROOT / "docs"))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmark/results/README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FILES = [  # that commands speak of
    "runs/FOLDER/agent.pt",
    "runs/FOLDER/agent_1/agent.pt",
    "runs/ANOTHER/agent.pt",
    "runs_229k/FOLDER/agent.pt",
    "cleanrl-1.2.0-py3-none-any.whl",
    "benchmark/results/curves.csv",
]
PLACEHOLDERS = {"GAME": "starpilot", "SEED": "1", "SCRIPT.py": "ppo_procgen.py"}


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors_of(page: Path) -> set[str]:
    """What a heading can be linked by."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(words.replace(" ", "-"))
    return anchors


def dead_links(page: Path) -> list[str]:
    """Those to files that are not there, and to headings that no page has."""
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(page.read_text())):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](#a-heading) [b](#another) [c](page.md) [d](no.md)\n```\n[e](no.md)\n```\n"
    )
    assert dead_links(page) == ["#another", "no.md"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_has_a_picture_near_its_top_and_the_readme_links_to_it(page):
    top = "\n".join(page.read_text().splitlines()[:25])
    assert re.search(r"!\[.+\]\(.+\.png\)", top) or page.name == "python.md"
    assert f"(docs/{page.name})" in (ROOT / "README.md").read_text()


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def commands_of(page: Path) -> list[str]:
    """Each `python SCRIPT.py ...`, from blocks, from tables and from sentences."""
    text = page.read_text()
    places = re.findall(r"```sh\n(.*?)```", text, re.S)
    places += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(text))
    commands = []
    for place in places:
        for line in place.splitlines():
            for command in re.split(r"&&|#", line):
                if re.match(r"\s*(python|uv run) .*\.py\b", command):
                    commands.append(command.strip())
    return commands


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The files that commands speak of are there, and wandb, which they say how to install."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "can_import", lambda package: True)


def understand(command: str):
    """Reads it as the script that it names would."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    module = importlib.import_module(Path(words[script]).stem)
    flags = words[script + 1 :]
    if "--help" in flags:
        return
    of_scripts = []  # the flags that go to training scripts
    if module.__name__ in ("sweep", "backgrounds"):
        flags, of_scripts = module.split_words(flags)
    if module.__name__ == "throughput":
        _, of_scripts = tyro.cli(module.Args, args=flags, return_unknown_args=True)
        flags = []
    tyro.cli(importlib.import_module("ppo_procgen").Args, args=of_scripts)
    tyro.cli(module.Args, args=flags)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_understood(page, place):
    for command in commands_of(page):
        understand(command)


def test_commands_are_found_and_a_wrong_one_is_not_understood(place):
    found = [command for page in PAGES for command in commands_of(page)]
    scripts = {word for command in found for word in shlex.split(command) if word.endswith(".py")}
    assert {f"{name}.py" for name in SCRIPTS} <= scripts | {"spo_procgen.py", "mdspo_procgen.py"}
    assert len(found) > 40
    with pytest.raises(SystemExit):
        understand("python ppo_procgen.py --no-such-flag")
