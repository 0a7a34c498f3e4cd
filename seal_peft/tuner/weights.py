"""The weights file of an adapter: whether it is whole, and the settings that its numbers were saved with.

PEFT writes the weights and then the config, transformers the config and then the weights: a crash between the two
leaves a pair that does not belong together. Shapes do not always tell, since under other RoPE parameters, or for other
heads, equal shapes mean something else. So the weights carry their settings, as what torch calls the extra state of a
module, beside the first scales.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from peft.config import PeftConfig
from torch import Tensor

from .chosen import only_chosen

if TYPE_CHECKING:
    from .config import SealConfig

SCALES = ".seal_delta.weight"
SETTINGS = ".seal_delta._extra_state"
BASE = "base_model_name_or_path"
# What tensors of equal names and shapes take their meaning from.
MEANING = ("target_heads", "rope_parameters", "self_extend", "base_rope", "base_self_extend")
_ASKED = MEANING[:3]  # by whoever made the config; the rest is on record
_MEND = (
    "A save was interrupted, or one of the two files was replaced. `SealConfig.from_pretrained(folder)` returns the "
    "settings of the weights: load them with `config=` (transformers: `peft_config=`), and save the adapter again."
)
_Value = TypeVar("_Value")


# -- writing ----------------------------------------------------------------------------------------------------------


def add_settings(weights: dict[str, Tensor], config: SealConfig, ending: str = SCALES) -> dict[str, Tensor]:
    """Return weights as they act, with the settings among them; the config takes note of their fingerprint.

    Args:
        weights: What is about to be saved.
        config: Its config, to be saved with it.
        ending: How the names of scales end.
    """
    first = next((name for name in weights if name.endswith(ending)), None)
    if first is None:
        return weights
    weights = {name: only_chosen(config, name, t) if name.endswith(ending) else t for name, t in weights.items()}
    text = json.dumps({name: value for name, value in _settings(config).items() if value is not None}, sort_keys=True)
    packed = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)
    config.fingerprint = _fingerprint(packed)
    return {**weights, first.removesuffix("weight") + "_extra_state": packed}


def _settings(config: SealConfig) -> dict[str, Any]:
    """Return the fields of SEAL's own as JSON gives them back, and what tells one base model from another."""
    own = {field.name for field in fields(config)} - {field.name for field in fields(PeftConfig)} - {"fingerprint"}
    values = {name: getattr(config, name) for name in own}
    base = getattr(config, BASE)
    # A folder of somebody's machine should not come along when the weights are published.
    values[BASE] = _digest(str(base).encode()) if base else None
    return cast(dict[str, Any], json.loads(json.dumps(values, default=sorted)))  # sets become lists


def _bytes(packed: Tensor) -> bytes:
    return bytes(packed.to(torch.uint8).tolist())  # who casts all weights of a file casts these, and loses none


def _fingerprint(packed: Tensor) -> str:
    return _digest(_bytes(packed))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# -- reading ----------------------------------------------------------------------------------------------------------


def take_settings(weights: dict[str, _Value]) -> tuple[dict[str, _Value], _Value | None]:
    """Split weights as they were saved into all else and the settings; `None` if they carry none."""
    packed = next((value for name, value in weights.items() if name.endswith(SETTINGS)), None)
    return {name: value for name, value in weights.items() if not name.endswith(SETTINGS)}, packed


