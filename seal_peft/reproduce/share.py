"""Work that several processes share through the files that it makes, without talking to each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

_WAIT = 1.0


def make_all(files: Mapping[Path, Callable[[], object]]) -> None:
    """Make the files that are not there yet.

    Other processes may be at the same: nobody makes what somebody else is making, and all return when all is there.
    The lock of a process that is killed is free again.

    Args:
        files: What makes a file, by its path. It must appear whole, and last of all that is made with it.
    """
    left = dict(files)
    while left:
        for path, make in list(left.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if not path.is_file():
                    make()
            finally:
                lock.release()
            del left[path]
        if left:
            time.sleep(_WAIT)
