"""Tiny models, built in code, of every architecture that SEAL knows by itself.

Head sizes are decoupled from the hidden size wherever an architecture allows it, so that code that computes
`hidden_size // num_heads` cannot pass. Weights are drawn wide enough that every head is felt in the logits.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from seal_peft import SealConfig, SealLayer

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCAB = 32, 4, 12, 2, 64
INPUT_IDS = torch.tensor([[3, 9, 27, 17, 51, 29, 6, 18], [5, 25, 61, 49, 55, 19, 31, 27]])

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture, and by hand where its heads are: full projection name -> (heads, channels per head)."""

    build: Callable[[], nn.Module]
    projections: dict[str, tuple[int, int]]


def seeded(config: tf.PreTrainedConfig, model_class: type[tf.PreTrainedModel]) -> nn.Module:
    """Build a model whose weights depend on nothing but its config, in eval mode."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    torch.set_rng_state(state)
    return model.eval()


def causal(config_class: type[tf.PreTrainedConfig], **kwargs: Any) -> nn.Module:
    """Build a tiny decoder of the given config class."""
    config = config_class(**{**_SIZES, **kwargs})
    return seeded(config, tf.AutoModelForCausalLM._model_mapping[type(config)])


def llama(**kwargs: Any) -> nn.Module:
    """Build a tiny Llama with grouped queries; head size 12 times 4 heads is not the hidden size 32."""
    return causal(tf.LlamaConfig, **{"head_dim": HEAD_DIM, **kwargs})


def gpt2() -> nn.Module:
    """Build a tiny GPT-2, whose linear layers are `Conv1D`."""
    return causal(tf.GPT2Config, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=128)


def gemma3(**kwargs: Any) -> nn.Module:
    """Build a tiny text-only Gemma 3 with one sliding and one full layer.

    Its embeddings are untied: tied random ones make it repeat the last token whatever attention does.
    """
    return causal(tf.Gemma3TextConfig, **{**_GEMMA3, "tie_word_embeddings": False, **kwargs})


_GEMMA3: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _llava(vision: tf.PreTrainedConfig) -> nn.Module:
    text = tf.LlamaConfig(**_SIZES, head_dim=HEAD_DIM)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_seq_length=4)
    return seeded(config, tf.LlavaForConditionalGeneration)


def gemma3_multimodal() -> nn.Module:
    """Build a tiny Gemma 3 with its SigLIP tower, whose attention has an `out_proj` of its own."""
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**_SIZES, **_GEMMA3),
        vision_config=tf.SiglipVisionConfig(**_VISION),
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return seeded(config, tf.Gemma3ForConditionalGeneration)


def _qwen2_5_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**_SIZES, "hidden_size": 32, "rope_parameters": rope}
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = tf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "fullatt_block_indexes": [1], "patch_size": 14, "window_size": 28},
        image_token_id=63,
        video_token_id=62,
        vision_start_token_id=61,
        vision_end_token_id=60,
    )
    return seeded(config, tf.Qwen2_5_VLForConditionalGeneration)


def _falcon(new_decoder_architecture: bool) -> nn.Module:
    return causal(
        tf.FalconConfig,
        new_decoder_architecture=new_decoder_architecture,
        multi_query=not new_decoder_architecture,
        num_kv_heads=2,
        parallel_attn=True,
        bias=False,
    )


def _deepseek_v3() -> nn.Module:
    # Multi-head latent attention: queries and keys have 6 + 4 channels, values have 14.
    return causal(
        tf.DeepseekV3Config,
        num_key_value_heads=HEADS,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=14,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **_MOE,
    )


# The full-attention layer has larger heads than the sliding one.
_GEMMA4: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "global_head_dim": 20,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
}


def gemma4_text(**kwargs: Any) -> nn.Module:
    """Build a tiny text-only Gemma 4 with one sliding and one full layer."""
    return causal(tf.Gemma4TextConfig, **{**_GEMMA4, **kwargs})


def _gemma4() -> nn.Module:
    # Its vision tower names its projections as the language part does: only the part tells them apart.
    config = tf.Gemma4Config(
        text_config={**_SIZES, **_GEMMA4},
        vision_config={**_VISION, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64},
        audio_config=None,
        image_token_id=63,
        boi_token_id=62,
        eoi_token_id=61,
    )
    return seeded(config, tf.Gemma4ForConditionalGeneration)


def _at(pattern: str, heads: int = HEADS, head_dim: int = HEAD_DIM) -> dict[str, tuple[int, int]]:
    return {pattern.format(layer): (heads, head_dim) for layer in range(LAYERS)}


_USUAL = "model.layers.{}.self_attn.o_proj"
_MULTIMODAL = "model.language_model.layers.{}.self_attn.o_proj"
_COUPLED = HIDDEN // HEADS  # for architectures that know no head size of their own


def _decoder(config_class: type[tf.PreTrainedConfig], **kwargs: Any) -> Architecture:
    return Architecture(functools.partial(causal, config_class, head_dim=HEAD_DIM, **kwargs), _at(_USUAL))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(tf.LlamaConfig),
    "llama-one-kv-head": _decoder(tf.LlamaConfig, num_key_value_heads=1),
    "mistral": _decoder(tf.MistralConfig),
    "mixtral": _decoder(tf.MixtralConfig, num_local_experts=4),
    "qwen2": _decoder(tf.Qwen2Config),
    "qwen3": _decoder(tf.Qwen3Config),
    "qwen3_moe": _decoder(tf.Qwen3MoeConfig, num_experts=4, **_MOE),
    "gemma2": _decoder(tf.Gemma2Config, query_pre_attn_scalar=HEAD_DIM, sliding_window=4),
    "gemma3_text": Architecture(gemma3, _at(_USUAL)),
    "phi3": _decoder(tf.Phi3Config),
    "olmo2": _decoder(tf.Olmo2Config),
    "granite": _decoder(tf.GraniteConfig),
    "cohere": _decoder(tf.CohereConfig, logit_scale=1.0),
    "smollm3": _decoder(tf.SmolLM3Config),
    "gpt_oss": _decoder(
        tf.GptOssConfig,
        num_local_experts=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": Architecture(_deepseek_v3, _at(_USUAL, head_dim=14)),
    "gpt2": Architecture(gpt2, _at("transformer.h.{}.attn.c_proj", head_dim=_COUPLED)),
    "gpt_neox": Architecture(
        functools.partial(causal, tf.GPTNeoXConfig), _at("gpt_neox.layers.{}.attention.dense", head_dim=_COUPLED)
    ),
    "opt": Architecture(
        functools.partial(causal, tf.OPTConfig, ffn_dim=40, word_embed_proj_dim=HIDDEN, dropout=0.0),
        _at("model.decoder.layers.{}.self_attn.out_proj", head_dim=_COUPLED),
    ),
    "falcon": Architecture(
        functools.partial(_falcon, False), _at("transformer.h.{}.self_attention.dense", head_dim=_COUPLED)
    ),
    "falcon-new-decoder": Architecture(
        functools.partial(_falcon, True), _at("transformer.h.{}.self_attention.dense", head_dim=_COUPLED)
    ),
    "llava-clip": Architecture(lambda: _llava(tf.CLIPVisionConfig(**_VISION)), _at(_MULTIMODAL)),
    "llava-siglip": Architecture(lambda: _llava(tf.SiglipVisionConfig(**_VISION)), _at(_MULTIMODAL)),
    "gemma3": Architecture(gemma3_multimodal, _at(_MULTIMODAL)),
    "qwen2_5_vl": Architecture(_qwen2_5_vl, _at(_MULTIMODAL, head_dim=_COUPLED)),
}

if hasattr(tf, "Gemma4Config"):  # younger than the oldest transformers that we support
    ARCHITECTURES |= {
        "gemma4_text": Architecture(
            gemma4_text,
            {_USUAL.format(0): (HEADS, HEAD_DIM), _USUAL.format(1): (HEADS, 20)},
        ),
        "gemma4": Architecture(
            _gemma4, {_MULTIMODAL.format(0): (HEADS, HEAD_DIM), _MULTIMODAL.format(1): (HEADS, 20)}
        ),
    }


class _WithoutTensors(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, found: Any) -> int | None:
        if isinstance(found, Tensor):
            self.tensors[id(found)] = found
            return id(found)
        return None


class _WithCopiesOfTensors(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.copied = functools.cache(lambda key: copy.deepcopy(tensors[key]))  # once: tied weights stay tied

    def persistent_load(self, key: int) -> Tensor:
        return self.copied(key)


@functools.cache
def _pickled(name: str) -> tuple[bytes, dict[int, Tensor]]:
    file = io.BytesIO()
    pickler = _WithoutTensors(file)
    pickler.dump(ARCHITECTURES[name].build())
    return file.getvalue(), pickler.tensors


def base_model(name: str) -> nn.Module:
    """Return a fresh copy of a tiny model; the same name always gives the same weights.

    Tests take thousands of copies. These are made by pickle, six times as fast as by `copy.deepcopy`.
    """
    pickled, tensors = _pickled(name)
    return _WithCopiesOfTensors(io.BytesIO(pickled), tensors).load()


def logits(model: nn.Module) -> Tensor:
    """Return the logits of the fixed inputs, without gradient."""
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def seal_layers(model: nn.Module) -> dict[str, SealLayer]:
    """Return the wrapped projections by their names in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, SealLayer)
    }


