"""Tokenizers of every kind, samples of `lines`, and a tiny Llama that reads them."""

import pytest
from transformers import (
    LlamaConfig,
)

import tokenizers_for_tests as tokenizers_
from seal_peft.data import make_samples
from seal_peft.tasks import Sample

TOKENIZERS = {
    "base": tokenizers_.bpe(),
    "base_metaspace": tokenizers_.metaspace(),
    "words": tokenizers_.words(tokenizers_.CHATML),
    **{name: tokenizers_.bpe(template) for name, template in tokenizers_.CHAT_TEMPLATES.items()},
    "metaspace_brackets": tokenizers_.metaspace(tokenizers_.BRACKETS),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def some_samples(**changes) -> list[Sample]:
    arguments = {"tokenizer": TOKENIZERS["chatml"], "split": "train", "lengths": [900], "num_samples": 2, **changes}
    return make_samples("lines", **arguments)


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 900,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    return LlamaConfig(**{**sizes, **changes})
