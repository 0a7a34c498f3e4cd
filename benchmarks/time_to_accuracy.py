"""Time to accuracy on line retrieval at 8K tokens with SmolLM2: recipes and methods, and what each knob is worth.

The paper's recipe (one question a context, all at full length, constant learning rate, one context a step) against
ours, and under ours SEAL-H and SEAL-C, each also with temperatures, IA3, LoRA and DoRA. Every system gets a search
over as many learning rates, on as many contexts. The rate with the lowest loss on validation samples is trained with
all seeds. Adapters are saved at several points of the training, with the clock stopped. The last one answers 200
held-out samples, also in another wording, and a bisection finds the point from where on the others have an accuracy.

Our recipe is chosen before: `knobs` trains SEAL-C with one setting changed at a time, each with two learning rates,
and `choice` lets the better of the two answer validation samples, in both wordings.

Several processes share a GPU, so their seconds are not those of a training: `timing` trains each system once more,
alone on its GPU and shorter, and the seconds to an accuracy are the tokens to it times seconds per token there.

    python benchmarks/time_to_accuracy.py data --work runs/tta                # needs the tokenizer only
    python benchmarks/time_to_accuracy.py run --phases knobs choice --work runs/tta --workers 8
    python benchmarks/time_to_accuracy.py run --phases timing search final --work runs/tta --workers 8  # see OURS
    python benchmarks/time_to_accuracy.py merge --work runs/tta --output results/time-to-accuracy.json
    python benchmarks/time_to_accuracy.py all --size tiny --work runs/tta-tiny  # a trial on a CPU

`run` begins no job after `--minutes`; called again, it goes on with what is left. `all` does everything.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from jobs import Part, do_jobs, interval_over_seeds, make_lines, mean_loss, score_answers, source_of, spread
from peft import PeftModel, get_peft_model
from time_clock import Clock
from time_systems import CENTRE, KNOB_RATES, KNOBS, METHODS, SLOWEST, SYSTEMS, Recipe
from transformers import Trainer, TrainingArguments

from seal_peft.data import read_samples
from seal_peft.files import write_json
from seal_peft.loading import load_model, load_tokenizer, unload_adapter
from seal_peft.provenance import provenance
from seal_peft.report import markdown_table
from seal_peft.tasks import Sample
from seal_peft.tokens import AnswerCollator, encode_training

REACHED = (0.90, 0.95)
# Samples of a seed begin at this times the seed: further apart than any file is long, so that seeds share no sample.
STRIDE = 10_000
VALIDATION_SEED, CHOICE_SEED, LONG_SEED = 100_000, 200_000, 300_000
SEEDS = {
    "training": "of each run",
    "training samples": f"{STRIDE} times that of the run",
    "training samples of the file long": f"{LONG_SEED} and {STRIDE} times that of the run",
    "validation samples": VALIDATION_SEED,
    "validation samples that are answered": CHOICE_SEED,
    "test samples": 0,
}


@dataclass(frozen=True)
class Size:
    """How much there is of everything.

    Attributes:
        lengths: Training lengths in tokens; the last one is tested.
        contexts: Training contexts of each.
        full: Contexts of the paper's recipe, all at the last length: nearly four times the tokens of ours.
        long: Contexts of the knobs with the last length only: about as many tokens as ours.
        valid: Validation contexts, for the loss.
        choice: Validation samples that knobs answer.
        searched: Contexts of a training of the search.
        timed: Contexts of a training whose seconds count.
        seeds: Seeds of data and training.
    """

    lengths: tuple[int, ...]
    contexts: int
    full: int
    long: int
    valid: int
    choice: int
    searched: int
    timed: int
    seeds: int


SIZES = {
    "full": Size((1536, 2048, 4096, 6144, 8192), 120, 1200, 325, 24, 100, 200, 100, 3),
    "tiny": Size((1536, 2600), 4, 6, 4, 2, 2, 2, 2, 1),
}


def first_questions(sample: Sample, count: int) -> Sample:
    """Return a sample with its first questions only."""
    if sample.meta["questions"] <= count:
        return sample
    turns = sample.messages[: 2 * count]
    return replace(sample, messages=turns[:-1], target=turns[-1]["content"])


def reworded(sample: Sample) -> Sample:
    """Return a sample of line retrieval with the same keys and numbers in another wording."""
    (turn,) = sample.messages
    _, register, question = turn["content"].split("\n\n")
    lines, count = re.subn(r"line (\S+): REGISTER_CONTENT is <(\d+)>", r"\1 has the value \2", register)
    (key,) = re.findall(r"in line (\S+)\?", question)
    if count != register.count("\n") + 1:
        raise ValueError(f"{sample.id}: {count} lines were found, the register has {register.count(chr(10)) + 1}.")
    content = f"Items and their values:\n\n{lines}\n\nWhat is the value of {key}? Answer with the number."
    return replace(sample, id=f"{sample.id}-reworded", messages=[{"role": "user", "content": content}])


# -- one job ----------------------------------------------------------------------------------------------------------


class Bench:
    """The benchmark in its work folder. A job is (phase, system, learning rate, seed)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size, self.folder = options, SIZES[options.size], Path(options.work)
        self.systems = {name: SYSTEMS[name] for name in options.systems}
        self.tokenizer = load_tokenizer(options.model)

    def data(self) -> None:
        """Make all files of samples."""
        size, longest, questions = self.size, self.size.lengths[-1], CENTRE.questions
        most = max(recipe.questions for recipe in KNOBS.values())
        files: dict[str, list[Part]] = {}
        for seed in range(size.seeds):
            first = STRIDE * seed
            files[f"mixed-{seed}"] = [
                part for length in size.lengths for part in _parts(length, size.contexts, questions, first)
            ]
            files[f"long-{seed}"] = _parts(longest, size.long, most, LONG_SEED + first)
            files[f"full-{seed}"] = _parts(longest, size.full, 1, first)
        files["valid"] = _parts(longest, size.valid, 1, VALIDATION_SEED)
        files["choice"] = _parts(longest, size.choice, 1, CHOICE_SEED)
        files["test"] = _parts(longest, self.options.num_samples, 1, 0)
        make_lines(self.options.model, self.folder, files)

    def samples(self, name: str) -> list[Sample]:
        """Read a file of samples."""
        return read_samples(self.folder / f"{name}.jsonl")

    def rows(self, samples: list[Sample]) -> list[dict[str, list[int]]]:
        """Tokens and labels of samples."""
        return [encode_training(sample, self.tokenizer) for sample in samples]

    def check(self) -> None:
        """Refuse a work folder with trainings of other recipes, finished or under way, before any job."""
        for path in sorted([*self.folder.glob("*/*/run.json"), *self.folder.glob("*/*/clock.json")]):
            system, _, _ = path.parent.name.rsplit("-", 2)
            recipe = (KNOBS if path.parts[-3] == "knobs" else SYSTEMS).get(system)
            trained = json.loads(path.read_text())["recipe"]
            if recipe and trained != asdict(recipe):
                raise ValueError(
                    f"{path.parent} was trained with {trained}, not {recipe}: remove all folders of {system!r} in "
                    f"{path.parents[1]} and the other phases, or use another --work."
                )

    def path(self, phase: str, system: str, rate: float, seed: int) -> Path:
        """Folder of one job."""
        return self.folder / phase / f"{system}-{rate:g}-{seed}"

    def train(self, phase: str, system: str, rate: float, seed: int) -> dict[str, Any]:
        """Train one adapter, unless it is there; return what it cost, point by point."""
        output, recipe = self.path(phase, system, rate, seed), (KNOBS if phase == "knobs" else SYSTEMS)[system]
        if (output / "run.json").is_file():
            return json.loads((output / "run.json").read_text())
        torch.manual_seed(seed)
        kind, settings, _ = METHODS[recipe.method]
        base = load_model(self.options.model)
        base.config.use_cache = False
        model = get_peft_model(base, kind(**settings, task_type="CAUSAL_LM"))
        rows = self.rows(self._training_samples(phase, recipe, seed))
        collator = AnswerCollator(self.tokenizer.pad_token_id)
        answers = phase in ("final", "knobs")
        points = self.points(rows) if answers else self.options.points
        clock = Clock(model, output if answers else None, points, recipe)
        trainer = Trainer(model, _arguments(output, recipe, rate, seed), collator, rows, callbacks=[clock])
        trainer.train(resume_from_checkpoint=clock.checkpoint)
        run = {
            "recipe": asdict(recipe),
            "points": clock.points,
            "contexts": len(rows),
            "parameters": model.get_nb_trainable_parameters()[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "valid_loss": mean_loss(model.eval(), self.rows(self.samples("valid")), collator),
            "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
            **provenance(),
        }
        write_json(output / "run.json", run)
        clock.remove_checkpoints()
        return run

    def points(self, rows: list[dict[str, list[int]]]) -> int:
        """How often a training is tested: after as many tokens as ours, so that nobody has the coarser grid."""
        apart = sum(self.size.lengths) * self.size.contexts / self.options.points
        return max(1, round(sum(len(row["input_ids"]) for row in rows) / apart))

    def _training_samples(self, phase: str, recipe: Recipe, seed: int) -> list[Sample]:
        """The samples of a recipe; of shortened trainings the same share of every length."""
        limit = recipe.max_length or self.size.lengths[-1]
        samples = [sample for sample in self.samples(f"{recipe.data}-{seed}") if sample.length <= limit]
        contexts = {"search": self.size.searched, "timing": self.size.timed}.get(phase)
        share = recipe.share if contexts is None else contexts / len(samples)
        by_length: dict[int, list[Sample]] = {}
        for sample in samples:
            by_length.setdefault(sample.length, []).append(first_questions(sample, recipe.questions))
        return [sample for own in by_length.values() for sample in own[: max(1, round(share * len(own)))]]

    def test(self, phase: str, system: str, rate: float, seed: int) -> dict[str, Any]:
        """Let adapters of a training answer: the last, and those that tell from where on it had the accuracies."""
        folder = self.path(phase, system, rate, seed)
        if (folder / "scores.json").is_file():
            return json.loads((folder / "scores.json").read_text())
        steps = [str(point["step"]) for point in self.train(phase, system, rate, seed)["points"]]
        path, known = folder / "scores-so-far.json", {}
        if path.is_file():
            known = json.loads(path.read_text())
        samples = self.samples("choice" if phase == "knobs" else "test")
        model: Any = None
        while (name := _asked_next(known, steps)) is not None:
            model = model or load_model(self.options.model).eval()
            worn = PeftModel.from_pretrained(model, folder / f"step-{steps[-1] if name == 'reworded' else name}")
            asked = list(map(reworded, samples)) if name == "reworded" else samples
            known[name] = score_answers(worn.eval(), self.tokenizer, asked, self.options.batch_tokens)
            model = unload_adapter(worn)
            write_json(path, known)
        path.rename(folder / "scores.json")
        for step in steps[:-1]:  # nobody asks these any more, and LoRA's would fill what is carried between machines
            shutil.rmtree(folder / f"step-{step}")
        return known

    def base(self) -> dict[str, Any]:
        """Let the base model answer both wordings."""
        path = self.folder / "base.json"
        if not path.is_file():
            model, samples = load_model(self.options.model).eval(), self.samples("test")
            asked = {"original": samples, "reworded": list(map(reworded, samples))}
            scores = {k: score_answers(model, self.tokenizer, v, self.options.batch_tokens) for k, v in asked.items()}
            write_json(path, scores)
        return json.loads(path.read_text())

    # -- all of them --------------------------------------------------------------------------------------------------

    def jobs(self, phase: str) -> list[tuple[str, str, float, int]]:
        """All jobs of a phase, the longest first."""
        if phase == "knobs":
            return [(phase, knob, rate, 0) for knob in KNOBS for rate in KNOB_RATES]
        if phase == "choice":
            return [("knobs", knob, self.best(knob), 0) for knob in KNOBS]
        systems = sorted(self.systems, key=lambda name: name not in SLOWEST)
        if phase == "search":
            return [(phase, name, rate, 0) for name in systems for rate in METHODS[SYSTEMS[name].method][2]]
        if phase == "timing":
            return [(phase, name, METHODS[SYSTEMS[name].method][2][0], 0) for name in systems]
        return [(phase, name, self.best(name), seed) for name in systems for seed in range(self.size.seeds)]

    def files(self, phase: str) -> dict[Path, Callable[[], object]]:
        """What the jobs of a phase write last, and how."""
        do, name = (self.test, "scores.json") if phase in ("final", "choice") else (self.train, "run.json")
        files: dict[Path, Callable[[], object]] = {
            self.path(*job) / name: partial(do, *job) for job in self.jobs(phase)
        }
        return files | ({self.folder / "base.json": self.base} if phase == "final" else {})

    def left(self, phase: str) -> list[Path]:
        """Files of a phase that are not there yet."""
        return [path for path in self.files(phase) if not path.is_file()]

    def searched(self, name: str) -> dict[float, float]:
        """Validation loss of a system or knob with each of its learning rates."""
        knob = name in KNOBS
        phase, rates = ("knobs", KNOB_RATES) if knob else ("search", METHODS[SYSTEMS[name].method][2])
        paths = {rate: self.path(phase, name, rate, 0) / "run.json" for rate in rates}
        if missing := [path for path in paths.values() if not path.is_file()]:
            raise ValueError(f"{missing[0]} is not there yet: `run --phases {phase}` comes first.")
        return {rate: json.loads(path.read_text())["valid_loss"] for rate, path in paths.items()}

    def best(self, name: str) -> float:
        """Learning rate with the lowest validation loss."""
        losses = self.searched(name)
        return min(losses, key=losses.__getitem__)

    def work(self, phase: str) -> bool:
        """Do a share of the jobs of one phase; return whether all are done."""
        return do_jobs(self.files(phase), self.options.until)

    def run(self) -> None:
        """Do the phases in worker processes; stop where the time is up."""
        until = time.time() + 60 * self.options.minutes
        gpus = max(1, torch.cuda.device_count())
        shared = ["--model_name_or_path", self.options.model, "--work", self.options.work, "--size", self.options.size]
        shared += ["--points", str(self.options.points), "--batch_tokens", str(self.options.batch_tokens)]
        shared += ["--systems", *self.systems]
        for phase in self.options.phases:
            if self.left(phase):
                workers = gpus if phase == "timing" else self.options.workers
                spread([__file__, "work", "--phases", phase, "--until", str(until), *shared], workers)
            if left := self.left(phase):
                sys.exit(f"{phase}: {len(left)} jobs are left; call this again to go on.")

    def summary(self) -> dict[str, Any]:
        """Everything that was found."""
        finals: dict[str, Any] = {}
        for phase, system, rate, seed in self.jobs("final"):
            timed = self.train("timing", system, METHODS[SYSTEMS[system].method][2][0], 0)["points"]
            seconds_per_token = _difference(timed, "seconds_shared") / _difference(timed, "tokens")
            entry = finals.setdefault(system, {"rate": rate, "seconds_per_token": seconds_per_token, "runs": []})
            entry["runs"].append({"seed": seed, **self._outcome(phase, system, rate, seed, seconds_per_token)})
        for system, entry in finals.items():
            runs = entry["runs"]
            entry["recipe"], entry["parameters"] = [run.pop("recipe") for run in runs][0], runs[0]["parameters"]
            entry["search"] = {f"{rate:g}": loss for rate, loss in self.searched(system).items()}
            for name in ("last", "reworded"):
                entry[name] = interval_over_seeds([run.pop(f"{name}_scores") for run in runs])
            for target in map(str, REACHED):
                reached = [run["to"][target] for run in runs]
                # A median only where most seeds get there; those that do not count as later than all others.
                later = [point["seconds"] if point else float("inf") for point in reached]
                tokens = [point["tokens"] if point else float("inf") for point in reached]
                entry[f"to {target}"] = {
                    "reached": sum(point is not None for point in reached),
                    "seconds": _finite(median(later)),
                    "tokens": _finite(median(tokens)),
                }
        knobs = {}
        if not self.left("knobs") and not self.left("choice"):
            for phase, knob, rate, seed in self.jobs("choice"):
                outcome = self._outcome(phase, knob, rate, seed, None)
                for name in ("last", "reworded"):
                    outcome[name] = interval_over_seeds([outcome.pop(f"{name}_scores")])
                search = {f"{rate:g}": loss for rate, loss in self.searched(knob).items()}
                knobs[knob] = {"rate": rate, "search": search, **outcome}
        base = {name: interval_over_seeds([own]) for name, own in self.base().items()}
        return {"size": asdict(self.size), "base": base, "systems": finals, "knobs": knobs}

    def _outcome(
        self, phase: str, system: str, rate: float, seed: int, seconds_per_token: float | None
    ) -> dict[str, Any]:
        """One training with the accuracy at its points, and from where on it had the accuracies that count."""
        run, scores = self.train(phase, system, rate, seed), self.test(phase, system, rate, seed)
        points = []
        for point in run["points"]:
            own = scores.get(str(point["step"]))
            seconds = None if seconds_per_token is None else point["tokens"] * seconds_per_token
            points.append({**point, "seconds": seconds, "accuracy": None if own is None else sum(own) / len(own)})
        to = {str(target): _reached(points, target) for target in REACHED}
        ends = {"last_scores": scores[str(points[-1]["step"])], "reworded_scores": scores["reworded"]}
        return {**run, "points": points, "to": to, **ends}


def _asked_next(known: dict[str, list[float]], steps: list[str]) -> str | None:
    """What answers next: the end in both wordings, then the middle of where an accuracy may lie, if any."""
    accuracies = [mean(known[step]) if step in known else None for step in steps]
    for name in ("reworded", steps[-1]):
        if name not in known:
            return name
    between = (_middle(accuracies, target) for target in REACHED)
    return next((steps[index] for index in between if index is not None), None)


def _middle(accuracies: list[float | None], target: float) -> int | None:
    """Index halfway from the last point known to be below a target to the first known after it; `None` if decided."""
    below = _last_below(accuracies, target)
    after = next((i for i in range(below + 1, len(accuracies)) if accuracies[i] is not None), below)
    return (below + after) // 2 if after - below > 1 else None


def _last_below(accuracies: list[float | None], target: float) -> int:
    return max((i for i, own in enumerate(accuracies) if own is not None and own < target), default=-1)


def _reached(points: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The point after the last one that is known to be below a target."""
    return next(iter(points[_last_below([point["accuracy"] for point in points], target) + 1 :]), None)


def _parts(length: int, contexts: int, questions: int, first: int, at_once: int = 50) -> list[Part]:
    """Split a number of contexts, so that many processes have something to make."""
    starts = range(0, contexts, at_once)
    return [(length, min(at_once, contexts - start), questions, first + start) for start in starts]


def _arguments(output: Path, recipe: Recipe, rate: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        str(output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.batch,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        include_num_input_tokens_seen="all",
        logging_steps=10,
        save_strategy="no",  # the clock says when
        save_total_limit=2,  # the one before stays until the clock names the new one
        report_to="none",
        seed=seed,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


def _difference(points: list[dict[str, Any]], name: str) -> float:
    """From the first point, when everything is warm, to the last."""
    return points[-1][name] - (points[0][name] if len(points) > 1 else 0)


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None


def table(systems: dict[str, Any]) -> str:
    """Systems by what they cost and reach."""
    rows = [["system", "parameters", "rate", *(f"to {t:.2f}" for t in REACHED), "last", "reworded"]]
    for name, entry in systems.items():
        to = [entry[f"to {target}"] for target in REACHED]
        times = [f"{own['seconds']:.0f} s" if own["seconds"] is not None else "not reached" for own in to]
        ends = [f"{entry[end]['mean']:.3f}" for end in ("last", "reworded")]
        rows.append([name, f"{entry['parameters']:,}", f"{entry['rate']:g}", *times, *ends])
    return markdown_table(rows)


def merge(bench: Bench) -> None:
    """Write the results file."""
    if missing := next(filter(None, map(bench.left, ("timing", "search", "final"))), []):
        sys.exit(f"{len(missing)} jobs are left, {missing[0]} first: use `run`.")
    result = bench.summary()
    phases = ["timing", "search", "final", *(["knobs"] if result["knobs"] else [])]
    runs = [bench.train(*job) for phase in phases for job in bench.jobs(phase)]
    write_json(bench.options.output, {"task": "lines", "seeds": SEEDS, **result, **source_of(runs)})
    print(f"{table(result['systems'])}\nwritten to {bench.options.output}")


def main() -> None:
    """Read the command line and run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["data", "run", "merge", "all", "work"])
    phases = ["knobs", "choice", "timing", "search", "final"]
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="of all phases but knobs")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--work", default="runs/tta")
    parser.add_argument("--output", type=Path, default=Path("runs/time-to-accuracy.json"))
    parser.add_argument("--num_samples", type=int, default=200, help="test samples")
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
