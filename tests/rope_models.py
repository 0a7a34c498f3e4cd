"""Tiny models whose RoPE is extended: by hand, by an adapter, and by several adapters in turn."""

import copy
import warnings

import torch
import transformers as tf
from peft import get_peft_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import models
from models import draw_scales
from seal_peft import SealConfig

# Positions beyond `max_position_embeddings` and `original_max_position_embeddings`, so that every type shows.
LONG = torch.arange(1, 49).remainder(63).unsqueeze(0)
YARN = {"rope_type": "yarn", "factor": 4.0}
NTK = {"rope_type": "ntk", "factor": 4.0}
TYPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {**YARN, "beta_fast": 16.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
HERE = sorted({"default", *ROPE_INIT_FUNCTIONS} & set(TYPES))


def logits(model, ids=LONG):
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapted(base, **kwargs):
    """Give a base an adapter with drawn scales."""
    model = get_peft_model(base, SealConfig(**kwargs))
    draw_scales(model)
    return model.eval()


def llama(**kwargs):
    return models.llama(**{"max_position_embeddings": 32, **kwargs})


def gemma3(**kwargs):
    return models.gemma3(**{"max_position_embeddings": 32, "sliding_window": 16, **kwargs})


def phi3(**kwargs):
    sizes = {"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 32, "original_max_position_embeddings": 32}
    return models.causal(tf.Phi3Config, **{**sizes, "partial_rotary_factor": 0.5, **kwargs})


def phi3_longrope(factor):
    return {
        "rope_type": "longrope",
        "factor": factor,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }


def built(build, rope):
    """Build a model from a config with the parameters that `read_rope` gives."""
    rope = copy.deepcopy(rope)
    return build(max_position_embeddings=rope.pop("max_position_embeddings"), rope_parameters=rope)


# -- in an adapter ----------------------------------------------------------------------------------------------------


def extended(request=YARN, build=llama, adapter_name="default", **kwargs):
    """An adapter with drawn scales that asks for RoPE."""
    model = get_peft_model(build(), SealConfig(rope_parameters=request, **kwargs), adapter_name)
    draw_scales(model)
    return model.eval()


# -- in and out of force ----------------------------------------------------------------------------------------------


def told(make):
    """Return what `make` gives, and its user warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = make()
    return result, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def switching():
    """A model with four adapters: two under the same YaRN, one under NTK, one under the base's RoPE."""
    model = extended(YARN, adapter_name="yarn")
    model.add_adapter("yarn too", SealConfig(rope_parameters=dict(YARN)))
    model.add_adapter("ntk", SealConfig(rope_parameters=NTK))
    model.add_adapter("plain", SealConfig())
    for seed, name in enumerate(model.peft_config):
        draw_scales(model, name, seed)
    return model.eval()


def alone(model, name, request):
    """The logits of one adapter by itself in a fresh base."""
    other = get_peft_model(llama(), SealConfig(rope_parameters=request))
    for own, layer in zip(models.seal_layers(model).values(), models.seal_layers(other).values(), strict=True):
        layer.offset("default").data.copy_(own.offset(name).data)
    return logits(other)
