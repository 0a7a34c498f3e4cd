"""Files that appear whole or not at all, and are read as such."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open a file for writing that takes the name `path` when the block ends without an error.

    A reader sees the old file or the new one, never half of one; an interrupt leaves the old file, if there was one.

    Args:
        path: File to write (UTF-8, line feeds); missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON for people and programs."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a file of JSON.

    Raises:
        ValueError: It holds something else.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): it was cut off or edited. Restore it, or make it again with what wrote it."
        ) from error


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from writing to an output folder until the block ends. A killed process frees it, too.

    Args:
        folder: Made if missing; it holds a file `.lock` meanwhile.

    Raises:
        ValueError: Another process is in such a block.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder}. Wait until it has ended, or choose another --output_dir."
        ) from error
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # while it is held; who waits for it sees that it is gone
        lock.release()
