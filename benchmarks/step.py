"""One training step of a Llama-3.1-8B-shaped model: seconds and memory, by method and by memory policy.

Random weights, bf16, batch 1, loss on the last 20 tokens, logits of these alone. Part `systems` compares methods under
full checkpointing of every layer. Its frozen floor has no adapter: a function that does nothing asks for a gradient at
the input of the lowest output projection, so that the backward pass runs exactly as far as that of a scale there.
Part `policies` trains SEAL-C and changes what layers keep. Part `rates` measures the matrix products and attentions of
the model alone; the FLOP floor is a step of these that computes nothing twice.

    python benchmarks/step.py --tokens 31744 --output results/step-8b.json
    python benchmarks/step.py --size tiny --tokens 64 128 --repeats 1 --output /tmp/step.json

The rows of a part take turns, `--repeats` times, each round behind one of the floor, with which alone its turns are
compared: machines differ by more than methods do. Every turn is written to the output file at once, and none is made
again that stands there, so a killed command goes on with what is left; it measures rates and floor again, which the
last call may have done on another machine. Not to fit is a result, too; a row that ended with another error keeps its
text, fails the command after the other rows, and is tried again by the next one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rates import BACKENDS, default_attention, measure_rates
from shapes import SIZES
from step_systems import FLOOR, LABELS, METHODS, ON_HOST, POLICIES, RECOMPUTE, Bench, Policy
from timing import milliseconds
from torch.nn.attention import sdpa_kernel

from seal_peft.files import read_json, write_json
from seal_peft.provenance import provenance

PARTS = ["rates", "systems", "policies"]
SEEDS = {"weights": 0, "tokens": "the length"}
# What the memory of the GPU keeps for others than torch's allocator: modules of kernels that are loaded later.
LEFT_FREE = 2 * 2**30
Row = dict[str, Any]


def rounds(
    bench: Callable[[], Bench],
    runs: dict[str, tuple[str, Policy]],
    rows: dict[str, Row],
    length: int,
    repeats: int,
    beside: Row,
    save: Callable[[], None],
) -> list[str]:
    """Let systems under policies take turns, as far as `rows` lack them; save after each; return which ones failed.

    Args:
        bench: Builds the model, or returns it.
        runs: System and policy of each row, the floor's excepted.
        rows: What is known of each row; is added to.
        length: Tokens of a step.
        repeats: Turns of each row.
        beside: What all turns of this call have in common.
        save: Is called after each turn.
    """
    failed: list[str] = []

    def take_turn(name: str, system: str, policy: Policy, beside: Row) -> float | None:
        row = rows.setdefault(name, {"turns": [], "chosen": None})
        row.pop("error", None)
        row |= turn(bench(), system, policy, name in ON_HOST, length)
        took = row.pop("took_ms", None)
        timed = "error" not in row and row["fits"]
        if timed:
            row["turns"].append({"ms": took, **beside})
        elif "error" in row:
            failed.append(name)
        save()
        print(f"  {name:<40} {outcome(row)}", flush=True)
        return took if timed else None

    for number in range(1, repeats + 1):
        names = [name for name in left(runs, rows, number) if name not in failed]
        if names:
            floor_ms = None
            if FLOOR not in failed and rows.get(FLOOR, {}).get("fits", True):
                floor_ms = take_turn(FLOOR, FLOOR, RECOMPUTE, beside)
            for name in names:
                take_turn(name, *runs[name], {**beside, "floor_ms": floor_ms})
    return failed


def left(runs: dict[str, tuple[str, Policy]], rows: dict[str, Row], repeats: int) -> list[str]:
    """Return the rows that fit, as far as is known, and have had fewer turns."""
    known = {name: rows.get(name, {"turns": []}) for name in runs}
    return [name for name, row in known.items() if row.get("fits", True) and len(row["turns"]) < repeats]


def turn(bench: Bench, system: str, policy: Policy, on_host: bool, length: int) -> Row:
    """Time a step of a system under a policy, which may not fit or fail, and return what is known then."""
    restore: Callable[[], None] | None = None
    facts: Row = {}
    try:
        gc.collect()
        bench.wear(system)
        input_ids = bench.tokens(length)
        calls = min(8, max(1, 16_384 // length))
        facts["resident_bytes"] = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
        facts["chosen"], restore = policy(bench, length)
        if on_host and torch.cuda.is_available():
            pin_host_memory(bench, length, calls)
        take_memory()
        bench.warm_up(system, input_ids)
        before = taken_bytes()
        facts["took_ms"] = milliseconds(partial(bench.step, system, input_ids), calls)
        facts |= {"peak_bytes": peak_bytes(), "grown_bytes": taken_bytes() - before, "fits": True}
        facts["gradient_difference"] = bench.gradient_difference(system, length)
    except torch.OutOfMemoryError:
        facts["fits"] = False
    except RuntimeError as error:  # of pinning, of a library at full memory, of a kernel: the other rows go on
        facts["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        if restore is not None:
            restore()
        bench.optimizers[system].zero_grad()
    return facts


def pin_host_memory(bench: Bench, length: int, calls: int) -> None:
    """Have torch pin host memory for the inputs of all layers, which takes seconds and is done once in a training."""
    config = bench.model.config
    shape = (1, length, config.hidden_size)
    # Python may begin the next step while the GPU still reads what the last one left on the host.
    number = config.num_hidden_layers * min(2, calls)
    held = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=True) for _ in range(number)]
    del held  # torch keeps it for the next who asks


def take_memory() -> None:
    """Let torch's allocator take the free memory of the GPU in one piece now, so that it need not within a step."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if free > LEFT_FREE:
            torch.empty(free - LEFT_FREE, dtype=torch.uint8, device="cuda")
        torch.cuda.reset_peak_memory_stats()


