"""Killing a process of our own at a chosen place."""

import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

# Its own lock is one for all forks: what is killed or stopped while it holds it stops the progress bars of all others.
tqdm.set_lock(threading.RLock())


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process_of_its_own(action: Callable[[], Any]) -> int:
    """Run something in a fork, which takes its patches with it; return the signal that killed it, or 0."""
    return signal_that_ended(start(action))


def start(action: Callable[[], Any]) -> int:
    """Start something in a fork and return its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of processes with threads
        child = os.fork()
    if child == 0:
        signal.alarm(120)  # a fork of a process with threads may wait for a lock that nobody opens: end as an error
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def runs(child: int) -> bool:
    """Whether a fork goes on; it can still be waited for if not."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def signal_that_ended(child: int) -> int:
    """Wait for the end of a fork; return the signal that killed it, or 0. Any other end is an error."""
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
