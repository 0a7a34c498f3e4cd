"""Fold an adapter into its base model, for serving without this package.

seal-peft merge --adapter runs/demo/adapter --output_dir runs/demo/merged
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from .folders import check_place
from .loading import base_of_adapter, check_adapter, load_adapter, load_model, load_tokenizer
from .together import check_together, split_together
from .tuner import save_adapter
from .tuner.config import Site, check_sites
from .tuner.reading import read_adapter
from .tuner.saving import disk_is_full, share_as

logger = logging.getLogger(__name__)

# Folder, inside that of the merged model, of an adapter with what was not merged.
REST = "seal_adapter"


@dataclass
class MergeArguments:
    """Which adapter to merge, and where to put the plain model."""

    adapter: str = field(
        metadata={"help": "Adapter folder or Hub id; PATH+PATH for LoRA and SEAL that are merged together."}
    )
    output_dir: str = field(metadata={"help": "Folder for the merged model; must not exist yet."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model. Default: the one that the adapter names."}
    )
    sites: list[str] = field(
        default_factory=lambda: ["output", "query"],
        metadata={
            "help": "Merge the scales at these sites only. The others stay as an adapter of the merged model, in its "
            f"folder `{REST}`; some models cannot take `query` scales into their weights.",
            "choices": get_args(Site),
        },
    )
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = field(
        default="stored", metadata={"help": "Dtype of the merged model; stored: that of the base model's files."}
    )


def merge(arguments: MergeArguments) -> Path:
    """Write a plain checkpoint with the scales folded into the weights.

    The folder appears by one rename, so that a crash never leaves half a model under its name. What a crash left
    beside it is removed by the next merge to the same name.

    Args:
        arguments: See `MergeArguments`.

    Returns:
        The folder of the merged model.

    Raises:
        ValueError: The output folder exists already, or the adapter is broken, of another base, or needs Self-Extend,
            which no engine would apply to the plain model; raised before any model is loaded. Or the model cannot take
            scales of one of the sites into its weights.
        OSError: The folder cannot be written. Nothing is left of it.
    """
    target = Path(arguments.output_dir)
    if target.exists():
        raise ValueError(f"{target} exists already. Remove it or choose another --output_dir.")
    check_place(target)
    adapters = split_together(arguments.adapter)
    configs = [read_adapter(adapter) for adapter in adapters]
    check_together(adapters)
    if settings := next(filter(None, (getattr(config, "self_extend", None) for config in configs)), None):
        raise ValueError(
            f"The adapter needs self_extend={settings}, which no setting of a plain checkpoint brings about: every "
            "engine would run the merged model without it. Keep the adapter, or train one under rope_parameters such "
            "as YaRN, which config.json carries. In Python, `merge_and_unload()` keeps it in force in memory."
        )
    merged_sites = check_sites(arguments.sites)
    rest = [site for config in configs for site in getattr(config, "sites", ()) if site not in merged_sites]
    if rest and len(adapters) > 1:
        raise ValueError(f"--sites leaves scales at {', '.join(rest)} as an adapter, which takes one --adapter alone.")
    base = arguments.model_name_or_path or base_of_adapter(configs[0], adapters[0])
    for adapter in adapters:
        check_adapter(base, adapter)
    tokenizer = load_tokenizer(base)
    model = load_adapter(load_model(base, arguments.dtype), *adapters)
    if not rest:
        merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    with _appearing(target) as folder:
        if rest:
            model.peft_config["default"].base_model_name_or_path = str(target.resolve())
            save_adapter(model, folder / REST, sites=rest)
            model.merge_adapter(safe_merge=True, sites=merged_sites)
            merged = model.unload()
        merged.save_pretrained(folder)
        share_as(folder / "config.json", folder.glob("*.safetensors"))
        tokenizer.save_pretrained(folder)
    if rest:
        logger.warning(
            "Scales at %s are not in the merged model; they stay an adapter of it: %s.", ", ".join(rest), target / REST
        )
    return target


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a folder to write files to, which takes the name of the target when all went well."""
    unfinished, temporary = f".{target.name}.merging-", None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(glob.escape(unfinished) + "*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = target.with_name(f"{unfinished}{os.getpid()}")
        temporary.mkdir()
        yield temporary
        os.rename(temporary, target)
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk is full: the merged model was not written, and nothing is left of it ({error}). Free some "
            "space or choose an --output_dir on another disk, and merge again",
            str(target),
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
