"""Models for the query site: those of `models.py` and more whose queries lie or are normalised in other ways."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from models import ARCHITECTURES, HEAD_DIM, HEADS, HIDDEN, LAYERS, base_model, causal
from versions import QWEN3_NEXT_RUNS_WITHOUT_LINEAR_ATTENTION

_MORE: dict[str, Callable[[], nn.Module]] = {
    "apertus": lambda: causal(tf.ApertusConfig, head_dim=HEAD_DIM),
    "bloom": lambda: causal(tf.BloomConfig, n_layer=LAYERS, n_head=HEADS),
    "codegen": lambda: causal(tf.CodeGenConfig, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, rotary_dim=4),
    "cohere-norm": lambda: causal(tf.CohereConfig, head_dim=HEAD_DIM, use_qk_norm=True, logit_scale=1.0),
    "exaone4": lambda: causal(
        tf.Exaone4Config,
        head_dim=HEAD_DIM,
        sliding_window=4,
        sliding_window_pattern=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_bigcode": lambda: causal(tf.GPTBigCodeConfig, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "gpt_bigcode-many": lambda: causal(
        tf.GPTBigCodeConfig, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, multi_query=False
    ),
    "gptj": lambda: causal(tf.GPTJConfig, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, rotary_dim=4),
    "hunyuan_v1_dense": lambda: causal(tf.HunYuanDenseV1Config, head_dim=HEAD_DIM),
    "lfm2": lambda: causal(tf.Lfm2Config, layer_types=["full_attention"] * LAYERS, num_heads=HEADS, block_dim=HIDDEN),
    "mpt": lambda: causal(tf.MptConfig, d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS),
    "olmo3": lambda: causal(
        tf.Olmo3Config, sliding_window=4, layer_types=["sliding_attention", "full_attention"], head_dim=HEAD_DIM
    ),
    "persimmon": lambda: causal(tf.PersimmonConfig),
    "phi-norm": lambda: causal(tf.PhiConfig, qk_layernorm=True),
    "qwen3_next": lambda: causal(
        tf.Qwen3NextConfig,
        head_dim=HEAD_DIM,
        layer_types=["full_attention"] * LAYERS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "stablelm-norm": lambda: causal(tf.StableLmConfig, qk_layernorm=True),
}
if not QWEN3_NEXT_RUNS_WITHOUT_LINEAR_ATTENTION:
    del _MORE["qwen3_next"]
# Query scales become part of `q_proj` or of a norm over all heads here, but not of a norm that all heads share.
SHARED_NORM = ["qwen3", "qwen3_moe", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "apertus", "exaone4"]
SHARED_NORM += ["hunyuan_v1_dense", "lfm2", "persimmon", "phi-norm", "qwen3_next", "stablelm-norm"]
# Their attention does not go through transformers' interface: queries are multiplied in the weights instead.
OWN_ATTENTION = ["falcon", "falcon-new-decoder", "bloom", "codegen", "gptj", "mpt"]
NAMES = [*ARCHITECTURES, *_MORE]
SHARED_NORM = [name for name in SHARED_NORM if name in NAMES]
MERGEABLE = [name for name in NAMES if name not in SHARED_NORM]


@functools.cache
def _built(name: str) -> nn.Module:
    return _MORE[name]()


def plain(name: str) -> nn.Module:
    """Return a fresh copy of a tiny model, one of `NAMES`, that computes attention eagerly."""
    model = copy.deepcopy(_built(name)) if name in _MORE else base_model(name)
    if name not in OWN_ATTENTION:
        model.set_attn_implementation("eager")
    return model


def with_queries(name: str, scales: list[Tensor]) -> nn.Module:
    """Return a plain model whose queries are multiplied by `scales[layer][head]`, written independently of SEAL."""
    model = plain(name)
    if name in OWN_ATTENTION:
        for index, scale in enumerate(scales):
            _multiply_rows(name, model, index, scale)
        return model
    layers = [
        m
        for key, m in model.named_modules()
        if key.endswith((".self_attn", ".attn", ".attention")) and "vis" not in key
    ]
    for attention, scale in zip(layers, scales, strict=True):
        attention.oracle = scale
    model.set_attn_implementation("multiplied")
    return model


def _multiplied(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    """The model's own attention over queries that are multiplied after everything that the model does to them."""
    own = importlib.import_module(type(module).__module__).eager_attention_forward
    if hasattr(module, "oracle"):
        query = query * module.oracle.view(1, -1, 1, 1)
    return own(module, query, key, value, mask, **kwargs)


AttentionInterface.register("multiplied", _multiplied)
AttentionMaskInterface.register("multiplied", eager_mask)


def _multiply_rows(name: str, model: nn.Module, layer: int, scale: Tensor) -> None:
    dim = HIDDEN // HEADS
    where = {
        "falcon": ("transformer.h.{}.self_attention.query_key_value", lambda head: head * dim),
        # two groups, each of two query heads, a key head and a value head
        "falcon-new-decoder": (
            "transformer.h.{}.self_attention.query_key_value",
            lambda head: (head // 2 * 4 + head % 2) * dim,
        ),
        "bloom": ("transformer.h.{}.self_attention.query_key_value", lambda head: head * 3 * dim),
        # four parts with query, value and key of one head each
        "codegen": ("transformer.h.{}.attn.qkv_proj", lambda head: head * 3 * dim),
        "gptj": ("transformer.h.{}.attn.q_proj", lambda head: head * dim),
        "mpt": ("transformer.blocks.{}.attn.Wqkv", lambda head: head * dim),
    }[name]
    projection = model.get_submodule(where[0].format(layer))
    assert not isinstance(projection, Conv1D)
    with torch.no_grad():
        for head in range(HEADS):
            start = where[1](head)
            projection.weight[start : start + dim] *= scale[head]
            if projection.bias is not None:
                projection.bias[start : start + dim] *= scale[head]
