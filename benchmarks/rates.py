"""What the hardware does at best: rates of the model's own matrix products and attentions, and the floor they give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from timing import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Of one time of one shape: after a pause the clocks are higher than power allows in a step of seconds, and of a few
# short calls the first launch is a part that counts.
SECONDS = 0.3


def flops(config: Any, tokens: int, labels: int) -> dict[str, float]:
    """Count a step that computes nothing twice, with all weights frozen and a scale before every output projection.

    Causal attention counts half of the matrix; its backward pass is five products for two. The lowest layer's
    backward pass ends at its output projection. Logits are those of the labelled rows.
    """
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    weights = linear_sizes(config)
    per_layer = sum(2 * tokens * a * b for a, b in weights.values())
    to_attention = sum(2 * tokens * a * b for name, (a, b) in weights.items() if name in ("q", "k", "v"))
    head = 2 * labels * hidden * vocabulary
    attention = 2 * tokens**2 * queries
    return {
        "linear forward": layers * per_layer + head,
        "linear backward": layers * per_layer - to_attention + head,
        "attention forward": layers * attention,
        "attention backward": (layers - 1) * 2.5 * attention,
    }


def linear_sizes(config: Any) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers of a Llama layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, wide),
        "up": (hidden, wide),
        "down": (wide, hidden),
    }


def measure_rates(config: Any, tokens: int, labels: int, device: str, repeats: int) -> dict[str, Any]:
    """Measure FLOP/s of one layer's matrix products and attention, and seconds that a step needs at these rates.

    Of the attention kernels that run here, the one with the fastest forward and backward pass gives the floor.
    """
    timed = partial(seconds_a_call, repeats=repeats)
    seconds = {"linear forward": 0.0, "linear backward": 0.0}
    for inputs, outputs in linear_sizes(config).values():
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        seconds["linear forward"] += timed(partial(linear, x, weight))
        x = torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)
        seconds["linear backward"] += timed(partial(torch.matmul, x, weight))
    count = flops(config, tokens, labels)
    per_layer = sum(2 * tokens * a * b for a, b in linear_sizes(config).values())
    rates = {name: per_layer / value for name, value in seconds.items()}

    attention: dict[str, dict[str, float]] = {}
    one = count["attention forward"] / config.num_hidden_layers
    for name, backend in BACKENDS.items():
        try:
            forward, backward = _attention_seconds(config, tokens, device, backend, timed)
        except RuntimeError:  # this kernel does not run here
            continue
        attention[name] = {"attention forward": one / forward, "attention backward": 2.5 * one / backward}
    best = min(attention, key=lambda name: sum(count[part] / rate for part, rate in attention[name].items()))
    used = rates | attention[best]
    return {
        "default attention": default_attention(config, tokens, device),
        "fastest attention": best,
        "flop_per_second": rates,
        "attention_flop_per_second": attention,
        "flops": count,
        "floor_ms": 1e3 * sum(count[part] / used[part] for part in count),
    }


def seconds_a_call(run: Callable[[], object], repeats: int) -> float:
    """Return seconds of one call among so many in a row as take `SECONDS`; of several times the median."""
    run()
    calls = max(1, round(1e3 * SECONDS / milliseconds(run, 1)))
    return median(milliseconds(run, calls) for _ in range(repeats)) / 1e3


def _qkv(config: Any, tokens: int, device: str) -> list[Tensor]:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    # As the model has them: the heads of a token side by side in memory.
    qkv = [torch.randn(1, tokens, n, config.head_dim, device=device, dtype=torch.bfloat16) for n in heads]
    return [x.transpose(1, 2).requires_grad_() for x in qkv]


def _attention_seconds(
    config: Any, tokens: int, device: str, backend: SDPBackend, timed: Callable[[Callable[[], object]], float]
) -> tuple[float, float]:
    qkv = _qkv(config, tokens, device)
    with sdpa_kernel(backend):
        run = partial(scaled_dot_product_attention, *qkv, is_causal=True, enable_gqa=True)
        out = run()
        grad = torch.randn_like(out)
        backward = partial(torch.autograd.grad, out, qkv, grad, retain_graph=True)
        return timed(run), timed(backward)


def default_attention(config: Any, tokens: int, device: str) -> str:
    """Return the name of the kernel that torch chooses for a causal attention of this model."""
    qkv = _qkv(config, min(tokens, 4096), device)
    chosen = SDPBackend(torch._fused_sdp_choice(*qkv, is_causal=True, enable_gqa=True))
    return chosen.name.lower().removesuffix("_attention")
