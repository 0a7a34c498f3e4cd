"""Train the scales with the HF Trainer, on samples in JSONL.

seal-peft train --model_name_or_path smollm2 --train_file runs/demo/train.jsonl --output_dir runs/demo/adapter
"""

from __future__ import annotations

import copy
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers
from packaging.version import Version
from peft import PeftConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from .card import write_card
from .data import prompt_hash, read_samples, trained_prompts
from .dataset import check_batch_size, training_rows
from .files import alone_in, write_json
from .folders import check_output_folder
from .loading import DTYPE_HELP, Dtype, check_one_gpu, load_model, load_skeleton, load_tokenizer, pick_dtype
from .memory import Policy, apply_memory_policy
from .provenance import provenance
from .resume import FINISHED, UNFINISHED, find_checkpoint, settings_of, start_afresh
from .tokens import AnswerCollator
from .tuner import SealConfig, hotswap_adapter, save_adapter
from .tuner.config import Granularity, Site, check_sites
from .tuner.reading import read_adapter

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

logger = logging.getLogger(__name__)


@dataclass
class TrainArguments:
    """What to train, and on what. The flags of `transformers.TrainingArguments` come on top."""

    model_name_or_path: str = field(metadata={"help": "Base model: Hub id, local folder, or `smollm2`."})
    train_file: str = field(
        metadata={
            "help": "Samples, one JSON row each: what `seal-peft make-data` writes, or your own.",
            "aliases": ["--task_file"],
        }
    )
    granularity: Granularity | None = field(
        default=None,
        metadata={
            "help": "One scale per `head` or per `channel` of it; queries always have one per head. Default: channel, "
            "for queries alone head. (`SealConfig` in Python has `head` unless told.)"
        },
    )
    sites: list[str] = field(
        default_factory=lambda: ["output"],
        metadata={
            "help": "What is scaled: the `output` of each head, its `query` (a temperature), or both.",
            "choices": get_args(Site),
        },
    )
    target_heads: list[str] | None = field(
        default=None,
        metadata={"help": "Heads that get a scale, such as L14H7; `seal-peft heads` names them. Default: all."},
    )
    init_adapter: str | None = field(
        default=None,
        metadata={"help": "Start from the scales of this adapter, which has the same sites and granularity."},
    )
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Layers to adapt. Default: all."})
    rope_parameters: str | None = field(
        default=None,
        metadata={"help": """Extension that the adapter brings, as JSON: '{"rope_type": "yarn", "factor": 4.0}'."""},
    )
    self_extend: str | None = field(
        default=None, metadata={"help": """The same by Self-Extend: '{"group_size": 6, "window": 1024}'."""}
    )
    recipe: str = field(default="default", metadata={"help": "Named settings. Flags win.", "choices": RECIPES})
    dtype: Dtype = field(default="auto", metadata={"help": DTYPE_HELP})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention function, e.g. sdpa."})
    memory: Policy | None = field(
        default=None,
        metadata={
            "help": "What layers keep for the backward pass: as much as fits (`auto`), all (`fast`), or nothing "
            "(`low`). Default: auto, unless activation_checkpointing is given."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an adapter or another training that is in --output_dir."}
    )


@dataclass
class SealTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a few scales on long inputs."""

    output_dir: str = field(metadata={"help": "Adapter folder to write; checkpoints stand in it meanwhile."})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Samples a forward pass, padded to the longest; flash kernels stay."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_steps: float = field(
        default=0.1, metadata={"help": "Write a checkpoint every so many steps; below 1, every such share of the run."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Experiment trackers, as in transformers."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Token ids are too few to be worth it."})
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Checkpoint as transformers does, instead of --memory.", "nargs": "?", "const": True},
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'As in transformers, e.g. {"every_n_layers": 2}.'}
    )

    def __post_init__(self) -> None:
        if self.push_to_hub or self.hub_token is not None:
            # The Trainer's upload has no card of ours, and a token on the command line ends up in files and histories.
            raise ValueError(
                "push_to_hub and hub_token are not used here. Log in with `hf auth login` or set HF_TOKEN, and run "
                "`seal-peft push --adapter OUTPUT_DIR --repo_id OWNER/NAME` when the training is done."
            )
        if self.max_steps == 0:
            raise ValueError("max_steps=0 was given; use more than 0, or -1 for all epochs.")
        counted = () if self.max_steps > 0 else ("num_train_epochs",)
        for name in ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", *counted):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; use more than 0.")
        # Without this, several processes on CPUs would each train alone (transformers 5.23).
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # transformers 5.23 renamed gradient_checkpointing and warns about the old name; older ones know only that.
        # Remove this, and the two fields above, when the oldest supported transformers is 5.23.
        renamed = Version(transformers.__version__) >= Version("5.23")
        if self.activation_checkpointing and not renamed:
            self.gradient_checkpointing = True
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        super().__post_init__()
        if not renamed:
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


def train(
    arguments: TrainArguments, training_arguments: SealTrainingArguments, config: PeftConfig | None = None
) -> Path:
    """Train one adapter.

    Writes the adapter folder (`adapter_config.json`, `adapter_model.safetensors`, the card `README.md`) and, last of
    all, `run.json` with every setting, the loss curve, seconds, tokens and peak memory.

    A folder with an interrupted training goes on from its last checkpoint, and ends with the same weights; other
    settings than those it began with are refused, and so is a folder with a finished adapter, unless
    `overwrite_output_dir` lets it be replaced.

    Args:
        arguments: Model, data and scales.
        training_arguments: Optimiser, schedule, batch size, output folder.
        config: Adapter of another PEFT method, to be trained in the same way; `None` for the SEAL adapter that
            `arguments` describe. Such a folder gets the card that PEFT writes.

    Returns:
        The adapter folder.

    Raises:
        ValueError: Bad rows, samples of the test split or longer than the model's window, two memory settings, an
            adapter to start from that does not fit, a finished adapter, an unfinished training with other settings,
            files of another stage in the output folder, or several GPUs for one process; raised before the model is
            loaded. Another process trains into the folder.
    """
    if arguments.memory is not None and training_arguments.activation_checkpointing:
        raise ValueError(
            f"--memory {arguments.memory} and --activation_checkpointing both say what is kept for the backward pass: "
            "give one of them."
        )
    check_one_gpu(training_arguments.n_gpu)
    if arguments.granularity is None:
        arguments = replace(arguments, granularity="channel" if "output" in arguments.sites else "head")
    samples = read_samples(arguments.train_file)
    other, config = config, config or _config(arguments)
    pick_dtype(arguments.dtype)
    output_dir = Path(training_arguments.output_dir)
    check_output_folder(output_dir, "train")
    settings = settings_of(asdict(arguments), training_arguments, other)
    find = partial(find_checkpoint, output_dir, settings, arguments.overwrite_output_dir)
    checkpoint = find(training_arguments.resume_from_checkpoint)
    with torch.device("meta"):  # whether the heads can be found, and how far it reads, shows without the weights
        adapted = get_peft_model(load_skeleton(arguments.model_name_or_path), copy.deepcopy(config))
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if arguments.init_adapter is not None:
        _check_same_sites(arguments.init_adapter, config)
        hotswap_adapter(adapted, arguments.init_adapter)
    learned_before = trained_prompts(arguments.init_adapter) if arguments.init_adapter is not None else []
    rows = training_rows(samples, tokenizer, adapted)
    tokens_of = [len(row["input_ids"]) for row in rows]
    check_batch_size(adapted, training_arguments.per_device_train_batch_size, tokens_of)

    base = load_model(arguments.model_name_or_path, arguments.dtype, arguments.attn_implementation)
    base.config.use_cache = False
    model = get_peft_model(base, config)
    if arguments.init_adapter is not None:
        hotswap_adapter(model, arguments.init_adapter)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=rows,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.get_train_dataloader()  # a bad setting of it shows here, before an earlier adapter is cleared away
    memory = _apply_memory(trainer, arguments.memory, tokens=max(tokens_of))
    first = trainer.is_world_process_zero()
    with alone_in(output_dir) if first else nullcontext():
        if first:  # Another process may have come or gone while the model was loaded.
            checkpoint = find(training_arguments.resume_from_checkpoint)
        if checkpoint is None and first:
            start_afresh(output_dir, settings)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        if not first:
            return output_dir
        if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
            start_afresh(output_dir, settings)  # no checkpoint of it is worth going on from
            raise ValueError(
                "Training diverged: its weights are not finite, and nothing was saved. Lower --learning_rate."
            )
        save_adapter(model, output_dir)
        record = {
            "arguments": asdict(arguments),
            "memory": memory,
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "samples": len(rows),
            "tasks": sorted({sample.task for sample in samples}),
            "lengths": sorted(
                {sample.length or len(row["input_ids"]) for sample, row in zip(samples, rows, strict=True)}
            ),
            "tokens": round(sum(tokens_of) * (trainer.state.epoch or 0)),
            # Of this call: an interrupted run's earlier steps are not in it.
            "seconds": time.monotonic() - started,
            "resumed_from": checkpoint,
            **_record(trainer),
            "prompt_hashes": [*map(prompt_hash, samples), *learned_before],  # `evaluate` refuses to score on these
        }
        if other is None:
            write_card(output_dir, record)
        write_json(output_dir / FINISHED, record)
        (output_dir / UNFINISHED).unlink(missing_ok=True)
        return output_dir


def _config(arguments: TrainArguments) -> SealConfig:
    return SealConfig(
        task_type="CAUSAL_LM",
        granularity=cast(Granularity, arguments.granularity),
        sites=check_sites(arguments.sites),
        target_heads=arguments.target_heads,
        layers_to_transform=arguments.layers_to_transform,
        rope_parameters=_from_json("rope_parameters", arguments.rope_parameters),
        self_extend=_from_json("self_extend", arguments.self_extend),
    )


def _check_same_sites(init_adapter: str, config: PeftConfig) -> None:
    """Refuse to start from an adapter with other sites: swapping would leave those that it lacks at 1."""
    given, wanted = (getattr(each, "sites", None) for each in (read_adapter(init_adapter), config))
    if given is not None and wanted is not None and given != wanted:
        raise ValueError(
            f"--init_adapter {init_adapter} has sites={given}, but sites={wanted} are to be trained. Give --sites as "
            "that adapter has them, or start from one that has these."
        )


def _apply_memory(trainer: Trainer, policy: Policy | None, tokens: int) -> str | None:
    """Say what layers keep, unless transformers is to say it, and return what was chosen."""
    if trainer.args.gradient_checkpointing:
        return None
    model: Any = trainer.model
    rows = trainer.args.per_device_train_batch_size
    summary = apply_memory_policy(model, policy or "auto", tokens=tokens, rows=rows).summary
    if trainer.is_world_process_zero():
        logger.info("Memory policy %s.", summary)
    return summary


def _from_json(name: str, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{name} must be JSON, as in --help; got {text!r} ({error}).") from error


def _record(trainer: Trainer) -> dict[str, Any]:
    """What the Trainer itself can say of a training, for `run.json`."""
    history = trainer.state.log_history
    return {
        "training_arguments": trainer.args.to_dict(),
        "steps": trainer.state.global_step,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "loss_curve": [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row],
        **provenance(),
    }
