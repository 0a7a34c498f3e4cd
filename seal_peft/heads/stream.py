"""Take the residual stream apart: what embedding, heads and MLPs wrote into it, as the head module reads it.

How a layer adds up (post-norms, multipliers, parallel branches) is found by comparing what its modules put out with
what the layer adds to the stream. A model that adds up in another way is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import HeadLayer, Heads


class Parts(NamedTuple):
    """Parts of what the head module reads at the last position, fp32.

    Attributes:
        heads: For each layer `(num_heads, hidden)`.
        mlps: `(layers, hidden)`.
        biases: `(hidden,)`: of all output projections and norms.
        embedding: `(hidden,)`.
        logits: `(vocabulary,)`: what the head module makes of them, before any scaling or softcapping of the model.
    """

    heads: list[Tensor]
    mlps: Tensor
    biases: Tensor
    embedding: Tensor
    logits: Tensor


class _Call(NamedTuple):
    """Input and output of a module at the last position, fp32."""

    input: Tensor
    output: Tensor


class _Frozen(NamedTuple):
    """A norm with its scale frozen: `y = linear(x) + bias`."""

    weight: Tensor
    centred: bool
    scale: Tensor
    bias: Tensor

    def linear(self, x: Tensor) -> Tensor:
        return self.scale * self.weight * (x - x.mean(-1, keepdim=True) if self.centred else x)


def read_parts(heads: Heads, input_ids: Sequence[int]) -> Parts:
    """Run the model and split what its head module reads at the last position.

    Args:
        heads: The heads of a model.
        input_ids: Tokens; the last one's output is split.

    Raises:
        ValueError: The model is not a residual stream of attention and MLP outputs under one last norm.
    """
    if len(heads.layers) != len(heads.blocks):
        raise _refusal(heads, f"{len(heads.blocks) - len(heads.layers)} of its layers have no attention heads")
    calls, head_inputs = _run(heads, input_ids)
    blocks = [calls[id(block)] for block in heads.blocks]
    for before, after in zip(blocks, blocks[1:], strict=False):
        if not torch.equal(before.output, after.input):
            raise _refusal(heads, "something stands between its layers")
    by_head, mlps, biases = [], [], torch.zeros_like(blocks[0].input)
    for position, layer in enumerate(heads.layers):
        own, mlp, bias = _split_block(heads, layer, calls, head_inputs[position])
        by_head.append(own)
        mlps.append(mlp)
        biases = biases + bias
    norm = _last_norm(heads, calls)
    frozen = _freeze(heads, norm, calls[id(norm)])
    head = calls[id(heads.base.get_output_embeddings())]
    # Some models scale what the norm puts out.
    factor = (head.input @ calls[id(norm)].output) / calls[id(norm)].output.square().sum()
    _check_close(heads, head.input, factor * calls[id(norm)].output, "its head does not read its last norm")

    def share(part: Tensor) -> Tensor:
        return factor * frozen.linear(part)

    return Parts(
        [share(own) for own in by_head],
        share(torch.stack(mlps)),
        share(biases) + factor * frozen.bias,
        share(blocks[0].input),
        head.output,
    )


def _run(heads: Heads, input_ids: Sequence[int]) -> tuple[dict[int, _Call], list[Tensor]]:
    """Run the model; return the calls of its layers, their direct parts, and the direct parts of the decoder."""
    calls: dict[int, _Call] = {}
    head_inputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and isinstance(output, Tensor) and given.is_floating_point():
            # A copy: some models go on to add to what a module gave them.
            calls[id(module)] = _Call(*(value.flatten(0, -2)[-1].float().clone() for value in (given, output)))

    decoder = next(module for module in heads.base.modules() if heads.blocks in module.children())
    watched = [heads.base.get_output_embeddings(), *decoder.children()]
    for block, layer in zip(heads.blocks, heads.layers, strict=True):
        watched += [block, *(child for child in block.children()), layer.attention]
    with ExitStack() as stack:
        for module in {id(module): module for module in watched if module is not heads.blocks}.values():
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        for layer in heads.layers:
            hook = layer.projection.register_forward_pre_hook(lambda module, args: head_inputs.append(args[0][0, -1]))
            stack.callback(hook.remove)
        ids = torch.tensor([list(input_ids)], device=heads.base.device)
        heads.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return calls, head_inputs


def _split_block(heads: Heads, layer: HeadLayer, calls: dict[int, _Call], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the heads, the MLP and the biases of a layer add to the stream."""
    block = heads.blocks[layer.number]
    by_head, bias = _through_projection(layer, z)
    attention = calls[id(layer.attention)].output
    added = attention
    children = [child for child in block.children() if id(child) in calls and child is not layer.attention]
    for norm in children:
        # A norm between the heads and the stream reads just what attention puts out.
        if torch.equal(calls[id(norm)].input, attention):
            frozen = _freeze(heads, norm, calls[id(norm)])
            by_head, bias, added = frozen.linear(by_head), frozen.linear(bias) + frozen.bias, calls[id(norm)].output
            break
    multiplier = float(getattr(heads.base.config.get_text_config(), "residual_multiplier", 1.0))
    rest = calls[id(block)].output - calls[id(block)].input - multiplier * added
    sizes = calls[id(block)].input.abs() + calls[id(block)].output.abs() + added.abs()
    for child in children:
        if _is_close(heads, rest, multiplier * calls[id(child)].output, sizes):
            return multiplier * by_head, multiplier * calls[id(child)].output, multiplier * bias
    raise _refusal(heads, f"layer {layer.number} adds something else than attention and the output of one more module")


