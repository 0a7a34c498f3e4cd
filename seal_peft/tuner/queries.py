"""Where the queries are: from an attention module to the module whose output is the query, and the heads in there."""

from __future__ import annotations

from types import NoneType
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .geometry import HeadGeometry, first_int, in_out_features, is_linear

# The last module that a query goes through before it meets the keys, the likeliest first: a norm undoes any scale that
# comes before it.
_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
_PROJECTIONS = ("q_b_proj", "q_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
QUERY_NAMES = (*_NORMS, *_PROJECTIONS, *_FUSED)

# Models whose norm sees `(batch, heads, tokens, head_dim)`; it is asked only where there are as many tokens as heads.
_HEADS_BEFORE_TOKENS = frozenset("apertus exaone4 gemma3_text hunyuan_v1_dense hunyuan_v1_moe phi stablelm".split())
_TOKENS_BEFORE_HEADS = frozenset(
    "afmoe cohere doge dots1 gemma3n_text gemma4_text glm4_moe lfm2 lfm2_moe persimmon qwen3 qwen3_moe qwen3_5_text "
    "qwen3_next qwen3_vl_text qwen3_vl_moe_text".split()
)


class QueryLayout(NamedTuple):
    """How heads lie in the output of a module that holds queries, and perhaps keys and values, too.

    The output is `groups` times the same: `queries` query heads, then key and value heads up to `heads` in all.

    Attributes:
        groups: How often the pattern repeats; 1 for a projection of its own, or one that puts all queries first.
        queries: Query heads in each group.
        heads: Heads of all kinds in each group.
        heads_axis: For norms, the axis of the heads where sizes cannot tell it: -2, -3, or 0 if it is not known.
    """

    groups: int
    queries: int
    heads: int
    heads_axis: int = 0

    def spread(self, scale: Tensor) -> Tensor:
        """Fill in 1 for keys and values: `(..., query heads, n)` becomes `(..., heads of all kinds, n)`."""
        others = self.heads - self.queries
        if not others:
            return scale
        grouped = scale.unflatten(-2, (self.groups, self.queries))
        ones = torch.ones((), dtype=scale.dtype, device=scale.device)
        ones = ones.expand(*grouped.shape[:-2], others, grouped.shape[-1])
        return torch.cat([grouped, ones], dim=-2).flatten(-3, -2)


def query_name(attention: nn.Module, name: str) -> str:
    """Return the name of the child whose output is the query, normalised where the model normalises queries.

    Args:
        attention: An attention module.
        name: Its full name, for messages.

    Raises:
        ValueError: No child has a name that is known, or a norm that all heads share undoes every scale.
    """
    children = attention._modules
    if children.get("qk_norm") is not None:
        raise ValueError(
            f"{name} ({type(attention).__name__}) normalises queries after rotating them (`qk_norm`), which undoes "
            "any scale on them. Leave the query site out: sites=('output',)."
        )
    for child in QUERY_NAMES:
        if not isinstance(children.get(child), NoneType | nn.Identity):  # which stands for a norm that was left out
            return child
    raise ValueError(
        f"SEAL does not know where the query of {name} ({type(attention).__name__}) is. Its children: "
        f"{', '.join(children)}. Name the module whose output is the query in SealConfig(query_modules=[...]), or "
        "leave the query site out: sites=('output',)."
    )


def query_layout(
    attention: nn.Module,
    module: nn.Module,
    name: str,
    model_type: str | None,
    num_heads: int | None,
    head_dim: int | None,
) -> tuple[HeadGeometry, QueryLayout]:
    """Find the query heads in the output of a module.

    Args:
        attention: The attention module that holds it.
        module: A projection, alone or fused with keys and values, or a norm of queries.
        name: Its full name, for messages.
        model_type: The model's type in transformers, which tells how a fused projection is laid out.
        num_heads: Number of query heads; `None` asks the attention module.
        head_dim: Head size that the user gives; `None` asks the attention module.

    Returns:
        Number of query heads and their size, and where they lie.

    Raises:
        ValueError: The heads cannot be found.
        TypeError: The module is of a kind that cannot be wrapped.
    """
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    child = name.rpartition(".")[2]
    num_heads = num_heads or first_int(attention, ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    # With multi-head latent attention `head_dim` is the size of the rotary part, and value heads have another.
    head_dim = first_int(attention, ("qk_head_dim",)) or head_dim or first_int(attention, ("head_dim", "head_size"))
    if child in _NORMS and not is_linear(module):
        if not num_heads or not head_dim:
            raise ValueError(_no_heads(name, attention, num_heads, head_dim))
        return HeadGeometry(num_heads, head_dim), QueryLayout(1, num_heads, num_heads, _heads_axis(model_type))
    if not is_linear(module):
        raise TypeError(
            f"{name} is a {type(module).__name__}; the query site needs a linear projection or a norm of queries. "
            "Name another module in `query_modules`, or leave the query site out: sites=('output',)."
        )
    for norm in _NORMS:
        weight = getattr(attention._modules.get(norm), "weight", None)
        if isinstance(weight, Tensor) and weight.numel() == head_dim:  # one over all heads leaves their ratios
            raise ValueError(
                f"Scales on {name} would do nothing: {type(attention).__name__} normalises each query head in {norm}, "
                f"which undoes them. Name {norm!r} in `query_modules`, or leave it at None, which finds it."
            )
    size = in_out_features(module)[1] or 0
    fused = child in _FUSED
    groups = _groups(attention, name, model_type, num_heads) if fused else 1
    if num_heads and not fused:
        head_dim = head_dim or size // num_heads
    if not num_heads or not head_dim or size % (groups * head_dim) or num_heads % groups:
        raise ValueError(_no_heads(name, attention, num_heads, head_dim, size))
    heads, queries = size // (groups * head_dim), num_heads // groups
    if heads < queries or (heads != queries and not fused):
        raise ValueError(_no_heads(name, attention, num_heads, head_dim, size))
    return HeadGeometry(num_heads, head_dim), QueryLayout(groups, queries, heads)


def heads_axis(shape: tuple[int, ...], num_heads: int, layout: QueryLayout, name: str) -> int:
    """Find the axis of the heads in what a norm returns, `(..., tokens, heads, head_dim)` or with the two exchanged.

    Raises:
        ValueError: Neither axis has the size, or both have and the model's convention is not known.
    """
    fitting = [axis for axis in (-2, -3) if shape[axis] == num_heads]
    if len(fitting) == 1:
        return fitting[0]
    if fitting and layout.heads_axis:
        return layout.heads_axis
    raise ValueError(
        f"The output of the {name}, shape {tuple(shape)}, does not tell which axis holds the {num_heads} query heads. "
        "Give the model another number of tokens, or leave the query site out: sites=('output',)."
    )


def _heads_axis(model_type: str | None) -> int:
    return -3 if model_type in _HEADS_BEFORE_TOKENS else -2 if model_type in _TOKENS_BEFORE_HEADS else 0


def _groups(attention: Any, name: str, model_type: str | None, num_heads: int | None) -> int:
    """How often the pattern of queries, keys and values repeats in a fused projection."""
    match model_type:
        case "gpt2" | "modernbert" | "mpt" | "phi3":
            return 1
        case "bloom" | "gpt_neox" | "gpt_neox_japanese" | "persimmon":
            return num_heads or 0
        case "codegen":
            return 4  # laid out for four devices, see CodeGenAttention.forward
        case "gpt_bigcode":
            return 1 if attention.multi_query else num_heads or 0
        case "falcon":
            if attention.new_decoder_architecture:
                return int(attention.num_kv_heads)
            return 1 if attention.multi_query else num_heads or 0
    raise ValueError(
        f"{name} holds queries, keys and values in one projection, and SEAL does not know their order for model type "
        f"{model_type!r}. Leave the query site out: sites=('output',)."
    )


def _no_heads(name: str, attention: nn.Module, num_heads: int | None, head_dim: int | None, size: int = 0) -> str:
    of = f"the {size} outputs of {name}" if size else name
    return (
        f"Cannot split {of} into query heads: {type(attention).__name__} and SealConfig tell num_attention_heads="
        f"{num_heads}, head_dim={head_dim}. Set SealConfig(num_attention_heads=..., head_dim=...), or leave the query "
        "site out: sites=('output',)."
    )
