"""Cards for what PEFT saves and uploads by itself: `save_pretrained`, checkpoints included, and `push_to_hub`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME

from .assets import public_id
from .card import (
    CARD_NAME,
    EMPTY_FORM,
    MARKER,
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


def describe(folder: str | os.PathLike[str], repo_id: str | None = None) -> None:
    """Put our card where PEFT has its empty form, with the import that loading needs and without local paths.

    Args:
        folder: A SEAL adapter that was just saved; or, with `repo_id`, all that is about to be uploaded.
        repo_id: Repository that the folder goes to.
    """
    folder = Path(folder)
    if repo_id is not None:
        for place in (folder, *folder.iterdir()):
            if _is_seal(config := _config(place)):
                _hide_folder(place / CONFIG_NAME, config)
    if _is_seal(_config(folder)):
        write_card(folder, {}, CardFacts(repo_id))
    root = folder if repo_id is not None else folder.parent
    if not _config(root) and (repo_id is not None or _has_form(root)):
        _write_several(root, repo_id)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_seal(config: dict[str, Any]) -> bool:
    return config.get("peft_type") == "SEAL"


def _has_form(root: Path) -> bool:
    """Whether PEFT put its form, or we our card, in front of adapters in subfolders, which have names of their own."""
    path = root / CARD_NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return EMPTY_FORM in text or (MARKER in text and f"# {_TITLE}" in text)


def _hide_folder(path: Path, config: dict[str, Any]) -> None:
    """Name the base model in a config that goes up as others know it, or at least without the folders above it."""
    named = config.get("base_model_name_or_path") or ""
    known = public_id(named)
    if known is None and named:
        known = f"./{Path(named).name}"  # no name on the Hub looks like this
        warnings.warn(
            f"The base model of this adapter is a folder of this machine ({named}), and the pushed adapter names only "
            f"{known!r}. To name one that others can load, save the adapter and push the folder: "
            "seal_peft.push(folder, repo_id, base_model='owner/name').",
            stacklevel=2,
        )
    write_json(path, config | {"base_model_name_or_path": known})


def _write_several(root: Path, repo_id: str | None) -> None:
    """Write the card in front of several adapters; an author's own keeps its text."""
    found = {path.name: config for path in sorted(root.iterdir()) if _is_seal(config := _config(path))}
    if not found:
        return
    own = authors_card(root / CARD_NAME)
    first, config = next(iter(found.items()))
    data = metadata(config, CardFacts(repo_id))
    if own is not None:
        text = bring_up_to_date(own, data)
    else:
        words: dict[str, Any] = {
            "marker": MARKER,
            "name": title(repo_id) if repo_id else _TITLE,
            "base": f"`{data.base_model}`" if data.base_model else "a local model",
            "base_address": data.base_model or "path/of/the/base/model",
            "folders": ", ".join(f"`{name}`" for name in found),
            "first": first,
            "address": repo_id or "path/of/this/folder",
        }
        text = f"{ModelCard.from_template(data, template_path=str(_TEMPLATE), **words)}\n"
    with replacing(root / CARD_NAME) as file:
        file.write(text)
