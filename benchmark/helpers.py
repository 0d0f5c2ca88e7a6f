"""What the command lines of this folder share: ranges of numbers, errors of one line, whole files.

To import it is what makes `import ppo_procgen` find the training scripts.

What is wrong on the command line is found by tyro or by an Args.__post_init__ that raises ValueError: tyro
prints either. What is wrong with a file or a disk is a Failure: one line. Both end with exit status 2.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_type_hints

import tyro

ROOT = Path(__file__).resolve().parents[1]  # of the training scripts
sys.path.insert(0, str(ROOT))


class Failure(Exception):
    """What the user can mend, a file or a disk: the shell gets it as one line, with exit status 2."""


def fail(message: str):
    """Raises Failure."""
    raise Failure(message)


class Range(NamedTuple):
    """Limits of a number on the command line, both included."""

    low: float
    high: float


Count = Annotated[int, Range(1, 2**31 - 1)]
CountOrZero = Annotated[int, Range(0, 2**31 - 1)]


def check_ranges(args):
    """Raises ValueError for the first field of a dataclass that lies outside the Range in its annotation.

    Of a tuple there must be a number, and each is checked, whether the Range is that of the tuple or of what
    is in it. None is no number, and passes.
    """
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        limits = find_range(hint)
        value = getattr(args, name)
        if limits is None or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers:
            raise ValueError(f"{flag} needs one or more numbers from {limits.low} to {limits.high}")
        for number in numbers:
            if not limits.low <= number <= limits.high:
                raise ValueError(f"{flag} must be from {limits.low} to {limits.high}, not {number}")


def find_range(hint) -> Range | None:
    """The first Range in an annotation, at any depth."""
    if isinstance(hint, Range):
        return hint
    for part in get_args(hint):
        limits = find_range(part)
        if limits is not None:
            return limits
    return None


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Those before and after the first `--`."""
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def parse_args(args_class, description: str, words: list[str] | None = None):
    """Reads words, by default those of the shell, into a dataclass. Raises SystemExit where they cannot be
    read, of which tyro has told then."""
    return tyro.cli(args_class, prog=Path(sys.argv[0]).name, description=description, args=words)


def run_tool(main, args_class, description: str, words: list[str] | None = None):
    """Calls main with the words, by default those of the shell, as an args_class, with clear_errors."""
    args = parse_args(args_class, description, words)
    with clear_errors():
        main(args)


@contextlib.contextmanager
def clear_errors():
    """What the user can mend ends the process with one line and exit status 2, Ctrl-C with exit status 130. A
    letter that the terminal does not have is no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where the shell has closed it
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except Failure as failure:
        end_with(str(failure))
    except OSError as error:
        reason = error.strerror or str(error)
        end_with(f"{error.filename}: {reason}" if error.filename else reason)
    except KeyboardInterrupt:
        sys.exit(130)


def end_with(message: str):
    """Ends the process over something that its user can mend."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_folder(flag: str, path: Path):
    """Raises Failure if there can be no such folder, or nothing be written to it. Makes none."""
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fail(f"{flag}: {nearest} is no folder that can be written to")


@contextlib.contextmanager
def replacing(flag: str, path: Path):
    """Gives a name, with the suffixes of path, for a file that becomes path when it is whole. An OSError
    becomes a Failure, and what was there before stays."""
    unfinished = path.with_name(f".tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        fail(f"{flag} {path}: {error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def copy_script(name: str):
    """A module of its own from a training script: what is replaced in it stays as it is in the script."""
    spec = importlib.util.spec_from_file_location(f"copy_of_{name}", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look for the types of their fields
    spec.loader.exec_module(script)
    return script
