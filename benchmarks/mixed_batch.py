"""Many adapters in one batch, SEAL-H against the base and PEFT LoRA r=4: milliseconds per decode step, and memory.

python benchmarks/mixed_batch.py --size 8b --output results/mixed-batch-8b.json

Every row of the batch asks for another adapter. The cost of one more adapter in flight is measured at the same number
of rows: all of them with different adapters, against all with the same one. LoRA's layers run adapter after adapter,
so it is raised until a step takes longer than `--step_limit` or the memory is full; the file says which.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from shapes import random_model
from timing import interleaved, summary
from transformers import DynamicCache

import seal_peft
from seal_peft.files import write_json
from seal_peft.provenance import provenance

SEAL, LORA = "seal-h", "lora r=4 q,k,v,o"
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def with_adapters(model: torch.nn.Module, method: str, count: int) -> PeftModel:
    """Wrap a base model with `count` adapters of random weights, named `task0`, `task1`, ..."""

    def config() -> Any:
        if method == SEAL:
            return seal_peft.SealConfig(granularity="head", init_weights=False, inference_mode=True)
        return LoraConfig(r=4, target_modules=QKVO, init_lora_weights=False, inference_mode=True)

    wrapped = get_peft_model(model, config(), adapter_name="task0")
    layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    for name in (f"task{index}" for index in range(1, count)):
        # What add_adapter does to the layers; its own walks over all modules are not what is timed here.
        wrapped.peft_config[name] = config()
        for layer in layers:
            arguments = () if method == SEAL else (4, 8)
            layer.update_layer(name, *arguments, config=wrapped.peft_config[name])
    return wrapped.eval().requires_grad_(False)


def measure(arguments: argparse.Namespace, method: str, count: int) -> dict[str, Any]:
    """Time one decode step of a batch with `count` adapters in flight, and the same step of the bare model before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = random_model(arguments.size, device)
    rows = max(count, arguments.min_rows)
    different, same = [f"task{index % count}" for index in range(rows)], ["task0"] * rows
    tokens = torch.randint(0, 500, (rows, arguments.tokens), device=device)
    cache = DynamicCache(config=base.config)
    with torch.inference_mode():
        base(tokens, past_key_values=cache, logits_to_keep=1)

        def step(model: torch.nn.Module, **kwargs: Any) -> None:
            model(tokens[:, -1:], past_key_values=cache, logits_to_keep=1, **kwargs)
            cache.crop(-1)

        def timed(**systems: Any) -> dict[str, list[float]]:
            first = interleaved(systems, repeats=1, calls=1)
            slow = max(max(milliseconds) for milliseconds in first.values()) > 1e3
            return first if slow else interleaved(systems, arguments.repeats, arguments.calls)

        times = timed(base=lambda: step(base))
        base_peak = _peak(lambda: step(base))
        before = _allocated()
        model = with_adapters(base, method, count)
        each = (_allocated() - before) / count
        times |= timed(every_call=lambda: step(model, adapter_names=different))
        times |= timed(every_call_one_adapter=lambda: step(model, adapter_names=same))
        if method == SEAL:
            # As in generate(): the rows' scales are gathered once for all steps.
            with model.base_model._enable_peft_forward_hooks(adapter_names=different):
                times |= timed(within_generate=lambda: step(model))
            with model.base_model._enable_peft_forward_hooks(adapter_names=same):
                times |= timed(within_generate_one_adapter=lambda: step(model))
        peak = _peak(lambda: step(model, adapter_names=different))
    rounds = min(map(len, times.values()))
    steps = summary({name: values[:rounds] for name, values in times.items()}, "base")
    return {
        "method": method,
        "adapters": count,
        "rows": rows,
        "step": steps,
        "adapter_bytes_each": each,
        "base_peak_gib": base_peak / 2**30,
        "peak_gib": peak / 2**30,
        "one_more_adapter": None if count == 1 else _one_more(steps, peak - base_peak, count),
    }


def _one_more(steps: dict[str, dict[str, float]], peak: float, count: int) -> dict[str, float]:
    """Cost of one more adapter in flight at the same number of rows."""
    cost = {"peak_bytes": peak / count}
    for name in ("every_call", "within_generate"):
        if name in steps:
            cost[f"{name}_us"] = 1e3 * (steps[name]["ms"] - steps[f"{name}_one_adapter"]["ms"]) / (count - 1)
    return cost


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak(run: Any) -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def _show(result: dict[str, Any]) -> None:
    steps = "  ".join(f"{name} {row['ms']:.1f}" for name, row in result["step"].items() if "one" not in name)
    more = result["one_more_adapter"] or {}
    print(
        f"{result['method']:<17} {result['adapters']:>5} adapters {result['rows']:>5} rows  ms: {steps}  "
        f"{result['adapter_bytes_each']:,.0f} bytes each, peak {result['base_peak_gib']:.2f} -> "
        f"{result['peak_gib']:.2f} GiB, one more: { ({name: round(value, 2) for name, value in more.items()}) }",
        flush=True,
    )


def main() -> None:
    """Measure, print a line for each, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b", choices=["8b", "tiny"])
    parser.add_argument("--tokens", type=int, default=128, help="tokens in each row's cache")
    parser.add_argument("--seal", type=int, nargs="*", default=[1, 16, 256, 1024])
    parser.add_argument("--lora", type=int, nargs="*", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--step_limit", type=float, default=2.0, help="seconds per step after which a method is done")
    parser.add_argument("--min_rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--output", default="results/mixed-batch.json")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    stopped: dict[str, str] = {}
    for method, counts in ((SEAL, arguments.seal), (LORA, arguments.lora)):
        for count in counts:
            try:
                results.append(measure(arguments, method, count))
                _show(results[-1])
                milliseconds = results[-1]["step"]["every_call"]["ms"]
                if milliseconds > 1e3 * arguments.step_limit:
                    stopped[method] = f"after {count} adapters: a step takes {milliseconds / 1e3:.1f} s"
            except torch.OutOfMemoryError as error:
                stopped[method] = f"at {count} adapters: {str(error).splitlines()[0]}"
            gc.collect()  # models with adapters are cycles
            report = {"arguments": vars(arguments), "results": results, "stopped": stopped, **provenance()}
            write_json(arguments.output, report)
            if method in stopped:
                print(f"{method} stopped {stopped[method]}", flush=True)
                break


if __name__ == "__main__":
    main()
