"""Tiny models with an adapter of SEAL beside one of LoRA, made in every order, and what they must compute."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import seal_peft
from models import base_model, draw_scales, logits, multiply_by_hand
from seal_peft import SealConfig, scales

# LoRA on the projection that SEAL scales, and on others.
SHARED = {"llama": ["o_proj", "q_proj"], "gpt2": ["attn.c_proj", "c_attn"]}
OTHER = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def lora_config(name="llama", shared=True, **kwargs):
    targets = (SHARED if shared else OTHER)[name]
    return LoraConfig(r=3, lora_alpha=7, target_modules=targets, fan_in_fan_out=name == "gpt2", **kwargs)


def lora_layers(model):
    return {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for key, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def draw_lora(model, adapter_name="style", seed=3):
    """Give LoRA products about as large as the weights, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for part in (layer.lora_A, layer.lora_B):
                weight = part[adapter_name].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)


def second(function, *args):
    """Call what PEFT warns about: a second method on one model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        return function(*args)


def add_seal_to_lora(base, lora, seal):
    return seal_peft.add_beside(get_peft_model(base, lora, "style"), seal, "heads")


def add_lora_to_seal(base, lora, seal):
    return seal_peft.add_beside(get_peft_model(base, seal, "heads"), lora, "style")


def inject_seal_then_wrap_lora(base, lora, seal):
    return second(get_peft_model, inject_adapter_in_model(seal, base, "heads"), lora, "style")


def wrap_lora_then_inject_seal(base, lora, seal):
    model = get_peft_model(base, lora, "style")
    second(inject_adapter_in_model, seal, model.get_base_model(), "heads")
    return model


ORDERS = [add_seal_to_lora, add_lora_to_seal, inject_seal_then_wrap_lora, wrap_lora_then_inject_seal]


def build(order=add_seal_to_lora, name="llama", shared=True, granularity="head", base=None, **kwargs):
    """Return a model with LoRA "style" and SEAL "heads", both far from the identity."""
    base = base or base_model(name)
    model = order(base, lora_config(name, shared, **kwargs), SealConfig(granularity=granularity)).eval()
    draw_lora(model)
    draw_scales(model, "heads")
    return model


def by_hand(model, name="llama", active=("heads", "style")):
    """Write what the model must compute into the weights of a plain one: columns first, then the product added."""
    base = base_model(name)
    if "heads" in active:
        multiply_by_hand(base, scales(model, "heads"))
    if "style" in active:
        with torch.no_grad():
            for key, layer in lora_layers(model).items():
                target = base.get_submodule(key)
                a, b = layer.lora_A["style"].weight, layer.lora_B["style"].weight
                for out in range(b.shape[0]):
                    row = sum(b[out, rank] * a[rank] for rank in range(3)) * (7 / 3)
                    part = target.weight[:, out] if isinstance(target, Conv1D) else target.weight[out]
                    part.add_(row)
    return base


def same(model, plain, tolerance=2e-5):
    assert_close(logits(model), logits(plain), rtol=0, atol=tolerance)


orders = pytest.mark.parametrize("order", ORDERS)
names = pytest.mark.parametrize("name", ["llama", "gpt2"])
places = pytest.mark.parametrize("shared", [True, False], ids=["same-module", "other-modules"])
granularities = pytest.mark.parametrize("granularity", ["head", "channel"])
merged_more_than_once = [
    # PEFT says on each further merge what is merged already, and on each unmerge that some layers have nothing to.
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged. Nothing to do:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning"),
]
