"""One training step of a Llama-3.1-8B-shaped model: seconds and memory, by method and by memory policy.

Random weights, bf16, batch 1, loss on the last 20 tokens, logits of these alone. Part `systems` compares methods under
full checkpointing of every layer. Its frozen floor has no adapter: a function that does nothing asks for a gradient at
the input of the lowest output projection, so that the backward pass runs exactly as far as that of a scale there.
Part `policies` trains SEAL-C and changes what layers keep. Part `rates` measures the matrix products and attentions of
the model alone; the FLOP floor is a step of these that computes nothing twice.

    python benchmarks/step.py --tokens 31744 --output results/step-8b-h200.json
    python benchmarks/step.py --size tiny --tokens 64 128 --repeats 1 --output /tmp/step.json

Parts and lengths that stand in the output file already stay there; those of this run are added or replaced.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig
from rates import BACKENDS, measure_rates
from shapes import SIZES, random_model
from switch import QKVO, Switch
from timing import milliseconds, summary
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from seal_peft import SealConfig
from seal_peft.files import write_json
from seal_peft.memory.keep import Keep, Products, find_layers, run_layer, set_runners
from seal_peft.memory.measure import measure_layers
from seal_peft.memory.policy import LADDER, apply_memory_policy
from seal_peft.provenance import provenance

PARTS = ["rates", "systems", "policies"]
LABELS = 20
SEEDS = {"weights": 0, "tokens": "the length"}
FLOOR = "frozen floor"
METHODS: dict[str, Callable[[], Any]] = {
    "seal-h": lambda: SealConfig(granularity="head"),
    "seal-c": lambda: SealConfig(granularity="channel"),
    "seal-c + query": lambda: SealConfig(granularity="channel", sites=("output", "query")),
    "ia3 on the input of o_proj": lambda: IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]),
    "lora r=4 q,k,v,o": lambda: LoraConfig(r=4, target_modules=QKVO),
    "dora r=4 q,k,v,o": lambda: LoraConfig(r=4, target_modules=QKVO, use_dora=True),
}
# Longer inputs are warmed up at this length: there a step takes so long that one more would say nothing new.
WARM_UP = 32_768


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
        for name in list(self.switch.wrapped)[1:]:
            self.wear(name)
            # A rate of 0 keeps the weights, so that every step of a method must give the same gradient.
            self.optimizers[name] = torch.optim.AdamW(self.trained(), lr=0.0)

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


RECOMPUTE = "recompute all"
POLICIES: dict[str, Policy] = {
    RECOMPUTE: keep_all_layers(Keep(inputs=True)),
    "transformers, every 2nd layer": upstream(every_n_layers=2),
    "transformers, offload": upstream(offload=True),
    "low": keep_all_layers(LADDER["recompute all, inputs in host memory"]),
    "keep attention, inputs in host memory": keep_all_layers(LADDER["keep attention, inputs in host memory"], True),
    "keep inputs and attention": keep_all_layers(LADDER["keep inputs and attention"], True),
    "keep matrix products": keep_all_layers(LADDER["keep inputs, attention and matrix products"], True),
    "fast": keep_all_layers(LADDER["keep all"]),
    "auto": automatic,
}


def pin_host_memory(bench: Bench, length: int) -> None:
    """Have torch pin host memory for the inputs of all layers, which takes seconds and is done once in a training."""
    config = bench.model.config
    shape = (1, length, config.hidden_size)
    held = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=True) for _ in range(config.num_hidden_layers)]
    del held  # torch keeps it for the next who asks


def no_policy() -> None:
    """Take nothing back."""


def rounds(bench: Bench, runs: dict[str, tuple[str, Policy]], length: int, repeats: int) -> dict[str, Any]:
    """Time systems under policies in turn; each turn is warmed up by a step of its own, and may not fit."""
    input_ids = bench.tokens(length)
    warm_up = input_ids if length <= WARM_UP else bench.tokens(2048)
    times: dict[str, list[float]] = {name: [] for name in runs}
    rows: dict[str, Any] = {name: {} for name in runs}
    gradients: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, (system, policy) in runs.items():
            if rows[name].get("fits") is False:
                continue
            bench.wear(system)
            free_all()
            resident = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
            chosen, restore = None, no_policy
            try:
                chosen, restore = policy(bench, length)
                step = partial(bench.step, system, input_ids)
                bench.step(system, warm_up)
                reset_peak()
                times[name].append(milliseconds(step, min(8, max(1, 16_384 // length))))
                rows[name] = peak() | {"resident_bytes": resident, "chosen": chosen, "fits": True}
                gradients[name] = torch.cat([p.grad.flatten().float() for p in bench.trained()])
            except torch.OutOfMemoryError:
                rows[name] = {"resident_bytes": resident, "chosen": chosen, "fits": False}
            restore()
            bench.optimizers[system].zero_grad()
            print(
                f"  {name:<40} {f'{times[name][-1]:10.1f} ms' if rows[name]['fits'] else 'does not fit'}", flush=True
            )
    fitting = {name: values for name, values in times.items() if rows[name]["fits"]}
    if not fitting:
        return rows
    first = next(iter(fitting))
    return {
        name: rows[name]
        | (summary(fitting, first)[name] if name in fitting else {})
        | ({"gradient_difference": difference(gradients[name], gradients[first])} if name in fitting else {})
        for name in runs
    }


def difference(gradient: Tensor, reference: Tensor) -> float | None:
    """Return the relative difference of two gradients of the same adapter; the floor and other adapters have none."""
    if gradient.shape != reference.shape or not reference.any():
        return None
    return ((gradient - reference).norm() / reference.norm()).item()


def free_all() -> None:
    """Give cached memory back, so that no policy meets the fragments of another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Start to measure memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int | None]:
    """Return the most bytes that tensors took, and that the allocator held."""
    if not torch.cuda.is_available():
        return {"peak_bytes": None, "reserved_bytes": None}
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def measure(arguments: argparse.Namespace) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Run part after part and yield length, part and results."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(arguments.size, device)
    suffix = "" if arguments.attention == "default" else f", {arguments.attention} attention"
    for length in arguments.tokens:
        if "rates" in arguments.parts:
            yield length, "rates", measure_rates(bench.model.config, length, LABELS, device, arguments.repeats)
        for part, runs in choose(arguments):
            if part == "policies" and length > WARM_UP and device == "cuda":
                pin_host_memory(bench, length)  # a short warm-up would not
            with sdpa_kernel(BACKENDS[arguments.attention]) if suffix else nullcontext():
                yield length, part + suffix, rounds(bench, runs, length, arguments.repeats)


