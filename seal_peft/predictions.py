"""The rows of `predictions.jsonl`: appended as answers come, read back after a restart, never taken for others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from .assets import smollm2_package
from .files import replacing

# What `from_pretrained` reads. A fingerprint covers the tokenizer by the prompts themselves.
_MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin")
_SMALL = 2**24


class Predictions:
    """Finished rows by fingerprint, with the files that keep them.

    Several processes append to a file each, beside the main one; whoever reads the main one reads these, too.

    Args:
        path: A JSONL file, which need not exist yet.
        process: Number of this process where there are several.

    Raises:
        ValueError: A file holds a line that is not a prediction.
    """

    def __init__(self, path: Path, process: int | None = None) -> None:
        self.path = path
        self._own = path if process is None else path.with_suffix(f".process-{process}.jsonl")
        self._rows: dict[str, dict[str, Any]] = {}
        for file in (path, *self._parts()):
            if file.is_file():
                self._rows |= _read_rows(file)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._rows

    def __getitem__(self, fingerprint: str) -> dict[str, Any]:
        return self._rows[fingerprint]

    def keep_only(self, fingerprints: dict[str, list[str]]) -> None:
        """Drop rows of the given systems that come from other files, settings or samples than those of this run.

        All that is left stands in the main file afterwards.

        Args:
            fingerprints: All rows that a system is to have. Rows of systems that are not named here stay.
        """
        wanted = {name: set(rows) for name, rows in fingerprints.items()}
        self._rows = {
            key: row for key, row in self._rows.items() if row["system"] not in wanted or key in wanted[row["system"]]
        }
        parts = self._parts()
        if self.path.is_file() or parts:
            with replacing(self.path) as file:
                file.writelines(_line(row) for row in self._rows.values())
        # A kill between the two steps leaves rows in two places, which count once.
        for part in parts:
            part.unlink()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, each with its fingerprint."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._own.open("a", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(_line(row))
                self._rows[row["fingerprint"]] = row

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.process-*.jsonl"))


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    # A kill in the middle of a write leaves half a line, which was never a finished row.
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            rows[row["fingerprint"]] = row
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is not a row of `seal-peft evaluate`. Remove the file, or choose "
                "another --output_dir."
            ) from error
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def fingerprint(*parts: Any) -> str:
    """Return a short name of everything that an answer and its score depend on, given as JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def identity(name_or_path: str) -> list[Any]:
    """Tell one version of a model or adapter from the next.

    Args:
        name_or_path: A folder: small files count by their bytes, large ones by size and time; those of the converted
            SmolLM2 by its package, so that answers stay valid on a machine that converted it anew. A Hub id counts
            by the commit that was downloaded.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.name in _MODEL_FILES or file.suffix in _WEIGHTS)
        return [[file.name, *_content(file)] for file in files]
    cached = (try_to_load_from_cache(name_or_path, name) for name in ("adapter_config.json", "config.json"))
    return [name_or_path, *(Path(path).parent.name for path in cached if isinstance(path, str))]


def _content(file: Path) -> list[Any]:
    status = file.stat()
    if status.st_size < _SMALL:
        return [hashlib.sha256(file.read_bytes()).hexdigest()]
    if smollm2_package(str(file.parent)):
        return [status.st_size, file.parents[1].name]  # the versions of package and conversion
    return [status.st_size, status.st_mtime_ns]
