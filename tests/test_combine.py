"""Strength, weighted sums and hot swapping, against scales computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import INPUT_IDS, adapted, base_model, draw_scales, logits, multiply_by_hand
from seal_peft import SealConfig, hotswap_adapter, scales, set_strength
from seal_peft.tuner.layer import SealLayer

GRANULARITIES = ["head", "channel"]


def assert_same_logits(model, by_hand):
    torch.testing.assert_close(logits(model), logits(by_hand), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_strength_stretches_the_distance_from_one(granularity, alpha):
    model = adapted("llama", granularity)
    set_strength(model, alpha)
    by_hand = multiply_by_hand(base_model("llama"), {n: 1 + alpha * (s - 1) for n, s in scales(model).items()})
    assert_same_logits(model, by_hand)
    model.merge_adapter()
    assert_same_logits(model, by_hand)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_strength_must_be_finite(alpha):
    with pytest.raises(ValueError, match="finite number"):
        set_strength(adapted("llama", "head"), alpha)


def test_the_strength_of_a_merged_or_unknown_adapter_cannot_change():
    model = adapted("llama", "head")
    with pytest.raises(ValueError, match="no SEAL adapter named 'typo'.*default"):
        set_strength(model, 0.5, "typo")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_strength(model, 0.5)


@given(weights=st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_a_weighted_adapter_is_linear_in_the_offsets(weights):
    model = adapted("llama", "head")
    model.add_adapter("other", SealConfig(task_type="CAUSAL_LM"))
    draw_scales(model, "other", seed=3)
    first, second = scales(model), scales(model, "other")
    model.add_weighted_adapter(["default", "other"], weights, "sum")
    for name, scale in scales(model, "sum").items():
        expected = 1 + weights[0] * (first[name] - 1) + weights[1] * (second[name] - 1)
        torch.testing.assert_close(scale, expected)


def test_adapters_of_different_shape_and_layers_combine(tmp_path):
    model = adapted("llama", "head", layers_to_transform=[0])
    model.add_adapter("wide", SealConfig(granularity="channel", layers_to_transform=[1], task_type="CAUSAL_LM"))
    draw_scales(model, "wide", seed=3)
    model.add_weighted_adapter(["default", "wide"], [1.0, -0.5], "sum")
    model.set_adapter("sum")
    narrow, wide, total = scales(model), scales(model, "wide"), scales(model, "sum")
    first, second = sorted(total)
    torch.testing.assert_close(total[first], narrow[first].unsqueeze(-1).expand_as(total[first]))
    torch.testing.assert_close(total[second], 1 - 0.5 * (wide[second] - 1))
    assert_same_logits(model, multiply_by_hand(base_model("llama"), total))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert {name: scale.shape for name, scale in scales(tmp_path / "sum").items()} == {
        name: scale.shape for name, scale in total.items()
    }


def test_adapters_whose_configs_name_other_numbers_of_heads_combine():
    model = adapted("llama", layers_to_transform=[0], num_attention_heads=4)
    model.add_adapter("other", SealConfig(layers_to_transform=[1], num_attention_heads=6, head_dim=8))
    draw_scales(model, "other", seed=3)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert all(torch.equal(scales(model, "sum")[name], scale) for name, scale in scales(model, "other").items())


def test_a_weighted_adapter_survives_its_parts():
    model = adapted("llama", "head")
    model.add_weighted_adapter(["default"], [0.5], "default2")
    expected = {name: 1 + 0.5 * (scale - 1) for name, scale in scales(model).items()}
    model.set_adapter("default2")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["default2"]
    assert_same_logits(model, multiply_by_hand(base_model("llama"), expected))


def test_a_weighted_adapter_does_not_disturb_the_active_one():
    model = adapted("llama", "head")
    before = logits(model)
    model.add_weighted_adapter(["default"], [3.0], "strong")
    assert torch.equal(logits(model), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default"], [1.0], "default", "already is an adapter named 'default'"),
        (["typo"], [1.0], "sum", "Unknown adapters"),
        (["default"], [0.5], "half", "does not allow an adapter to be named 'half'"),
        (["default"], [1.0, 2.0], "sum", "one finite weight per adapter"),
        (["default"], [float("nan")], "sum", "one finite weight per adapter"),
        ([], [], "sum", "one finite weight per adapter"),
    ],
)
def test_what_cannot_be_combined_is_refused(adapters, weights, name, message):
    model = adapted("llama", "head")
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert list(model.peft_config) == ["default"]


def test_what_is_more_than_scales_is_neither_combined_nor_swapped(tmp_path):
    model = adapted("llama", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "whole")
    adapted("llama", seed=5).save_pretrained(tmp_path / "scales")
    with pytest.raises(ValueError, match=r"Cannot combine \['default'\]: they train modules in full"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    for other, folder in ((model, "scales"), (adapted("llama"), "whole")):
        before = logits(other)
        with pytest.raises(ValueError, match="trains modules in full .* which are not swapped"):
            hotswap_adapter(other, tmp_path / folder)
        assert torch.equal(logits(other), before)


def saved(tmp_path, granularity, seed, **kwargs):
    model = adapted("llama", granularity, seed=seed, **kwargs)
    model.save_pretrained(tmp_path)
    return logits(model), tmp_path


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_hotswap_gives_the_logits_of_the_other_adapter_without_recompiling(granularity, tmp_path):
    model = adapted("llama", granularity).eval()
    targets = [saved(tmp_path / str(seed), granularity, seed) for seed in (5, 6, 7)]
    compilations = 0

    def backend(graph, example_inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(INPUT_IDS)
        for expected, folder in targets:
            hotswap_adapter(compiled, folder)
            torch.testing.assert_close(compiled(INPUT_IDS).logits, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model(INPUT_IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert compilations == 1


def test_a_layer_that_the_new_adapter_lacks_becomes_the_identity(tmp_path):
    expected, folder = saved(tmp_path, "head", 5, layers_to_transform=[1])
    model = adapted("llama", "head")
    hotswap_adapter(model, folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert all((scale == 1).all() for name, scale in scales(model).items() if ".0." in name)


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    _, wide = saved(tmp_path / "wide", "channel", 5)
    _, all_layers = saved(tmp_path / "all", "head", 5)
    model = adapted("llama", "head", layers_to_transform=[1])
    before = logits(model)
    with pytest.raises(ValueError, match="granularity must be the same"):
        hotswap_adapter(adapted("llama", "head"), wide)
    with pytest.raises(ValueError, match="does not have"):
        hotswap_adapter(model, all_layers)
    with pytest.raises(ValueError, match="no SEAL adapter named 'typo'"):
        hotswap_adapter(model, all_layers, "typo")
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, all_layers)


def test_an_adapter_of_another_method_is_not_swapped_in(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(base_model("llama"), LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type LORA, so"):
        hotswap_adapter(adapted("llama", "head"), tmp_path)


def test_no_layer_keeps_state_of_a_deleted_adapter():
    model = adapted("llama", "head")
    model.add_weighted_adapter(["default"], [0.5], "weaker")
    model.delete_adapter("weaker")
    layers = [module for module in model.modules() if isinstance(module, SealLayer)]
    assert all(set(layer.seal_delta) == set(layer.seal_alpha) == {"default"} for layer in layers)
