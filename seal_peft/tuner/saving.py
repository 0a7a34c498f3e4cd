"""Saving an adapter so that a crash or a full disk leaves the old one or the new one, never a mixture.

PEFT writes the weights and then the config, in place. Here both are written beside the old ones first. One rename
makes the new files count; moving them to their places can be interrupted and is finished by whoever comes next.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .weights import add_settings

if TYPE_CHECKING:
    from .config import SealConfig

_UNFINISHED, _COMMITTED = ".saving-", ".saved"
_CARD = "README.md"


def save_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    sites: Sequence[str] | None = None,
) -> Path:
    """Save one adapter of a model into a folder, all of it or nothing.

    Writes the files of `model.save_pretrained(folder)`, directly into the folder whatever the name of the adapter;
    other files in the folder stay. If this process is killed on the way, or the disk is full, the adapter that was in
    the folder before can still be loaded; docs/decisions.md says what is guaranteed for which call.

    Args:
        model: A `PeftModel`.
        folder: Where to; made if missing.
        adapter_name: Which adapter.
        sites: Save only the scales at these of its sites, as an adapter of its own. `None` saves all.

    Returns:
        The folder.

    Raises:
        TypeError: The model is no `PeftModel`.
        ValueError: The adapter has no scales at one of `sites`, or these would replace an adapter of another method.
        OSError: The files cannot be written. What was in the folder is unchanged.

    Example:
        ```python
        seal_peft.save_adapter(model, "runs/demo/adapter")
        ```
    """
    from peft.peft_model import PeftModel  # PEFT imports its tuners first

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"save_adapter needs a PeftModel, got a {type(model).__name__}. Adapters that came by transformers' own "
            "calls are saved by its `model.save_pretrained(folder)`."
        )
    if sites is not None:
        return write_adapter(folder, *part_at(model, adapter_name, sites))
    with _replacing(Path(folder)) as new:
        card = Path(folder) / _CARD
        if card.is_file():
            shutil.copy(card, new)  # PEFT updates an existing card
        model.save_pretrained(str(new), selected_adapters=[adapter_name])
        if adapter_name != "default":
            for file in (new / adapter_name).iterdir():
                file.replace(new / file.name)
            (new / adapter_name).rmdir()
    return Path(folder)


def write_adapter(folder: str | os.PathLike[str], config: PeftConfig, weights: dict[str, Tensor]) -> Path:
    """Write an adapter folder from its config and weights, all of it or nothing.

    Args:
        folder: Where to; made if missing.
        config: Config of any method.
        weights: Tensors by the names that PEFT saves them under.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds an adapter of another method.
    """
    finish_save(folder)
    there = Path(folder) / CONFIG_NAME
    if there.is_file() and (kind := PeftConfig.from_json_file(str(there)).get("peft_type")) != config.peft_type:
        raise ValueError(
            f"{folder} holds an adapter of the method {kind}, which would be lost. Choose another folder."
        )
    with _replacing(Path(folder)) as new:
        if config.peft_type == "SEAL":
            weights = add_settings(weights, cast("SealConfig", config))
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(tensors, new / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(new))
    return Path(folder)


def finish_save(folder: str | os.PathLike[str]) -> bool:
    """Complete a save that was interrupted after its files counted; do nothing if there is none.

    Returns:
        Whether the adapter is one of another base model now.

    Raises:
        OSError: The folder cannot be written to.
    """
    committed = Path(folder) / _COMMITTED
    if not committed.is_dir():
        return False
    before, after = (_base_named_in(files / CONFIG_NAME) for files in (Path(folder), committed))
    # The weights first: without its config a folder is no adapter to anyone. Two processes may do this at a time.
    for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, _CARD):
        with contextlib.suppress(FileNotFoundError):
            os.replace(committed / name, Path(folder) / name)
    shutil.rmtree(committed, ignore_errors=True)
    return bool(before and after and before != after)


def _base_named_in(config: Path) -> str | None:
    try:
        return cast(str | None, json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    except FileNotFoundError:
        return None


def discard_save(folder: str | os.PathLike[str]) -> None:
    """Drop what an interrupted save left behind, because newer files are being written over it."""
    shutil.rmtree(Path(folder) / _COMMITTED, ignore_errors=True)


def part_at(model: Any, adapter_name: str, sites: Sequence[str]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the scales of an adapter at some of its sites, as config and weights of an adapter of its own.

    Args:
        model: A `PeftModel`.
        adapter_name: Which adapter.
        sites: Sites at which it has scales.

    Raises:
        ValueError: It is not there, has no scales at one of `sites`, or trains whole modules, too.
    """
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"There is no adapter named {adapter_name!r}. The model has: {', '.join(model.peft_config)}.")
    own = getattr(config, "sites", ())  # another method has none
    if isinstance(sites, str) or set(sites) - set(own):
        raise ValueError(
            f"sites={sites!r} is not allowed. Adapter {adapter_name!r} has scales at {own}; give a list of "
            "some of them."
        )
    if config.modules_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} trains whole modules, too (modules_to_save={config.modules_to_save}), which "
            "belong to no site. Save all of it."
        )
    layers = {
        name.replace(".base_layer", ""): layer
        for name, layer in model.named_modules()
        if getattr(layer, "site", None) in sites and adapter_name in layer.seal_delta
    }
    part = replace(
        config,
        sites=tuple(sites),
        granularity=config.granularity if "output" in sites else "head",
        query_modules=config.query_modules if "query" in sites else None,
        heads=[list(layer.geometry) for layer in layers.values()],
        inference_mode=True,
    )
    return part, {f"{name}.seal_delta.weight": layer.offset(adapter_name) for name, layer in layers.items()}


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write files to, and move them into `folder` at the end."""
    new = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish_save(folder)
        for left in folder.glob(_UNFINISHED + "*"):
            shutil.rmtree(left, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        yield new
        share_as(new / CONFIG_NAME, new.glob("*.safetensors"))
        os.rename(new, folder / _COMMITTED)
        finish_save(folder)
    except (OSError, SafetensorError) as error:
        raise _explained(error, folder) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def share_as(neighbour: str | os.PathLike[str], weights: Iterable[str | os.PathLike[str]]) -> None:
    """Let whoever may read a file read the weights beside it, which safetensors writes for their owner alone.

    Args:
        neighbour: File that was opened in the ordinary way, so that its mode is what the umask says.
        weights: Files that safetensors wrote.
    """
    for file in weights:
        shutil.copymode(neighbour, file)


def disk_is_full(error: Exception) -> bool:
    """Tell whether something could not be written for lack of space, in whichever language it was tried."""
    return getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)


def _explained(error: Exception, folder: Path) -> OSError:
    if not disk_is_full(error):
        return error if isinstance(error, OSError) else OSError(str(error))
    return OSError(
        errno.ENOSPC,
        f"The disk is full: the adapter was not saved ({error}). What was in the folder before is unchanged. Free "
        "some space and save again",
        str(folder),
    )
