"""The output folder of a training: what goes on there, what may begin there, and what must not be written over."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .files import read_json, write_json

FINISHED, UNFINISHED, CHECKPOINTS = "run.json", "unfinished.json", "checkpoint-*"
# How to go on, how to show it, and how to fit it may change on the way. A rank is not a setting.
_NO_SETTINGS = {"train_file", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"}
_NO_SETTINGS |= {"disable_tqdm", "report_to", "local_rank", "memory"}


def settings_of(
    arguments: dict[str, Any], training_arguments: TrainingArguments, config: PeftConfig | None = None
) -> dict[str, Any]:
    """Return everything that decides the weights, in JSON values.

    Args:
        arguments: Flags of the stage by name.
        training_arguments: Those of the Trainer.
        config: Adapter, where the flags do not say it all.
    """
    settings = {
        "train_file's bytes": hashlib.sha256(Path(arguments["train_file"]).read_bytes()).hexdigest(),
        **arguments,
        **training_arguments.to_dict(),
    }
    if config is not None:
        # The order of a set is another one in every process.
        fields = config.to_dict().items()
        settings["config"] = {name: sorted(value) if isinstance(value, set) else value for name, value in fields}
    for name in _NO_SETTINGS:
        settings.pop(name, None)
    return json.loads(json.dumps(settings, default=str))


def find_checkpoint(
    output_dir: Path, settings: dict[str, Any], overwrite: bool, given: str | None = None
) -> str | None:
    """Find the checkpoint from which an interrupted training goes on; `None` where one begins.

    Args:
        output_dir: Folder of the adapter.
        settings: As `settings_of` gives them.
        overwrite: Whether what stands there and is not this training may be removed.
        given: The checkpoint that the user names, which then is the one, whatever its settings.

    Raises:
        ValueError: The given one is no whole checkpoint, or the folder holds a finished adapter, or a training that
            this one would not continue.
    """
    if given is not None and not _is_whole(Path(given)):
        raise ValueError(
            f"--resume_from_checkpoint {given} is no whole checkpoint: it has no whole {TRAINER_STATE_NAME}. "
            "Give one, or leave the flag out: a training goes on from the last checkpoint in its --output_dir."
        )
    record = output_dir / UNFINISHED
    if not record.is_file() and not overwrite:
        _check_free(output_dir, checkpoints=given is None)
    if given is not None or not record.is_file():
        return given
    whole = [path for path in output_dir.glob(CHECKPOINTS) if _is_whole(path)]
    if not whole:
        return None  # it ended before its first checkpoint, so there is nothing to go on from
    before = read_json(record)
    changed = sorted(name for name in before | settings if before.get(name) != settings.get(name))
    if changed and overwrite:
        return None
    if changed:
        described = ", ".join(f"{name} {before.get(name)} -> {settings.get(name)}" for name in changed)
        raise ValueError(
            f"{output_dir} holds an unfinished training with other settings ({described}). Give the same settings to "
            "go on; to start afresh, pass --overwrite_output_dir, which removes it, or choose another --output_dir."
        )
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


def _check_free(output_dir: Path, checkpoints: bool) -> None:
    """Refuse a folder with an adapter or, if asked to, checkpoints in it; other files do no harm and stay."""
    found = next((name for name in (FINISHED, CONFIG_NAME) if (output_dir / name).is_file()), None)
    if found is not None:
        raise ValueError(
            f"{output_dir} holds a finished adapter ({found}). Choose another --output_dir, or pass "
            "--overwrite_output_dir, which removes it and trains anew."
        )
    if checkpoints and any(output_dir.glob(CHECKPOINTS)):
        raise ValueError(
            f"{output_dir} holds checkpoints of another program. Choose another --output_dir, or pass "
            "--overwrite_output_dir, which removes them."
        )


def _is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def start_afresh(output_dir: Path, settings: dict[str, Any]) -> None:
    """Clear away an earlier training, so that none of it can be taken for this one, and note what begins."""
    for path in output_dir.glob(CHECKPOINTS):
        shutil.rmtree(path)
    for name in (FINISHED, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (output_dir / name).unlink(missing_ok=True)
    write_json(output_dir / UNFINISHED, settings)
