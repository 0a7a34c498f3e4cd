"""Self-Extend: is it exact on this device, what do prefill and a decode step cost, and what does training take?

Equality compares every path with one full matrix in a higher precision. Prefill and decode are interleaved with
torch's SDPA on the same model. Training is one step of SEAL-C with gradient checkpointing and loss on the last tokens.

    python benchmarks/self_extend.py --tokens 32768 --output results/self-extend-h100.json
    python benchmarks/self_extend.py --model_name_or_path tiny --tokens 512 --window 64 --repeats 1 --output t.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from shapes import random_model
from timing import interleaved, summary
from torch import Tensor
from transformers import DynamicCache

from seal_peft import SealConfig
from seal_peft.context import grouped
from seal_peft.context.self_extend import apply_self_extend
from seal_peft.files import write_json
from seal_peft.loading import load_model
from seal_peft.provenance import provenance

LABELS = 20


def attention(
    inputs: tuple[Tensor, ...], grouping: grouped.Grouping, slots: Tensor | None, positions: Tensor, grad: Tensor
) -> list[Tensor]:
    """Run one attention forward and backward; return output and gradients in fp64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = grouped.attend(*leaves, grouping, positions, slots)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return [x.double() for x in (out, *gradients)]


@contextmanager
def one_matrix() -> Iterator[None]:
    """Within the context there is no flash and one block: the definition, with full matrices."""
    with patch.object(grouped, "fits_flash", lambda *_: False), patch.object(grouped, "SCORES_PER_BLOCK", 2**62):
        yield


def equality(device: str, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Compare outputs and gradients with full matrices, for all kinds of calls."""
    rows = []
    generator = torch.Generator(device).manual_seed(seed)
    frequencies = 10000.0 ** -(torch.arange(32, device=device) / 32)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = ("whole", "chunk", "left padding", "right padding", "one query")
    for dtype, case, (group_size, window) in itertools.product(dtypes, cases, ((6, 64), (7, 45), (16, 1))):
        queries = {"chunk": tokens // 3, "one query": 1}.get(case, tokens)
        shapes = ((2, 9, queries, 64), (2, 3, tokens, 64), (2, 3, tokens, 64))
        inputs = tuple(torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
        grad = torch.randn(shapes[0], generator=generator, device=device).to(dtype)
        positions = torch.arange(tokens - queries, tokens, device=device).unsqueeze(0)
        slots = None
        if "padding" in case:
            pads = tokens // 5
            seen = torch.ones(2, tokens, dtype=torch.bool, device=device)
            seen[1, slice(0, pads) if case == "left padding" else slice(tokens - pads, tokens)] = False
            slots = torch.where(seen, torch.arange(tokens, device=device), 2 * tokens)
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            grad = grad * seen[:, None, :, None]
        exact = torch.float64 if dtype == torch.float32 else torch.float32
        with one_matrix():
            grouping = grouped.Grouping(group_size, window, frequencies, False, 64**-0.5)
            wanted = attention(tuple(x.to(exact) for x in inputs), grouping, slots, positions, grad)
        with patch.object(grouped, "SCORES_PER_BLOCK", 2 * 9 * tokens * 64):
            found = attention(inputs, grouping, slots, positions, grad)
        if slots is not None:  # the outputs of padding mean nothing
            found[0], wanted[0] = (x * (slots < tokens)[:, None, :, None] for x in (found[0], wanted[0]))
        errors = [((a - b).abs().max(), (a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "case": case,
                "group_size": group_size,
                "window": window,
                "flash": grouped.fits_flash(*inputs),
                "max_error": errors[0][0].item(),
                "relative_error": errors[0][1].item(),
                "relative_error_of_gradients": [e[1].item() for e in errors[1:]],
            }
        )
    return rows


def speed(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time prefill and a decode step, with SDPA and with Self-Extend."""
    device = next(model.parameters()).device
    tokens = torch.randint(5, 400, (1, arguments.tokens), device=device)
    applied: list[Any] = []

    def wear(system: str) -> None:
        while applied:
            applied.pop().restore()
        if system != "sdpa":
            applied.append(apply_self_extend(model, group_size=arguments.group_size, window=arguments.window))

    results = {}
    names = ("sdpa", "self-extend")
    with torch.inference_mode():
        prefill = dict.fromkeys(names, lambda: model(tokens, use_cache=False, logits_to_keep=1))
        results["prefill"] = summary(interleaved(prefill, arguments.repeats, 2, wear), "sdpa")
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, logits_to_keep=1)

        def step() -> None:
            model(tokens[:, -1:], past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)

        results["decode step"] = summary(interleaved(dict.fromkeys(names, step), arguments.repeats, 8, wear), "sdpa")
    wear("sdpa")
    for part in results.values():
        part["self-extend"]["times_sdpa"] = part["self-extend"]["ms"] / part["sdpa"]["ms"]
    return results


def training(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one training step of SEAL-C: seconds, and peak memory where there is a GPU."""
    device = next(model.parameters()).device
    settings = {"group_size": arguments.group_size, "window": arguments.window}
    extensions: dict[str, dict[str, Any]] = {
        "ntk, sdpa": {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}},
        "self-extend": {"self_extend": settings},
    }
    tokens = torch.randint(5, 400, (1, arguments.tokens), device=device)
    labels = tokens[:, -LABELS:].clone()
    results = {}
    for name, extension in extensions.items():
        adapted = get_peft_model(model, SealConfig(granularity="channel", **extension)).train()
        enable = getattr(adapted, "activation_checkpointing_enable", None) or adapted.gradient_checkpointing_enable
        enable()
        adapted.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
        seconds = []
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            loss = adapted(
                input_ids=tokens, labels=labels, shift_labels=labels, logits_to_keep=LABELS, use_cache=False
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started + 0 * loss.item())
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        results[name] = {"seconds": min(seconds), "peak_bytes": peak, "loss": loss.item()}
        model = adapted.unload()
    return results


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path",
        dest="model",
        default="smollm2",
        help="smollm2, a folder, or tiny: random weights, for a trial",
    )
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--equality_tokens", type=int, default=700)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/self-extend.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"equality": equality(device, arguments.equality_tokens)}
    for dtype in ("float32", "bfloat16", "float16"):
        rows = [row for row in results["equality"] if row["dtype"] == dtype]
        worst = max(row["relative_error"] for row in rows)
        gradients = max(error for row in rows for error in row["relative_error_of_gradients"])
        flash = sum(row["flash"] for row in rows)
        largest = max(row["max_error"] for row in rows)
        print(
            f"{dtype}: {len(rows)} cases, {flash} by flash: largest error {largest:.2g}, relative {worst:.2g}, "
            f"of gradients {gradients:.2g}"
        )
    model = random_model("tiny", device) if arguments.model == "tiny" else load_model(arguments.model).eval()
    model.requires_grad_(False)
    results |= speed(model, arguments)
    for part in ("prefill", "decode step"):
        row = results[part]["self-extend"]
        print(
            f"{part} at {arguments.tokens} tokens: sdpa {results[part]['sdpa']['ms']:.1f} ms, self-extend "
            f"{row['ms']:.1f} ms, {row['times_sdpa']:.2f} times"
        )
    results["training step"] = training(model, arguments)
    for name, row in results["training step"].items():
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
        print(f"training step at {arguments.tokens} tokens, {name}: {row['seconds']:.2f} s{peak}")
    write_json(arguments.output, {"arguments": vars(arguments), "results": results, **provenance()})


if __name__ == "__main__":
    main()
