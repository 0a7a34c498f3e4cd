"""The attention heads of a loaded model, layer by layer, whatever adapters it wears."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..tuner import SealConfig
from ..tuner.geometry import HeadGeometry, default_target_modules
from ..tuner.targets import geometry_of
from .kernels import one_attention_kernel


class HeadLayer(NamedTuple):
    """The heads of one layer.

    Attributes:
        number: Number of the layer in the model, from 0.
        name: Full name of the attention output projection in the base model, as `seal_peft.scales` names it.
        projection: That module, with the adapters around it. Its input is the concatenated heads.
        attention: The attention module that holds it.
        geometry: How that input splits into heads.
    """

    number: int
    name: str
    projection: nn.Module
    attention: nn.Module
    geometry: HeadGeometry


@dataclass(frozen=True)
class Heads:
    """A causal language model and where its attention heads are.

    Attributes:
        model: What is called: the model, or the PEFT model around it.
        base: The model itself.
        blocks: Its decoder layers.
        layers: Those of them that have attention heads, from the bottom up.
    """

    model: nn.Module
    base: Any
    blocks: nn.ModuleList
    layers: list[HeadLayer]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers with heads, and the heads of the widest of them."""
        return len(self.layers), max(layer.geometry.num_heads for layer in self.layers)

    def empty(self, samples: int) -> Tensor:
        """Return an array `(samples, layers, heads)` to fill in; NaN stays where a layer has fewer heads."""
        return torch.full((samples, *self.shape), torch.nan)


def find_heads(model: nn.Module, config: SealConfig | None = None) -> Heads:
    """Find the attention heads of a causal language model.

    Args:
        model: The model, plain or with adapters, merged or not.
        config: Says where the heads are if the architecture is not one that SEAL knows; its `target_modules`,
            `exclude_modules`, `num_attention_heads` and `head_dim` count.

    Returns:
        The layers with heads, from the bottom up, and the geometry of each.

    Raises:
        TypeError: The model is none of transformers'.
        ValueError: The heads cannot be found, or the model is not a decoder that predicts the next token.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("Heads are not analysed under prompt tuning: its virtual tokens are in no sample.")
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"find_heads needs a model of transformers, got a {type(base).__name__}.")
    # Encoders with a language-model head (BERT) predict masked tokens, and do not generate.
    encodes = getattr(base.config, "is_encoder_decoder", False) or not base.can_generate()
    if encodes or base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} is not a decoder-only model with a language-model head, which these scores are "
            "about. Load the model with AutoModelForCausalLM."
        )
    config = config or SealConfig()
    targets = config.target_modules or default_target_modules(base, base.config.to_dict())
    wanted = SealConfig(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
    )
    layers: list[HeadLayer] = []
    lists: dict[str, nn.ModuleList] = {}
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        if check_target_module_exists(wanted, name):
            geometry, _ = geometry_of(wanted, base, module, name)
            index, blocks = _place(base, name)
            lists[blocks] = cast(nn.ModuleList, base.get_submodule(blocks))
            attention = base.get_submodule(name.rpartition(".")[0])
            layers.append(HeadLayer(index, name, module, attention, geometry))
    if len(lists) != 1 or len({layer.number for layer in layers}) < len(layers):
        found = ", ".join(layer.name for layer in layers) or "nothing"
        raise ValueError(
            f"Heads are mapped for models with one stack of layers and one attention output projection in each; in "
            f"{type(base).__name__} {sorted(wanted.target_modules or ())} found {found}."
        )
    return Heads(model, base, next(iter(lists.values())), layers)


def _place(base: nn.Module, name: str) -> tuple[int, str]:
    """Number of the layer that holds a module, and the name of the list of layers."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(base.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return int(parts[end]), ".".join(parts[:end])
    raise ValueError(f"{name} stands in no list of layers, so its heads have no place in a map.")


def head_name(layer: int, head: int) -> str:
    """Return the usual name of a head, such as `L14H7`."""
    return f"L{layer}H{head}"


def parse_head(name: str, heads: Heads) -> tuple[int, int]:
    """Return position among `heads.layers` and number of a head.

    Args:
        name: Such as `L14H7`: layer 14, head 7, both from 0.
        heads: The heads of the model.

    Returns:
        Position of the layer, number of the head.

    Raises:
        ValueError: The model has no such head.
    """
    match = re.fullmatch(r"L(\d+)H(\d+)", name)
    for position, layer in enumerate(heads.layers if match else ()):
        if match and layer.number == int(match[1]) and int(match[2]) < layer.geometry.num_heads:
            return position, int(match[2])
    last = heads.layers[-1]
    raise ValueError(
        f"The model has no head {name!r}. Heads are named by layer and head, both from 0, up to "
        f"{head_name(last.number, last.geometry.num_heads - 1)}."
    )


@contextmanager
def scoring(heads: Heads) -> Iterator[None]:
    """Within it the model is in eval mode, its weights are frozen, and its logits are computed in fp32.

    Rounded to bf16, a logit of 20 moves in steps of 0.125, which is more than most heads change. Attention keeps to
    one kernel, so that a text read in parts has the values of a text read in one go.
    """
    base = heads.base
    training, trained = base.training, [p for p in base.parameters() if p.requires_grad]
    head = base.get_output_embeddings()
    plain = type(head) is nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16)
    base.eval().requires_grad_(False)
    if plain:
        head.forward = lambda hidden: functional.linear(
            hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float()
        )
    try:
        with one_attention_kernel():
            yield
    finally:
        if plain:
            del head.forward
        base.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
