"""How long an evaluation takes: 40 lines samples at each of 1K, 2K, 4K and 8K tokens, base and adapter, SmolLM2.

Prints seconds and peak memory and writes them as JSON. The samples are made before the clock starts; loading the model
counts. Without `--adapter` a fresh one with random scales answers, which costs what a trained one does.

    python benchmarks/evaluate_lines.py --output results/evaluate-lines.json
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model

from seal_peft import SealConfig
from seal_peft.data import make_samples, write_samples
from seal_peft.evaluate import EvaluateArguments, evaluate
from seal_peft.files import write_json
from seal_peft.loading import load_model, load_tokenizer
from seal_peft.provenance import provenance


def fresh_adapter(model_name: str, folder: Path) -> Path:
    """Save a SEAL-C adapter with random scales between 0.9 and 1.1."""
    model = get_peft_model(load_model(model_name), SealConfig(task_type="CAUSAL_LM", granularity="channel"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "seal_delta" in name:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    model.save_pretrained(str(folder))
    return folder


def peak_bytes() -> int:
    """Most memory held at once: on the GPU, or by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Make the samples, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--adapter", help="folder of an adapter; default: a fresh one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--num_samples", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate-lines.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = options.adapter or fresh_adapter(options.model, folder / "adapter")
        tokenizer = load_tokenizer(options.model)
        numbers = {"lengths": options.lengths, "num_samples": options.num_samples}
        write_samples(folder / "test.jsonl", make_samples("lines", tokenizer=tokenizer, split="test", **numbers))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        metrics = evaluate(
            EvaluateArguments(
                options.model,
                str(folder / "test.jsonl"),
                str(folder / "eval"),
                adapters=[f"adapter={adapter}"],
                per_device_eval_batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
            )
        )
        seconds = time.perf_counter() - started
    result = {"seconds": seconds, "peak_bytes": peak_bytes(), **numbers, "batch_size": options.batch_size}
    write_json(options.output, {**result, "systems": metrics["systems"], **provenance()})
    count = len(options.lengths) * options.num_samples
    print(f"{count} samples x 2 systems: {seconds:.1f} s, peak {result['peak_bytes'] / 2**30:.2f} GiB")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
