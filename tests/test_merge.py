"""Merging folds the scales into the weight; unmerging gives the base back, bit for bit."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from models import INPUT_IDS, adapted, base_model, draw_scales, logits, seal_layers
from seal_peft import SealConfig, add_beside
from seal_peft.tuner.geometry import HeadGeometry
from seal_peft.tuner.layer import Linear

both_granularities = pytest.mark.parametrize("granularity", ["head", "channel"])
GEOMETRY = HeadGeometry(4, 12)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer_with(adapters, granularity="head", dtype=torch.float32, kind=nn.Linear):
    """A wrapped projection with adapters whose offsets differ."""
    base = nn.Linear(48, 20) if kind is nn.Linear else Conv1D(20, 48)
    nn.init.normal_(base.bias)
    config = SealConfig(granularity=granularity, init_weights=False)
    layer = Linear(base.to(dtype), adapters[0], config, GEOMETRY)
    for name in adapters[1:]:
        layer.update_layer(name, config)
    layer.set_adapter(list(adapters))
    return layer


def scale_per_input(layer, names):
    """The product of the named adapters' scales, one number per input feature."""
    total = torch.ones(GEOMETRY)
    for name in names:
        offset = layer.seal_delta[name].weight.detach()
        total = total * (1 + (offset if offset.dim() == 2 else offset.unsqueeze(-1)))
    return total.flatten()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_per_channel_scales_equal_ia3_on_the_same_input(name):
    seal = adapted(name, "channel")
    config = IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])
    ia3 = get_peft_model(base_model(name), config)
    with torch.no_grad():
        for key, layer in seal_layers(seal).items():
            vector = ia3.get_submodule("base_model.model." + key).ia3_l["default"]
            vector.copy_(1 + layer.seal_delta["default"].weight.reshape(vector.shape))
    assert (logits(seal) - logits(base_model(name))).abs().max() > 0.1
    assert_close(logits(seal), logits(ia3), rtol=0, atol=1e-6)
    seal.merge_adapter()
    ia3.merge_adapter()
    for key, layer in seal_layers(seal).items():
        merged_by_ia3 = ia3.get_submodule("base_model.model." + key).base_layer.weight
        assert_close(layer.base_layer.weight, merged_by_ia3, rtol=0, atol=1e-6)
    assert_close(logits(seal), logits(ia3), rtol=0, atol=1e-6)


@both_granularities
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_merged_and_unloaded_model_is_plain_and_gives_the_same_logits(name, granularity):
    model = adapted(name, granularity)
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base_model(name))
    assert not seal_layers(merged)
    assert merged.state_dict().keys() == base_model(name).state_dict().keys()
    assert_close(logits(merged), before, rtol=0, atol=1e-5)