def _through_projection(layer: HeadLayer, z: Tensor) -> tuple[Tensor, Tensor]:
    """Send each head alone through the output projection with its adapters; what nothing gives is the bias."""
    heads, size = layer.geometry
    alone = torch.zeros(heads + 1, heads, size, device=z.device, dtype=z.dtype)
    alone[range(heads), range(heads)] = z.view(heads, size)
    written = layer.projection(alone.flatten(1).unsqueeze(0))[0].float()
    return written[:-1] - written[-1], written[-1]


def _last_norm(heads: Heads, calls: dict[int, _Call]) -> nn.Module:
    decoder = next(module for module in heads.base.modules() if heads.blocks in module.children())
    stream = calls[id(heads.blocks[-1])].output
    for module in decoder.children():
        if id(module) in calls and torch.equal(calls[id(module)].input, stream):
            return module
    raise _refusal(heads, "no norm reads the output of its last layer")


def _freeze(heads: Heads, norm: nn.Module, call: _Call) -> _Frozen:
    """Find by a few probes what a norm is when its scale is frozen, whatever its class."""
    probe: Callable[[Tensor], Tensor] = copy.deepcopy(norm).float().forward  # past any hooks
    ones = torch.ones_like(call.input)
    bias = probe(torch.zeros_like(ones))
    centred = torch.allclose(probe(ones), bias, atol=1e-5)
    alternating = ones.clone()
    alternating[1::2] = -1.0  # its mean is 0 and its mean square 1, so any norm leaves its size
    weight = (probe(alternating) - bias) * alternating
    frozen = _Frozen(weight, centred, torch.ones((), device=ones.device), bias)
    direction, wanted = frozen.linear(call.input), call.output - bias
    frozen = frozen._replace(scale=(direction @ wanted) / direction.square().sum())
    _check_close(
        heads, frozen.linear(call.input) + bias, call.output, f"its {type(norm).__name__} does more than scale"
    )
    return frozen


def _is_close(heads: Heads, a: Tensor, b: Tensor, sizes: Tensor) -> bool:
    # Sums are rounded to the dtype of the model, in proportion to their terms.
    tolerance = 1e-4 if heads.base.dtype == torch.float32 else 2e-2
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (sizes + b.abs()) + 1e-6).all())


def _check_close(heads: Heads, a: Tensor, b: Tensor, why: str) -> None:
    if not _is_close(heads, a, b, a.abs().amax().expand_as(a)):
        raise _refusal(heads, why)


def _refusal(heads: Heads, why: str) -> ValueError:
    return ValueError(
        f"The direct effect has no meaning for {type(heads.base).__name__}: {why}, so its parts do not sum to the "
        "logit. Leave direct_effect out of --scores; the others do not need it."
    )
