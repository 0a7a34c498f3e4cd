"""SEAL beside LoRA, merged: any part, in any order, gives the same logits, and unmerged the same weights."""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close

from lora_pairs import (
    add_seal_to_lora,
    build,
    by_hand,
    draw_lora,
    lora_config,
    lora_layers,
    merged_more_than_once,
    names,
    orders,
    places,
    same,
)
from models import INPUT_IDS, base_model, draw_scales, logits, seal_layers
from seal_peft import SealConfig

pytestmark = merged_more_than_once


@orders
@names
@places
@pytest.mark.parametrize(
    "steps",
    [
        [["style"]],
        [["heads"]],
        [["style", "heads"]],
        [["style"], ["heads"]],
        [["heads"], ["style"]],
        [None],
    ],
    ids=str,
)
def test_any_part_may_be_merged_in_any_order(order, name, shared, steps):
    model = build(order, name, shared, "channel" if steps else "head")
    expected = by_hand(model, name)
    before = logits(model)
    for names_to_merge in steps:
        model.merge_adapter(adapter_names=names_to_merge)
        same(model, expected)
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        same(twin, base_model(name))
    same(twin, expected)
    model.unmerge_adapter()
    assert_close(logits(model), before, rtol=0, atol=2e-5)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


@names
@pytest.mark.parametrize("first_in", ["seal", "lora"])
@pytest.mark.parametrize("first_out", ["seal", "lora"])
def test_layers_merge_and_unmerge_one_by_one_in_any_order(name, first_in, first_out):
    model = build(name=name)
    original = {key: layer.get_base_layer().weight.clone() for key, layer in seal_layers(model).items()}
    expected = by_hand(model, name)
    methods = {"seal": seal_layers(model), "lora": lora_layers(model)}
    for first, verb in ((first_in, "merge"), (first_out, "unmerge")):
        for method in (first, {"seal": "lora", "lora": "seal"}[first]):
            for layer in methods[method].values():
                getattr(layer, verb)()
            same(model, expected)
    for key, layer in seal_layers(model).items():
        assert_close(layer.get_base_layer().weight, original[key], rtol=0, atol=1e-6)


def test_without_merging_lora_the_original_comes_back_bit_for_bit():
    model = build()
    original = [layer.get_base_layer().weight.clone() for layer in seal_layers(model).values()]
    model.merge_adapter(adapter_names=["heads"])
    model.unmerge_adapter()
    for layer, weight in zip(seal_layers(model).values(), original, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_merging_seal_over_a_merged_lora_gives_the_merged_weight_back_bit_for_bit():
    model = build(base=base_model("llama").bfloat16())
    model.merge_adapter(adapter_names=["style"])
    merged = [layer.get_base_layer().weight.clone() for layer in seal_layers(model).values()]
    for layer in seal_layers(model).values():
        layer.merge()
        layer.unmerge()
    for layer, weight in zip(seal_layers(model).values(), merged, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


@orders
@names
@places
@pytest.mark.parametrize("merged_before", [[], ["style"], ["heads"], ["heads", "style"]], ids=str)
def test_merge_and_unload_keeps_both_without_a_forward_pass_before(order, name, shared, merged_before):
    model = build(order, name, shared)
    expected = by_hand(model, name)
    if merged_before:
        model.merge_adapter(adapter_names=merged_before)
    plain = model.merge_and_unload(safe_merge=name == "gpt2")
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert plain.state_dict().keys() == base_model(name).state_dict().keys()
    same(plain, expected)


@orders
@places
@pytest.mark.parametrize("kept", ["heads", "style"])
def test_merge_and_unload_of_one_adapter_leaves_the_other_out(order, shared, kept):
    model = build(order, shared=shared)
    expected = by_hand(model, active=[kept])
    same(model.merge_and_unload(adapter_names=[kept]), expected)


@orders
@names
@places
def test_unloading_gives_the_plain_base_back(order, name, shared):
    plain = build(order, name, shared).unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert torch.equal(logits(plain), logits(base_model(name)))


@places
def test_a_bias_of_lora_is_merged_once(shared):
    config = lora_config("gpt2", shared, lora_bias=True)
    model = add_seal_to_lora(base_model("gpt2"), config, SealConfig()).eval()
    draw_lora(model)
    draw_scales(model, "heads")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["style"].bias.normal_()
    before = logits(model)
    for names_to_merge in (["style"], ["heads"]):
        model.merge_adapter(adapter_names=names_to_merge)
        assert_close(logits(model), before, rtol=0, atol=2e-5)


def test_a_broken_scale_is_refused_with_lora_merged_and_changes_nothing():
    model = build()
    model.merge_adapter(adapter_names=["style"])
    before = logits(model)
    layer = next(iter(seal_layers(model).values()))
    kept = layer.seal_delta["heads"].weight.detach().clone()
    with torch.no_grad():
        layer.seal_delta["heads"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    with torch.no_grad():
        layer.seal_delta["heads"].weight.copy_(kept)
    assert torch.equal(logits(model), before)


def test_gradients_reach_the_scales_while_lora_is_merged():
    def gradients(merged):
        model = build()
        if merged:
            model.merge_adapter(adapter_names=["style"])
        model(input_ids=INPUT_IDS).logits.square().mean().backward()
        return [layer.seal_delta["heads"].weight.grad for layer in seal_layers(model).values()]

    for unmerged, merged in zip(gradients(False), gradients(True), strict=True):
        assert_close(merged, unmerged, rtol=1e-3, atol=1e-6)
