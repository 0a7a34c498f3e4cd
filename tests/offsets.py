"""The offsets of an adapter, and a loss to move them."""

import pytest

from models import INPUT_IDS, seal_layers

both_granularities = pytest.mark.parametrize("granularity", ["head", "channel"])
some_models = pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "opt", "gpt2"])


def offsets(model, adapter_name="default"):
    return [layer.seal_delta[adapter_name].weight for layer in seal_layers(model).values()]


def loss_of(model):
    return model(input_ids=INPUT_IDS).logits.float().square().mean()
