"""Where a stage may write: into a folder, and, but for `report`, not among the files of another stage."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

# By stage, what its folders hold, finished or not, as patterns.
_FILES = {
    "train": ("adapter_config.json", "run.json", "unfinished.json", "checkpoint-*"),
    "evaluate": ("predictions*.jsonl", "metrics.json"),
    "heads": ("heads.json", "gradient.json", "pruning.json", "retrieval.json", "direct_effect.json"),
    "merge": ("config.json", "model*.safetensors"),
}
# Folder, inside that of a merged model, of an adapter with what was not merged.
REST = "seal_adapter"


def check_place(path: Path) -> None:
    """Make sure, before any work, that a folder can be written to.

    Args:
        path: Folder that will be written to; need not exist.

    Raises:
        ValueError: It, or what is to hold it, is a file, or takes no files.
    """
    for place in (path, *path.parents):
        if place.is_dir():
            try:  # its rights do not tell: a file system may be read-only, or not for files
                with TemporaryFile(dir=place):
                    return
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be written to, because {place} takes no files ({error.strerror}). Choose another "
                    "folder to write to."
                ) from error
        if place.exists():
            raise ValueError(
                f"{path} cannot be a folder, because {place} is a file. Choose another folder to write to."
            )


def check_output_folder(folder: Path, stage: str) -> None:
    """Make sure that a stage may write into a folder.

    Args:
        folder: Need not exist.
        stage: `train`, `evaluate` or `heads`.

    Raises:
        ValueError: It is a file, or another stage wrote into it; the message names what is there.
    """
    check_place(folder)
    for other, patterns in _FILES.items():
        found = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        if found and other != stage:
            raise ValueError(
                f"{folder} holds what `seal-peft {other}` writes ({', '.join(found)}), and the two would mix. Choose "
                f"another --output_dir for `seal-peft {stage}`, such as {folder.with_name(f'{folder.name}-{stage}')}."
            )
