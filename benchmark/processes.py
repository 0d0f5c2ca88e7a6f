"""Many trainings at a time, each in a process with one thread."""

import contextlib
import ctypes
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from helpers import fail
from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def process_pool(processes: int):
    """A ProcessPoolExecutor whose processes are forks, so that they share what is in memory: no thread of
    torch's may run before. None of them outlives this process, or its `with`. Failure if one is killed."""
    context = get_context("fork")
    with ProcessPoolExecutor(processes, context, begin_process) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            fail("a training was killed: is there enough memory? fewer --processes need less")
        finally:
            pool.shutdown(cancel_futures=True)


def begin_process():
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the parent is no more
