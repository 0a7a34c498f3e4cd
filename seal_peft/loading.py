"""From a name to a model on the right device in the right dtype, with or without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .assets import resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str) -> torch.dtype:
    """Turn a dtype name into a dtype; `auto` is bfloat16 where the hardware computes in it, else float32.

    Raises:
        ValueError: The name is not known.
    """
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() or _cpu_has_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known. Use one of: auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _cpu_has_bfloat16() -> bool:
    # torch has no public call for this before 2.10's `torch.cpu.get_capabilities`.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_config(model_name_or_path: str) -> Any:
    """Load the model's config alone, so that settings can be checked before any weights are read."""
    return AutoConfig.from_pretrained(resolve_model(model_name_or_path))


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer, padding on the left as generation and answer-only logits need it."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model_name_or_path), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model_name_or_path: str, dtype: str = "auto", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model onto the device at hand.

    Args:
        model_name_or_path: Hub id, local folder, or `smollm2` for the installed asset.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attn_implementation: Name of the attention function; `None` leaves it to transformers.
    """
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(model_name_or_path), dtype=pick_dtype(dtype), attn_implementation=attn_implementation
    )
    return model.to(pick_device())


def load_adapter(model: PreTrainedModel, adapter_path: str) -> PeftModel:
    """Wrap a base model with the adapter of a folder (or Hub id), ready for inference."""
    return PeftModel.from_pretrained(model, adapter_path).eval()


def base_of_adapter(adapter_path: str) -> str:
    """Return the base model an adapter was trained on.

    Raises:
        ValueError: The adapter does not name its base model.
    """
    base = PeftConfig.from_pretrained(adapter_path).base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {adapter_path} does not name its base model. Pass --model_name_or_path.")
    return base


def is_adapter(path: str) -> bool:
    """Tell whether a local folder holds a PEFT adapter."""
    return (Path(path) / "adapter_config.json").is_file()
