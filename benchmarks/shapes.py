"""Models of true size with random weights, for timing: time and memory do not depend on the values."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    # Llama-3.1-8B: 32 layers, 32 query and 8 key-value heads of 128.
    "8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    # As many layers and heads, but next to no work in them: what a method does in Python shows.
    "thin": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=2,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    # The same shape at a size that a laptop runs, to try the scripts.
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
}


def random_model(size: str, device: str) -> LlamaForCausalLM:
    """Build a model with small random weights, bf16, in inference mode."""
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(SIZES[size])
        finally:
            torch.set_default_dtype(dtype)
    return model.eval().requires_grad_(False)
