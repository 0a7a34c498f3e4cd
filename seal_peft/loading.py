"""From a name to a model on the right device in the right dtype, with or without an adapter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, PeftType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .assets import public_id, resolve_model
from .context.self_extend import apply_self_extend, check_settings
from .tuner import activate, load_adapters
from .tuner.reading import not_found, read_adapter

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_HELP = "auto: bfloat16 where the hardware computes in it, else float32."


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_one_gpu(gpus: int) -> None:
    """Refuse a Trainer that has several GPUs in one process: its DataParallel makes batches as many times larger.

    Raises:
        ValueError: There are several.
    """
    if gpus > 1:
        raise ValueError(
            f"This process sees {gpus} GPUs, and transformers would split batches {gpus} times as large over them "
            "(DataParallel). Set CUDA_VISIBLE_DEVICES=0 to train on one, or start a process for each: "
            f"`accelerate launch --multi_gpu --num_processes {gpus} -m seal_peft train ...`."
        )


def pick_dtype(name: str) -> torch.dtype:
    """Turn a dtype name into a dtype; `auto` is bfloat16 where the hardware computes in it, else float32.

    Raises:
        ValueError: The name is not known.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() or _cpu_has_bfloat16() else torch.float32
    if name not in known:
        raise ValueError(f"dtype {name!r} is not known. Use one of: auto, {', '.join(known)}.")
    return known[name]


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def locate_model(name_or_path: str) -> str:
    """Turn what a user calls a model into a hub id or an absolute folder.

    Adapters record this name as their base. A relative path would mean something else in another working directory.
    """
    name = resolve_model(name_or_path)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_config(model_name_or_path: str) -> Any:
    """Load the model's config alone, so that settings can be checked before any weights are read.

    Raises:
        OSError: There is no such model, no way to it, or none that can be read.
        ValueError: It is an adapter.
    """
    name = locate_model(model_name_or_path)
    if reason := not_found(name, "config.json"):
        raise OSError(f"{reason} Give the folder of a model, a Hub id, or the word smollm2.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        if (Path(name) / CONFIG_NAME).is_file():
            raise ValueError(
                f"{model_name_or_path!r} is an adapter, not a model. Give its base model here; `evaluate` takes "
                "adapters in --adapters, other stages one in --adapter."
            )
        raise OSError(
            f"The folder {model_name_or_path!r} holds no model: there is no config.json in it. Give the folder of a "
            "model, a Hub id, or the word smollm2."
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"The model {model_name_or_path!r} cannot be read: {error}") from error


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer, padding on the left as generation needs it.

    Raises:
        OSError: There is none beside the model, or none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate_model(model_name_or_path), padding_side="left")
    except (OSError, ValueError) as error:
        raise OSError(
            f"The tokenizer of {model_name_or_path!r} cannot be read. Save it in the model's folder with "
            f"`tokenizer.save_pretrained`, or mend what transformers says: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model_name_or_path: str, dtype: str = "auto", attn_implementation: str | None = None) -> Any:
    """Load a causal language model onto the device at hand; Self-Extend that its config notes is in force.

    Args:
        model_name_or_path: Hub id, local folder, or `smollm2` for the installed asset.
        dtype: A name that `pick_dtype` knows, or `stored` for the dtype of the checkpoint's files.
        attn_implementation: Name of the attention function; `None` leaves it to transformers.

    Raises:
        ValueError: The config notes a Self-Extend that the model does not take.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        locate_model(model_name_or_path),
        dtype="auto" if dtype == "stored" else pick_dtype(dtype),
        attn_implementation=attn_implementation,
    )
    return _as_noted(model.to(pick_device()))


def load_skeleton(model_name_or_path: str) -> Any:
    """Build what `load_model` loads without its weights, on the meta device.

    Args:
        model_name_or_path: Hub id, local folder, or `smollm2`.

    Raises:
        OSError: As `load_config`.
        ValueError: As `load_config`, or the config notes a Self-Extend that the model does not take.
    """
    config = load_config(model_name_or_path)
    with torch.device("meta"):
        return _as_noted(AutoModelForCausalLM.from_config(config))


def _as_noted(model: Any) -> Any:
    """A model that was merged under Self-Extend answers as it did then; transformers alone ignores the note."""
    settings = getattr(model.config.get_text_config(), "self_extend", None)
    if settings is not None:
        apply_self_extend(model, **check_settings(settings))
    return model


def check_adapter(model_name_or_path: str, path: str) -> PeftModel | None:
    """Make sure that an adapter is whole and fits a base model, without the weights of the model.

    Shapes tell most models apart, not all: a base of another name than the recorded one is warned about.

    Args:
        model_name_or_path: Hub id, local folder, or `smollm2`.
        path: Folder or Hub id of an adapter of any PEFT method.

    Returns:
        The model with the adapter on the meta device, the context extension of the adapter in force; `None` for
        prompts, and for methods that compute with the weights.

    Raises:
        ValueError: There is no adapter, its files are broken, or it was made for a model of other shapes or modules.
    """
    config = read_adapter(path)
    skeleton = load_skeleton(model_name_or_path)
    try:
        if config.is_prompt_learning:
            _check_prompt(config, skeleton)
        adapted = (
            None if config.is_prompt_learning else _wrap(skeleton, path, low_cpu_mem_usage=True, torch_device="cpu")
        )
    except (ValueError, RuntimeError) as error:
        mismatches = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if isinstance(error, RuntimeError) and not mismatches:
            return None  # Some methods compute with the weights, which a skeleton cannot; loading for real will tell.
        raise ValueError(
            f"The adapter {path} does not fit the model {model_name_or_path}. Pass the one that it was trained on, "
            f"{config.base_model_name_or_path!r}, as --model_name_or_path. ({mismatches[0] if mismatches else error})"
        ) from error
    recorded = str(config.base_model_name_or_path or "")
    if recorded and _plain_name(recorded) != _plain_name(locate_model(model_name_or_path)):
        logger.warning(
            "The adapter %s fits the model %s, but was trained on %s. Unless these are one model by two names, pass "
            "that one as --model_name_or_path.",
            *(path, model_name_or_path, recorded),
        )
    return adapted


def _check_prompt(config: Any, model: Any) -> None:
    """Prompts have no modules that could tell; the sizes that they were made for stand in the config."""
    width, layers = model.get_input_embeddings().embedding_dim, model.config.get_text_config().num_hidden_layers
    prefix = config.peft_type == PeftType.PREFIX_TUNING  # of keys and values, which may be narrower
    if config.num_layers != layers or not (prefix or config.token_dim == width):
        raise ValueError(
            f"It is for {config.num_layers} layers of width {config.token_dim}; the model has {layers} of {width}."
        )


def _plain_name(model: str) -> str:
    """The name of a model without its owner or the folders above it, which differ from machine to machine."""
    return (public_id(model) or model.rstrip("/")).rpartition("/")[2]


def load_adapter(model: Any, *paths: str) -> PeftModel:
    """Wrap a base model with the adapter of a folder (or Hub id), ready for inference.

    Args:
        model: The base model; it is modified in place.
        paths: One adapter of any PEFT method, or several that compute together, SEAL's among them.

    Raises:
        ValueError: A part of an adapter has no place in the model, or a place in the model has no part; or there are
            several, and none is SEAL's, or they ask for different RoPE or Self-Extend.
    """
    if len(paths) == 1:
        return _wrap(model, *paths).eval()
    adapters = {f"part{number}": path for number, path in enumerate(paths)}
    with _missing_refused():
        adapted = load_adapters(model, adapters)
    activate(adapted, adapters, inference_mode=True)  # or refuse what cannot compute together
    for name, path in adapters.items():
        _refuse_unknown(adapted, path, name)
    return adapted.eval()


def _wrap(model: Any, path: str, **settings: Any) -> PeftModel:
    """Load an adapter whole. PEFT drops keys that have no place and starts anew what the file lacks."""
    with _missing_refused():
        adapted = PeftModel.from_pretrained(model, path, **settings)
    _refuse_unknown(adapted, path, "default", **settings)
    return adapted


@contextmanager
def _missing_refused() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*Found missing adapter keys")
        try:
            yield
        except UserWarning as warning:
            if "Found missing adapter keys" not in str(warning):
                raise
            raise ValueError(f"Its file lacks what modules of the model need. {warning!s:.200}") from warning


def _refuse_unknown(adapted: PeftModel, path: str, name: str, **settings: Any) -> None:
    """Load a second time, because only this call tells what was left over. Prompts are kept outside of the model."""
    unknown = adapted.load_adapter(path, name, **settings).unexpected_keys
    if unknown and not adapted.peft_config[name].is_prompt_learning:
        raise ValueError(f"Tensors of its file that have no place there: {len(unknown)}, such as {unknown[0]}")


def unload_adapter(model: PeftModel) -> Any:
    """Take an adapter off again; the base model is what it was."""
    # Prompt methods leave the base model alone, so they have nothing to unload.
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()


def base_of_adapter(config: PeftConfig, path: str) -> str:
    """Return the base model an adapter was trained on.

    Raises:
        ValueError: The adapter does not name its base model.
    """
    if not config.base_model_name_or_path:
        raise ValueError(f"The adapter {path} does not name its base model. Pass --model_name_or_path.")
    return str(config.base_model_name_or_path)
