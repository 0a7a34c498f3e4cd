"""A house to evaluate in, and what an evaluation leaves."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import models
from seal_peft import SealConfig
from seal_peft.data import write_samples
from seal_peft.evaluate import EvaluateArguments, evaluate
from seal_peft.merge import MergeArguments, merge
from stages import save_model, some_samples

ADAPTERS = {
    "seal": SealConfig(task_type="CAUSAL_LM", granularity="channel"),
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=2, init_lora_weights=False),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["o_proj"], feedforward_modules=["o_proj"], init_ia3_weights=False
    ),
}


def save_adapter(house: Path, name: str, seed: int = 1) -> Path:
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(base, copy.deepcopy(ADAPTERS[name]))
    if name == "seal":
        models.draw_scales(model, seed=seed)
    model.save_pretrained(str(house / name))
    return house / name


def make_house(folder: Path) -> Path:
    """A tiny model, six samples, an adapter of each method, and the model with SEAL's merged."""
    save_model(folder / "model")
    samples = [replace(sample, meta={**sample.meta, "wording": "own"}) for sample in some_samples("test")]
    write_samples(folder / "test.jsonl", samples)
    for name in ADAPTERS:
        save_adapter(folder, name)
    merge(MergeArguments(str(folder / "seal"), str(folder / "merged")))
    return folder


def evaluate_in(house: Path, folder: Path, systems: tuple[str, ...] = ("seal",), **changes: Any) -> dict[str, Any]:
    arguments = {
        "adapters": [str(house / name) for name in systems],
        "max_new_tokens": 6,
        "dtype": "float32",
        **changes,
    }
    return evaluate(EvaluateArguments(str(house / "model"), str(house / "test.jsonl"), str(folder), **arguments))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().split(b"\n")[:-1]]


def answers_of(folder: Path) -> dict[tuple[str, str], str]:
    rows = rows_of(folder)
    answers = {(row["system"], row["id"]): row["answer"] for row in rows}
    assert len(answers) == len(rows)
    return answers


def numbers_of(folder: Path) -> str:
    metrics = json.loads((folder / "metrics.json").read_text())
    return json.dumps([metrics["systems"], metrics["cells"]])
