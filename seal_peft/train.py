"""Train the scales with the HF Trainer, on samples in JSONL.

seal-peft train --model_name_or_path smollm2 --train_file runs/demo/train.jsonl --output_dir runs/demo/adapter
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .data import AnswerCollator, check_window, encode_training, read_samples
from .loading import load_config, load_model, load_tokenizer
from .provenance import provenance, write_json
from .tuner import SealConfig, save_adapter

# What `--recipe` sets unless a flag or the config file says otherwise. "paper" is the paper's: 50 samples with one
# question each, constant learning rate, one epoch.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "num_train_epochs": 1, "max_grad_norm": 0.0},
    "default": {
        "learning_rate": 2e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "num_train_epochs": 1,
        "max_grad_norm": 1.0,
    },
}


@dataclass
class TrainArguments:
    """What to train, and on what. The flags of `transformers.TrainingArguments` come on top."""

    model_name_or_path: str = field(metadata={"help": "Base model: Hub id, local folder, or `smollm2`."})
    train_file: str = field(metadata={"help": "Samples, one JSON row each, as `seal-peft make-data` writes them."})
    granularity: str = field(default="channel", metadata={"help": "One scale per attention `head` or per `channel`."})
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Layers to adapt. Default: all."})
    recipe: str = field(default="default", metadata={"help": f"Named settings: {', '.join(RECIPES)}. Flags win."})
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 where the hardware has it) or a dtype name."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention function, e.g. sdpa."})


@dataclass
class SealTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a few scales on long inputs."""

    per_device_train_batch_size: int = field(default=1, metadata={"help": "1 needs no padding, so flash kernels stay."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=50, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Experiment trackers, as in transformers."})


def train(arguments: TrainArguments, training_arguments: TrainingArguments) -> Path:
    """Train one SEAL adapter; an interrupted run goes on from its last checkpoint.

    Writes the adapter folder (`adapter_config.json`, `adapter_model.safetensors`, `README.md`) and, last of all,
    `run.json` with every setting, the loss curve, seconds, tokens and peak memory.

    Args:
        arguments: Model, data and scales.
        training_arguments: Optimiser, schedule, batch size, output folder.

    Returns:
        The adapter folder.

    Raises:
        ValueError: Bad rows, or samples longer than the model's window; raised before the model is loaded.
    """
    samples = read_samples(arguments.train_file)
    if not samples:
        raise ValueError(f"{arguments.train_file} holds no samples. Make some with `seal-peft make-data`.")
    check_window(load_config(arguments.model_name_or_path), max(sample.length for sample in samples))
    config = SealConfig(
        task_type="CAUSAL_LM",
        granularity=arguments.granularity,
        layers_to_transform=arguments.layers_to_transform,
    )
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    rows = [encode_training(sample, tokenizer) for sample in samples]

    base = load_model(arguments.model_name_or_path, arguments.dtype, arguments.attn_implementation)
    base.config.use_cache = False
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=training_arguments,
        train_dataset=rows,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    output_dir = Path(training_arguments.output_dir)
    finished = (output_dir / "run.json").is_file()
    checkpoint = None if finished or not output_dir.is_dir() else get_last_checkpoint(str(output_dir))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    if not trainer.is_world_process_zero():
        return output_dir
    save_adapter(trainer.model, output_dir)
    write_json(
        output_dir / "run.json",
        {
            "arguments": asdict(arguments),
            "training_arguments": training_arguments.to_dict(),
            "samples": len(samples),
            "tokens": sum(len(row["input_ids"]) for row in rows) * training_arguments.num_train_epochs,
            "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
            "seconds": seconds,
            "resumed_from": checkpoint,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "train_loss": result.training_loss,
            "loss_curve": [
                {"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row
            ],
            **provenance(),
        },
    )
    return output_dir
