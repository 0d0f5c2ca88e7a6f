"""Runs a Python script that does not outlive its parent process, by whatever signal that ends.

python benchmark/launch.py PARENT_PID SCRIPT FLAGS
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>: the signal that the process gets when its parent ends


def main(parent: int, command: list[str]):
    """Becomes Python with the command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("its parent has ended")
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
