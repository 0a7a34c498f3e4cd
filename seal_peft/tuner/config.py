"""SealConfig: which heads get a scale, and how fine it is."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors import safe_open
from torch import Tensor

from .chosen import check_names
from .saving import discard_save, finish_save, share_as
from .weights import SCALES, check_weights_file, saved_config, take_settings

Granularity = Literal["head", "channel"]
Site = Literal["output", "query"]


@dataclass
class SealConfig(PeftConfig):
    """Configuration of SEAL, which learns how strongly each attention head counts.

    Source: "SEAL: Scaling to Emphasize Attention for Long-Context Retrieval", ACL 2025, arXiv 2501.15225.

    Args:
        granularity: `"head"` learns one scale per attention head (SEAL-H), `"channel"` one per channel of every head
            (SEAL-C). The query site always has one per head.
        sites: What is scaled: `"output"`, the output of each head before the output projection (the paper's), and
            `"query"`, the query of each head, which is the temperature of its softmax. Either or both. `()` scales
            nothing: an adapter of a few lines that brings `rope_parameters` or `self_extend` to any other adapter.
        target_modules: Attention output projections, as name suffixes or one regular expression: the output site
            scales their input, and the query site is beside them. `None` picks them by architecture.
        query_modules: Modules whose output is the query, as name suffixes or one regular expression: a projection, or
            the norm of queries where the model has one. `None` finds them beside the output projections.
        exclude_modules: Modules to leave out, as name suffixes or one regular expression.
        target_heads: Heads that get a scale, named by layer and head from 0, such as `["L14H7", "L20H1"]`; all others
            stay exactly 1, and layers without any are left alone. `None` scales all heads.
        layers_to_transform: Indices of the layers to adapt. `None` adapts all.
        layers_pattern: Name of the layer list, if `layers_to_transform` is given and the name is unusual.
        modules_to_save: Modules apart from the scales that are trained and saved in full.
        init_weights: `True` starts at the identity (every scale 1). `False` starts at random scales, for tests.
        num_attention_heads: Number of heads a projection reads. `None` asks the attention module.
        head_dim: Channels per head. `None` asks the attention module.
        rope_parameters: RoPE that the adapter needs, as in transformers' configs, such as `{"rope_type": "yarn",
            "factor": 4.0}` or `{"rope_type": "ntk", "factor": 4.0}`; per layer type where the model has it. The model
            has it while the adapter is in use, in training, after loading, and for good after merging; see
            `seal_peft.context.rope.apply_rope`. `None` leaves the model's own.
        self_extend: Self-Extend that the adapter needs, such as `{"group_size": 6, "window": 1024}`, in force as
            `rope_parameters` are; see `seal_peft.context.self_extend.apply_self_extend`.
        heads: Filled in by the model: the `(num_heads, head_dim)` pair of each adapted layer. An adapter that was
            saved with other pairs than those of the base is refused.
        base_rope: Filled in by the model: RoPE parameters of the base that the adapter was trained on. Loading on a
            base that has others warns; to apply the recorded ones, set `rope_parameters` to `base_rope`.
        base_self_extend: Filled in by the model: Self-Extend that the base itself had in force.
        fingerprint: Filled in when weights are saved: tells whether a file of weights belongs to these settings.

    Raises:
        ValueError: A field has a value that is not allowed.

    Example:
        ```python
        config = seal_peft.SealConfig(granularity="channel", layers_to_transform=[0, 1], task_type="CAUSAL_LM")
        model = get_peft_model(base_model, config)
        ```
    """

    granularity: Granularity = field(
        default="head", metadata={"help": "One scale per attention 'head' (SEAL-H) or per 'channel' of it (SEAL-C)."}
    )
    sites: tuple[Site, ...] = field(
        default=("output",),
        metadata={"help": "What is scaled: the 'output' of each head, its 'query', both, or () nothing."},
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Attention output projections: name suffixes or one regex. None: by architecture."},
    )
    query_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Modules whose output is the query. None: those beside the output projections."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out: name suffixes or one regex."}
    )
    target_heads: list[str] | None = field(
        default=None, metadata={"help": "Heads that get a scale, such as L14H7 (layer 14, head 7). None: all."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt. None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, if `layers_to_transform` is given."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from the scales that are trained and saved in full."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start at the identity (True) or at random (False)."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Heads a projection reads. None: ask the attention module."}
    )
    head_dim: int | None = field(default=None, metadata={"help": "Channels per head. None: ask the attention module."})
    rope_parameters: dict[str, Any] | None = field(
        default=None, metadata={"help": "RoPE that the adapter brings along. None: the model's own."}
    )
    self_extend: dict[str, int] | None = field(
        default=None, metadata={"help": "Self-Extend that the adapter brings along: group_size and window."}
    )
    heads: list[list[int]] | None = field(
        default=None, metadata={"help": "Filled in: (num_heads, head_dim) of each adapted layer."}
    )
    base_rope: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in: RoPE parameters of the base at training time."}
    )
    base_self_extend: dict[str, int] | None = field(
        default=None, metadata={"help": "Filled in: Self-Extend of the base at training time."}
    )
    fingerprint: str | None = field(
        default=None, metadata={"help": "Filled in: fingerprint of the settings that the saved weights carry."}
    )

    # Writes the card of a saved adapter. The package around the tuner sets it; without one, PEFT's own form stays.
    _describe: ClassVar[Callable[[str], None] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["SEAL"]
        # What a file says about its base is an expectation; what a later injection fills in is a record.
        self._expected_heads = self.heads
        self._expected_base_rope = self.base_rope
        self._expected_base_self_extend = self.base_self_extend
        if self.granularity not in get_args(Granularity):
            raise ValueError(
                f"granularity={self.granularity!r} is not allowed. Use 'head' (one scale per attention head) or "
                "'channel' (one per channel of every head)."
            )
        self._check_sites()
        if self.target_heads is not None:
            self.target_heads = check_names(self.target_heads)
        for name in ("num_attention_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(
                    f"{name}={value!r} is not allowed. Use a positive whole number, or None to look it up."
                )
        if self.rope_parameters is not None and not (isinstance(self.rope_parameters, dict) and self.rope_parameters):
            raise ValueError(
                f"rope_parameters={self.rope_parameters!r} is not allowed. Use a dictionary such as "
                '{"rope_type": "yarn", "factor": 4.0}, or None.'
            )
        if self.self_extend is not None and not (isinstance(self.self_extend, dict) and self.self_extend):
            raise ValueError(
                f"self_extend={self.self_extend!r} is not allowed. Use a dictionary such as "
                '{"group_size": 6, "window": 1024}, or None.'
            )
        self.target_modules = _set_of(self.target_modules)
        self.query_modules = _set_of(self.query_modules)
        self.exclude_modules = _set_of(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is one regular expression: put the layer "
                "indices into the expression, or give a list of module names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is given, `layers_to_transform` must be given, too.")

    def _check_sites(self) -> None:
        if isinstance(self.sites, tuple | list) and not self.sites:
            if not self.rope_parameters and not self.self_extend:
                raise ValueError(
                    "sites=() scales nothing, so this adapter would do nothing. Use ('output',), ('query',) or "
                    "('output', 'query'), or give "
                    "rope_parameters or self_extend, which an adapter may bring without scales."
                )
            if self.granularity == "channel" or self.query_modules is not None or self.target_heads is not None:
                raise ValueError("granularity='channel', query_modules and target_heads are of no use for sites=().")
            self.sites = ()
            return
        self.sites = sites = check_sites(self.sites)
        if "query" not in sites and self.query_modules is not None:
            raise ValueError(f"query_modules={self.query_modules!r} is of no use without 'query' in `sites`.")
        if "output" not in sites and self.granularity == "channel":
            raise ValueError(
                "granularity='channel' is of no use for sites=('query',), which has one scale per head. Use "
                "granularity='head', or add the output site."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `adapter_config.json` holds them."""
        return {**super().to_dict(), "sites": list(self.sites)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config; a trained adapter gets its model card, too, over the empty form that PEFT writes.

        Each file appears complete, by a rename. Weights that PEFT wrote before may be read by whoever may read it.
        """
        os.makedirs(save_directory, exist_ok=True)
        discard_save(save_directory)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=save_directory) as new:
            super().save_pretrained(new, **kwargs)
            for name in os.listdir(new):
                os.replace(os.path.join(new, name), os.path.join(save_directory, name))
        weights = [os.path.join(save_directory, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
        if os.path.isfile(weights[0]):
            share_as(os.path.join(save_directory, CONFIG_NAME), [weights[0]])
        if all(map(os.path.isfile, weights)) and os.stat(weights[1]).st_mtime_ns > os.stat(weights[0]).st_mtime_ns:
            warnings.warn(
                f"{save_directory} holds an older {SAFETENSORS_WEIGHTS_NAME}, too, which every loader takes instead "
                f"of the {WEIGHTS_NAME} that was saved now. Delete it, or save to another folder.",
                stacklevel=2,
            )
        describe = type(self)._describe  # of the class, where a function is no method
        if describe is not None and self.heads and any(map(os.path.isfile, weights)):
            describe(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the config; in a local folder, make sure first that the weights beside it are usable.

        PEFT reads the config before it touches the model, so that a broken adapter leaves the model as it was. A
        config that never was in a model may be alone in its folder; `PeftConfig.from_pretrained` reads any config
        without asking for weights.

        If the weights carry settings of another save than the config is of, these are returned, with a warning.

        Raises:
            ValueError: The weights file of a trained adapter is missing, is cut off or is not a safetensors file, or
                holds scales that are not finite, not of the config's granularity, or for another base model.
        """
        folder = os.path.join(pretrained_model_name_or_path, *([subfolder] if subfolder else []))
        if finish_save(folder):  # the caller may have loaded the old one, as AutoPeftModel does before it comes here
            raise ValueError(
                f"A save into {folder} had been interrupted. It is complete now, but the adapter is for another base "
                "model than the one before. Load it again, on its own base model."
            )
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        check_weights_file(weights)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, SealConfig):  # PEFT reads a folder of any method with any method's class
            return config
        if os.path.isfile(weights):
            with safe_open(weights, framework="pt") as file:
                _, settings = take_settings({key: key for key in file.keys()})  # noqa: SIM118 (not a dict)
                config = saved_config(config, file.get_tensor(settings) if settings else None, folder)
                keys = [key for key in file.keys() if key.endswith(SCALES)]  # noqa: SIM118
                if not keys and config.sites and config.heads:
                    raise ValueError(
                        f"The adapter file {weights} is cut off or damaged: it holds no scales. Save the adapter "
                        "again, or download it again."
                    )
                for key in keys:
                    config._check_scale(key, file.get_tensor(key))
        elif os.path.isdir(folder) and config.heads and not os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
            raise ValueError(
                f"There is an {CONFIG_NAME} in {folder} but no {SAFETENSORS_WEIGHTS_NAME}: the scales are missing. "
                "Save the adapter again, or download it again."
            )
        return config

    def _check_scale(self, name: str, value: Tensor) -> None:
        shapes = {(heads, dim)[: value.dim()] for heads, dim in self.heads or []} or {tuple(value.shape)}
        dims = {1 for site in self.sites if site == "query" or self.granularity == "head"}
        dims |= {2 for site in self.sites if site == "output" and self.granularity == "channel"}
        if value.dim() not in dims or tuple(value.shape) not in shapes:
            raise ValueError(
                f"The adapter's scales {name} have shape {tuple(value.shape)}, which does not fit its config "
                f"(sites={self.sites}, granularity={self.granularity!r}, (num_heads, head_dim) = {self.heads}). The "
                "two files do not belong together: save or download the adapter again."
            )
        if not value.isfinite().all():
            raise ValueError(
                f"The adapter holds NaN or infinite scales ({name}). Its file is broken or its training diverged; do "
                "not use it."
            )


def check_sites(sites: Sequence[str]) -> tuple[Site, ...]:
    """Return sites as a tuple, in the order in which a head goes through them.

    Raises:
        ValueError: They are not one or two different ones of those that there are.
    """
    known = get_args(Site)
    if isinstance(sites, str) or not sites or set(sites) - set(known) or len(set(sites)) < len(sites):
        raise ValueError(
            f"sites={sites!r} is not allowed. Use ('output',), ('query',) or ('output', 'query'), on the command line "
            "`--sites output query`. SealConfig takes (), too, for rope_parameters or self_extend without scales."
        )
    return tuple(site for site in known if site in sites)


def _set_of(names: list[str] | set[str] | str | None) -> set[str] | str | None:
    return names if names is None or isinstance(names, str) else set(names)
