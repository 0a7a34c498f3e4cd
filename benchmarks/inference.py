"""Inference overhead of SEAL against the base, PEFT's IA3 and LoRA: prefill, eager decode, and decode as a CUDA graph.

python benchmarks/inference.py --size 8b --tokens 8192 --output results/inference-8b-h200.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from shapes import random_model
from switch import QKVO, Switch
from timing import interleaved, summary
from torch import nn
from transformers import DynamicCache, StaticCache

import seal_peft
from seal_peft.files import write_json
from seal_peft.provenance import provenance

METHODS = {
    "seal-h": lambda: seal_peft.SealConfig(granularity="head", init_weights=False),
    "seal-c": lambda: seal_peft.SealConfig(granularity="channel", init_weights=False),
    "seal-h and query": lambda: seal_peft.SealConfig(sites=("output", "query"), init_weights=False),
    "ia3 on the input of o_proj": lambda: IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]),
    "lora r=4 q,k,v,o": lambda: LoraConfig(r=4, target_modules=QKVO, init_lora_weights=False),
}


def make_switch(model: nn.Module) -> Switch:
    """Build all systems: the base, the adapters, and SEAL merged."""
    switch = Switch(model, METHODS)
    for modules in switch.wrapped.values():
        for module in modules.values():
            module.eval().requires_grad_(False)
    for name in ("seal-h", "seal-c"):
        switch.wrapped[f"{name} merged"] = merge(switch, METHODS[name]())
    return switch


def merge(switch: Switch, config: PeftConfig) -> dict[str, nn.Module]:
    """Return plain projections with an adapter's scales in their weights."""
    merged = get_peft_model(switch.model, config).eval()
    merged.merge_adapter()
    plain = copy.copy(switch.wrapped["base"])
    for path, module in switch.projections().items():
        if hasattr(module, "get_base_layer"):
            plain[path] = copy.deepcopy(module.get_base_layer())
    merged.unmerge_adapter()
    switch.undress()
    return plain


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Time part after part and yield its name with its summaries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    switch = make_switch(random_model(arguments.size, device))
    tokens = torch.randint(0, 500, (1, arguments.tokens), device=device)
    with torch.inference_mode():

        def timed(run: Callable[[], object], calls: int) -> dict[str, dict[str, float]]:
            systems = dict.fromkeys(switch.wrapped, run)
            return summary(interleaved(systems, arguments.repeats, calls, prepare=switch.wear), "base")

        model = switch.model
        yield "prefill", timed(lambda: model(tokens, use_cache=False, logits_to_keep=1), arguments.calls)

        cache = DynamicCache(config=switch.model.config)
        switch.wear("base")(tokens, past_key_values=cache, logits_to_keep=1)

        def decode() -> None:
            model(tokens[:, -1:], past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)

        yield "decode, eager", timed(decode, 4 * arguments.calls)
        if device == "cuda":
            del cache
            graphs = decode_graphs(switch, tokens)
            times = interleaved(graphs, arguments.repeats, 10 * arguments.calls)
            yield "decode, CUDA graph", summary(times, "base")


def decode_graphs(switch: Switch, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Capture one decode step per system over one static cache: what is left is the work of the GPU itself."""
    length = tokens.shape[1]
    cache = StaticCache(config=switch.model.config, max_cache_len=length + 8)
    switch.wear("base")(tokens, past_key_values=cache, logits_to_keep=1)
    last, position = tokens[:, -1:].clone(), torch.tensor([[length]], device=tokens.device)

    def step() -> None:
        switch.model(last, past_key_values=cache, position_ids=position, logits_to_keep=1)
        for layer in cache.layers:  # every step writes the same slot
            layer.cumulative_length.fill_(length)

    replays: dict[str, Callable[[], object]] = {}
    for name in switch.wrapped:
        switch.wear(name)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replays[name] = graph.replay
    return replays


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b", choices=["8b", "tiny"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--calls", type=int, default=5, help="prefill calls per round; decode takes more")
    parser.add_argument("--output", default="results/inference.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for part, systems in measure(arguments):
        results[part] = systems
        print(f"\n{part}, batch 1, {arguments.tokens} tokens")
        for name, row in systems.items():
            print(f"  {name:<28} {row['ms']:9.3f} ms   {row['overhead_percent']:+6.2f} %")
        write_json(arguments.output, {"arguments": vars(arguments), "results": results, **provenance()})


if __name__ == "__main__":
    main()
