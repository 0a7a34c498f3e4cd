"""The clock of benchmarks/time_to_accuracy.py: what a training cost up to some steps, also after it was killed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from time_systems import Recipe
from transformers import TrainerCallback

from seal_peft.files import write_json


class Clock(TrainerCallback):
    """Notes the seconds of training and the tokens at some steps, and saves the adapter there if it is to answer.

    A training whose adapters are to answer is long: it leaves a checkpoint there too, from which a killed one goes on.
    """

    def __init__(self, model: Any, folder: Path | None, points: int, recipe: Recipe, tokens: list[int]) -> None:
        self.model, self.folder, self.count, self.recipe = model, folder, points, recipe
        self.tokens = tokens  # of all whole steps so far, padding not counted
        self.points: list[dict[str, Any]] = []
        self.started = 0.0
        self.checkpoint: str | None = None
        if folder and (folder / "clock.json").is_file():
            known = json.loads((folder / "clock.json").read_text())
            self.points, self.checkpoint = known["points"], str(folder / known["checkpoint"])
        self.seconds = self.points[-1]["seconds_shared"] if self.points else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the steps and start the clock."""
        self.steps = {max(1, round(state.max_steps * (i + 1) / self.count)) for i in range(self.count)}
        self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, save, and start it again."""
        if state.global_step not in self.steps:
            return
        self.seconds += now() - self.started
        point = {
            "step": state.global_step,
            "tokens": self.tokens[state.global_step - 1],
            "seconds_shared": self.seconds,
        }
        self.points.append(point)
        if self.folder:
            self.model.save_pretrained(str(self.folder / f"step-{state.global_step}"))
            control.should_save = True  # the checkpoint, after this; the clock stands until it is there
        self.started = now()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the checkpoint, now that it is whole, and start the clock again."""
        checkpoint, recipe = f"checkpoint-{state.global_step}", asdict(self.recipe)
        known = {"recipe": recipe, "checkpoint": checkpoint, "points": self.points}
        write_json(Path(args.output_dir) / "clock.json", known)
        self.started = now()

    def remove_checkpoints(self) -> None:
        """Remove what only a training that is under way needs."""
        if self.folder:
            (self.folder / "clock.json").unlink(missing_ok=True)
            for checkpoint in self.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)


def now() -> float:
    """Seconds, after all that the GPU was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
