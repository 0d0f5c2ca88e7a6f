"""What the command lines of this folder share: errors of one line with exit status 2, whole files."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

import tyro


def fail(message: str):
    """Ends the process over something that its user can mend."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(args_class, description: str, words: list[str] | None = None, where: str = "", **options):
    """Reads words, by default sys.argv, into a dataclass by tyro.cli, with its options; tyro's box of errors
    becomes one line, which begins with `where`."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            prog = Path(sys.argv[0]).name
            return tyro.cli(args_class, prog=prog, description=description, args=words, **options)
    except SystemExit as stop:
        if not (stop.code and box.getvalue()):
            raise
        text = re.sub("╭.*╮|│|╰.*╯", " ", box.getvalue())
        message = re.sub(" *─+ *", "; ", " ".join(text.split())).removeprefix("Error parsing Args: ")
        fail(where + message.split("; For full helptext")[0])


def check_ranges(args, ranges: dict[str, tuple[int, int]]):
    """Raises ValueError for the first field of args that has a number outside of its range, or has none."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or min(numbers) < low or max(numbers) > high:
            raise ValueError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


def check_folder(flag: str, path: Path):
    """Ends the process if there can be no such folder, or nothing be written to it. Makes none."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        fail(f"{flag}: {nearest} is no folder that can be written to")


@contextlib.contextmanager
def replacing(flag: str, path: Path):
    """Gives a name, with the suffixes of path, for a file that becomes path when it is whole; an OSError ends
    the process, and what was there before stays."""
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
