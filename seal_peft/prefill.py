"""Prompts of different lengths, read one by one: the cache is the one of a padded batch, the mask is not needed.

A padded batch needs a mask of all tokens times all tokens, at 32K tokens a gigabyte for each prompt, and loses the
flash kernels to it. A step of decoding needs one row of it, so only those steps are a batch's. So the most memory that
answers take is the cache of a batch and the reading of one prompt.
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


def can_prefill_one_by_one(model: Any) -> bool:
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


def prefill_one_by_one(model: Any, prompts: Sequence[list[int]]) -> DynamicCache:
    """Read all but the last token of each prompt.

    Args:
        model: One that can be read so, on its device and in inference mode.
        prompts: Token ids of each prompt.

    Returns:
        What the model would hold of a batch padded on the left: keys and values of shape `(batch_size,
        num_key_value_heads, tokens, head_dim)`, zeros in front of the shorter ones.
    """
    width = max(map(len, prompts)) - 1
    layers: dict[int, list[Tensor]] = {}
    for row, prompt in enumerate(prompts):
        if len(prompt) == 1:
            continue
        own = DynamicCache()  # of all tokens, also where a sliding window has passed
        ids = torch.tensor([prompt[:-1]], device=model.device)
        positions = torch.arange(len(prompt) - 1, device=model.device)[None]
        model(input_ids=ids, position_ids=positions, past_key_values=own, use_cache=True, logits_to_keep=1)
        for index, layer in enumerate(cast("list[DynamicLayer]", own.layers)):
            pair: tuple[Any, Any] = layer.keys, layer.values
            batch = layers.setdefault(index, [])
            if not batch:
                batch += [alone.new_zeros(len(prompts), alone.shape[1], width, alone.shape[3]) for alone in pair]
            for together, alone in zip(batch, pair, strict=True):
                together[row, :, width + 1 - len(prompt) :] = alone[0]
    cache = DynamicCache(config=model.config)
    for index in list(layers):
        keys, values = layers.pop(index)  # `update` copies them, so they go layer by layer
        cache.update(keys, values, index)
    return cache
