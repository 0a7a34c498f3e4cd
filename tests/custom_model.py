"""The models of the PEFT contract: tiny decoders, and one with attention and MLP that is not from transformers."""

from __future__ import annotations

import types

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from models import HIDDEN, INPUT_IDS, VOCAB, base_model, draw_scales
from seal_peft import SealConfig

DECODERS = ["llama", "qwen2", "qwen3", "gemma3_text", "opt", "gpt2"]
CASES = [*DECODERS, "custom"]
# "query" is one scale per head on outputs and queries. The custom model's queries are fused in an order of its own.
KINDS = ["head", "channel", "query"]
HEADS, HEAD_DIM = 3, 8


class Attention(nn.Module):
    """Attention that says nothing about its heads: 3 of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM)
        self.mix = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mix(heads.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 40), nn.GELU(), nn.Linear(40, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


class CustomModel(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(HIDDEN, VOCAB)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> types.SimpleNamespace:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.decoder.layers:
            x = layer(x)
        return types.SimpleNamespace(logits=self.head(x))


def base(name: str) -> nn.Module:
    """Return a fresh plain model; the same name always gives the same weights."""
    if name != "custom":
        return base_model(name)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = CustomModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25)
    torch.set_rng_state(state)
    return model.eval()


def cases(names: list[str] = CASES, merged: bool = False) -> pytest.MarkDecorator:
    """Parametrize a test over models and kinds of adapters; `merged` leaves out norms that take no scale per head."""
    without_query = ["custom", "qwen3", "gemma3_text"] if merged else ["custom"]
    pairs = [(name, kind) for name in names for kind in KINDS if kind != "query" or name not in without_query]
    return pytest.mark.parametrize(("name", "granularity"), pairs)


def sites(kind: str) -> int:
    """Return how many modules of an attention layer an adapter of this kind scales."""
    return 2 if kind == "query" else 1


def config(name: str, granularity: str = "head", **kwargs) -> SealConfig:
    """Return the settings with which SEAL finds the heads of a model."""
    told = {"target_modules": ["attention.mix"], "num_attention_heads": HEADS} if name == "custom" else {}
    kind = {"sites": ("output", "query")} if granularity == "query" else {"granularity": granularity}
    return SealConfig(**{**told, **kind, **kwargs})


def adapt(
    name: str,
    granularity: str = "head",
    adapter_name: str = "default",
    model: PeftModel | None = None,
    seed: int = 1,
    **kwargs,
) -> PeftModel:
    """Add an adapter with random scales to a model, or to a fresh one."""
    settings = config(name, granularity, **kwargs)
    if model is None:
        model = get_peft_model(base(name), settings, adapter_name=adapter_name).eval()
    else:
        model.add_adapter(adapter_name, settings)
    draw_scales(model, adapter_name, seed)
    return model


def result(model: nn.Module) -> Tensor:
    """Return the logits of the fixed inputs, without gradient."""
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits
