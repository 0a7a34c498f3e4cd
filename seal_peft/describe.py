"""Cards for what PEFT saves and uploads by itself: `save_pretrained`, checkpoints included, and `push_to_hub`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .assets import public_id
from .card import (
    CARD_NAME,
    EMPTY_FORM,
    MARKER,
    TRAINER_NOTE,
    CardFacts,
    authors_card,
    bring_up_to_date,
    metadata,
    title,
    write_card,
)
from .files import replacing, write_json

_TEMPLATE = Path(__file__).with_name("card_several.md")
_TITLE = "SEAL adapters"
_DEFAULT = "default"  # the name of PEFT's adapter that has no folder of its own


def describe(folder: str | os.PathLike[str], repo_id: str | None = None, by_trainer: bool = False) -> None:
    """Put our card where PEFT has its empty form or a Trainer its own card, with the import and without local paths.

    Args:
        folder: A SEAL adapter that was just saved; or, with `repo_id`, all that is about to be uploaded.
        repo_id: Repository that the folder goes to.
        by_trainer: Whether the folder is one whose card a Trainer may just have written.
    """
    folder = Path(folder)
    if repo_id is not None:
        _hide_folders(folder)
        _write(folder, repo_id)
    elif by_trainer:
        if TRAINER_NOTE in _text(folder / CARD_NAME):
            _write(folder)
            _warn_of_config(folder)
    elif _is_seal(_config(folder)):
        _write(folder)
        if _has_form(folder.parent):
            _write(folder.parent)


def _warn_of_config(folder: Path) -> None:
    """A Trainer's push comes next, mostly, and asks nobody about the config."""
    names = {_base_of(config) for config in _adapters(folder).values()}
    for named in sorted(name for name in names if name and public_id(name) is None):
        warnings.warn(
            f"The base model of this adapter is a folder of this machine ({named}). The card does not tell, but "
            f"{CONFIG_NAME} does, and a Trainer's push sends it as it is. Push the folder with seal_peft.push(folder, "
            "repo_id, base_model='owner/name') instead, or name the model before training: "
            "model.peft_config['default'].base_model_name_or_path = 'owner/name'.",
            stacklevel=2,
        )


def _write(root: Path, repo_id: str | None = None) -> None:
    """Write the card in front of what was saved: of the one adapter in the folder, or of several."""
    found = _adapters(root)
    if list(found) == [_DEFAULT] and _is_seal(found[_DEFAULT]):
        write_card(root, {}, CardFacts(repo_id))
    elif any(map(_is_seal, found.values())):
        for name, config in found.items():
            if repo_id is not None and name != _DEFAULT and _is_seal(config):
                write_card(root / name, {}, CardFacts())
        _write_several(root, found, repo_id)


def _adapters(root: Path) -> dict[str, dict[str, Any]]:
    """Return the configs of what PEFT saves for a model: "default" in the folder itself, others one below."""
    places = {_DEFAULT: root} | {path.name: path for path in sorted(root.iterdir())}
    return {
        name: config
        for name, place in places.items()
        if not name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and (config := _config(place))
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _is_seal(config: dict[str, Any]) -> bool:
    return config.get("peft_type") == "SEAL"


def _base_of(config: dict[str, Any]) -> str:
    return config.get("base_model_name_or_path") or ""


def _has_form(root: Path) -> bool:
    """Whether PEFT put its form, or we our card, in front of adapters in subfolders, which have names of their own."""
    text = _text(root / CARD_NAME)
    return EMPTY_FORM in text or (MARKER in text and f"# {_TITLE}" in text)


def _hide_folders(root: Path) -> None:
    """Name the base model in configs that go up as others know it, or at least without the folders above it."""
    hidden = {}
    for name, config in _adapters(root).items():
        named = _base_of(config)
        known = public_id(named)
        if known is None and named:
            known = hidden[named] = f"./{Path(named).name}"  # no name on the Hub looks like this
        path = (root if name == _DEFAULT else root / name) / CONFIG_NAME
        write_json(path, config | {"base_model_name_or_path": known})
    for named, known in hidden.items():
        warnings.warn(
            f"The base model of this adapter is a folder of this machine ({named}), and the pushed adapter names only "
            f"{known!r}. To name one that others can load, save the adapter and push the folder: "
            "seal_peft.push(folder, repo_id, base_model='owner/name').",
            stacklevel=2,
        )


def _write_several(root: Path, found: dict[str, dict[str, Any]], repo_id: str | None) -> None:
    """Write the card in front of several adapters; an author's own keeps its text."""
    own = authors_card(root / CARD_NAME)
    heads = [name for name, config in found.items() if _is_seal(config)]
    others = sorted({str(config.get("peft_type")).lower() for config in found.values() if not _is_seal(config)})
    data = metadata(found[heads[0]], CardFacts(repo_id))
    data.tags = [*(data.tags or []), *others]
    if own is not None:
        text = bring_up_to_date(own, data)
    else:
        address = repo_id or "path/of/this/folder"
        words: dict[str, Any] = {
            "marker": MARKER,
            "name": title(repo_id) if repo_id else _TITLE,
            "base": f"`{data.base_model}`" if data.base_model else "a local model",
            "base_address": data.base_model or "path/of/the/base/model",
            "folders": ", ".join(f"`{name}`" for name in heads),
            "names": ", ".join(f"`{name}` ({config.get('peft_type')})" for name, config in found.items()),
            "together": bool(others),
            "cards": heads != [_DEFAULT],
            "on_hub": repo_id is not None,
            "address": address,
            "everything": f'snapshot_download("{address}")' if repo_id else f'"{address}"',
            "subfolder": "" if heads[0] == _DEFAULT else f', subfolder="{heads[0]}"',
        }
        text = f"{ModelCard.from_template(data, template_path=str(_TEMPLATE), **words)}\n"
    with replacing(root / CARD_NAME) as file:
        file.write(text)
