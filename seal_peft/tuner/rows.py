"""Many adapters in one batch: every row of the batch is scaled by an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import SealLayer

BASE = "__base__"
# What generation repeats its inputs with, once for every beam or returned sequence.
_EXPAND = "_expand_inputs_for_generation"
_REFUSAL = "_refuses_adapter_names"


class _Parts(NamedTuple):
    layers: list[SealLayer]
    others: list[BaseTunerLayer]
    trained_modules: list[AuxiliaryTrainingWrapper]


@contextmanager
def scaled_rows(model: nn.Module, base: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the context, row `i` of every batch gets the scales of `adapter_names[i]`.

    Entering lays the offsets in flight side by side in one table per layer and gathers the rows from it; every
    forward pass within then costs one multiplication, however many adapters there are. Nothing is kept for the next
    time: making a table is as cheap as asking every parameter whether it has changed.

    Args:
        model: A model with SEAL layers, in inference mode.
        base: The model inside it that generates: where it repeats rows, for beams or several answers, so does this.
        adapter_names: One adapter per row; `"__base__"` leaves the row unscaled.

    Raises:
        TypeError: `adapter_names` is not a list of names.
        ValueError: The model is in training mode, an adapter is merged, one of another method is active, or a name is
            not known.
    """
    parts = _parts(model)
    names = _checked(model, parts, adapter_names)
    rows = list(adapter_names)
    handles = [
        module.register_forward_pre_hook(partial(_with_adapter_names, adapter_names=rows), with_kwargs=True)
        for module in parts.trained_modules
    ]
    before = [layer.row_scale for layer in parts.layers]

    def repeat(times: int) -> None:
        rows[:] = [name for name in adapter_names for _ in range(times)]
        _scale_rows(parts.layers, names, rows)

    try:
        repeat(1)
        with _on_expansion(base, repeat):
            yield
    finally:
        for layer, row_scale in zip(parts.layers, before, strict=True):
            layer.row_scale = row_scale
        for handle in handles:
            handle.remove()


def _parts(model: nn.Module) -> _Parts:
    """Find what a mixed batch concerns, without a walk through all adapters: there may be thousands in every layer."""
    found = _Parts([], [], [])
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, BaseTunerLayer):
            found.layers.append(module) if isinstance(module, SealLayer) else found.others.append(module)
            stack.append(cast(nn.Module, module.base_layer))
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.trained_modules.append(module)
        stack.extend(module._modules.values())
    return found


def _checked(model: nn.Module, parts: _Parts, adapter_names: Sequence[str]) -> list[str]:
    """Return every adapter of the batch once, without the base."""
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"`adapter_names` must be a list with one adapter name per row, got {adapter_names!r}.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if any(layer.merged for layer in parts.layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    for module in parts.others:
        if not module.disable_adapters:
            acting = module._get_available_adapters() & {*module.active_adapters, *module.merged_adapters}
            if acting:
                raise ValueError(
                    f"Cannot pass `adapter_names` while adapters of other methods act on every row: {sorted(acting)}. "
                    "Switch them off, `seal_peft.activate(model, [])`, and give each row a SEAL adapter."
                )
    names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
    if unknown := [name for name in names if not any(name in layer.seal_alpha for layer in parts.layers)]:
        known = sorted({name for layer in parts.layers for name in layer.seal_alpha})
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. "
            f"Known are {', '.join(known)} and {BASE}."
        )
    return names


@torch.no_grad()
def _scale_rows(layers: Sequence[SealLayer], names: Sequence[str], rows: Sequence[str]) -> None:
    """Give every layer the scales of all rows, `(rows, heads, 1 or head_dim)`, where it has any adapter at all."""
    position = {name: place for place, name in enumerate((BASE, *names))}
    index = torch.tensor([position[name] for name in rows], dtype=torch.long)
    indices = {index.device: index}
    for layer in layers:
        gathered = []
        for table in _tables(layer, names):
            if table.device not in indices:
                indices[table.device] = index.to(table.device)
            gathered.append(table.index_select(0, indices[table.device]))
        layer.row_scale = reduce(torch.mul, gathered) if gathered else None


def _tables(layer: SealLayer, names: Sequence[str]) -> list[Tensor]:
    """Lay the scales of some adapters side by side, behind a row of ones: `(1 + names, heads, 1 or head_dim)`.

    Adapters per head and per channel have tables of their own, with ones for the adapters that are not in it, so that
    the scale of an adapter is the product over the tables.
    """
    modules: dict[str, Any] = layer.seal_delta._modules
    if not modules:
        return []
    # What runs once per adapter here runs adapters x layers times per forward pass.
    absent = next(iter(modules.values())).weight.new_zeros(layer.geometry.num_heads)
    offsets: list[Tensor] = [modules[name].values() if name in modules else absent for name in names]
    kinds = set(map(Tensor.dim, offsets)) or {1}
    tables = []
    for dims in kinds:
        shape = layer.geometry[:dims]
        zeros = absent.new_zeros(shape)
        here = offsets if len(kinds) == 1 else [offset if offset.dim() == dims else zeros for offset in offsets]
        table = torch.cat([zeros, *here]).view(-1, *shape, *[1] * (2 - dims))
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        if not set(map(layer.seal_alpha.get, names)) <= {1.0, None}:
            strengths = [layer.seal_alpha.get(name, 1.0) for name in names]
            table = table * torch.tensor([1.0, *strengths], device=table.device).view(-1, 1, 1)
        tables.append(layer.spread(1 + table))
    return tables


@contextmanager
def _on_expansion(base: nn.Module, repeat: Callable[[int], None]) -> Iterator[None]:
    """Call `repeat(times)` when generation repeats every input next to itself, whatever made it do so."""
    expand = getattr(base, _EXPAND, None)
    if expand is None:
        yield
        return

    def expand_and_repeat(expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        if expand_size != 1:
            repeat(expand_size)
        return expand(expand_size, *args, **kwargs)

    own = {name: value for name, value in vars(base).items() if name == _EXPAND}
    vars(base)[_EXPAND] = expand_and_repeat
    try:
        yield
    finally:
        del vars(base)[_EXPAND]
        vars(base).update(own)


def refuse_names(*models: nn.Module) -> None:
    """Let a base model and its tuner refuse `adapter_names`, which PEFT's wrapper takes out before it calls them.

    Models that got their adapters by transformers' own calls have no wrapper, and would ignore them without a word.
    So would `peft_model.base_model`, which calls the base model's `forward` without its hooks.
    """
    for model in models:
        if _REFUSAL not in vars(model):
            vars(model)[_REFUSAL] = model.register_forward_pre_hook(_refuse_names, with_kwargs=True)


def stop_refusing_names(model: nn.Module) -> None:
    """Take the refusal back, where there is one."""
    if (handle := vars(model).pop(_REFUSAL, None)) is not None:
        handle.remove()


def _refuse_names(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "`adapter_names` needs PEFT's wrapper, and this model was called without it. Load the adapters with "
            "`PeftModel.from_pretrained(model, folder)` and `load_adapter`, and call what that returns. Without it, "
            "all rows have the adapter that `set_adapter` chose."
        )


def _with_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]) -> Any:
    return args, {**kwargs, "adapter_names": list(adapter_names)}
