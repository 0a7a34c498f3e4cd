"""The part `speed` of benchmarks/heads.py: time of the maps, and their values against full forward passes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from line_samples import samples_of
from shapes import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from seal_peft.files import write_json
from seal_peft.heads import EncodedSample, encode_samples, find_heads, gradient_map, pruning_map, without_head
from seal_peft.heads.inputs import collate, score_logits
from seal_peft.heads.layers import Heads, scoring
from seal_peft.loading import load_model, load_tokenizer
from seal_peft.provenance import provenance

FLOAT32 = 1024  # tokens up to which maps are compared in float32, too; beyond, that takes minutes
# What torch tries first for a causal text on an H100 or H200.
PREFERRED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time the maps of a model against full forward passes, and compare values on some heads.

    Times and each comparison of a length are pieces: those that an earlier call finished are not measured again.
    """
    if options.size:
        model = random_model(options.size, "cuda" if torch.cuda.is_available() else "cpu")
        ids = torch.randint(3, 500, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        row = EncodedSample("random", options.tokens, ids, [-100] * (len(ids) - 5) + ids[-5:], [1])
        return {str(options.tokens): speed_of(options, find_heads(model), {"one sample": [row]})}
    return {str(length): speed_at(options, length) for length in options.lengths}


def speed_at(options: argparse.Namespace, length: int) -> dict[str, Any]:
    """Times and comparisons at one length."""
    tokenizer = load_tokenizer(options.model)
    rows = {
        f"{contexts} contexts": encode_samples(samples_of(options, length, contexts), tokenizer)
        for contexts in dict.fromkeys((options.contexts, options.num_samples))
    }

    def found(dtype: str) -> Heads:
        return find_heads(load_model(options.model, dtype))

    result = piece(options, f"{length}-times", lambda: speed_of(options, found(options.dtype), rows))
    result["equality"] = {}
    usual = str(found(options.dtype).base.dtype).removeprefix("torch.")
    for dtype in dict.fromkeys((usual, *(["float32"] if length <= FLOAT32 else []))):
        result["equality"][dtype] = {
            name: piece(
                options,
                f"{length}-{dtype}-{name}",
                lambda own=own, dtype=dtype: equality(found(dtype), own, options.check_heads),
            )
            for name, own in rows.items()
        }
    return result


def piece(options: argparse.Namespace, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a piece of the measurement, with its source, from the output folder if it is there.

    Raises:
        SystemExit: The piece that is there was measured with other settings.
    """
    path = options.output_dir / "speed" / f"{name.replace(' ', '-')}.json"
    names = ("model", "num_samples", "contexts", "check_heads", "batch_tokens", "activation_checkpointing")
    settings = {name: getattr(options, name) for name in names}
    if not path.is_file():
        write_json(path, {"settings": settings, "result": {**measure(), "source": provenance()}})
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["settings"] != settings:
        raise SystemExit(f"{path} was measured with {known['settings']}, not {settings}. Choose another --output_dir.")
    return known["result"]


def speed_of(options: argparse.Namespace, heads: Heads, rows: dict[str, list[EncodedSample]]) -> dict[str, Any]:
    """Time each map, in seconds, and full passes: with logits of the answer only, the cheapest there are."""
    some = next(iter(rows.values()))
    batches = [collate([row], heads.base.device)[0] for row in some]
    with torch.inference_mode():
        for batch in batches[:2]:
            heads.model(**batch)
        kept = [seconds(lambda b=b: heads.model(**b)) for b in batches]
    with scoring(heads):
        both = [seconds(lambda b=b: forward_backward(heads, b)) for b in (batches[0], *batches)][1:]
    count = sum(layer.geometry.num_heads for layer in heads.layers)
    naive = count * len(some) * median(kept)
    result: dict[str, Any] = {
        "heads": count,
        "samples": len(some),
        "forward": {"answer_logits": median(kept)},
        "forward_backward": median(both),
        "naive_pruning": naive,
    }
    gradient_map(heads, some[:1], activation_checkpointing=options.activation_checkpointing)
    for sites in (["output"], ["query"], ["output", "query"]):
        took = seconds(lambda s=sites: gradient_map(heads, some, s, options.activation_checkpointing))
        result[f"gradient_{'_'.join(sites)}"] = {
            "seconds": took,
            "forwards_per_sample": took / len(some) / median(kept),
            "forward_backwards_per_sample": took / len(some) / median(both),
        }
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for name, own in rows.items():
        took = seconds(lambda own=own: pruning_map(heads, own, batch_tokens=options.batch_tokens))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        result[f"pruning, {name}"] = {"seconds": took, "share_of_naive": took / naive, "peak_bytes": peak}
        print(f"{name}: {took:.1f} s, {took / naive:.3f} of {naive:.1f} s", flush=True)
    return result


def forward_backward(heads: Heads, batch: dict[str, Any]) -> None:
    """Run forward, and backward to what enters the first layer: the least that training of all layers takes."""
    ids = batch["input_ids"]
    embedded = heads.base.get_input_embeddings()(ids).detach().requires_grad_()
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    logits = heads.model(inputs_embeds=embedded, **others).logits
    torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded)


def seconds(run: Callable[[], object]) -> float:
    """Time one call, to the end of what it started on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def equality(heads: Heads, rows: list[EncodedSample], count: int) -> dict[str, Any]:
    """Compare a map with full forward passes, a head and a sample at a time, on heads spread over the layers.

    Beside it stands what the full passes differ from themselves: `noise` when each sample stands in a batch twice,
    `default_attention` with the attention kernel that torch prefers. In `unsplit_products` the map and the passes run
    without matrix products that are split along their sum, as torch splits small ones.
    """
    places = torch.linspace(0, heads.shape[0] * heads.shape[1] - 1, count).long().tolist()
    alone = naive_values(heads, rows, places)
    found: dict[str, Any] = {"heads": count, **largest(mapped_values(heads, rows, places) - alone)}
    found["noise"] = largest(naive_values(heads, rows, places, copies=2) - alone)
    if heads.base.device.type == "cuda" and heads.base.dtype == torch.bfloat16:
        found["default_attention"] = largest(naive_values(heads, rows, places, attention=PREFERRED) - alone)
        with unsplit_products():
            difference = mapped_values(heads, rows, places) - naive_values(heads, rows, places)
        found["unsplit_products"] = largest(difference)
    print(f"{heads.base.dtype}: {found}", flush=True)
    return found


def largest(difference: torch.Tensor) -> dict[str, float]:
    """Largest difference of a head's value, a mean over samples, and of one sample's; share of samples without any."""
    same = (difference.abs() < 1e-5).float().mean().item()  # what fp32 logits round
    return {"mean": difference.mean(0).abs().max().item(), "sample": difference.abs().max().item(), "same": same}


@contextmanager
def unsplit_products() -> Iterator[None]:
    """Within it no matrix product on a GPU adds up parts of its sum that were computed side by side."""
    matmul = torch.backends.cuda.matmul
    allowed = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k)
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed
        torch.backends.cuda.preferred_blas_library(library)


def mapped_values(heads: Heads, rows: list[EncodedSample], places: list[int]) -> torch.Tensor:
    """Change of the log-probability without some heads, `(samples, heads)`, from a pruning map."""
    return pruning_map(heads, rows).logprob.flatten(1)[:, places]


def naive_values(
    heads: Heads, rows: list[EncodedSample], places: list[int], copies: int = 1, attention: Any = None
) -> torch.Tensor:
    """The same by a full pass for every value; with so many copies of a sample in a batch, and attention kernels."""
    values = []
    with ExitStack() as stack:
        stack.enter_context(scoring(heads))
        stack.enter_context(torch.inference_mode())
        if attention:
            stack.enter_context(sdpa_kernel(attention, set_priority=True))
        for row in rows:
            batch, labels = collate([row] * copies, heads.base.device)
            before = score_logits(heads.model(**batch).logits, labels).logprob[0]
            for place in places:
                with without_head(heads, *divmod(place, heads.shape[1])):
                    after = score_logits(heads.model(**batch).logits, labels).logprob[0]
                values.append((after - before).item())
    return torch.tensor(values).view(len(rows), len(places))