def taken_bytes() -> int:
    """Return all bytes that the allocator has taken from the GPU so far."""
    return torch.cuda.memory_stats()["reserved_bytes.all.allocated"] if torch.cuda.is_available() else 0


def peak_bytes() -> int | None:
    """Return the most bytes that tensors took since the allocator took its memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def choose(arguments: argparse.Namespace, part: str) -> dict[str, tuple[str, Policy]]:
    """Return the runs of a part that were asked for, beside the floor."""
    if part == "systems":
        return {name: (name, RECOMPUTE) for name in arguments.systems or METHODS}
    names = arguments.policies or list(POLICIES)
    if not torch.cuda.is_available():
        names = [name for name in names if name != "transformers, offload"]  # it asks for pinned memory anyway
    return {name: ("seal-c", POLICIES[name]) for name in names}


def summarize(rows: dict[str, Row]) -> None:
    """Add to each row the median, the overhead to the floor of the same round, and times of the call's FLOP floor."""
    for row in rows.values():
        if turns := row["turns"]:
            times = [own["ms"] for own in turns]
            row |= {"ms": median(times), "min_ms": min(times), "max_ms": max(times)}
            over = [100 * (own["ms"] / own["floor_ms"] - 1) for own in turns if own.get("floor_ms")]
            row["overhead_percent"] = median(over) if over else None
            ratios = [own["ms"] / own["flop_floor_ms"] for own in turns if own["flop_floor_ms"]]
            row["flop_floors"] = median(ratios) if ratios else None


def outcome(row: Row) -> str:
    """Say in a few words how the last turn of a row ended."""
    if "error" in row:
        return row["error"]
    return f"{row['turns'][-1]['ms']:10.1f} ms" if row["fits"] else "does not fit"


def show(length: int, part: str, rows: dict[str, Any]) -> None:
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
        if not row["turns"]:
            print(f"  {name:<40} {outcome(row)}")
            continue
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:7.1f} GB"
        floor = "" if row["flop_floors"] is None else f"{row['flop_floors']:6.2f} x FLOP floor"
        over = "" if row["overhead_percent"] is None else f"{row['overhead_percent']:+6.1f} %"
        print(
            f"  {name:<40} {row['ms'] / 1e3:8.3f} s {1e3 * length / row['ms']:8.0f} tokens/s {over} {memory} {floor}"
            f"  {row['chosen'] or ''}"
        )


def main() -> None:
    """Measure what is left, print tables, write the file after every turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16_384, 31_744])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the rates come first")
    parser.add_argument("--systems", nargs="+", choices=list(METHODS), help="methods beside the floor; default: all")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), help="default: all")
    parser.add_argument("--attention", default="default", choices=["default", *BACKENDS])
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--output", default="results/step.json")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"size": arguments.size, "labels": LABELS, "runs": [], "results": {}}
    if Path(arguments.output).is_file():
        record = read_json(arguments.output)
        if (record["size"], record["labels"]) != (arguments.size, LABELS):
            raise SystemExit(f"{arguments.output} holds another model; give another --output.")
    record["runs"].append({"arguments": vars(arguments), **provenance(), "seeds": SEEDS})

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SIZES[arguments.size]
    bench = functools.cache(partial(Bench, arguments.size, device))  # built once something is left to do with it
    failed: list[str] = []
    for length in arguments.tokens:
        parts = record["results"].setdefault(str(length), {})

        # The kernel is part of the name, so that forcing the one that is the default anyway measures nothing again.
        forced = arguments.attention != "default"
        attention = arguments.attention if forced else default_attention(config, length, device)
        chosen = {
            f"{part}, {attention} attention": choose(arguments, part) for part in arguments.parts if part != "rates"
        }
        beside: Row = {"run": len(record["runs"]) - 1, "flop_floor_ms": None}
        if "rates" in arguments.parts:
            rows = {name: parts.get(name, {"rows": {}})["rows"] for name in chosen}
            if "rates" not in parts or any(left(runs, rows[name], arguments.repeats) for name, runs in chosen.items()):
                parts["rates"] = {"rows": measure_rates(config, length, LABELS, device, arguments.repeats)}
                write_json(arguments.output, record)
            show(length, "rates", parts["rates"]["rows"])
            beside["flop_floor_ms"] = parts["rates"]["rows"]["floor_ms"]
        for name, runs in chosen.items():
            rows = parts.setdefault(name, {"rows": {}})["rows"]

            def save(rows: dict[str, Row] = rows) -> None:
                summarize(rows)
                write_json(arguments.output, record)

            with sdpa_kernel(BACKENDS[attention]) if forced else nullcontext():
                failed += rounds(bench, runs, rows, length, arguments.repeats, beside, save)
            show(length, name, rows)
    if failed:
        sys.exit(f"Rows ended with an error: {', '.join(failed)}. The same command tries them again.")


if __name__ == "__main__":
    main()
