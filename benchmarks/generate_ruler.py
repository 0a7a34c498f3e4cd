"""How long it takes to generate RULER: 13 tasks x 3 lengths x 20 samples, with the tokenizer of SmolLM2.

Prints the seconds of every task and of all, and how full the samples are, and writes them as JSON. Reading essays,
questions and words counts. The limit is 180 s on two cores.

    python benchmarks/generate_ruler.py --output results/ruler-generation-cpu.json
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from seal_peft.data import make_samples
from seal_peft.files import write_json
from seal_peft.loading import load_tokenizer
from seal_peft.provenance import provenance
from seal_peft.tasks import ruler


def generate(task: str, model: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all samples of a task, and the emptiest one's fill."""
    tokenizer = load_tokenizer(model)
    start = time.perf_counter()
    samples = make_samples(task, tokenizer=tokenizer, split="test", **numbers)
    fill = min(sample.n_tokens / sample.length for sample in samples)
    return {"seconds": time.perf_counter() - start, "samples": len(samples), "smallest_fill": fill}


def main() -> None:
    """One task at a time in each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2", help="model whose tokenizer counts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--num_samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/ruler-generation.json"))
    options = parser.parse_args()
    numbers = {"lengths": options.lengths, "num_samples": options.num_samples, "seed": options.seed}
    names = [row[0] for row in ruler.ROWS]
    load_before = os.getloadavg()[0]
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=options.processes) as pool:
        tasks = dict(zip(names, pool.map(partial(generate, model=options.model, numbers=numbers), names), strict=True))
    result = {"seconds": time.perf_counter() - start, "processes": options.processes, **numbers, "tasks": tasks}
    write_json(options.output, {**result, "load_average_before": load_before, **provenance()})
    for name, task in tasks.items():
        print(f"{name:24} {task['seconds']:6.1f} s, filled {task['smallest_fill']:.1%} or more")
    print(f"all {len(tasks)} tasks, lengths {options.lengths}, {options.num_samples} each: {result['seconds']:.1f} s")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
