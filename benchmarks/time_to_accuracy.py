"""Time to accuracy on line retrieval at 8K tokens with SmolLM2: recipes and methods, and what each knob is worth.

The paper's recipe (one question a context, all at full length, constant learning rate, one context a step) against
ours, and under ours SEAL-H and SEAL-C, each also with temperatures, IA3, LoRA and DoRA. Every system gets a search
over as many learning rates, on as many contexts, by the loss on validation samples. `finalists` trains the three best
with all contexts, as a short training takes higher rates than a long one, and the best one gets all seeds. Adapters
are saved at several points of the training, with the clock stopped. The last one answers 200 held-out
samples, also in another wording, and a bisection finds the point from where on the others have an accuracy.

Our recipe is chosen before: `knobs` trains SEAL-C with one setting changed at a time, each with two learning rates,
and `choice` lets the better of the two answer validation samples, in both wordings.

Several processes share a GPU, so their seconds are not those of a training: `timing` trains each system again, alone
on its GPU, shorter and in rounds; seconds to an accuracy are the tokens to it times seconds per token there. Alone
it takes the contexts of a step together, padded: the same gradient in fewer kernels; beside others there is no memory
for that, and no need.

    python benchmarks/time_to_accuracy.py data --work runs/tta                # needs the tokenizer only
    python benchmarks/time_to_accuracy.py run --phases knobs choice --work runs/tta --workers 8
    python benchmarks/time_to_accuracy.py run --phases timing search finalists final --work runs/tta --workers 8
    python benchmarks/time_to_accuracy.py merge --work runs/tta --output results/time-to-accuracy.json

`run` begins no job after `--minutes`; called again, it goes on with what is left. `all` does everything.

A trial of one system on two CPU cores, without the knobs, takes about ten minutes:

    python benchmarks/time_to_accuracy.py all --size tiny --systems seal-c --phases timing search finalists final \
        --minutes 30 --workers 2 --work runs/tta-tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from time_bench import Bench
from time_data import SIZES
from time_summary import merge
from time_systems import SYSTEMS


def main() -> None:
    """Read the command line and run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["data", "run", "merge", "all", "work"])
    phases = ["knobs", "choice", "timing", "search", "finalists", "final"]
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="of all phases but knobs")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--work", default="runs/tta")
    parser.add_argument("--output", type=Path, default=Path("runs/time-to-accuracy.json"))
    parser.add_argument("--points", type=int, default=16, help="points at which ours may be tested; others as densely")
    parser.add_argument("--batch_tokens", type=int, default=100_000, help="tokens that are answered together")
    parser.add_argument("--workers", type=int, default=1, help="processes, over all GPUs")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no job later than this")
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options)
    if options.verb != "work":  # workers are begun by what has checked
        bench.check()
    if options.verb == "work":
        torch.set_num_threads(1)
        bench.work(options.phases[0])
    if options.verb in ("data", "all"):
        bench.data()
    if options.verb in ("run", "all"):
        bench.run()
    if options.verb in ("merge", "all"):
        merge(bench)


if __name__ == "__main__":
    main()
