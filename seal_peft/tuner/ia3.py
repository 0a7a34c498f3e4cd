"""Exchange with PEFT's IA3: a SEAL adapter as a folder that stock PEFT loads without this package, and the way back.

On the input of a linear layer ("feedforward" in IA3's words) IA3 learns one factor per feature. SEAL-C is that on the
attention output projections, SEAL-H the same with one value per head. Query scales are IA3's factors on the outputs of
a projection, one value per head.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from peft.config import PeftConfig
from peft.tuners.ia3 import IA3Config
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import SealConfig
from .geometry import HeadGeometry, attention_of, default_target_modules, head_geometry, is_linear
from .layer import SealLayer
from .reading import read_adapter
from .saving import write_adapter
from .scales import layers_with
from .weights import SCALES, checked_weights, take_settings

_PREFIX = "base_model.model."
_SEAL_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.seal_delta\.weight")
_IA3_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.ia3_l")
_ON_ITS_BASE = "Import it with the base model that it was trained on."
_OUTPUTS_ALONE = (
    "export the output site alone: save_adapter(model, folder, sites=['output']), then export_ia3(folder, ...)."
)


def export_ia3(
    model: nn.Module | str | os.PathLike[str], output_dir: str | os.PathLike[str], adapter_name: str = "default"
) -> Path:
    """Write a SEAL adapter as an IA3 adapter, which PEFT loads without this package and with equal logits.

    A strength that was set on the model (`set_strength`) goes into the factors, which are `1 + alpha * (s - 1)`.

    Args:
        model: A model with a SEAL adapter, or the folder of one without query scales.
        output_dir: Folder of the IA3 adapter.
        adapter_name: Which adapter of the model; a folder holds one adapter and ignores it.

    Returns:
        The IA3 folder.

    Raises:
        ValueError: The output folder holds an adapter of another method, there is no such SEAL adapter, a folder
            alone does not tell where its scales lie, query scales are on a norm, or the adapter brings RoPE
            parameters: IA3 knows neither.

    Example:
        ```python
        folder = seal_peft.export_ia3("runs/demo/adapter", "runs/demo/ia3")
        model = PeftModel.from_pretrained(base_model, folder)  # in any process, without this package
        ```
    """
    queries: dict[str, SealLayer] = {}
    if isinstance(model, nn.Module):
        config, state, sizes, conv1d = _seal_in_model(model, adapter_name)
        queries = _query_layers(model, adapter_name)
    else:
        config, state, sizes = _seal_in_folder(Path(model))
        conv1d = False  # not on record; PEFT corrects it with a warning where the base has Conv1D layers
    if config.rope_parameters is not None or config.self_extend is not None:
        raise ValueError(
            f"This adapter runs under RoPE {config.rope_parameters} and self_extend={config.self_extend}, which an "
            "IA3 folder cannot carry: it would give other logits. Merge the adapter instead; the merged model's "
            "config carries the RoPE."
        )
    names, inputs, weights = [], [], {}
    for key, value in state.items():
        match = _SEAL_KEY.fullmatch(key)
        if not match:
            weights[key] = value  # what `modules_to_save` trains keeps its key
            continue
        name = match["name"]
        names.append(name)
        scale = 1 + value.detach().float().cpu()
        scale = scale.unsqueeze(-1) if scale.dim() == 1 else scale
        if name in queries:
            vector = queries[name].spread(scale).expand(-1, sizes[name].head_dim).reshape(-1, 1)
        else:
            inputs.append(name)
            vector = scale.expand(sizes[name]).reshape(1, -1)
        weights[f"base_model.model.{name}.ia3_l"] = vector
    ia3 = IA3Config(
        **_shared(config),
        # Full names, twice: short ones could hit other modules, and IA3 treats what is only in the first as outputs.
        target_modules=names,
        feedforward_modules=inputs,
        fan_in_fan_out=conv1d,
        modules_to_save=config.modules_to_save,
    )
    return write_adapter(output_dir, ia3, weights)


def import_ia3(
    folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    granularity: Literal["head", "channel"] = "channel",
    base_model: nn.Module | None = None,
) -> Path:
    """Turn an IA3 adapter that scales the inputs of attention output projections into a SEAL adapter.

    Query scales that `export_ia3` wrote are on outputs, so they have no way back.

    Args:
        folder: The IA3 adapter.
        output_dir: Folder of the SEAL adapter.
        granularity: `"channel"` takes every IA3 adapter; `"head"` one whose factors are constant within each head.
        base_model: The base model, which tells where the heads are. `None` builds its layers, without weights, from
            the config of the base model that the adapter names. Its modules and shapes must be those that the adapter
            was trained on; its name, which differs from machine to machine, is not compared.

    Returns:
        The SEAL folder.

    Raises:
        ValueError: The output folder holds an adapter of another method, or the adapter to import is no IA3 adapter,
            scales outputs or other modules, does not fit the base model, or has factors that are not constant within a
            head although `granularity="head"`.
        OSError: The base model that the adapter names cannot be read, and no other was given.

    Example:
        ```python
        seal_peft.export_ia3("runs/demo/adapter", "runs/demo/ia3")
        seal_peft.import_ia3("runs/demo/ia3", "runs/demo/again", base_model=base_model)
        ```
    """
    source, config = str(folder), read_adapter(str(folder))
    if not isinstance(config, IA3Config):
        raise ValueError(
            f"{folder} holds an adapter of type {PeftType(config.peft_type).value}; import_ia3 reads IA3 adapters."
        )
    base_model = _skeleton(config) if base_model is None else base_model
    modules, tensors, projections = dict(base_model.named_modules()), base_model.state_dict(), _projections(base_model)
    heads, weights = {}, {}
    for key, value in load_peft_weights(source, device="cpu").items():
        match = _IA3_KEY.fullmatch(key)
        if not match:
            _check_shape(key, value, tensors)
            weights[key] = value
            continue
        name = match["name"]
        if name not in modules:
            raise ValueError(f"The IA3 vector of {name} has no such module in the base model. {_ON_ITS_BASE}")
        _check_scales_heads(name, value, config, projections)
        heads[name] = projections[name]
        weights[f"base_model.model.{name}.seal_delta.weight"] = _offset(name, value, projections[name], granularity)
    if not heads:
        raise ValueError(f"{folder} holds no IA3 vectors.")
    if missing := [name for name in projections if name not in heads and check_target_module_exists(config, name)]:
        raise ValueError(
            f"The IA3 adapter targets {missing[0]} of the base model, too, but has no vector for it. {_ON_ITS_BASE}"
        )
    order = [name for name in modules if name in heads]
    seal = SealConfig(
        **_shared(config),
        target_modules=order,
        granularity=granularity,
        modules_to_save=config.modules_to_save,
        heads=[list(heads[name]) for name in order],
    )
    return write_adapter(output_dir, seal, weights)


def _shared(config: PeftConfig) -> dict[str, Any]:
    names = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    return {"inference_mode": True, **{name: getattr(config, name) for name in names}}


_Sizes = dict[str, HeadGeometry]


def _seal_in_model(model: Any, adapter_name: str) -> tuple[SealConfig, dict[str, Tensor], _Sizes, bool]:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, SealConfig):
        known = [name for name, c in getattr(model, "peft_config", {}).items() if isinstance(c, SealConfig)]
        raise ValueError(f"The model holds no SEAL adapter named {adapter_name!r}. SEAL adapters: {known or 'none'}.")
    layers = layers_with(model, adapter_name)
    conv1d = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    sizes = {name: layer.geometry for name, layer in layers.items()}
    state, _ = take_settings(get_peft_model_state_dict(model, adapter_name=adapter_name))
    # Models that got the adapter by transformers' own calls have no wrapper, and its files no prefix.
    state = {_PREFIX + name.removeprefix(_PREFIX): value for name, value in state.items()}
    for name, layer in layers.items():
        state[f"{_PREFIX}{name}{SCALES}"] = layer.seal_alpha[adapter_name] * layer.values(adapter_name)
    return config, state, sizes, conv1d


def _query_layers(model: nn.Module, adapter_name: str) -> dict[str, SealLayer]:
    layers = layers_with(model, adapter_name)
    queries = {name: layer for name, layer in layers.items() if layer.site == "query"}
    for name, layer in queries.items():
        if not is_linear(layer.get_base_layer()):
            raise ValueError(
                f"The query scales of this adapter are on {name}, a {type(layer.get_base_layer()).__name__}; IA3 "
                f"knows linear layers only. If it scales outputs, too, {_OUTPUTS_ALONE}"
            )
    return queries


def _seal_in_folder(folder: Path) -> tuple[SealConfig, dict[str, Tensor], _Sizes]:
    config = read_adapter(str(folder))
    if not isinstance(config, SealConfig):
        raise ValueError(
            f"{folder} holds an adapter of type {PeftType(config.peft_type).value}; export_ia3 writes SEAL adapters."
        )
    if "query" in config.sites:
        raise ValueError(
            f"The adapter in {folder} scales queries, and only its base model tells which outputs of a projection are "
            "queries of which head. Load the adapter on that model and export it from there: export_ia3(model, ...)."
        )
    state = checked_weights(config, load_peft_weights(str(folder), device="cpu"))
    pairs = {HeadGeometry(*pair) for pair in config.heads or []}
    sizes = {}
    for key, value in state.items():
        match = _SEAL_KEY.fullmatch(key)
        if not match:
            continue
        fitting = {pair for pair in pairs if tuple(value.shape) == pair[: value.dim()]}
        if value.dim() == 2:
            fitting = {HeadGeometry(*value.shape)}
        if len(fitting) != 1:
            raise ValueError(
                f"The folder {folder} does not tell the head size of {match['name']}: (num_heads, head_dim) of its "
                f"layers are {sorted(pairs) or 'not recorded'}. Load the adapter on its base model and export that."
            )
        (sizes[match["name"]],) = fitting
    return config, state, sizes


def _skeleton(config: PeftConfig) -> nn.Module:
    """Build the layers of the base model without memory for their weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not config.base_model_name_or_path:
        raise ValueError("The adapter does not name its base model. Pass base_model=..., the model it was trained on.")
    try:
        base = AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    except OSError as error:
        raise OSError(
            f"The base model that the adapter names, {config.base_model_name_or_path!r}, cannot be read. Pass "
            f"base_model=..., the model it was trained on. ({error})"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(base)


def _projections(model: nn.Module) -> _Sizes:
    """Return the attention output projections of a model and how their inputs split into heads."""
    config = getattr(model, "config", None)
    wanted = default_target_modules(model, config.to_dict() if config is not None else {})
    suffixes = tuple("." + name for name in wanted)
    return {
        name: head_geometry(attention_of(model, name), module, name, None, None)
        for name, module in model.named_modules()
        if name in wanted or name.endswith(suffixes)
    }


def _check_scales_heads(name: str, vector: Tensor, config: IA3Config, projections: _Sizes) -> None:
    listed = config.feedforward_modules or []
    on_input = re.fullmatch(listed, name) if isinstance(listed, str) else name.endswith(tuple(listed))
    if not on_input or vector.shape[0] != 1:
        raise ValueError(
            f"The IA3 vector of {name} scales the outputs of that module (it is not in `feedforward_modules`); "
            "import_ia3 reads scales on the inputs of attention output projections only. If export_ia3 wrote this one "
            f"for query scales, use the SEAL adapter itself, or {_OUTPUTS_ALONE} If IA3 trained it, train with the "
            "attention output projections in `feedforward_modules`."
        )
    if name not in projections:
        raise ValueError(
            f"The IA3 vector of {name} scales a module that does not read attention heads; SEAL has no such scale. "
            f"Attention output projections of the base: {', '.join(list(projections)[:3])}, ..."
        )
    num_heads, head_dim = projections[name]
    if vector.numel() != num_heads * head_dim:
        raise ValueError(
            f"The IA3 vector of {name} has {vector.numel()} factors, but the base model has {num_heads} heads of "
            f"{head_dim} channels there. {_ON_ITS_BASE}"
        )


def _check_shape(key: str, value: Tensor, tensors: dict[str, Tensor]) -> None:
    """Refuse what `modules_to_save` trained on another base."""
    there = tensors.get(key.removeprefix(_PREFIX))
    if there is None or there.shape != value.shape:
        found = "nothing of that name" if there is None else f"shape {tuple(there.shape)}"
        raise ValueError(
            f"The adapter's {key} has shape {tuple(value.shape)}, but the base model has {found}. {_ON_ITS_BASE}"
        )


def _offset(name: str, vector: Tensor, geometry: HeadGeometry, granularity: str) -> Tensor:
    offset = vector.float().view(geometry) - 1
    if granularity == "channel":
        return offset
    if not (offset == offset[:, :1]).all():
        raise ValueError(
            f"The IA3 factors of {name} differ within a head, so they are no scales per head. Use "
            "granularity='channel'."
        )
    return offset[:, 0].contiguous()
