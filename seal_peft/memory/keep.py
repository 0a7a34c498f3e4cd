"""What a decoder layer keeps on its device from its forward to its backward pass; it recomputes the rest.

The layers are those that transformers checkpoints: a `GradientCheckpointingLayer` hands its forward to the function in
`_gradient_checkpointing_func` while `gradient_checkpointing` is set and the model trains. So no model code is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .offload import InputsOnHost

_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm"}
_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"

# Runs one layer: gets the layer's forward, with its keyword arguments bound, and its positional arguments.
Runner = Callable[..., Any]


class Keep(NamedTuple):
    """What stays on the device. Without `inputs` a GPU's layer inputs wait in host memory.

    Attributes:
        inputs: The input of the layer, from which everything else can be recomputed.
        attention: Outputs of the attention kernels, so that none runs twice.
        matmuls: Outputs of matrix products, so that none runs twice.
        everything: All that autograd saves; nothing is recomputed, and the other fields do not matter.
    """

    inputs: bool = False
    attention: bool = False
    matmuls: bool = False
    everything: bool = False


def find_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model that transformers can checkpoint, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def kind_of(op: Any) -> str | None:
    """Return the field of `Products` that an operator belongs to, or `None`.

    A whole attention is one of torch's fused kernels or of the flash-attn package's; a matrix product counts if it
    allocates its output.
    """
    if "attention" in str(op) or "flash_attn" in str(op):
        return "attention"
    _, name, overload = (str(op) + "..").split(".")[:3]
    return "matmuls" if name in _MATRIX_PRODUCTS and overload == "default" else None


class Products(NamedTuple):
    """Which outputs of a layer can be kept, by their place among the operators of their kind."""

    attention: frozenset[int] = frozenset()
    matmuls: frozenset[int] = frozenset()


class _Selection:
    """Says for one run of one layer, operator by operator, what is saved."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.seen = Counter[tuple[str, bool]]()  # operators of a kind so far, in the first and in the recomputing pass

    def __call__(self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = kind_of(op)
        if kind is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        place = self.seen[kind, context.is_recompute]
        self.seen[kind, context.is_recompute] += 1
        kept = place in getattr(self.products, kind)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_layer(keep: Keep, products: Products, forward: Callable[..., Any], *args: Any) -> Any:
    """Run the forward of a layer so that just what `keep` names stays.

    Args:
        keep: What stays.
        products: What the layer has of attention and matrix products to keep.
        forward: The layer's forward.
        args: Its positional arguments, hidden states of shape `(rows, tokens, features)` first.
    """
    if keep.everything:
        return forward(*args)
    chosen = Products(*(part if wanted else frozenset() for part, wanted in zip(products, keep[1:3], strict=True)))
    contexts = partial(create_selective_checkpoint_contexts, _Selection(chosen)) if any(chosen) else noop_context_fn
    inputs: AbstractContextManager[Any] = nullcontext() if keep.inputs else InputsOnHost()
    with inputs:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


def set_runners(layers: Sequence[GradientCheckpointingLayer], runners: Sequence[Runner | None]) -> Callable[[], None]:
    """Have every layer run by its runner while it trains, or by itself where that is `None`.

    Returns:
        A function that puts back what was set before.
    """
    before = [{name: layer.__dict__.get(name) for name in (_SWITCH, _FUNCTION)} for layer in layers]
    for layer, runner in zip(layers, runners, strict=True):
        setattr(layer, _SWITCH, runner is not None)
        setattr(layer, _FUNCTION, runner)

    def restore() -> None:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if value is None:
                    layer.__dict__.pop(name, None)
                else:
                    setattr(layer, name, value)

    return restore
