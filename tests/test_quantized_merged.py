"""Scales merged into quantised weights on the CPU, exactly or with rounding that is told, and taken out again."""

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.integrations.finegrained_fp8 import FP8Linear

from models import (
    HEADS,
    adapted,
    base_model,
    draw_scales,
    logits,
    seal_layers,
)
from quantized_models import (
    FORMATS,
    HEAD_DIM,
    codes,
    dequantised,
    every_format,
    granularities,
    needs,
    quantised,
    quantised_adapter,
    stored,
)
from seal_peft import SealConfig
from seal_peft.tuner.quantized import _EXACT, _per_group


@every_format
@granularities
@pytest.mark.parametrize("run_before", [False, True])
def test_merging_is_exact_or_says_that_it_rounds(name, granularity, run_before):
    entry, model = FORMATS[name], quantised_adapter(name, granularity)
    if run_before:
        logits(model)
    before = {key: (dequantised(layer), codes(layer)) for key, layer in seal_layers(model).items()}
    expected = logits(model)
    if granularity in entry.exact:
        model.merge_adapter(safe_merge=True)  # warnings are errors: this one rounds nothing
    else:
        with pytest.warns(UserWarning, match="rounds: they are dequantised, scaled and quantised again"):
            model.merge_adapter(safe_merge=True)
    for key, layer in seal_layers(model).items():
        weight, code = before[key]
        vector = (1 + layer.seal_delta["default"].weight.detach()).view(HEADS, -1).expand(HEADS, HEAD_DIM).reshape(-1)
        error = (dequantised(layer) - weight * vector).abs()
        if granularity in entry.exact:
            assert torch.equal(codes(layer), code)
            assert (error <= entry.scale_bound * (weight * vector).abs().clamp_min(1e-3)).all()
        else:
            assert error.norm() < 0.2 * (weight * vector).norm()
    bound = entry.forward_bound if granularity in entry.exact else 3.0
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=bound)


@every_format
@granularities
@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_unmerging_gives_back_every_stored_tensor_bit_for_bit(name, granularity, run_before):
    model = quantised_adapter(name, granularity)
    untouched = quantised_adapter(name, granularity)
    if run_before:
        logits(model)
    before = [stored(layer) for layer in seal_layers(model).values()]
    for _ in range(2):
        model.merge_adapter()
        logits(model)
        model.unmerge_adapter()
        for kept, layer in zip(before, seal_layers(model).values(), strict=True):
            found = stored(layer)
            assert found.keys() == kept.keys()
            assert all(torch.equal(kept[key], found[key]) for key in kept)
    assert torch.equal(logits(model), logits(untouched))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(quantised(name)))


@needs("bitsandbytes")
@granularities
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_bitsandbytes_finds_its_own_records_again(granularity):
    model = quantised_adapter("bnb-nf4-double", granularity)
    bases = [layer.get_base_layer() for layer in seal_layers(model).values()]
    before = [(base.weight, base.quant_state, dict(vars(base.weight))) for base in bases]
    model.merge_adapter()
    assert all(base.quant_state is base.weight.quant_state for base in bases)
    model.unmerge_adapter()
    for base, (weight, state, attributes) in zip(bases, before, strict=True):
        assert base.weight is weight and base.quant_state is state and vars(weight) == attributes


@every_format
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_disabling_a_merged_adapter_gives_the_base_back(name):
    model = quantised_adapter(name)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(quantised(name)))


@every_format
@pytest.mark.filterwarnings("ignore:Merging into .* rounds", "ignore:Already following adapters were merged")
def test_adapters_merged_one_after_the_other_start_from_the_original(name):
    one_by_one, at_once = quantised_adapter(name), quantised_adapter(name)
    for model in (one_by_one, at_once):
        model.add_adapter("other", SealConfig())
        draw_scales(model, "other", seed=3)
        model.base_model.set_adapter(["default", "other"])
    one_by_one.merge_adapter(["default"])
    one_by_one.merge_adapter(["other"])
    at_once.merge_adapter(["default", "other"])
    for mine, other in zip(seal_layers(one_by_one).values(), seal_layers(at_once).values(), strict=True):
        assert torch.equal(dequantised(mine), dequantised(other))
    one_by_one.unmerge_adapter()
    at_once.unmerge_adapter()
    assert torch.equal(logits(one_by_one), logits(at_once))


@every_format
@granularities
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_a_safe_merge_that_fails_leaves_the_weights_as_they_were(name, granularity):
    model = quantised_adapter(name, granularity)
    before = [stored(layer) for layer in seal_layers(model).values()]
    with torch.no_grad():
        seal_layers(model)["model.layers.0.self_attn.o_proj"].seal_delta["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems"):
        model.merge_adapter(safe_merge=True)
    for kept, layer in zip(before, seal_layers(model).values(), strict=True):
        assert not layer.merged
        assert all(torch.equal(kept[key], value) for key, value in stored(layer).items())


@every_format
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_a_merged_model_keeps_its_bias(name):
    model = quantised_adapter(name, bias=True)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any("seal_" in key for key, _ in merged.named_modules())
    bound = FORMATS[name].forward_bound if "head" in FORMATS[name].exact else 3.0
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=bound)


@needs("hqq")
def test_hqq_keeps_its_bias_when_it_quantises_again():
    model = quantised_adapter("hqq-inputs", "channel", bias=True)
    biases = [layer.get_base_layer().bias.clone() for layer in seal_layers(model).values()]
    with pytest.warns(UserWarning, match="rounds"):
        model.merge_adapter()
    for bias, layer in zip(biases, seal_layers(model).values(), strict=True):
        assert torch.equal(layer.get_base_layer().bias, bias)


