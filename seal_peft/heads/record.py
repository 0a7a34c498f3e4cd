"""The files of `seal-peft heads`: one for each score, its picture, and the table over all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import write_json
from ..provenance import provenance
from ..tuner.saving import share_as
from .layers import Heads
from .maps import MEANING, as_tensor, compare, summarise
from .pictures import draw_channels, draw_maps
from .scores import Score

CHANNELS = "gradient-channels.safetensors"
# Shares start at 0; all other maps have a sign.
_SHARES = ("retrieval_copy", "retrieval_mass")


def finished(folder: Path, name: str, key: str) -> dict[str, Any] | None:
    """Return what an earlier call wrote of a score, if model, samples and settings were the same."""
    record = _read(folder, name)
    return record if record and record["fingerprint"] == key else None


def earlier(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier call wrote of a score that this call was not asked for, to stand in its table.

    Raises:
        ValueError: Its settings are others than these, so that one table cannot have it beside the rest, or a file
            of it is missing.
    """
    record = _read(folder, name)
    if record is None and (folder / f"{name}.json").is_file():
        raise ValueError(
            f"{folder} holds {name}.json without its {CHANNELS}. Put the file back, add {name} to --scores to compute "
            "it anew, or choose another --output_dir."
        )
    if record is None:
        return None
    changed = [setting for setting, value in settings.items() if record["settings"].get(setting) != value]
    if changed:
        raise ValueError(
            f"{folder} holds {name} scores with other settings ({', '.join(changed)}). Give the same settings, add "
            f"{name} to --scores to compute it anew, or choose another --output_dir."
        )
    return record


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"maps", "settings", "fingerprint"} <= record.keys():
        raise ValueError(f"{path} is not a file of `seal-peft heads`. Remove it, or choose another --output_dir.")
    return record if not _has_channels(record) or (folder / CHANNELS).is_file() else None


def write_score(
    folder: Path, name: str, score: Score, heads: Heads, key: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `NAME.json`, its picture, and the channels if the score has them; return what the JSON holds."""
    folder.mkdir(parents=True, exist_ok=True)
    if score.channels:
        save_file({channel: values.contiguous() for channel, values in score.channels.items()}, folder / CHANNELS)
    maps = {
        title: {str(length): summarise(values) for length, values in own.items()} for title, own in score.maps.items()
    }
    record = {
        "score": name,
        "layers": [layer.number for layer in heads.layers],
        "meaning": {title: MEANING[title] for title in maps if title in MEANING},
        "maps": maps,
        **_with_text_keys(score.more),
        "settings": dict(settings),
        "fingerprint": key,
        **provenance(),
    }
    means = _means(record)
    for shares in (True, False):
        drawn = {title: own for title, own in means.items() if (title in _SHARES) == shares and _is_main(title)}
        if drawn:
            draw_maps(drawn, heads, folder / f"{name}.png", None if shares else 0.0, _mlps(record))
    write_json(folder / f"{name}.json", record)  # last: it says that the rest is there
    if score.channels:
        share_as(folder / f"{name}.json", [folder / CHANNELS])
    return record


def write_comparison(
    folder: Path, records: Sequence[Mapping[str, Any]], columns: Mapping[str, Mapping[None, Tensor]], heads: Heads
) -> dict[str, Any]:
    """Write `heads.json`: every score of every head beside the learned scales; return what it holds.

    Args:
        folder: Where to.
        records: What `write_score` returned.
        columns: Learned scales, from `scale_columns`.
        heads: The heads of the model.
    """
    maps = {title: own for record in records for title, own in _means(record).items() if _is_main(title)}
    comparison = compare({**maps, **columns}, heads)
    named = {title: text for title, text in MEANING.items() if title in maps or title in columns}
    write_json(folder / "heads.json", {"meaning": named, **comparison, **provenance()})
    if columns:
        draw_maps(columns, heads, folder / "scales.png", 1.0)
    _draw_channels(folder, records, heads)
    return comparison


def _means(record: Mapping[str, Any]) -> dict[str, dict[int, Tensor]]:
    return {
        title: {int(length): as_tensor(summary["mean"]) for length, summary in own.items()}
        for title, own in record["maps"].items()
    }


def _mlps(record: Mapping[str, Any]) -> dict[str, dict[int, Tensor]]:
    """What the MLPs wrote, for the one score that knows."""
    return {
        title: {int(length): as_tensor(parts["mlps"]["mean"]) for length, parts in own.items()}
        for title, own in record.get("parts", {}).items()
    }


def _is_main(title: str) -> bool:
    """Whether a map is compared and drawn; changes of accuracy take few values and stand in the file alone."""
    return not title.endswith(("_tokens", "_exact"))


def _has_channels(record: Mapping[str, Any]) -> bool:
    """Whether `CHANNELS` is of this score; one that stands there may be of an earlier call. Queries have none."""
    return "gradient" in record["maps"]


def _draw_channels(folder: Path, records: Sequence[Mapping[str, Any]], heads: Heads) -> None:
    """Draw what pruning single channels changes, beside their gradients if these were asked for, too."""
    gradients = load_file(folder / CHANNELS) if any(map(_has_channels, records)) else {}
    drawn: dict[str, dict[str, Tensor]] = {}
    for name, by_length in (item for record in records for item in record.get("channels", {}).items()):
        layer, head = (int(number) for number in name[1:].split("H"))
        module = next(own.name for own in heads.layers if own.number == layer)
        for length, summary in by_length.items():
            title = f"{name}, {int(length):,} tokens" if int(length) else name
            own = drawn[title] = {"pruning": torch.tensor(summary["mean"])}
            if (gradient := gradients.get(f"{length}.{module}")) is not None:
                own["gradient"] = gradient[head]
    if drawn:
        draw_channels(drawn, folder / "channels.png")


def _with_text_keys(value: Any) -> Any:
    """JSON has no numbers as keys; what is returned is to equal what is read back."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(own) for key, own in value.items()}
    return value
