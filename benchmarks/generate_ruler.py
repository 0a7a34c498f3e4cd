"""How long it takes to generate RULER: 13 tasks x 3 lengths x 20 samples, with the tokenizer of SmolLM2.

Prints the seconds of every task and of all, and how full the samples are. The issue's limit is 180 s on two cores.

    python benchmarks/generate_ruler.py
"""

import time
from concurrent.futures import ProcessPoolExecutor

from seal_peft.data import make_samples
from seal_peft.loading import load_tokenizer
from seal_peft.tasks import ruler

LENGTHS = (2048, 4096, 8192)
SAMPLES = 20


def generate(task: str) -> tuple[str, float, float]:
    """Seconds for all samples of a task, and the emptiest one's fill."""
    tokenizer = load_tokenizer("smollm2")
    start = time.perf_counter()
    samples = make_samples(task, tokenizer=tokenizer, split="test", lengths=LENGTHS, num_samples=SAMPLES)
    return task, time.perf_counter() - start, min(sample.n_tokens / sample.length for sample in samples)


def main() -> None:
    """Two processes, one task at a time each."""
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=2) as pool:
        for task, seconds, fill in pool.map(generate, [row[0] for row in ruler.ROWS]):
            print(f"{task:24} {seconds:6.1f} s, filled {fill:.1%} or more")
    print(f"all {len(ruler.ROWS)} tasks, lengths {LENGTHS}, {SAMPLES} each: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
