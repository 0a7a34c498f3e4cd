"""Which heads matter: scores of every attention head on samples of a task, beside the scales that an adapter learned.

seal-peft heads --model_name_or_path smollm2 --test_file test.jsonl --adapter runs/my/adapter
--output_dir runs/my/heads
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ..data import check_window, read_samples
from ..folders import check_output_folder
from ..loading import (
    DTYPE_HELP,
    Dtype,
    check_adapter,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    locate_model,
    pick_device,
    pick_dtype,
    unload_adapter,
)
from ..plots import new_figure
from ..predictions import fingerprint, identity
from ..reach import reach, reach_of_folder
from ..tasks import Sample, get_task
from ..tuner import SealConfig, scales
from ..tuner.reading import read_adapter
from .generate import generation_without
from .gradient import Site
from .inputs import EncodedSample, Measure, encode_samples
from .layers import Heads, find_heads, parse_head
from .maps import as_tensor, scale_columns
from .pictures import draw_quadrants
from .pruning import BATCH_TOKENS, Ablation
from .quadrants import parse_factors, quadrant_scales, quadrants, save_head_scales
from .record import earlier, finished, write_comparison, write_score
from .retrieval import check_needles
from .scores import Score, add_direct_effect, score_direct_effect, score_gradient, score_pruning, score_retrieval
from .show import show

# The settings that are of one score alone; all others are of the whole table.
_OWN = {
    "gradient": ("sites",),
    "pruning": ("ablations", "channels_of", "generate_heads"),
    "retrieval": (),
    "direct_effect": (),
}
SCORES = tuple(_OWN)


@dataclass
class HeadsArguments:
    """Which heads to score, on what, and how."""

    model_name_or_path: str = field(metadata={"help": "Base model: Hub id, local folder, or `smollm2`."})
    test_file: str = field(
        metadata={
            "help": "Samples, one JSON row each: what `seal-peft make-data` writes, or your own. Maps are made for "
            "each length in it.",
            "aliases": ["--task_file"],
        }
    )
    output_dir: str = field(metadata={"help": "Folder for the maps, tables and pictures."})
    adapter: str | None = field(
        default=None, metadata={"help": "SEAL adapter whose scales stand beside the scores of the base model."}
    )
    apply_adapter: bool = field(default=False, metadata={"help": "Score the model with the adapter, not the base."})
    scores: list[str] = field(default_factory=lambda: [*SCORES], metadata={"help": "Which scores.", "choices": SCORES})
    measure: Measure = field(
        default="answer",
        metadata={"help": "Whose log-probability counts: of the accepted `answer`, or of the whole `target`."},
    )
    sites: list[str] = field(
        default_factory=lambda: ["output", "query"],
        metadata={"help": "Gradients of scales at these sites.", "choices": get_args(Site)},
    )
    ablations: list[str] = field(
        default_factory=lambda: ["zero"],
        metadata={"help": "What a pruned head gives: 0, or its mean over all tokens.", "choices": get_args(Ablation)},
    )
    channels_of: list[str] = field(
        default_factory=list, metadata={"help": "Heads whose channels are pruned one by one, such as L14H7."}
    )
    generate_heads: int = field(
        default=0, metadata={"help": "Generate answers without a head, for so many at either end of the pruning map."}
    )
    quadrants: list[str] = field(
        default_factory=list,
        metadata={"help": "Adapters to write from the two outer lengths of the pruning map, such as Q1=0.9,Q3=1.1."},
    )
    batch_tokens: int = field(
        default=BATCH_TOKENS, metadata={"help": "Tokens that go through a layer together when pruning: memory."}
    )
    activation_checkpointing: bool = field(default=False, metadata={"help": "Less memory for gradients, more time."})
    dtype: Dtype = field(default="auto", metadata={"help": DTYPE_HELP})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention function, e.g. sdpa."})


def heads(arguments: HeadsArguments) -> str:
    """Score every attention head of a model.

    Writes `SCORE.json` and `SCORE.png` for each score, `gradient-channels.safetensors`, and `heads.json` with all
    scores, learned scales and their rank correlations side by side. Scores that an earlier call finished are kept
    where model, samples and settings are still the same; those that this call does not ask for stay in the table, too.

    Args:
        arguments: See `HeadsArguments`.

    Returns:
        Tables for the terminal.

    Raises:
        ValueError: A setting is not allowed, a score has no meaning for the model or the samples, or the folder holds
            files of another stage, or a score that is not asked for and has other settings; as far as possible raised
            before the model is loaded.
        ImportError: matplotlib is missing.
    """
    new_figure(1, 1)
    samples = _check(arguments)
    config = load_config(arguments.model_name_or_path)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    encoded = encode_samples(samples, tokenizer, arguments.measure)
    if "retrieval" in arguments.scores:
        check_needles(encoded)
    by_length = {n: [row for row in encoded if row.length == n] for n in sorted({row.length for row in encoded})}
    _check_model(arguments, config, longest=max(len(row.input_ids) for row in encoded))

    folder = Path(arguments.output_dir)
    others = [earlier(folder, name, _settings(arguments, name)) for name in SCORES if name not in arguments.scores]
    model = load_model(arguments.model_name_or_path, arguments.dtype, arguments.attn_implementation)
    if arguments.adapter:
        model = load_adapter(model, arguments.adapter)
    found = find_heads(model)
    records: dict[str, dict[str, Any]] = {}
    for name in arguments.scores:
        settings = _settings(arguments, name) | {own: getattr(arguments, own) for own in _OWN[name]}
        key = fingerprint(name, settings)
        record = finished(folder, name, key)
        if record is None:
            with _worn(model, arguments):
                score = _compute(name, arguments, found, by_length, samples, tokenizer)
            if name == "direct_effect" and arguments.adapter and not arguments.apply_adapter:
                # The lead is over the same wrong tokens, so that the two can be compared.
                wrong = score.more.pop("wrong")
                for length, rows in by_length.items():
                    add_direct_effect(score, found, length, rows, wrong[length], "_adapter")
            score.more.pop("wrong", None)
            record = write_score(folder, name, score, found, key, settings)
        records[name] = record
    columns = scale_columns(scales(arguments.adapter), found) if arguments.adapter else {}
    comparison = write_comparison(folder, [*records.values(), *filter(None, others)], columns, found)
    lines = show(comparison, folder)
    if arguments.quadrants:
        plain = find_heads(unload_adapter(model)) if isinstance(model, PeftModel) else found
        lines += _write_quadrants(folder, records["pruning"], plain, arguments)
    return "\n".join(lines)


def _check(arguments: HeadsArguments) -> list[Sample]:
    """Refuse settings that are not allowed, and read the samples."""
    for name, known in (("scores", SCORES), ("sites", get_args(Site)), ("ablations", get_args(Ablation))):
        given = getattr(arguments, name)
        if not given or not set(given) <= set(known) or len(set(given)) < len(given):
            raise ValueError(f"{name}={given} was given; use one or more of: {', '.join(known)}, each once.")
    for wants_pruning in ("quadrants", "channels_of", "generate_heads"):
        if getattr(arguments, wants_pruning) and "pruning" not in arguments.scores:
            raise ValueError(f"--{wants_pruning} goes by pruning: add it to --scores.")
    if arguments.generate_heads < 0 or arguments.batch_tokens < 1:
        raise ValueError(
            f"--generate_heads {arguments.generate_heads} --batch_tokens {arguments.batch_tokens} was given; use 0 or "
            "more of the first, and 1 or more of the second."
        )
    for text in arguments.quadrants:
        parse_factors(text)
    if arguments.apply_adapter and (not arguments.adapter or arguments.quadrants):
        raise ValueError("--apply_adapter needs an --adapter, and --quadrants are about the base model without it.")
    pick_dtype(arguments.dtype)
    check_output_folder(Path(arguments.output_dir), "heads")
    samples = read_samples(arguments.test_file)
    if not samples:
        raise ValueError(f"{arguments.test_file} holds no samples. Make some with `seal-peft make-data`.")
    if arguments.quadrants and len({sample.length for sample in samples}) < 2:
        raise ValueError(f"--quadrants compare two lengths, and {arguments.test_file} has one. Make samples of two.")
    for sample in samples if arguments.generate_heads else ():
        get_task(sample.task)
    return samples


def _check_model(arguments: HeadsArguments, config: Any, longest: int) -> None:
    """Find out without the weights whether model and adapter fit each other and the samples, and name the heads."""
    window = reach_of_folder(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise ValueError(
            f"{arguments.model_name_or_path} is a {config.model_type} model, which transformers does not load as a "
            "language model that predicts the next token. These scores are about such models only."
        )
    if arguments.adapter:
        if not isinstance(read_adapter(arguments.adapter), SealConfig):
            raise ValueError(
                f"--adapter {arguments.adapter} is of another method and has no scales; give a SEAL adapter, or none."
            )
        adapted = check_adapter(arguments.model_name_or_path, arguments.adapter)
        if arguments.apply_adapter and adapted is not None:
            config, window = adapted.config, reach(adapted)
    check_window(config, longest, window)
    with torch.device("meta"):
        found = find_heads(AutoModelForCausalLM.from_config(load_config(arguments.model_name_or_path)))
    for name in arguments.channels_of:
        parse_head(name, found)


def _settings(arguments: HeadsArguments, name: str) -> dict[str, Any]:
    """Everything but its own settings that a score depends on, as JSON values."""
    uses_adapter = arguments.apply_adapter or name == "direct_effect"
    return {
        "model": identity(locate_model(arguments.model_name_or_path)),
        "adapter": identity(arguments.adapter) if arguments.adapter and uses_adapter else None,
        "samples": hashlib.sha256(Path(arguments.test_file).read_bytes()).hexdigest(),
        "dtype": str(pick_dtype(arguments.dtype)),
        "device": pick_device().type,
        "measure": arguments.measure,
        "apply_adapter": arguments.apply_adapter,
        "attn_implementation": arguments.attn_implementation,
    }


def _worn(model: Any, arguments: HeadsArguments) -> AbstractContextManager[Any]:
    """Within it the model is what is scored: the base, unless the adapter is asked for."""
    return model.disable_adapter() if arguments.adapter and not arguments.apply_adapter else nullcontext()


def _compute(
    name: str,
    arguments: HeadsArguments,
    found: Heads,
    by_length: dict[int, list[EncodedSample]],
    samples: Sequence[Sample],
    tokenizer: Any,
) -> Score:
    if name == "gradient":
        return score_gradient(found, by_length, arguments.sites, arguments.activation_checkpointing)
    if name == "retrieval":
        return score_retrieval(found, by_length)
    if name == "direct_effect":
        return score_direct_effect(found, by_length)
    score = score_pruning(found, by_length, arguments.ablations, arguments.channels_of, arguments.batch_tokens)
    if arguments.generate_heads:
        pruned = score.maps[f"pruning_{arguments.ablations[0]}"]
        generated = generation_without(found, pruned, samples, tokenizer, arguments.generate_heads)
        score.more["generated"] = generated
    return score


def _write_quadrants(folder: Path, pruning: dict[str, Any], plain: Heads, arguments: HeadsArguments) -> list[str]:
    """Write an adapter for each wish, and the picture; return lines that say where."""
    by_length = pruning["maps"][f"pruning_{arguments.ablations[0]}"]
    lengths = sorted(map(int, by_length))
    outer = {length: as_tensor(by_length[str(length)]["mean"]) for length in (lengths[0], lengths[-1])}
    found = quadrants(*outer.values())
    draw_quadrants(outer, found, plain, folder / "quadrants.png")
    written = []
    for text in arguments.quadrants:
        name = text.replace(" ", "").replace("=", "x").replace(",", "-")
        scaled = quadrant_scales(found, parse_factors(text))
        written.append(f"{text}: {save_head_scales(plain, scaled, folder / 'quadrants' / name)}")
    return written
