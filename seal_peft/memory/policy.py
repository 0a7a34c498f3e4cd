"""The memory policy of a training: by name, or the fastest that fits into the memory at hand."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import psutil
import torch
from torch import nn

from .keep import Keep, Products, find_layers, run_layer, set_runners
from .measure import LayerCost, measure_layers

Policy = Literal["auto", "fast", "low"]

# From the least memory to the least time. Per byte, attention outputs save the most time at long lengths; the last
# rung saves but the cheap operations between matrix products. Copies to host memory run beside the computation.
LADDER = {
    "recompute all, inputs in host memory": Keep(),
    "keep attention, inputs in host memory": Keep(attention=True),
    "keep inputs and attention": Keep(inputs=True, attention=True),
    "keep inputs, attention and matrix products": Keep(inputs=True, attention=True, matmuls=True),
    "keep all": Keep(everything=True),
}
# What `auto` climbs. Host memory is for those who ask for it: what it frees is worth a hundredth of a step.
AUTO = (Keep(inputs=True), *list(LADDER.values())[2:])
_NAMES = {keep: name for name, keep in LADDER.items()} | {AUTO[0]: "recompute all"}
# Gradients and temporaries of the layer whose backward pass runs, as a share of what it saves: it stands there in
# full once it is recomputed, and with it the gradients of its widest tensors.
_ONE_LAYER = 1.75
# Share of the memory for what nothing counts: fragments, libraries' workspaces, the optimiser, logits.
_MARGIN = 0.08


@dataclass(frozen=True)
class Plan:
    """What every layer keeps, for batches of any size up to that of the measurement.

    Attributes:
        costs: What the layers would keep in bytes, at `tokens`.
        tokens: Tokens of the measured batch, all rows together.
        budget: Bytes that may be filled.
    """

    costs: tuple[LayerCost, ...]
    tokens: int
    budget: int

    def bytes_for(self, keeps: tuple[Keep, ...], tokens: int) -> int:
        """Return the memory that a step needs beyond the weights, for a batch of so many tokens."""
        kept = sum(cost.of(keep) for cost, keep in zip(self.costs, keeps, strict=True))
        return round((kept + _ONE_LAYER * max(cost.everything for cost in self.costs)) * tokens / self.tokens)

    def choose(self, tokens: int) -> tuple[Keep, ...]:
        """Climb the ladder rung by rung, the upper layers first, whose memory the backward pass frees first."""
        first, *rungs = AUTO
        keeps = [first] * len(self.costs)
        free = self.budget - self.bytes_for(tuple(keeps), tokens)
        for rung in rungs:
            for index in reversed(range(len(keeps))):
                more = self.costs[index].of(rung) - self.costs[index].of(keeps[index])
                if more * tokens <= free * self.tokens:
                    free -= round(more * tokens / self.tokens)
                    keeps[index] = rung
        return tuple(keeps)


@dataclass
class AppliedMemory:
    """A memory policy in force on a model.

    Attributes:
        policy: Its name.
        summary: What it chose and why, in a line.
        plan: For `auto`, the measurement behind it.
        restore: Puts back how the model was checkpointed before.
    """

    policy: Policy
    summary: str
    plan: Plan | None
    restore: Callable[[], None] = field(repr=False)


def apply_memory_policy(model: nn.Module, policy: Policy = "auto", *, tokens: int = 0, rows: int = 1) -> AppliedMemory:
    """Choose what the layers of a model keep for the backward pass and what they recompute.

    Gradients are the same under every policy. Leave the Trainer's own `activation_checkpointing` off, which would
    replace this one (TRL turns it on by default).

    Args:
        model: A causal language model of transformers on its device, with the adapters that will be trained.
        policy: `fast` keeps everything. `low` keeps nothing: layer inputs wait in pinned host memory, everything
            else is recomputed. `auto` keeps as much as fits into the free memory of the device, layer by layer, and
            for shorter batches more.
        tokens: For `auto`, tokens of the longest row: it runs one forward pass of that length.
        rows: For `auto`, rows of a batch, which comes without a mask, as from `AnswerCollator`.

    Returns:
        A handle that says what was chosen and takes it back.

    Raises:
        ValueError: The policy is not known, `auto` lacks the length, or the model's layers cannot be checkpointed.

    Example:
        ```python
        memory = apply_memory_policy(model, "auto", tokens=31744)
        print(memory.summary)
        trainer.train()
        ```
    """
    if policy not in get_args(Policy):
        raise ValueError(f"memory policy {policy!r} is not known. Use one of: {', '.join(get_args(Policy))}.")
    if policy == "auto" and (tokens < 1 or rows < 1):
        raise ValueError(f"tokens={tokens} and rows={rows} were given; `auto` needs the size of the largest batch.")
    layers = find_layers(model)
    if policy == "fast" or (policy == "auto" and not layers):
        why = "" if layers else ", since transformers cannot checkpoint this model"
        restore = set_runners(layers, [None] * len(layers))
        return AppliedMemory(policy, f"{policy}: all layers keep all{why}", None, restore)
    if not layers:
        raise ValueError("transformers cannot checkpoint the layers of this model. Use the memory policy `fast`.")
    if policy == "low":
        keep = LADDER["recompute all, inputs in host memory"]
        restore = set_runners(layers, [functools.partial(run_layer, keep, Products())] * len(layers))
        return AppliedMemory(policy, f"low: all layers {_NAMES[keep]}", None, restore)
    plan = Plan(tuple(measure_layers(model, rows, tokens)), rows * tokens, free_memory(model))
    choose = functools.cache(plan.choose)

    def run(index: int, forward: Callable[..., Any], *args: Any) -> Any:
        hidden = args[0]
        keep = choose(hidden.shape[0] * hidden.shape[1])[index]
        return run_layer(keep, plan.costs[index].products, forward, *args)

    restore = set_runners(layers, [functools.partial(run, index) for index in range(len(layers))])
    return AppliedMemory(policy, _describe(plan), plan, restore)


def _describe(plan: Plan) -> str:
    keeps = plan.choose(plan.tokens)
    parts = ", ".join(f"{count} of {len(keeps)} layers {_NAMES[keep]}" for keep, count in Counter(keeps).items())
    need = plan.bytes_for(keeps, plan.tokens)
    text = f"auto: at {plan.tokens:,} tokens {parts}; takes {need / 2**30:.1f} of {plan.budget / 2**30:.1f} GiB"
    return text if need <= plan.budget else f"{text}, so it may not fit"


def free_memory(model: nn.Module) -> int:
    """Return the bytes that a training may fill on the model's device, a margin left out."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        memory = psutil.virtual_memory()
        return int(memory.available - _MARGIN * memory.total)
    torch.cuda.empty_cache()  # what the measurement left behind
    free, total = torch.cuda.mem_get_info(device)
    return int(free - _MARGIN * total)
