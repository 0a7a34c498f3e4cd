"""Fold an adapter into its base model, for serving without this package.

seal-peft merge --adapter_name_or_path runs/demo/adapter --output_dir runs/demo/merged
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .loading import base_of_adapter, check_adapter, load_adapter, load_model, load_tokenizer, read_adapter
from .tuner import save_adapter
from .tuner.config import check_sites

# Folder, inside that of the merged model, of an adapter with what was not merged.
REST = "seal_adapter"


@dataclass
class MergeArguments:
    """Which adapter to merge, and where to put the plain model."""

    adapter_name_or_path: str = field(metadata={"help": "Adapter folder or Hub id."})
    output_dir: str = field(metadata={"help": "Folder for the merged model; must not exist yet."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model. Default: the one that the adapter names."}
    )
    sites: list[str] = field(
        default_factory=lambda: ["output", "query"],
        metadata={
            "help": "Merge the scales at these sites only. The others stay as an adapter of the merged model, in its "
            f"folder `{REST}`; some models cannot take `query` scales into their weights."
        },
    )
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = field(
        default="stored", metadata={"help": "Dtype of the merged model; stored: that of the base model's files."}
    )


def merge(arguments: MergeArguments) -> Path:
    """Write a plain checkpoint with the scales folded into the weights.

    The folder appears by one rename, so that a crash never leaves half a model under its name.

    Args:
        arguments: See `MergeArguments`.

    Returns:
        The folder of the merged model.

    Raises:
        ValueError: The output folder exists already, or the adapter is broken, of another base, or needs Self-Extend,
            which no engine would apply to the plain model; raised before any model is loaded. Or the model cannot take
            scales of one of the sites into its weights.
    """
    target = Path(arguments.output_dir)
    if target.exists():
        raise ValueError(f"{target} exists already. Remove it or choose another --output_dir.")
    adapter = arguments.adapter_name_or_path
    config = read_adapter(adapter)
    if (settings := getattr(config, "self_extend", None)) is not None:
        raise ValueError(
            f"The adapter needs self_extend={settings}, which no setting of a plain checkpoint brings about: every "
            "engine would run the merged model without it. Keep the adapter, or train one under rope_parameters such "
            "as YaRN, which config.json carries. In Python, `merge_and_unload()` keeps it in force in memory."
        )
    merged_sites = check_sites(arguments.sites)
    rest = [site for site in getattr(config, "sites", ()) if site not in merged_sites]
    base = arguments.model_name_or_path or base_of_adapter(config, adapter)
    check_adapter(base, adapter)
    tokenizer = load_tokenizer(base)
    model = load_adapter(load_model(base, arguments.dtype), adapter)
    if not rest:
        merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        if rest:
            model.peft_config["default"].base_model_name_or_path = str(target.resolve())
            save_adapter(model, temporary / REST, sites=rest)
            model.merge_adapter(safe_merge=True, sites=merged_sites)
            merged = model.unload()
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
