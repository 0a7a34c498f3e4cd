"""Which sites to scale: outputs of heads, of their channels, queries, or both, on line retrieval with SmolLM2.

Every system gets the same samples, steps and search over learning rates. The rate with the lowest loss on validation
samples is trained with more seeds, and each of these is tested by generation. `native` is the model's own window,
`long` the same with three times the data, for both sites together; `ntk` is four times the window by the NTK-aware
base that the adapter brings along; `beyond` trains below the native length under it and tests above, to compare a
constant temperature with one that grows with the position.

    python benchmarks/sites.py data --settings native long ntk beyond --work runs/sites  # needs the tokenizer only
    python benchmarks/sites.py run --settings native --work runs/sites --output results/sites-native.json

Everything that is finished stays in the work folder; the same command goes on from there, also where it ended because
of `--minutes`, after which no job begins. Jobs are shared by `--workers` processes, spread over the GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jobs import do_jobs, interval_over_seeds, make_lines, mean_loss, score_answers, spread
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer

from seal_peft import SealConfig, save_adapter
from seal_peft.data import read_samples
from seal_peft.files import write_json
from seal_peft.loading import load_model, load_tokenizer
from seal_peft.provenance import provenance, source_of
from seal_peft.tokens import AnswerCollator, encode_training
from seal_peft.train import SealTrainingArguments
from seal_peft.tuner.query import QueryLinear

BOTH = ("output", "query")
SYSTEMS: dict[str, dict[str, Any]] = {
    "output-head": {},
    "output-channel": {"granularity": "channel"},
    "query": {"sites": ("query",)},
    "output-head+query": {"sites": BOTH},
    "output-channel+query": {"sites": BOTH, "granularity": "channel"},
}
GROWING = "output-head+growing query"
NTK = {"rope_type": "ntk", "factor": 4.0}
SEEDS = {"training": "of each run, also of its samples", "validation samples": 1000, "test samples": 0}


@dataclass(frozen=True)
class Setting:
    """What is trained and tested on.

    Attributes:
        systems: Names of systems.
        train_lengths: Lengths in tokens, as many contexts of each.
        contexts: Contexts for each length.
        questions: Questions about each context.
        test_lengths: Lengths in tokens.
        rope: RoPE that the adapters bring along.
    """

    systems: tuple[str, ...]
    train_lengths: tuple[int, ...]
    contexts: int
    questions: int
    test_lengths: tuple[int, ...]
    rope: dict[str, Any] | None = None


SETTINGS = {
    "native": Setting(tuple(SYSTEMS), (768, 1024, 2048, 4096, 6144, 8192), 120, 8, (1024, 4096, 8192)),
    "long": Setting(tuple(SYSTEMS)[3:], (768, 1024, 2048, 4096, 6144, 8192), 360, 8, (1024, 4096, 8192)),
    "ntk": Setting(tuple(SYSTEMS), (2048, 4096, 8192, 16384, 24576, 31744), 24, 8, (16384, 32768), NTK),
    "beyond": Setting(("output-head+query", GROWING), (1024, 2048, 4096, 8192), 75, 8, (8192, 16384, 32768), NTK),
    "tiny": Setting((*SYSTEMS, GROWING), (384, 512), 4, 2, (512,), NTK),
}


# -- a temperature that grows with the position -----------------------------------------------------------------------


def make_growing(model: torch.nn.Module) -> None:
    """Let the query scales of a model be `1 + delta * log(1 + position) / log(1 + 8192)`: equal at 8,192 tokens."""
    for attention in model.modules():
        layer = getattr(attention, "q_proj", None)
        if isinstance(layer, QueryLinear):
            attention.register_forward_pre_hook(_note_positions, with_kwargs=True)
            layer.__class__ = _GrowingQuery


def _note_positions(attention: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    attention.q_proj.positions = kwargs["position_ids"]


class _GrowingQuery(QueryLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        offset = self.offset("default").float().repeat_interleave(self.geometry.head_dim)
        growth = torch.log1p(self.positions.float()) / math.log1p(8192)
        result = self.base_layer(x, *args, **kwargs)
        return (result * (1 + growth.unsqueeze(-1) * offset)).to(result.dtype)


# -- one job ----------------------------------------------------------------------------------------------------------


class Bench:
    """One setting in a work folder."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.options, self.name, self.setting = options, name, SETTINGS[name]
        self.folder = Path(options.work) / name
        self.tokenizer: Any = None

    def data(self) -> None:
        """Make the samples of all seeds that are not there yet, each length in a process of its own."""
        setting = self.setting
        numbers = {
            f"train-{seed}": (setting.train_lengths, setting.contexts, setting.questions, seed)
            for seed in self.options.seeds
        }
        numbers["valid"] = (setting.train_lengths, max(2, setting.contexts // 25), 1, SEEDS["validation samples"])
        numbers["test"] = (setting.test_lengths, self.options.num_samples, 1, SEEDS["test samples"])
        files = {name: [(length, *rest) for length in lengths] for name, (lengths, *rest) in numbers.items()}
        make_lines(self.options.model, self.folder, files)

    def rows(self, name: str) -> list[dict[str, list[int]]]:
        """Tokens and labels of a file of samples."""
        self.tokenizer = self.tokenizer or load_tokenizer(self.options.model)
        return [encode_training(sample, self.tokenizer) for sample in read_samples(self.folder / f"{name}.jsonl")]

    def path(self, system: str, rate: float, seed: int) -> Path:
        """Folder of one adapter and its scores; of the base model at rate 0."""
        return self.folder / f"{system}-{rate:g}-{seed}"

    def train(self, system: str, rate: float, seed: int) -> dict[str, Any]:
        """Train one adapter, unless it is there; return what it cost and its loss on the validation samples."""
        output = self.path(system, rate, seed)
        if (output / "run.json").is_file():
            return json.loads((output / "run.json").read_text())
        torch.manual_seed(seed)
        settings = SYSTEMS["output-head+query" if system == GROWING else system]
        config = SealConfig(**settings, rope_parameters=self.setting.rope, task_type="CAUSAL_LM")
        base = load_model(self.options.model)
        base.config.use_cache = False
        model = get_peft_model(base, config)
        if system == GROWING:
            make_growing(model)
        rows = self.rows(f"train-{seed}")
        arguments = SealTrainingArguments(
            str(output),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            max_grad_norm=1.0,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            seed=seed,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        collator = AnswerCollator(self.tokenizer.pad_token_id)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        save_adapter(model, output)
        run = {
            "seconds": seconds,
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "parameters": model.get_nb_trainable_parameters()[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "valid_loss": mean_loss(model.eval(), self.rows("valid"), collator),
            "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
            **provenance(),
        }
        write_json(output / "run.json", run)
        return run

    def test(self, system: str, rate: float, seed: int) -> dict[str, list[float]]:
        """Let one adapter (the base model at rate 0) answer the test samples; return right and wrong by length."""
        path = self.path(system, rate, seed) / "scores.json"
        if path.is_file():
            return json.loads(path.read_text())
        begun = path.with_name("scores-begun.json")
        scores: dict[str, list[float]] = json.loads(begun.read_text()) if begun.is_file() else {}
        if rate:
            self.train(system, rate, seed)
        model = load_model(self.options.model).eval()
        if rate:
            model = PeftModel.from_pretrained(model, path.parent).eval()
        elif self.setting.rope:
            get_peft_model(model, SealConfig(rope_parameters=self.setting.rope))  # scales of 1: the base under RoPE
        if system == GROWING:
            make_growing(model)
        self.tokenizer = self.tokenizer or load_tokenizer(self.options.model)
        samples = read_samples(self.folder / "test.jsonl")
        for length in self.setting.test_lengths:
            if str(length) not in scores:
                asked = [sample for sample in samples if sample.length == length]
                scores[str(length)] = score_answers(model, self.tokenizer, asked, self.options.batch_tokens)
                write_json(begun, scores)
        begun.rename(path)
        return scores

    # -- all of them --------------------------------------------------------------------------------------------------

    def searches(self) -> list[tuple[str, float, int]]:
        """Jobs that search the learning rate of every system, with the first seed."""
        if self.options.rates_of:
            return []
        return [(system, rate, 0) for rate in self.options.rates for system in self.setting.systems]

    def best(self, system: str) -> float:
        """Learning rate with the lowest validation loss, in this setting or in the one that rates come from."""
        if self.options.rates_of and self.options.rates_of != self.name:
            other = Bench(self.options, self.options.rates_of)
            return other.best("output-head+query" if system == GROWING else system)
        return min(self.options.rates, key=lambda rate: self.searched(system, rate)["valid_loss"])

    def searched(self, system: str, rate: float) -> dict[str, Any]:
        """What a job of the search wrote."""
        return json.loads((self.path(system, rate, 0) / "run.json").read_text())

    def finals(self) -> list[tuple[str, float, int]]:
        """Jobs that train and test with the rate that was found, and the base model."""
        seeds = self.options.seeds
        return [*((s, self.best(s), seed) for seed in seeds for s in self.setting.systems), ("base", 0.0, 0)]

    def work(self) -> bool:
        """Do a share of the jobs; return whether all are done."""
        searches = {self.path(*job) / "run.json": partial(self.train, *job) for job in self.searches()}
        if not do_jobs(searches, self.options.until):
            return False
        finals = {self.path(*job) / "scores.json": partial(self.test, *job) for job in self.finals()}
        return do_jobs(finals, self.options.until)

    def summary(self) -> dict[str, Any]:
        """Everything that was found, for the results file."""
        systems: dict[str, Any] = {}
        for system, rate, seed in self.finals():
            scores = self.test(system, rate, seed)
            entry = systems.setdefault(system, {"rate": rate, "runs": []})
            run = self.train(system, rate, seed) if rate else {}
            entry["runs"].append({"seed": seed, **run, "accuracy": {key: mean(v) for key, v in scores.items()}})
            entry.setdefault("scores", []).append(scores)
        for system, entry in systems.items():
            by_seed = entry.pop("scores")
            entry["accuracy"] = {
                length: interval_over_seeds([own[length] for own in by_seed]) for length in by_seed[0]
            }
            if system != "base" and not self.options.rates_of:
                entry["search"] = {
                    f"{rate:g}": self.searched(system, rate)["valid_loss"] for rate in self.options.rates
                }
        return {"setting": asdict(self.setting), "systems": systems}


# -- many processes ---------------------------------------------------------------------------------------------------


def run(benches: list[Bench], options: argparse.Namespace) -> None:
    """Do all jobs in worker processes and write the results, or stop where the time is up."""
    until = str(time.time() + 60 * options.minutes)
    spread([__file__, "work", *(word for word in sys.argv[1:] if word != "run"), "--until", until], options.workers)
    options.until = 0.0  # this process begins none
    if left := [bench.name for bench in benches if not bench.work()]:
        sys.exit(f"{', '.join(left)}: jobs are left; call this again to go on.")
    results = {bench.name: bench.summary() for bench in benches}
    runs = [
        own
        for result in results.values()
        for entry in result["systems"].values()
        for own in entry["runs"]
        if entry["rate"]
    ]
    write_json(options.output, {"task": "lines", "seeds": SEEDS, **results, **source_of(runs)})
    for name, result in results.items():
        for system, entry in result["systems"].items():
            cells = " ".join(f"{length}: {cell['mean']:.3f}" for length, cell in entry["accuracy"].items())
            print(f"{name:8} {system:28} lr {entry['rate']:g}  {cells}")


def main() -> None:
    """Read the command line and run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["data", "run", "work"])
    parser.add_argument("--settings", nargs="+", default=["native"], choices=SETTINGS)
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--work", default="runs/sites")
    parser.add_argument("--output", type=Path, default=Path("runs/sites.json"))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 2e-2, 4e-2, 8e-2])
    parser.add_argument("--rates_of", choices=SETTINGS, help="take each system's rate from this setting's search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=100, help="test samples of each length")
    parser.add_argument("--batch_tokens", type=int, default=200_000, help="tokens that are answered together")
    parser.add_argument("--workers", type=int, default=1, help="processes, over all GPUs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no job later than this")
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args()
    benches = [Bench(options, name) for name in options.settings]
    if options.verb == "run":
        run(benches, options)
    for bench in benches:
        if options.verb == "data":
            bench.data()
        if options.verb == "work":
            torch.set_num_threads(1)
            bench.work()


if __name__ == "__main__":
    main()
