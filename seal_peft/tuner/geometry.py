"""Where the heads are: from a model to its attention output projections, their number of heads and head size."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D


class HeadGeometry(NamedTuple):
    """How the input of an attention output projection splits into heads.

    Attributes:
        num_heads: Query heads whose outputs the projection reads, concatenated head by head.
        head_dim: Channels a head contributes. With multi-head latent attention this is the value head size.
    """

    num_heads: int
    head_dim: int


# Projections that read the concatenated heads, by transformers model type. Suffixes are as long as it takes to leave
# MLP projections of the same last name alone (`attn.c_proj` against `mlp.c_proj`, BERT's two `output.dense`).
TARGET_MODULES: dict[str, list[str]] = {
    model_type: suffixes.split()
    for suffixes, model_types in {
        "self_attn.o_proj": (
            "afmoe apertus arcee bitnet cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 doge dots1 "
            "ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 "
            "glm4_moe glm4v_text gpt_oss granite granitemoe granitemoehybrid granitemoeshared helium "
            "hunyuan_v1_dense hunyuan_v1_moe jamba llama llama4_text minimax minimax_m2 ministral ministral3 "
            "mistral mixtral mllama_text_model nemotron olmo olmo2 olmo3 olmo_hybrid olmoe phi3 phimoe qwen2 "
            "qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_5_text qwen3_moe qwen3_next qwen3_vl_moe_text "
            "qwen3_vl_text seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu"
        ),
        "self_attn.out_proj": "biogpt lfm2 lfm2_moe opt xglm",
        "self_attn.dense": "persimmon phi",
        "self_attention.dense": "bloom falcon",
        "attention.dense": "gpt_neox gpt_neox_japanese",
        "attn.out_proj": "codegen gptj mpt",
        "attn.attention.out_proj": "gpt_neo",
        "attn.c_proj": "gpt2 gpt_bigcode",
        # Encoders, then models of an encoder and a decoder, which attends to both.
        "attention.output.dense": (
            "bert camembert data2vec-text deberta deberta-v2 electra ernie megatron-bert roberta xlm-roberta "
            "xlm-roberta-xl"
        ),
        "attention.out_lin": "distilbert",
        "attn.Wo": "modernbert",
        "self_attn.out_proj encoder_attn.out_proj": "bart blenderbot m2m_100 marian mbart pegasus plbart whisper",
        "SelfAttention.o EncDecAttention.o": "mt5 t5 umt5",
    }.items()
    for model_type in model_types.split()
}

# Attribute names under which attention modules keep the two numbers, the value head size first: with multi-head
# latent attention `head_dim` would be the size of the rotary part.
_HEAD_DIM_NAMES = ("v_head_dim", "head_dim", "head_size")
_NUM_HEADS_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def default_target_modules(model: nn.Module, model_config: dict[str, Any]) -> set[str]:
    """Return the attention output projections that SEAL scales when the config names none.

    For a model with several parts (vision, audio, language) only the language part is taken, by full module names.

    Args:
        model: The base model.
        model_config: Its config as a dictionary.

    Returns:
        Values for `target_modules`: name suffixes, or full names for a part of a larger model.

    Raises:
        ValueError: The architecture is not in the table; the message lists attention-like modules found.
    """
    text_config = model_config.get("text_config")
    if isinstance(text_config, dict):
        text_type = text_config.get("model_type", "")
        part, suffixes = _part_of_type(model, text_type), TARGET_MODULES.get(text_type)
        if suffixes and part is not None:
            names = {name for name, _ in model.named_modules() if name.startswith(part)}
            return {name for name in names if name.endswith(tuple("." + suffix for suffix in suffixes))}
    suffixes = TARGET_MODULES.get(model_config.get("model_type", ""))
    if suffixes is None:
        raise ValueError(_unknown_architecture(model, model_config))
    return set(suffixes)


def attention_of(model: nn.Module, name: str) -> nn.Module:
    """Return the attention module whose heads a projection reads: its parent, or BERT's `self` beside its parent."""
    parent, _, _ = name.rpartition(".")
    if parent.endswith(".output"):
        around = model.get_submodule(parent.removesuffix(".output"))
        return cast(nn.Module, getattr(around, "self", model.get_submodule(parent)))
    return model.get_submodule(parent)