@every_format
def test_groups_that_mix_heads_round(name):
    if "head" not in FORMATS[name].exact or name == "hqq-outputs":
        pytest.skip("this format has no groups along the inputs")
    model = quantised_adapter(name, head_dim=48)  # 192 inputs: 64-blocks and 32-groups cross heads
    with pytest.warns(UserWarning, match="rounds"):
        model.merge_adapter()


def test_a_scale_belongs_to_a_group_only_if_all_of_it_shares_it():
    scale = torch.tensor([1.0, 1.0, -2.0, -2.0, 0.0, 0.0])
    assert _per_group(scale, 2, inputs=6, axis=1).tolist() == [[1.0, -2.0, 0.0]]
    assert _per_group(scale, 1, inputs=6, axis=1).tolist() == [scale.tolist()]
    assert _per_group(scale, 3, inputs=6, axis=1) is None
    assert _per_group(scale, 4, inputs=6, axis=1) is None
    assert _per_group(scale, 4, inputs=8, axis=0).tolist() == [[value] for value in scale.tolist()]
    assert _per_group(scale, 4, inputs=6, axis=0) is None


def _int4_tensors() -> dict[str, Tensor]:
    """Return torchao's two GPU formats, put together by hand: 8 outputs, 256 inputs, groups of 32."""
    from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor
    from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

    groups, outputs = 256 // 32, 8
    scale, zero = torch.rand(groups, outputs) + 0.1, torch.rand(groups, outputs)
    packed = torch.randint(0, 255, (outputs, 128), dtype=torch.uint8)
    both = nn.functional.pad(torch.stack([scale, zero], -1), (0, 0, 0, 0, 0, 24)).bfloat16()
    shape = torch.Size([outputs, 256])
    return {
        "plain": Int4Tensor(packed, scale, zero, [1, 32], shape),
        "tiles": Int4TilePackedTo4dTensor(packed, both, [1, 32], shape),
    }


@needs("torchao")
@pytest.mark.parametrize("layout", ["plain", "tiles"])
def test_int4_layouts_of_the_gpu_scale_their_group_numbers_only(layout):
    weight = _int4_tensors()[layout]
    base = nn.Linear(256, 8, bias=False)
    base.weight = nn.Parameter(weight, requires_grad=False)
    scale = torch.tensor([0.5, -2.0, 0.0, 1.0]).repeat_interleave(64)
    written = _EXACT[type(weight).__name__](None, base, scale, 1)
    assert torch.isfinite(written).all()
    assert torch.equal(base.weight.qdata, weight.qdata)
    assert base.weight.shape == weight.shape
    factor = torch.tensor([0.5, -2.0, 0.0, 1.0]).repeat_interleave(2).unsqueeze(1)
    if layout == "plain":
        assert torch.equal(base.weight.scale, weight.scale * factor)
        assert torch.equal(base.weight.zero_point, weight.zero_point * factor)
    else:
        assert torch.equal(base.weight.scale_and_zero[:8], weight.scale_and_zero[:8] * factor.unsqueeze(1).bfloat16())
        assert torch.equal(base.weight.scale_and_zero[8:], weight.scale_and_zero[8:])


@needs("torchao")
@pytest.mark.parametrize(("layout", "kind"), [("plain", "Int4Tensor"), ("tiles", "Int4TilePackedTo4dTensor")])
def test_a_format_that_cannot_be_read_back_is_refused_by_name(layout, kind):
    model = quantised_adapter("torchao-int4", "channel")
    for layer in seal_layers(model).values():
        layer.get_base_layer().weight = nn.Parameter(_int4_tensors()[layout], requires_grad=False)
    before = [layer.get_base_layer().weight for layer in seal_layers(model).values()]
    with pytest.raises(ValueError, match=rf"cannot be merged into torchao \({kind}\) weights.*Keep the adapter"):
        model.merge_adapter()
    assert [layer.get_base_layer().weight for layer in seal_layers(model).values()] == before


def test_forward_only_formats_are_refused_by_name():
    model = adapted()
    for layer in seal_layers(model).values():
        layer.quantization_backend = ForwardOnlyQuantizationBackend("some-format")
    with pytest.raises(ValueError, match=r"cannot be merged into some-format weights \(.*Keep the adapter unmerged"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["float8 layer", "tensor subclass", "packed weight"])
def test_formats_that_peft_has_no_backend_for_are_refused_before_anything_is_touched(kind):
    """Real packages are in test_quantized_unmerged.py; the last layer is the one that cannot be merged."""
    base = base_model("llama")
    attention = base.model.layers[-1].self_attn
    linear = attention.o_proj
    if kind == "float8 layer":
        attention.o_proj = FP8Linear(linear.in_features, linear.out_features, block_size=(128, 128))
    elif kind == "tensor subclass":
        linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data), requires_grad=False)
    else:
        linear.qweight = linear.weight.data.to(torch.int8)
    model = get_peft_model(base, SealConfig(init_weights=False))
    name = {"float8 layer": "FP8Linear", "tensor subclass": "TwoTensor", "packed weight": "Linear"}[kind]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"cannot be merged into quantised weights \(\S+\.{name}\)\. Keep"):
            merge()
    assert not any(layer.merged for layer in seal_layers(model).values())
