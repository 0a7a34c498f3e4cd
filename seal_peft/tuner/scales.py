"""Reading what was learned: the scales of an adapter, from a model in memory or from its folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import SealConfig
from .layer import SealLayer
from .reading import read_adapter
from .saving import finish_save
from .weights import SCALES, check_weights_file

_KEY_PREFIX = "base_model.model."


def scales(model: nn.Module | str | os.PathLike[str], adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the learned scales by layer.

    Args:
        model: A model that carries a SEAL adapter, or an adapter folder on disk.
        adapter_name: Which adapter of the model; a folder holds one adapter and ignores it.

    Returns:
        Full name of each scaled module, by layer and then by letters -> fp32 tensor on the CPU, shape `(num_heads,)`,
        or `(num_heads, head_dim)` for the output site of SEAL-C. 1 is unchanged.

    Raises:
        ValueError: The model or folder holds no such adapter, or one without scales.

    Example:
        ```python
        for name, scale in seal_peft.scales("runs/demo/adapter").items():
            print(name, scale.shape, scale.min(), scale.max())
        ```
    """
    found = _from_model(model, adapter_name) if isinstance(model, nn.Module) else _from_folder(Path(model))
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, SealLayer]:
    """Return the layers that hold an adapter by their names in the base model, whatever is wrapped around it.

    Raises:
        ValueError: No layer holds an adapter of this name, or the adapter has no scales.
    """
    from peft.peft_model import PeftModel  # PEFT imports its tuners first

    base = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(base, PeftModel):
        base = base.get_base_model()
    elif isinstance(base, BaseTuner):
        base = base.model
    named = {name: module for name, module in base.named_modules() if isinstance(module, SealLayer)}
    layers = {name.replace(".base_layer", ""): m for name, m in named.items() if adapter_name in m.seal_delta}
    if not layers:
        _check_has_scales((getattr(base, "peft_config", None) or {}).get(adapter_name), f"Adapter {adapter_name!r}")
        known = sorted({key for layer in named.values() for key in layer.seal_delta})
        raise ValueError(
            f"The model holds no SEAL adapter named {adapter_name!r}. Adapters it holds: {known or 'none'}."
        )
    return layers


def _from_model(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    layers = layers_with(model, adapter_name)
    return {name: 1 + layer.values(adapter_name).detach().float().cpu() for name, layer in layers.items()}


def _from_folder(folder: Path) -> dict[str, Tensor]:
    finish_save(folder)
    path, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if path.is_file():
        check_weights_file(str(path))
        tensors = load_file(path)
    elif pickled.is_file():  # `save_pretrained(..., safe_serialization=False)`
        path, tensors = pickled, torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{folder} is not an adapter folder: there is no {SAFETENSORS_WEIGHTS_NAME} in it.")
    found = {
        key.removeprefix(_KEY_PREFIX).removesuffix(SCALES): 1 + value.to(torch.float32)
        for key, value in tensors.items()
        if key.endswith(SCALES)
    }
    if not found:
        if (folder / CONFIG_NAME).is_file():
            _check_has_scales(read_adapter(str(folder)), str(folder))
        raise ValueError(f"{path} holds no SEAL scales; is it an adapter of another method?")
    return found


def _check_has_scales(config: PeftConfig | None, adapter: str) -> None:
    """Refuse by what it is an adapter that was made to bring a context extension and nothing else."""
    if isinstance(config, SealConfig) and not config.sites:
        brought = {"rope_parameters": config.rope_parameters, "self_extend": config.self_extend}
        raise ValueError(
            f"{adapter} is SEAL's but has no scales (sites=()): it brings "
            f"{', '.join(f'{name}={value}' for name, value in brought.items() if value is not None)} and nothing that "
            "could be shown, set or swapped. Use an adapter with sites."
        )


def _place(name: str) -> list[tuple[int, str]]:
    """Sort key of a module's name: a file goes by letters alone, in which layer 10 stands before layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