@both_granularities
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_in_half_precision_merged_and_unmerged_differ_by_one_rounding_on_either_side(granularity, dtype, kind):
    layer = layer_with(["default"], granularity, dtype, kind)
    x = torch.randn(50, 48).to(dtype)
    with torch.no_grad():
        unmerged = layer(x).double()
        weight = layer.base_layer.weight.double()
        weight = weight if kind is nn.Linear else weight.T
        terms = x.double().abs() @ (weight * scale_per_input(layer, ["default"])).abs().T
        layer.merge()
        merged = layer(x).double()
    unit = torch.finfo(dtype).eps / 2
    # Unmerged rounds x * s, merged rounds W * s; then both round the sum.
    bound = 2 * unit * terms + unit * (merged.abs() + unmerged.abs())
    assert ((merged - unmerged).abs() <= 1.05 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_the_exact_product_rounded_once(dtype):
    layer = layer_with(["default"], "channel", dtype)
    exact = layer.base_layer.weight.detach().double() * scale_per_input(layer, ["default"])
    layer.merge()
    unit = torch.finfo(dtype).eps / 2
    error = (layer.base_layer.weight.detach().double() - exact).abs()
    assert (error <= 1.01 * unit * exact.abs() + torch.finfo(dtype).smallest_normal * unit * 2).all()


@both_granularities
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_five_cycles_restore_the_base_bit_for_bit(name, dtype, granularity):
    model = adapted(name, granularity).to(dtype)
    with torch.no_grad():
        for layer in seal_layers(model).values():
            offset = layer.seal_delta["default"].weight
            offset[0] = -1.0  # a zero scale: nothing that divides could bring this head back
            offset[1] = -2.5  # a negative one
            offset[2] = 1e-3
    fresh = base_model(name).to(dtype).state_dict()
    for _ in range(5):
        model.merge_adapter()
        for layer in seal_layers(model).values():
            assert layer.merged
            weight = layer.base_layer.weight if name == "llama" else layer.base_layer.weight.T
            assert (weight[:, : layer.geometry.head_dim] == 0).all()
        model.unmerge_adapter()
    restored = model.unload().state_dict()
    assert restored.keys() == fresh.keys()
    assert all(torch.equal(value, fresh[key]) and value.dtype == dtype for key, value in restored.items())


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_bias_is_not_scaled(kind):
    layer = layer_with(["default"], kind=kind)
    bias = layer.base_layer.bias.detach().clone()
    layer.merge()
    assert torch.equal(layer.base_layer.bias, bias)
    assert_close(layer(torch.zeros(1, 48))[0], bias, rtol=0, atol=0)


@both_granularities
def test_merging_one_by_one_equals_merging_all_at_once(granularity):
    one_by_one = layer_with(["a", "b", "c"], granularity, torch.bfloat16)
    at_once = copy.deepcopy(one_by_one)
    one_by_one.merge(adapter_names=["a"])
    for name in ["b", "c"]:
        with pytest.warns(UserWarning, match=f"You are now additionally merging {name}"):
            one_by_one.merge(adapter_names=[name])
    at_once.merge(adapter_names=["a", "b", "c"])
    assert torch.equal(one_by_one.base_layer.weight, at_once.base_layer.weight)
    one_by_one.unmerge()
    at_once.unmerge()
    assert torch.equal(one_by_one.base_layer.weight, at_once.base_layer.weight)


def test_merging_a_second_time_warns_and_changes_nothing():
    model = adapted()
    model.merge_adapter()
    merged = logits(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("beside_lora", [False, True])
def test_what_one_site_left_is_merged_without_a_word_of_what_is_merged_already(beside_lora):
    model = adapted(sites=("output", "query"), init_weights=False)
    if beside_lora:
        lora = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model = add_beside(model, lora, "lora").eval()
        model.merge_adapter(["lora"])
    before = logits(model)
    model.merge_adapter(["default"], sites=["output"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert all(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    assert_close(logits(model), before, rtol=0, atol=2e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
        model.merge_adapter(["default"], sites=["query"])
    assert [str(one.message) for one in caught] == ["All adapters are already merged, nothing to do."] * 2
    assert {one.filename for one in caught} == {__file__}


def test_only_sites_that_what_is_merged_has_can_be_merged():
    model = add_beside(adapted(init_weights=False), LoraConfig(target_modules=["q_proj"]), "lora")
    for names, sites, there in (
        (None, ["query"], "output"),
        (["default"], ["output", "query"], "output"),
        (["lora"], ["output"], "no site"),
    ):
        with pytest.raises(ValueError, match=rf"is not allowed. What is to be merged has scales at {there}; give"):
            model.merge_adapter(names, sites=sites)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def test_unmerging_what_is_not_merged_warns():
    model = adapted()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_layers_that_hold_nothing_merged_are_passed_by_without_a_word():
    beside = add_beside(adapted(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    by_layer = adapted(layers_to_transform=[0])
    by_layer.add_adapter("other", SealConfig(layers_to_transform=[1], init_weights=False))
    both = adapted(sites=("output", "query"))
    for model, merge in (
        (beside, lambda: beside.merge_adapter(["default"])),
        (beside, lambda: beside.merge_adapter(["lora"])),
        (by_layer, lambda: by_layer.merge_adapter(["default"])),
        (both, lambda: both.merge_adapter(sites=["output"])),
    ):
        before = copy.deepcopy(model.state_dict())
        merge()
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.unmerge_adapter()
        assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_safe_merge_refuses_broken_scales_and_leaves_the_weights(value):
    model = adapted()
    layer = next(iter(seal_layers(model).values()))
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.seal_delta["default"].weight[1] = value
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(model).merge_and_unload(safe_merge=True)
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_safe_merge_refuses_scales_that_overflow_the_weights_dtype():
    layer = layer_with(["default"], dtype=torch.float16)
    with torch.no_grad():
        layer.seal_delta["default"].weight.fill_(1e7)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)


def test_a_refused_second_merge_keeps_the_first():
    layer = layer_with(["good", "bad"])
    base = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.seal_delta["bad"].weight[0] = math.nan
    layer.merge(adapter_names=["good"])
    merged = layer.base_layer.weight.detach().clone()
    additionally = pytest.warns(UserWarning, match="You are now additionally merging bad")
    with additionally, pytest.raises(ValueError, match="The adapter bad seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["bad"])
    assert layer.merged_adapters == ["good"]
    assert torch.equal(layer.base_layer.weight, merged)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base)


def test_a_merged_model_can_change_its_dtype_before_it_is_unmerged():
    model = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    expected = adapted().to(torch.bfloat16)
    assert torch.equal(logits(model), logits(expected))


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = adapted()
    before = logits(model)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    model.unmerge_adapter()
    assert_close(logits(copied), before, rtol=0, atol=1e-5)
    copied.unmerge_adapter()
    assert torch.equal(logits(copied), before)


@pytest.mark.parametrize("tied", ["weight", "module"])
def test_a_weight_with_two_places_in_the_model_is_not_merged(tied):
    base = base_model("llama")
    first, second = (layer.self_attn for layer in base.model.layers)
    if tied == "module":
        second.o_proj = first.o_proj
    else:
        second.o_proj.weight = first.o_proj.weight
    model = get_peft_model(base, SealConfig(init_weights=False))
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"several places: .*layers\.0.*layers\.1"):
            merge()
    assert torch.equal(logits(model), before)


def test_merging_works_again_after_more_training():
    model = adapted()
    model.merge_adapter()
    model.unmerge_adapter()
    draw_scales(model, seed=9)
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_model_saved_after_merging_loads_without_us(tmp_path):
    merged = adapted().merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(merged))
    assert loaded(input_ids=INPUT_IDS).logits.shape == (2, 8, 64)


ADAPTERS = ["a", "b", "c"]
STEPS = st.one_of(
    st.tuples(st.just("merge"), st.lists(st.sampled_from(ADAPTERS), min_size=1, unique=True)),
    st.tuples(st.just("unmerge"), st.none()),
    st.tuples(st.just("activate"), st.lists(st.sampled_from(ADAPTERS), min_size=1, unique=True)),
    st.tuples(st.just("disable"), st.none()),
)


@given(steps=st.lists(STEPS, max_size=8), granularity=st.sampled_from(["head", "channel"]))
def test_any_order_of_merging_and_unmerging_keeps_the_layers_meaning(steps, granularity):
    torch.manual_seed(0)
    layer = layer_with(ADAPTERS, granularity)
    base = copy.deepcopy(layer.base_layer)
    x = torch.randn(5, 48)
    merged, active = [], list(ADAPTERS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already|All adapters are already merged")
        for step, names in steps:
            if step == "merge":
                layer.merge(adapter_names=names)
                merged += [name for name in names if name not in merged]
            elif step == "unmerge":
                layer.unmerge()
                merged = []
            elif step == "activate":
                layer.set_adapter(names)
                active = names
            else:
                layer.enable_adapters(False)
                assert torch.equal(layer(x), base(x))
                layer.enable_adapters(True)
                layer.set_adapter(active)
                merged = []
            assert layer.merged_adapters == merged
            scale = scale_per_input(layer, {*merged, *active})
            assert_close(layer(x), base(x * scale), rtol=0, atol=1e-5)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base.weight)
    assert torch.equal(layer.base_layer.bias, base.bias)
