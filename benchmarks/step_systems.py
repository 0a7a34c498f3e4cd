"""What benchmarks/step.py compares: a model that wears one method at a time, and policies of what its layers keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import IA3Config, LoraConfig
from shapes import random_model
from switch import QKVO, Switch
from torch import Tensor, nn

from seal_peft import SealConfig
from seal_peft.memory.keep import Keep, Products, find_layers, run_layer, set_runners
from seal_peft.memory.measure import measure_layers
from seal_peft.memory.policy import LADDER, apply_memory_policy

LABELS = 20
FLOOR = "frozen floor"
METHODS: dict[str, Callable[[], Any]] = {
    "seal-h": lambda: SealConfig(granularity="head"),
    "seal-c": lambda: SealConfig(granularity="channel"),
    "seal-c + query": lambda: SealConfig(granularity="channel", sites=("output", "query")),
    "ia3 on the input of o_proj": lambda: IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]),
    "lora r=4 q,k,v,o": lambda: LoraConfig(r=4, target_modules=QKVO),
    "dora r=4 q,k,v,o": lambda: LoraConfig(r=4, target_modules=QKVO, use_dora=True),
}


class Nothing(torch.autograd.Function):
    """Hands its input on, and asks for the gradient that a scale there would need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, asks: Tensor) -> Tensor:
        """Do nothing."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        """Do nothing."""
        return (grads[0] if ctx.needs_input_grad[0] else None), grads[0].new_zeros(1, dtype=torch.float32)


class Asking(nn.Module):
    """A projection behind `Nothing`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.asks = nn.Parameter(torch.zeros(1, device=next(base_layer.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        """Run the projection."""
        return self.base_layer(Nothing.apply(x, self.asks))


class Bench:
    """A model with all systems, and one optimiser for each."""

    def __init__(self, size: str, device: str) -> None:
        self.model = random_model(size, device)
        self.device = device
        self.switch = Switch(self.model, METHODS)
        base = self.switch.wrapped.pop("base")
        asking = base | {"0.o_proj": Asking(base["0.o_proj"])}
        self.switch.wrapped = {"base": base, FLOOR: asking, **self.switch.wrapped}
        self.optimizers = {}
        self.gradients: dict[tuple[str, int], Tensor] = {}
        for name in list(self.switch.wrapped)[1:]:
            self.wear(name)
            # A rate of 0 keeps the weights, so that every step of a method must give the same gradient.
            self.optimizers[name] = torch.optim.AdamW(self.trained(), lr=0.0)
            # What the first step allocates for good would otherwise lie in the midst of the memory of a later one.
            self.step(name, self.tokens(128))
            self.optimizers[name].zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wear(self, system: str) -> None:
        """Put one system in place, ready to train."""
        self.switch.wear(system)
        self.model.train()

    def trained(self) -> list[nn.Parameter]:
        """Return what the system in place trains."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, system: str, input_ids: Tensor) -> None:
        """Run forward, backward and optimiser once."""
        labels = input_ids[:, -LABELS:]
        self.optimizers[system].zero_grad()
        self.model(
            input_ids=input_ids, labels=labels, shift_labels=labels, logits_to_keep=LABELS, use_cache=False
        ).loss.backward()
        self.optimizers[system].step()

    def warm_up(self, system: str, input_ids: Tensor) -> None:
        """Step with the two lowest layers alone: every kernel at the true length, in a small share of the time."""
        config = self.model.config
        layers, config.num_hidden_layers = config.num_hidden_layers, 2
        try:
            self.step(system, input_ids)
        finally:
            config.num_hidden_layers = layers

    def gradient_difference(self, system: str, length: int) -> float | None:
        """Return the relative difference of the gradient to the first one of the system at this length."""
        gradient = torch.cat([p.grad.flatten().float() for p in self.trained() if p.grad is not None])
        reference = self.gradients.setdefault((system, length), gradient)
        if gradient is reference or not reference.any():  # the floor has no gradient
            return None
        return ((gradient - reference).norm() / reference.norm()).item()

    def tokens(self, length: int) -> Tensor:
        """Return random token ids, the same for the same length."""
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(0, self.model.config.vocab_size, (1, length), generator=generator)
        return ids.to(self.device)


# Puts itself in force for batches of one row of so many tokens; returns what it chose, and how to take it back.
Policy = Callable[[Bench, int], tuple[str | None, Callable[[], None]]]


def keep_all_layers(keep: Keep, measured: bool = False) -> Policy:
    """Make a policy that keeps the same in every layer."""

    def apply(bench: Bench, length: int) -> tuple[None, Callable[[], None]]:
        layers = find_layers(bench.model)
        products = [Products()] * len(layers)
        if measured:
            products = [cost.products for cost in measure_layers(bench.model, 1, min(length, 256))]
        return None, set_runners(layers, [partial(run_layer, keep, product) for product in products])

    return apply


def upstream(**settings: Any) -> Policy:
    """Make a policy of transformers' own checkpointing."""

    def apply(bench: Bench, length: int) -> tuple[None, Callable[[], None]]:
        layers = find_layers(bench.model)
        restore = set_runners(layers, [run_layer] * len(layers))  # remembers what was set
        enable = getattr(bench.model, "activation_checkpointing_enable", bench.model.gradient_checkpointing_enable)
        enable(**settings)
        bench.model.disable_input_require_grads()  # as in all other policies, no graph below the lowest scale
        return None, restore

    return apply


def automatic(bench: Bench, length: int) -> tuple[str, Callable[[], None]]:
    """Apply the package's policy `auto`."""
    applied = apply_memory_policy(bench.model, "auto", tokens=length)
    return applied.summary, applied.restore


# Of all systems; `seal-c` among them is what the policies are compared with.
RECOMPUTE = keep_all_layers(Keep(inputs=True))
POLICIES: dict[str, Policy] = {
    "auto": automatic,
    "low": keep_all_layers(LADDER["recompute all, inputs in host memory"]),
    "fast": keep_all_layers(LADDER["keep all"]),
    "keep matrix products": keep_all_layers(LADDER["keep inputs, attention and matrix products"], True),
    "keep inputs and attention": keep_all_layers(LADDER["keep inputs and attention"], True),
    "transformers, every 2nd layer": upstream(every_n_layers=2),
    "transformers, offload": upstream(offload=True),
    "keep attention, inputs in host memory": keep_all_layers(LADDER["keep attention, inputs in host memory"], True),
}
ON_HOST = [name for name in POLICIES if name == "low" or "offload" in name or "host" in name]