def head_geometry(
    attention: nn.Module, projection: nn.Module, name: str, num_attention_heads: int | None, head_dim: int | None
) -> HeadGeometry:
    """Find how the input of an attention output projection splits into heads.

    The numbers come from the attention module itself, never from `hidden_size // num_attention_heads`: many models
    decouple the head size from the hidden size, and layers of one model may differ.

    Args:
        attention: The attention module, see `attention_of`.
        projection: The output projection; its input is `(..., num_heads * head_dim)`.
        name: Full name of the projection, for messages.
        num_attention_heads: Number of heads given by the user; `None` to look it up.
        head_dim: Head size given by the user; `None` to look it up.

    Returns:
        The number of heads and their size.

    Raises:
        ValueError: The numbers cannot be found, or do not multiply to the input size of the projection.
    """
    in_features = in_out_features(projection)[0]
    if in_features is None:
        raise ValueError(f"{name} ({type(projection).__name__}) does not tell its input size, so SEAL cannot wrap it.")
    given = num_attention_heads is not None or head_dim is not None
    if not given:
        head_dim = first_int(attention, _HEAD_DIM_NAMES)
        num_attention_heads = first_int(attention, _NUM_HEADS_NAMES)
        # Every part of a model holds the config; only one that tells a head size is an attention module.
        if num_attention_heads is None and head_dim is not None:
            num_attention_heads = first_int(getattr(attention, "config", None), _NUM_HEADS_NAMES)
    # One number is enough: the other follows from the size of the projection.
    heads = num_attention_heads or (in_features // head_dim if head_dim else None)
    size = head_dim or (in_features // num_attention_heads if num_attention_heads else None)
    if heads is not None and size is not None and heads * size == in_features:
        return HeadGeometry(heads, size)
    found = f"num_attention_heads={num_attention_heads}, head_dim={head_dim}"
    raise ValueError(
        f"Cannot split the {in_features} inputs of {name} into attention heads: "
        + (f"SealConfig gives {found}" if given else f"{type(attention).__name__} tells {found}")
        + f". Set SealConfig(num_attention_heads=...) or SealConfig(head_dim=...) so that their product is "
        f"{in_features}, or leave this module out with `exclude_modules`."
    )


def in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """Return the sizes of a projection as PEFT finds them, or as the layer says; `None` where nothing tells.

    PEFT asks every linear layer for its `weight`; one of compressed-tensors has none before its first forward pass.
    """
    if isinstance(module, nn.Linear) and not hasattr(module, "weight"):
        return module.in_features, module.out_features
    return cast("tuple[int | None, int | None]", _get_in_out_features(module))


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map, plain or quantised, so that its input can be scaled."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, nn.Linear | Conv1D) or hasattr(module, "qweight") or hasattr(module, "W_q")


def first_int(source: object, names: tuple[str, ...]) -> int | None:
    """Return the first attribute that is a positive whole number."""
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _part_of_type(model: nn.Module, model_type: str) -> str | None:
    """Name prefix (with its dot) of the outermost inner model whose config is of the given type."""
    for name, module in model.named_modules():
        if name and getattr(getattr(module, "config", None), "model_type", None) == model_type:
            return name + "."
    return None


def _unknown_architecture(model: nn.Module, model_config: dict[str, Any]) -> str:
    seen: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name.startswith(inside) or not ("att" in name.rpartition(".")[2].lower() or "Attention" in kind):
            continue
        projections = [child for child, inner in module.named_modules() if child and is_linear(inner)]
        if projections:
            inside += (name + ".",)
            seen.setdefault(kind, f"{name} ({kind}) with {', '.join(projections)}")
    found = "; ".join(seen.values()) or "none"
    return (
        f"SEAL does not know where the attention heads of model type '{model_config.get('model_type', 'custom')}' "
        f"are. Attention modules found: {found}. Pass SealConfig(target_modules=[...]) with the name of the "
        "projection that reads the concatenated heads (often `o_proj`, `out_proj` or `dense`), and "
        "`num_attention_heads` or `head_dim` if the module does not tell them. A model without attention "
        "has no heads to scale."
    )
