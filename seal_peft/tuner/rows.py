"""Many adapters in one batch: every row of the batch is scaled by an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import SealLayer

BASE = "__base__"


@contextmanager
def scaled_rows(model: nn.Module, adapter_names: Sequence[str], num_beams: int) -> Iterator[None]:
    """Within the context, row `i` of every batch gets the scales of `adapter_names[i]`.

    The rows' scales are gathered once on entering, from one table per layer; every forward pass within then costs one
    multiplication, however many adapters are in flight.

    Args:
        model: A model with SEAL layers, in inference mode.
        adapter_names: One adapter per row; `"__base__"` leaves the row unscaled.
        num_beams: Beams of beam search: generation repeats every row that often.

    Raises:
        TypeError: `adapter_names` is not a list of names.
        ValueError: The model is in training mode, an adapter is merged, one of another method is active, or a name is
            not known.
    """
    layers = [module for module in model.modules() if isinstance(module, SealLayer)]
    rows = [name for name in _checked(model, layers, adapter_names) for _ in range(num_beams)]
    handles = [
        module.register_forward_pre_hook(partial(_with_adapter_names, adapter_names=rows), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    try:
        for layer in layers:
            layer.row_scale = _gather(layer, rows)
        yield
    finally:
        for layer in layers:
            layer.row_scale = None
        for handle in handles:
            handle.remove()


def _checked(model: nn.Module, layers: Sequence[SealLayer], adapter_names: Sequence[str]) -> Sequence[str]:
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"`adapter_names` must be a list with one adapter name per row, got {adapter_names!r}.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SealLayer) and not module.disable_adapters:
            acting = module._get_available_adapters() & {*module.active_adapters, *module.merged_adapters}
            if acting:
                raise ValueError(
                    f"Cannot pass `adapter_names` while adapters of other methods act on every row: {sorted(acting)}. "
                    "Switch them off, `seal_peft.activate(model, [])`, and give each row a SEAL adapter."
                )
    known = {name for layer in layers for name in layer.seal_alpha}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
            f"Known are {', '.join(sorted(known))} and {BASE}."
        )
    return adapter_names


def _gather(layer: SealLayer, rows: Sequence[str]) -> Tensor | None:
    """Scales of all rows in one layer, `(rows, heads, 1 or head_dim)`; `None` where no adapter is left at all."""
    index: dict[str, int] = {}
    for name in rows:
        if name in layer.seal_delta:
            index.setdefault(name, len(index) + 1)
    if not index:  # ones, because without row scales the layer would apply its active adapter
        others = [layer.offset(name) for name in layer.seal_delta]
        ones = torch.ones(len(rows), layer.geometry.num_heads, 1, device=others[0].device) if others else None
        return None if ones is None else layer.spread(ones)
    with torch.no_grad():
        offsets: list[Tensor] = [layer.offset(name) for name in index]
        wide = max(offset.dim() for offset in offsets)
        offsets = [offset if offset.dim() == 2 else offset.unsqueeze(-1) for offset in offsets]
        if wide == 2:
            offsets = [offset.expand(layer.geometry) for offset in offsets]
        table = torch.stack([torch.zeros_like(offsets[0]), *offsets]).float()
        alphas = torch.tensor([0.0, *(layer.seal_alpha[name] for name in index)], device=table.device)
        table = 1 + alphas.view(-1, 1, 1) * table
        return layer.spread(table)[torch.tensor([index.get(name, 0) for name in rows], device=table.device)]


def _with_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]) -> Any:
    return args, {**kwargs, "adapter_names": list(adapter_names)}
