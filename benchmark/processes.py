"""Many trainings at a time, each in a process with one thread."""

import contextlib
import ctypes
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from helpers import fail
from launch import PR_SET_PDEATHSIG
from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def process_pool(processes: int):
    """A ProcessPoolExecutor whose processes are forks, so that they share what is in memory: no thread of
    torch's may run before. None of them outlives this process, or its `with`. Failure if one is killed."""
    context = get_context("fork")
    parent = os.getpid()
    with ProcessPoolExecutor(processes, context, begin_process, [parent]) as pool:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until a process can take it
        try:
            pool.submit(int)  # the first job starts all processes
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield pool
        except BrokenProcessPool:
            fail("a training was killed: is there enough memory? fewer --processes need less")
        finally:
            pool.shutdown(cancel_futures=True)


def begin_process(parent: int):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before it could have been noticed
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in the background of a shell's script
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's