def checked_weights(config: SealConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as a model with this config has them, without the settings; see `check_settings`."""
    weights, settings = take_settings(weights)
    check_settings(config, settings)
    return {
        name: only_chosen(config, name, value) if name.endswith(SCALES) else value for name, value in weights.items()
    }


def check_scales(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> set[str]:
    """Return the names of a model's scales that are among some weights.

    Args:
        weights: What was read, by the names of a `PeftModel` or of a model without that wrapper.
        own: The scales of the model.

    Raises:
        ValueError: A scale is not finite or not of its layer's shape.
    """
    given = set()
    for name, value in weights.items():
        if name not in own and f"base_model.model.{name}" in own:
            name = f"base_model.model.{name}"
        if name not in own:
            continue
        given.add(name)
        if value.shape != own[name].shape:
            raise ValueError(
                f"The adapter's scales for {name} have shape {tuple(value.shape)}, but the base model needs "
                f"{tuple(own[name].shape)} (heads, or heads x head_dim). Load the adapter on the model that it "
                "was trained on, with the granularity that it was trained with."
            )
        if not torch.isfinite(value).all():
            raise ValueError(
                f"The adapter holds NaN or infinite scales ({name}). Its file is broken or its training "
                "diverged; do not use it."
            )
    return given


def check_settings(config: SealConfig, packed: Tensor | None, names: Collection[str] = MEANING) -> None:
    """Refuse weights that were saved with settings of another meaning than those of a config that was read.

    Whoever makes a new config, or changes one after reading it, wants it to be taken as it is. A new one says nothing
    about these weights, though: where it differs in what was asked for, there is a warning.

    Args:
        config: The config that is in use.
        packed: The settings that the weights carry; `None` is taken for those of the config.
        names: The settings that count.

    Raises:
        ValueError: The two differ.
    """
    all_differing = _differences(config, packed)
    if config._expected_heads is None:
        asked = {name: all_differing[name] for name in _ASKED if name in all_differing}
        if asked:
            warnings.warn(
                f"These weights were saved with {_told(asked)}: the config that is in use was made anew. It is taken "
                "as it is. Load the adapter under a name of its own to have the settings that come with it.",
                stacklevel=2,
            )
        return
    if differing := {name: both for name, both in all_differing.items() if name in names}:
        other_base = ["another base model"] if differing.pop(BASE, None) else []
        settings = [_told(differing)] if differing else []
        raise ValueError(
            f"The adapter's weights do not belong to its config: they were saved with "
            f"{'; '.join(other_base + settings)}. {_MEND}"
        )


def _told(differing: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}={saved!r}, not {own!r}" for name, (own, saved) in sorted(differing.items()))


def saved_config(config: SealConfig, packed: Tensor | None, folder: str) -> SealConfig:
    """Return the config that the weights in a folder were saved with: mostly the one beside them.

    Args:
        config: The one beside them.
        packed: The settings that they carry; `None` is taken for those of the config.
        folder: Where they are.

    Raises:
        ValueError: They are of another base model, which the caller may have loaded already.
    """
    differing = _differences(config, packed)
    if not differing:
        return config
    if BASE in differing:
        raise ValueError(
            f"The weights in {folder} were saved for another base model than the config beside them names, "
            f"{getattr(config, BASE)!r}: a save was interrupted, or one of the two files was replaced. Set {BASE} in "
            "adapter_config.json to the name under which they were trained, or to null, and load the adapter "
            "again: all other settings come with the weights."
        )
    warnings.warn(
        f"The config in {folder} is not the one that the weights beside it were saved with: a save was interrupted, "
        f"or one of the two files was replaced. The adapter is read as its weights were saved, with other "
        f"{', '.join(sorted(differing))}. Save it again to mend the folder.",
        stacklevel=3,
    )
    saved_settings = {name: saved for name, (_, saved) in differing.items()}
    values = {**config.to_dict(), **saved_settings, "fingerprint": _fingerprint(cast(Tensor, packed))}
    return cast("SealConfig", type(config).from_peft_type(**values))


def _differences(config: SealConfig, packed: Tensor | None) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which a config and weights of another save differ: name -> both values."""
    if packed is None or config.fingerprint == _fingerprint(packed):
        return {}
    try:
        saved = json.loads(_bytes(packed))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        warnings.warn(
            "The settings that these weights were saved with cannot be read, as after arithmetic on all tensors of a "
            "file. The config is taken as it is: make sure that it belongs to them.",
            stacklevel=3,
        )
        return {}
    both = {name: (own, saved.get(name)) for name, own in _settings(config).items() if own != saved.get(name)}
    if not all(both.get(BASE, (True,))):
        del both[BASE]  # one of the two does not say
    return both


def check_weights_file(path: str) -> None:
    """Refuse a safetensors file that is cut off or damaged; a missing file is left to the loader.

    Raises:
        ValueError: The size of the file is not what its header announces.
    """
    if not os.path.isfile(path):
        return
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else size
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
            end = (
                8
                + length
                + max(
                    (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            end = None
    if end != size:
        raise ValueError(
            f"The adapter file {path} is cut off or damaged ({size} bytes"
            + (f", its header announces {end}" if end else ", no readable header")
            + "). Save the adapter again, or download it again."
        )
