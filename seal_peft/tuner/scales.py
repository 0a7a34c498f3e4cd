"""Reading what was learned: the scales of an adapter, from a model in memory or from its folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .config import check_weights_file
from .layer import SealLayer
from .saving import finish_save

_WEIGHTS_NAME = "adapter_model.safetensors"
_KEY_SUFFIX = ".seal_delta.weight"
_KEY_PREFIX = "base_model.model."


def scales(model: nn.Module | str | os.PathLike[str], adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the learned scales by layer.

    Args:
        model: A model that carries a SEAL adapter, or an adapter folder on disk.
        adapter_name: Which adapter of the model; a folder holds one adapter and ignores it.

    Returns:
        Full name of each attention output projection -> fp32 tensor on the CPU, shape `(num_heads,)` for SEAL-H or
        `(num_heads, head_dim)` for SEAL-C. 1 is unchanged.

    Raises:
        ValueError: The model or folder holds no such adapter.

    Example:
        ```python
        for name, scale in seal_peft.scales("runs/demo/adapter").items():
            print(name, scale.shape, scale.min(), scale.max())
        ```
    """
    return _from_folder(Path(model)) if isinstance(model, str | os.PathLike) else _from_model(model, adapter_name)


def _from_model(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SealLayer)}
    found = {
        name.removeprefix(_KEY_PREFIX).replace(".base_layer", ""): 1
        + layer.offset(adapter_name).detach().float().cpu()
        for name, layer in layers.items()
        if adapter_name in layer.seal_delta
    }
    if not found:
        known = sorted({key for layer in layers.values() for key in layer.seal_delta})
        raise ValueError(
            f"The model holds no SEAL adapter named {adapter_name!r}. Adapters it holds: {known or 'none'}."
        )
    return found


def _from_folder(folder: Path) -> dict[str, Tensor]:
    finish_save(folder)
    path = folder / _WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not an adapter folder: there is no {_WEIGHTS_NAME} in it.")
    check_weights_file(str(path))
    with safe_open(path, framework="pt") as file:
        found = {
            key.removeprefix(_KEY_PREFIX).removesuffix(_KEY_SUFFIX): 1 + file.get_tensor(key).to(torch.float32)
            for key in file.keys()  # noqa: SIM118 (not a dict)
            if key.endswith(_KEY_SUFFIX)
        }
    if not found:
        raise ValueError(f"{path} holds no SEAL scales; is it an adapter of another method?")
    return found
