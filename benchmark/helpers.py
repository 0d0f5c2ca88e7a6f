"""What the tools share. To import it is what makes `import ppo_procgen` find the training scripts.

What a user types wrong is a ValueError in Args.__post_init__, which tyro prints as it prints its own. What is
wrong with a file that a flag names is one line by `fail`. Both end with exit status 2.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, get_type_hints

ROOT = Path(__file__).resolve().parents[1]  # of the training scripts
sys.path.insert(0, str(ROOT))

# The least and the most that a number on the command line may be.
Count = Annotated[int, (1, 2**31 - 1)]
CountOrZero = Annotated[int, (0, 2**31 - 1)]


def check_limits(args):
    """Raises ValueError for the first number of a dataclass outside the (least, most) in its annotation. Of a
    tuple each number is checked."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        limits = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, tuple)]
        for least, most in limits:  # tyro has markers of its own there
            for number in value if isinstance(value, tuple) else [value]:
                if not least <= number <= most:
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} must be from {least} to {most}, not {number}")


def fail(message: str):
    """Ends the process over something that its user can mend."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def replacing(path: Path):
    """Gives a name, with the suffix of path, for a file that becomes path when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".tmp.{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def copy_script(name: str):
    """A module of its own from a training script: what is replaced in it stays as it is in the script."""
    spec = importlib.util.spec_from_file_location(f"copy_of_{name}", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look for the types of their fields
    spec.loader.exec_module(script)
    return script