def choose(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, tuple[str, Policy]]]]:
    """Yield the runs of each part that was asked for."""
    if "systems" in arguments.parts:
        names = [name for name in (FLOOR, *METHODS) if name == FLOOR or name in (arguments.systems or METHODS)]
        yield "systems", {name: (name, POLICIES[RECOMPUTE]) for name in names}
    if "policies" in arguments.parts:
        names = arguments.policies or list(POLICIES)
        if not torch.cuda.is_available():
            names = [name for name in names if name != "transformers, offload"]  # it asks for pinned memory anyway
        yield "policies", {name: ("seal-c", POLICIES[name]) for name in names}


def show(length: int, part: str, rows: dict[str, Any], rates: dict[str, Any] | None) -> None:
    """Print one part as a table."""
    print(f"\n{part}, batch 1, {length:,} tokens")
    if part == "rates":
        for name, rate in rows["flop_per_second"].items():
            print(f"  {name:<40} {rate / 1e12:8.1f} TFLOP/s")
        for kernel, kinds in rows["attention_flop_per_second"].items():
            for name, rate in kinds.items():
                print(f"  {name + ', ' + kernel:<40} {rate / 1e12:8.1f} TFLOP/s")
        print(f"  default attention {rows['default attention']}; floor {rows['floor_ms'] / 1e3:.3f} s")
        return
    for name, row in rows.items():
        if not row["fits"]:
            print(f"  {name:<40} does not fit")
            continue
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:7.1f} GB"
        floor = "" if rates is None else f"{row['ms'] / rates['floor_ms']:6.2f} x FLOP floor"
        first = f"{row['overhead_percent']:+6.1f} %"
        print(
            f"  {name:<40} {row['ms'] / 1e3:8.3f} s {1e3 * length / row['ms']:8.0f} tokens/s {first} {memory} {floor}"
        )


def main() -> None:
    """Measure, print tables, write the file after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16_384, 31_744])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--systems", nargs="+", choices=list(METHODS), help="methods beside the floor; default: all")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), help="default: all")
    parser.add_argument("--attention", default="default", choices=["default", *BACKENDS])
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--output", default="results/step.json")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"size": arguments.size, "labels": LABELS, "runs": [], "results": {}}
    if Path(arguments.output).is_file():
        record = json.loads(Path(arguments.output).read_text(encoding="utf-8"))
        if (record["size"], record["labels"]) != (arguments.size, LABELS):
            raise SystemExit(f"{arguments.output} holds another model; give another --output.")
    record["runs"].append({"arguments": vars(arguments), **provenance(), "seeds": SEEDS})
    for length, part, rows in measure(arguments):
        parts = record["results"].setdefault(str(length), {})
        parts[part] = {"run": len(record["runs"]) - 1, "rows": rows}
        show(length, part, rows, parts["rates"]["rows"] if "rates" in parts else None)
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