def draw_scales(model: nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Give an adapter scales between 0.2 and 1.8, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in seal_layers(model).values():
            if adapter_name not in layer.seal_delta:
                continue
            weight = layer.seal_delta[adapter_name].weight
            weight.copy_(torch.rand(weight.shape, generator=generator) * 1.6 - 0.8)


def adapted(name: str = "llama", granularity: str = "head", seed: int = 1, **kwargs: Any) -> PeftModel:
    """Return a tiny model with a SEAL adapter whose scales are not the identity."""
    model = get_peft_model(base_model(name), SealConfig(granularity=granularity, **kwargs))
    draw_scales(model, seed=seed)
    return model


def multiply_by_hand(base: nn.Module, scales: dict[str, Tensor]) -> nn.Module:
    """Multiply the rows or columns that read a head by its scale: what SEAL must equal, written independently."""
    with torch.no_grad():
        for name, scale in scales.items():
            projection = base.get_submodule(name)
            in_is_first = isinstance(projection, Conv1D)  # Conv1D keeps its weight as (inputs, outputs)
            inputs = projection.weight.shape[0 if in_is_first else 1]
            for index in range(inputs):
                head_dim = inputs // scale.shape[0]
                head, channel = divmod(index, head_dim)
                factor = scale[head] if scale.dim() == 1 else scale[head, channel]
                column = projection.weight[index] if in_is_first else projection.weight[:, index]
                column.mul_(factor)
    return base
