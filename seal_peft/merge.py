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
from typing import Any, Literal, NamedTuple, get_args

from peft.config import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .card import write_card
from .data import window_of
from .files import read_json, write_json
from .folders import REST, check_place
from .loading import base_of_adapter, check_adapter, load_adapter, load_config, load_model, load_tokenizer
from .resume import FINISHED
from .rope_file import add_older_form
from .together import check_together, split_together
from .tuner import SealLayer
from .tuner.config import Site, check_sites
from .tuner.reading import read_adapter
from .tuner.saving import disk_is_full, part_at, share_as, write_adapter

logger = logging.getLogger(__name__)


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
        ValueError: The output folder exists already, or the adapter is broken, or of another base, or it or the base
            needs Self-Extend, which no engine would apply to the plain model; or `sites` leave scales of several
            adapters, or all there is; raised before any model is loaded. Or the model cannot take scales of one of the
            sites into its weights, or what `sites` leave would scale a LoRA that is merged.
        OSError: The folder cannot be written. Nothing is left of it.
    """
    target = Path(arguments.output_dir)
    if target.exists():
        raise ValueError(f"{target} exists already. Remove it or choose another --output_dir.")
    check_place(target)
    adapters = split_together(arguments.adapter)
    configs = [read_adapter(adapter) for adapter in adapters]
    check_together(adapters)
    base = arguments.model_name_or_path or base_of_adapter(configs[0], adapters[0])
    owners = [*(("adapter", config) for config in configs), ("base model", load_config(base).get_text_config())]
    for owner, config in owners:
        if settings := getattr(config, "self_extend", None):
            raise ValueError(
                f"The {owner} needs self_extend={settings}, which no setting of a plain checkpoint brings about: "
                "every engine would run the merged model without it. Keep the adapter, or train one under "
                "rope_parameters such as YaRN, which config.json carries. In Python, "
                "`merge_and_unload()` keeps it in force in memory."
            )
    rest = _rest(arguments, adapters, configs)
    record = _record_of(rest.adapter) if rest else {}
    for adapter in adapters:
        check_adapter(base, adapter)
    tokenizer = load_tokenizer(base)
    model = load_adapter(load_model(base, arguments.dtype), *adapters)
    apart = _take_out(model, rest.sites) if rest else None
    merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    if any(getattr(config, "rope_parameters", None) for config in configs):
        _raise_limit(tokenizer, window_of(merged.config))
    with _appearing(target) as folder:
        merged.save_pretrained(folder)
        if not add_older_form(folder, merged.config):
            logger.warning(
                "The merged config.json holds its RoPE as transformers 5 reads it. transformers 4, and engines that "
                "build on it, may refuse the model or run it with another RoPE."
            )
        share_as(folder / "config.json", folder.glob("*.safetensors"))
        tokenizer.save_pretrained(folder)
        if rest and apart:
            _write_rest(folder / REST, record, *apart, base=target)
    if rest:
        logger.warning(
            "Scales at %s are not in the merged model; they stay an adapter of it: %s.",
            *(", ".join(rest.sites), target / REST),
        )
    return target


def _raise_limit(tokenizer: PreTrainedTokenizerBase, window: int | None) -> None:
    """Raise the length at which a tokenizer truncates, the base model's, to the window of the extended model."""
    tokenizer.model_max_length = max(tokenizer.model_max_length, window or 0)


class _Rest(NamedTuple):
    """What is not merged: the scales of one adapter at some sites."""

    adapter: str
    sites: list[Site]


def _rest(arguments: MergeArguments, adapters: list[str], configs: list[PeftConfig]) -> _Rest | None:
    merged = check_sites(arguments.sites)
    sites_of = [getattr(config, "sites", ()) for config in configs]
    rests = [
        _Rest(adapter, left)
        for adapter, sites in zip(adapters, sites_of, strict=True)
        if (left := [site for site in sites if site not in merged])
    ]
    others = any(config.peft_type != "SEAL" for config in configs)
    if rests and not others and not {site for sites in sites_of for site in sites} & set(merged):
        raise ValueError(
            f"--sites {' '.join(merged)} would merge nothing: {arguments.adapter} has scales at {rests[0].sites[0]} "
            f"alone. Merge them with --sites {rests[0].sites[0]}, or go on with the adapter as it is."
        )
    if len(rests) > 1:
        raise ValueError(
            f"--sites {' '.join(merged)} leaves scales of {len(rests)} adapters, and a merged model takes one in its "
            f"folder {REST}. Merge one after the other, each into the model before it (--model_name_or_path)."
        )
    return rests[0] if rests else None


def _take_out(model: Any, sites: list[Site]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Take out of the model what is not merged, and return it as an adapter of its own."""
    name = next(n for n, config in model.peft_config.items() if set(getattr(config, "sites", ())) & set(sites))
    layers = {
        key.removesuffix(".base_layer"): layer
        for key, layer in model.get_base_model().named_modules()
        if isinstance(layer, SealLayer) and layer.site in sites and name in layer.seal_delta
    }
    if inside := next((key for key, layer in layers.items() if layer.outer_layers), None):
        raise ValueError(
            f"The scales at {', '.join(sites)} cannot stay an adapter: the other adapter is on the same module "
            f"({inside}), and once it is merged, they would scale it, too. Leave --sites out: this model takes all of "
            "it into its weights."
        )
    apart = part_at(model, name, sites)
    for layer in layers.values():
        del layer.seal_delta[name]
    return apart


def _record_of(adapter: str) -> dict[str, Any]:
    """What `train` wrote about an adapter, if it did; `evaluate` refuses to score on the samples in it."""
    path = Path(adapter) / FINISHED
    record = read_json(path) if path.is_file() else {}
    return record if isinstance(record, dict) and "training_arguments" in record else {}


def _write_rest(
    folder: Path, record: dict[str, Any], config: PeftConfig, weights: dict[str, Tensor], base: Path
) -> None:
    config.base_model_name_or_path = str(base.resolve())
    write_adapter(folder, config, weights)
    if record:
        left: Any = config
        record = {**record, "merged_sites": [site for site in get_args(Site) if site not in left.sites]}
        write_json(folder / FINISHED, record)
        write_card(folder, record)


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
