"""Prompts of different lengths, read apart: the cache is the one of a padded batch, the mask is not needed.

A padded batch needs a mask of all tokens times all tokens, at 32K tokens a gigabyte for each prompt, and loses the
flash kernels to it. A step of decoding needs one row of it, so only those steps are a batch's. So the most memory that
answers take is the cache of a batch and the reading of one prompt, or of a few short ones, with their drafts' logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .context.rope import depends_on_length

# Methods known to change modules and nothing else. Others may look at a whole prompt, or at the cache.
_METHODS = {"SEAL", "LORA", "IA3", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA"}
# Of keys and values of each token, or of none, where a layer shares another's (transformers 5.10 has no such kind).
_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer)}
# They hold a state of the text in their modules, which transformers 5.10 does not say.
_STATEFUL = {"recurrent_gemma", "glm_moe_dsa"}
# Tokens that a GPU reads together: their mask is small, and one text of so many takes as much memory.
_TOGETHER = 8192


def can_prefill_apart(model: Any) -> bool:
    """Tell whether all that a model remembers of a text are keys and values of its tokens, whatever is beside them.

    It is not where there is a recurrent state or an encoder, nor for RoPE whose frequencies depend on the length: in a
    batch they are those of the longest. Positions of several dimensions are counted by the model, from its batch.
    Some adapters look at the whole prompt: prompt learning puts tokens in front, aLoRA looks for some in it.

    Args:
        model: A causal language model, with adapters or without.
    """
    adapters = getattr(model, "peft_config", {}).values()
    if any(own.peft_type not in _METHODS or getattr(own, "alora_invocation_tokens", None) for own in adapters):
        return False
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = inner.config
    if config.is_encoder_decoder or inner._is_stateful or config.model_type in _STATEFUL:
        return False
    if "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {}):
        return False
    if depends_on_length(module for module in inner.modules() if hasattr(module, "rope_type")):
        return False
    if not inspect.signature(inner.forward).parameters.keys() >= {"past_key_values", "position_ids", "logits_to_keep"}:
        return False
    return {type(layer) for layer in DynamicCache(config=config).layers} <= _LAYERS


def groups_of(prompts: Sequence[list[int]], device: torch.device) -> list[list[int]]:
    """Say which prompts of a batch are read together: on a GPU short ones are, so that it does not wait for the CPU.

    Args:
        prompts: Token ids of each prompt.
        device: Where they are read.

    Returns:
        Indices of the prompts of each group; those of one token are in none, they have nothing to read ahead.
    """
    groups: list[list[int]] = []
    rows = [row for row, prompt in enumerate(prompts) if len(prompt) > 1]
    for row in sorted(rows, key=lambda row: -len(prompts[row])):
        most = _TOGETHER // len(prompts[groups[-1][0]]) if groups and device.type != "cpu" else 1
        if not groups or len(groups[-1]) >= most:
            groups.append([])
        groups[-1].append(row)
    return groups


def prefill(
    model: Any, texts: Sequence[list[int]], groups: Sequence[Sequence[int]], checked: int = 0
) -> tuple[dict[int, list[Tensor]], list[list[int]]]:
    """Read all but the last token of each text.

    Args:
        model: One that can be read so, on its device and in inference mode.
        texts: Token ids of each.
        groups: Indices of texts that are read together, with padding. A group of one needs no mask.
        checked: How many tokens at the end of each text are guesses at what the model says.

    Returns:
        Keys and values of each layer, `(texts, num_key_value_heads, tokens, head_dim)`, zeros in front of the shorter
        ones, and the `checked` tokens of each text that the model itself says in the place of its last ones.
    """
    width = max(map(len, texts)) - 1
    layers: dict[int, list[Tensor]] = {}
    said: list[list[int]] = [[] for _ in texts]
    for group in groups:
        own = DynamicCache()  # of all tokens, also where a sliding window has passed
        mask, logits = _read(model, [texts[row][:-1] for row in group], own, max(1, checked))
        for row, tokens in zip(group, logits.argmax(-1).tolist(), strict=True):
            said[row] = tokens[:checked]
        for index, layer in enumerate(cast("list[DynamicLayer]", own.layers)):
            pair: tuple[Any, Any] = layer.keys, layer.values
            batch = layers.setdefault(index, [])
            if not batch:
                batch += [read.new_zeros(len(texts), read.shape[1], width, read.shape[3]) for read in pair]
            for together, read in zip(batch, pair, strict=True):
                together[list(group), :, width - mask.shape[1] :] = read.masked_fill(
                    ~mask[:, None, :, None].to(read.device), 0
                )
    return layers, said


def cache_of(
    model: Any, layers: dict[int, list[Tensor]], rows: Sequence[int], width: int, dropped: int
) -> DynamicCache:
    """Return what a model would hold of texts as a batch padded on the left.

    Args:
        model: The model.
        layers: What `prefill` read, which this takes apart, so that it is never held twice.
        rows: Which of its texts.
        width: How many tokens, padding included.
        dropped: How many tokens after these are left out.
    """
    cache = DynamicCache(config=model.config)
    for index in list(layers):
        end = layers[index][0].shape[2] - dropped
        keys, values = (read[list(rows), :, end - width : end] for read in layers.pop(index))
        cache.update(keys, values, index)
    return cache


def _read(model: Any, texts: Sequence[list[int]], cache: DynamicCache, kept: int) -> tuple[Tensor, Tensor]:
    """Fill a cache with texts, padded on the left.

    Returns which of its tokens are theirs, `(len(texts), tokens)`, and the logits after the last `kept`.
    """
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts], device=model.device)
    mask = torch.tensor([[False] * (width - len(text)) + [True] * len(text) for text in texts], device=model.device)
    output = model(
        input_ids=ids,
        attention_mask=None if mask.all() else mask.long(),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=kept,
    )
    return mask, output.logits
