"""The jobs of benchmarks/time_to_accuracy.py: trainings and tests in a work folder, for several processes."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jobs import do_jobs, make_lines, mean_loss, score_answers, spread
from peft import PeftModel, get_peft_model
from time_clock import Clock
from time_data import SIZES, files_of, first_questions, reworded
from time_points import asked_next
from time_systems import KNOB_RATES, KNOBS, METHODS, SLOWEST, SYSTEMS, Recipe
from transformers import Trainer, TrainingArguments

from seal_peft.data import read_samples
from seal_peft.files import write_json
from seal_peft.loading import load_model, load_tokenizer, unload_adapter
from seal_peft.provenance import provenance
from seal_peft.tasks import Sample
from seal_peft.tokens import AnswerCollator, encode_training

SCRIPT = Path(__file__).with_name("time_to_accuracy.py")


class Bench:
    """The benchmark in its work folder. A job is (phase, system, learning rate, seed)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size, self.folder = options, SIZES[options.size], Path(options.work)
        self.systems = {name: SYSTEMS[name] for name in options.systems}
        self.tokenizer = load_tokenizer(options.model)

    def data(self) -> None:
        """Make all files of samples."""
        make_lines(self.options.model, self.folder, files_of(self.size))

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
        random.Random(seed).shuffle(rows)
        collator = AnswerCollator(self.tokenizer.pad_token_id)
        answers = phase in ("final", "knobs")
        points = self.points(rows) if answers else self.options.points
        ends = range(recipe.batch, len(rows) + recipe.batch, recipe.batch)
        seen = [sum(len(row["input_ids"]) for row in rows[:end]) for end in ends]
        clock = Clock(model, output if answers else None, points, recipe, seen)
        together = recipe.batch if phase == "timing" else 1
        arguments = _arguments(output, recipe, rate, seed, together)
        trainer = Trainer(model, arguments, collator, rows, callbacks=[clock])
        trainer.train(resume_from_checkpoint=clock.checkpoint)
        run = {
            "recipe": asdict(recipe),
            "points": clock.points,
            "contexts": len(rows),
            "parameters": model.get_nb_trainable_parameters()[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            # Nobody chooses by what was trained for the clock alone, and the machine is waiting.
            "valid_loss": None if phase == "timing" else self.valid_loss(model, collator),
            "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
            **provenance(),
        }
        write_json(output / "run.json", run)
        clock.remove_checkpoints()
        return run

    def valid_loss(self, model: Any, collator: AnswerCollator) -> float:
        """Loss of a trained model on the validation samples."""
        return mean_loss(model.eval(), self.rows(self.samples("valid")), collator)

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
        while (name := asked_next(known, steps)) is not None:
            model = model or load_model(self.options.model).eval()
            worn = PeftModel.from_pretrained(model, folder / f"step-{steps[-1] if name == 'reworded' else name}")
            asked = list(map(reworded, samples)) if name == "reworded" else samples
            known[name] = score_answers(worn.eval(), self.tokenizer, asked, self.options.batch_tokens)
            model = unload_adapter(worn)
            write_json(path, known)
        # Nobody asks the others any more, nor those of other rates; LoRA's would fill what is carried elsewhere.
        for step in folder.parent.glob(f"{system}-*-{seed}/step-*"):
            if step != folder / f"step-{steps[-1]}":
                shutil.rmtree(step)
        path.rename(folder / "scores.json")
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
            searched = dict.fromkeys(map(_searched_as, systems))
            return [(phase, name, rate, 0) for name in searched for rate in METHODS[SYSTEMS[name].method][2]]
        if phase == "finalists":
            return [("final", name, rate, 0) for name in systems for rate in self.three_best(name)]
        if phase == "timing":
            # Round by round, each from another system on: no slow while and no place in the order is one system's.
            rates = {name: METHODS[SYSTEMS[name].method][2][0] for name in systems}
            starts = {seed: seed * len(systems) // self.size.seeds for seed in range(self.size.seeds)}
            rounds = [(seed, name) for seed, n in starts.items() for name in systems[n:] + systems[:n]]
            return [(phase, name, rates[name], seed) for seed, name in rounds]
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
        if name in KNOBS:
            return self._losses("knobs", "knobs", name, KNOB_RATES)
        return self._losses("search", "search", _searched_as(name), METHODS[SYSTEMS[name].method][2])

    def three_best(self, name: str) -> list[float]:
        """The learning rates of a system with the lowest validation loss after a short training."""
        losses = self.searched(name)
        return sorted(losses, key=losses.__getitem__)[:3]

    def finalists(self, name: str) -> dict[float, float]:
        """Validation loss of these three after a training with all contexts, which is the first seed's."""
        return self._losses("finalists", "final", name, self.three_best(name))

    def best(self, name: str) -> float:
        """Learning rate with the lowest validation loss."""
        losses = self.searched(name) if name in KNOBS else self.finalists(name)
        return min(losses, key=losses.__getitem__)

    def _losses(self, phase: str, folder: str, name: str, rates: Iterable[float]) -> dict[float, float]:
        paths = {rate: self.path(folder, name, rate, 0) / "run.json" for rate in rates}
        if missing := [path for path in paths.values() if not path.is_file()]:
            raise ValueError(f"{missing[0]} is not there yet: `run --phases {phase}` comes first.")
        return {rate: json.loads(path.read_text())["valid_loss"] for rate, path in paths.items()}

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
                spread([str(SCRIPT), "work", "--phases", phase, "--until", str(until), *shared], workers)
            if left := self.left(phase):
                sys.exit(f"{phase}: {len(left)} jobs are left; call this again to go on.")


def _searched_as(name: str) -> str:
    """The system whose search is a system's own: short trainings do not tell shares of the contexts apart."""
    recipe = SYSTEMS[name]
    return name if recipe.share == 1 else recipe.method


def _arguments(output: Path, recipe: Recipe, rate: float, seed: int, together: int) -> TrainingArguments:
    return TrainingArguments(
        str(output),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=recipe.batch // together,
        train_sampling_strategy="sequential",  # the rows are shuffled, and the clock knows how long each is
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        logging_steps=10,
        save_strategy="no",  # the clock says when
        save_total_limit=2,  # the one before stays until the clock names the new one
        report_to="none",
        seed=seed,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
