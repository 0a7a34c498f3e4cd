"""Many SEAL adapters in one batch against the base and PEFT LoRA: seconds per decode step and memory.

python benchmarks/mixed_batch.py --size 8b --output results/mixed-batch-8b-h200.json

Every row of the batch asks for another adapter. LoRA loops over the adapters of a batch and holds A and B for each, so
it is measured as far as it goes within the time limit.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shapes import random_model
from timing import interleaved, summary
from transformers import DynamicCache

import seal_peft
from seal_peft.files import write_json
from seal_peft.provenance import provenance

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def with_adapters(model: torch.nn.Module, method: str, count: int) -> PeftModel:
    """Wrap a base model with `count` adapters of random weights, named `task0`, `task1`, ..."""

    def config() -> Any:
        if method == "seal-h":
            return seal_peft.SealConfig(granularity="head", init_weights=False, inference_mode=True)
        return LoraConfig(r=4, target_modules=QKVO, init_lora_weights=False, inference_mode=True)

    wrapped = get_peft_model(model, config(), adapter_name="task0")
    layers = [module for module in wrapped.modules() if isinstance(module, seal_peft.SealLayer)]
    for index in range(1, count):
        if method == "seal-h":
            # What add_adapter does to the layers; its own walks over all modules are not what is timed here.
            wrapped.peft_config[f"task{index}"] = config()
            for layer in layers:
                layer.update_layer(f"task{index}", wrapped.peft_config[f"task{index}"])
        else:
            wrapped.add_adapter(f"task{index}", config())
    return wrapped.eval().requires_grad_(False)


def measure(arguments: argparse.Namespace, method: str, count: int) -> dict[str, Any]:
    """Time one decode step of a batch with `count` adapters in flight, and the same step of the bare model before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = random_model(arguments.size, device)
    rows = max(count, arguments.min_rows)
    names = [f"task{index % count}" for index in range(rows)]
    tokens = torch.randint(0, 500, (rows, arguments.tokens), device=device)
    cache = DynamicCache(config=base.config)
    with torch.inference_mode():
        base(tokens, past_key_values=cache, logits_to_keep=1)

        def step(model: torch.nn.Module, **kwargs: Any) -> None:
            model(tokens[:, -1:], past_key_values=cache, logits_to_keep=1, **kwargs)
            cache.crop(-1)

        times = interleaved({"base": lambda: step(base)}, arguments.repeats, arguments.calls)
        before = _allocated()
        model = with_adapters(base, method, count)
        each = (_allocated() - before) / count
        mixed = {"every call": lambda: step(model, adapter_names=names)}
        times |= interleaved(mixed, arguments.repeats, arguments.calls)
        if method == "seal-h":
            # As in generate(): the rows' scales are gathered once for all steps.
            with model.base_model._enable_peft_forward_hooks(adapter_names=names):
                within = {"within generate": lambda: step(model)}
                times |= interleaved(within, arguments.repeats, arguments.calls)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(model, adapter_names=names)
    return {
        "method": method,
        "adapters": count,
        "rows": rows,
        "adapter_bytes_each": each,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "step": summary(times, "base"),
    }


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b", choices=["8b", "tiny"])
    parser.add_argument("--tokens", type=int, default=128, help="tokens in each row's cache")
    parser.add_argument("--seal", type=int, nargs="*", default=[1, 16, 256, 1024])
    parser.add_argument("--lora", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--min_rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--output", default="results/mixed-batch.json")
    arguments = parser.parse_args()
    results = []
    for method, counts in (("seal-h", arguments.seal), ("lora r=4 q,k,v,o", arguments.lora)):
        for count in counts:
            result = measure(arguments, method, count)
            results.append(result)
            steps = "  ".join(f"{name} {row['ms']:.1f} ms" for name, row in result["step"].items())
            print(
                f"{method:<18} {count:>5} adapters {result['rows']:>5} rows  {steps}  "
                f"{result['adapter_bytes_each']:.0f} bytes each, peak {result['peak_gib'] or 0:.1f} GiB",
                flush=True,
            )
            write_json(arguments.output, {"arguments": vars(arguments), "results": results, **provenance()})


if __name__ == "__main__":
    main()
