"""SEAL on quantised bases, on the CPU: forward, training, files, merging with and without rounding, unmerging.

`benchmarks/quantized_merge.py` and `quantized_bases.py` run the same claims on a GPU.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

from models import (
    HEADS,
    HIDDEN,
    INPUT_IDS,
    adapted,
    base_model,
    draw_scales,
    llama,
    logits,
    multiply_by_hand,
    seal_layers,
)
from seal_peft import SealConfig
from seal_peft.tuner.quantized import _EXACT, _per_group

HEAD_DIM = 64
PIP = {
    "bitsandbytes": "pip install --no-deps bitsandbytes",
    "torchao": "pip install --no-deps torchao",
    "hqq": "pip install --no-deps hqq termcolor",
}


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: `{PIP[package]}`")


@dataclass(frozen=True)
class Format:
    """A way to quantise a linear layer, and which scales its groups take without rounding."""

    package: str
    quantise: Callable[[nn.Linear], nn.Module]
    exact: tuple[str, ...] = ("head",)
    forward_bound: float = 1e-4  # against the dequantised weight; int8 kernels round the activations, too
    scale_bound: float = 1e-6  # relative error of a merged weight: one rounding of the group scale


def _bnb4(linear: nn.Linear, **kwargs: Any) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32, **kwargs
    )
    new.load_state_dict(linear.state_dict())
    new.support_avx512bf16_for_cpu = False  # the CPU layout rounds more; it has its own tests
    return new.to("cpu")


def _bnb8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def _torchao(linear: nn.Linear, config: str) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(linear, _torchao_config(config))
    return linear


def _torchao_config(name: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if name == "int8":
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def _hqq(linear: nn.Linear, axis: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=axis)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


FORMATS = {
    "bnb-nf4": Format("bitsandbytes", lambda x: _bnb4(x, quant_type="nf4", compress_statistics=False)),
    "bnb-fp4": Format("bitsandbytes", lambda x: _bnb4(x, quant_type="fp4", compress_statistics=False)),
    "bnb-nf4-double": Format("bitsandbytes", lambda x: _bnb4(x, quant_type="nf4", compress_statistics=True)),
    "bnb-int8": Format("bitsandbytes", _bnb8, exact=(), forward_bound=0.5),
    "torchao-int4": Format("torchao", lambda x: _torchao(x, "int4")),
    "torchao-int8": Format("torchao", lambda x: _torchao(x, "int8"), exact=()),
    "hqq-inputs": Format("hqq", lambda x: _hqq(x, axis=1)),
    "hqq-outputs": Format("hqq", lambda x: _hqq(x, axis=0), exact=("head", "channel")),
    "hqq-inputs-bf16": Format("hqq", lambda x: _hqq(x, 1, torch.bfloat16), scale_bound=3e-2, forward_bound=0.3),
}
every_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(entry.package)) for name, entry in FORMATS.items()]
)
granularities = pytest.mark.parametrize("granularity", ["head", "channel"])


def quantised(name: str, head_dim: int = HEAD_DIM, bias: bool = False) -> nn.Module:
    """Return a tiny Llama whose attention output projections are quantised."""
    model = llama(head_dim=head_dim, attention_bias=bias)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model = model.to(dtype)
    for layer in model.model.layers:
        if bias:
            layer.self_attn.o_proj.bias.data = torch.linspace(-1, 1, HIDDEN, dtype=dtype)
        layer.self_attn.o_proj = FORMATS[name].quantise(layer.self_attn.o_proj)
    if FORMATS[name].package == "torchao":
        config = types.SimpleNamespace(get_apply_tensor_subclass=lambda: _torchao_config(name.split("-")[1]))
        model.hf_quantizer = types.SimpleNamespace(quantization_config=config)
    return model.eval()


def quantised_adapter(name: str, granularity: str = "head", **kwargs: Any) -> PeftModel:
    """Return it with scales that include 0 and negative ones."""
    model = get_peft_model(quantised(name, **kwargs), SealConfig(granularity=granularity))
    draw_scales(model)
    with torch.no_grad():
        for layer in seal_layers(model).values():
            layer.seal_delta["default"].weight[:2] -= torch.tensor([1.0, 2.0]).view(-1, *[1] * (granularity != "head"))
            layer.seal_delta["default"].weight[2] = -1.0
    return model.eval()


def dequantised(layer: Any) -> Tensor:
    return layer.get_base_weight().detach().float().clone()


def in_full_precision(model: PeftModel) -> nn.Module:
    """Return the base model with plain layers that hold the dequantised weights, multiplied by hand."""
    plain = llama(head_dim=HEAD_DIM).to(model.dtype)
    for name, layer in seal_layers(model).items():
        plain.get_submodule(name).weight.data = dequantised(layer)
    scales = {name: 1 + layer.seal_delta["default"].weight.detach() for name, layer in seal_layers(model).items()}
    return multiply_by_hand(plain, scales).to(model.dtype)


def stored(layer: Any) -> dict[str, Tensor]:
    """Return every tensor that makes up the quantised weight, copied."""
    base = layer.get_base_layer()
    weight, found = base._parameters.get("weight"), {}
    sources = [vars(base), base._parameters, vars(weight) if weight is not None else {}]
    sources += [vars(part) for part in (getattr(base, "state", None), getattr(weight, "quant_state", None)) if part]
    if getattr(getattr(weight, "quant_state", None), "state2", None):
        sources.append(vars(weight.quant_state.state2))
    sources.append(getattr(base, "meta", {}))
    for index, source in enumerate(sources):
        found |= {f"{index}.{key}": value for key, value in source.items() if type(value) is Tensor}
    if weight is not None and type(weight.data) is Tensor:
        found["data"] = weight.data
    elif base._parameters.get("W_q") is not None:
        found["data"] = base.W_q.data
    return {key: value.clone() for key, value in found.items()}


def codes(layer: Any) -> Tensor:
    found = stored(layer)
    return next(found[key] for key in found if key.endswith("qdata") or key == "data")


@every_format
@granularities
def test_forward_is_that_of_the_dequantised_weight_times_the_scales(name, granularity):
    model = quantised_adapter(name, granularity)
    torch.testing.assert_close(
        logits(model), logits(in_full_precision(model)), rtol=0, atol=FORMATS[name].forward_bound
    )


@every_format
def test_training_gives_the_gradient_of_the_dequantised_model(name):
    model = quantised_adapter(name).train()
    plain = llama(head_dim=HEAD_DIM).to(model.dtype)
    for key, layer in seal_layers(model).items():
        plain.get_submodule(key).weight.data = dequantised(layer).to(model.dtype)
    oracle = get_peft_model(plain, SealConfig())
    oracle.load_state_dict({k: v for k, v in model.state_dict().items() if "seal_" in k}, strict=False)
    for each in (model, oracle):
        each(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for mine, other in zip(seal_layers(model).values(), seal_layers(oracle).values(), strict=True):
        gradient, expected = mine.seal_delta["default"].weight.grad, other.seal_delta["default"].weight.grad
        assert gradient.abs().sum() > 0
        bound = max(FORMATS[name].forward_bound, 1e-4) * expected.abs().max()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=float(bound))


@every_format
def test_an_adapter_survives_its_folder(name, tmp_path):
    model = quantised_adapter(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


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


@every_format
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_unloading_gives_the_quantised_base_back(name):
    model = quantised_adapter(name, bias=True)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(quantised(name, bias=True)))


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
        layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(ValueError, match="Scales cannot be merged into gptq weights. Keep the adapter unmerged"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["fp8", "quanto", "compressed-tensors", "packed"])
def test_formats_that_peft_has_no_backend_for_are_refused_before_anything_is_touched(kind):
    """The layer that cannot be merged is the last one, so that one at a time would merge the others first."""
    base = base_model("llama")
    attention = base.model.layers[-1].self_attn
    linear = attention.o_proj
    if kind == "fp8":
        attention.o_proj = FP8Linear(linear.in_features, linear.out_features, block_size=(128, 128))
    elif kind == "quanto":
        linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data), requires_grad=False)
    elif kind == "compressed-tensors":
        linear.quantization_scheme = "W8A16"
    else:
        linear.qweight = linear.weight.data.to(torch.int8)
    model = get_peft_model(base, SealConfig(init_weights=False))
    name = "FP8Linear" if kind == "fp8" else "Linear"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"cannot be merged into quantised {name} weights. Keep the adapter"):
            merge()
    assert not any(layer.merged for layer in seal_layers(model).values())


@needs("bitsandbytes")
@pytest.mark.parametrize("double", [False, True])
def test_a_merged_nf4_checkpoint_reloads(double, tmp_path):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    llama(head_dim=HEAD_DIM, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    model = get_peft_model(base, SealConfig())
    draw_scales(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    assert torch.equal(logits(again), logits(merged))


@needs("torchao")
def test_a_torchao_model_of_transformers_takes_scales(tmp_path):
    from transformers import TorchAoConfig

    llama(head_dim=HEAD_DIM, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=TorchAoConfig(_torchao_config("int4")), device_map="cpu"
    )
    model = get_peft_model(base, SealConfig())
    draw_scales(model)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-4)


def _repacking_adapter(double: bool = False) -> PeftModel:
    """Return an NF4 model after its first inference, where bitsandbytes lays weights out for this CPU."""
    model = quantised_adapter("bnb-nf4-double" if double else "bnb-nf4")
    for layer in seal_layers(model).values():
        layer.get_base_layer().support_avx512bf16_for_cpu = True
    logits(model)
    return model


def _packs_for_cpu() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


packs_for_cpu = pytest.mark.skipif(
    not _packs_for_cpu(), reason=f"needs a CPU with AVX512-BF16 and bitsandbytes: `{PIP['bitsandbytes']}`"
)


@packs_for_cpu
@pytest.mark.parametrize("double", [False, True])
def test_weights_packed_for_the_cpu_merge_exactly_and_come_back(double):
    model = _repacking_adapter(double)
    plain = quantised_adapter("bnb-nf4-double" if double else "bnb-nf4")
    before, expected = [stored(layer) for layer in seal_layers(model).values()], logits(model)
    model.merge_adapter()
    for mine, other in zip(seal_layers(model).values(), seal_layers(plain).values(), strict=True):
        vector = (1 + other.seal_delta["default"].weight.detach()).repeat_interleave(HEAD_DIM)
        # The layout itself keeps `absmax` in bf16.
        wanted = dequantised(other) * vector
        assert ((mine.get_base_weight().float() - wanted).abs() <= 2**-7 * wanted.abs() + 1e-6).all()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.2)
    model.unmerge_adapter()
    for kept, layer in zip(before, seal_layers(model).values(), strict=True):
        assert all(torch.equal(kept[key], value) for key, value in stored(layer).items())
    assert torch.equal(logits(model), expected)


@packs_for_cpu
def test_weights_packed_for_the_cpu_round_channel_scales_like_others():
    model = quantised_adapter("bnb-nf4", "channel")
    packed = copy.deepcopy(model)
    for layer in seal_layers(packed).values():
        layer.get_base_layer().support_avx512bf16_for_cpu = True
    logits(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        packed.merge_adapter()
    for mine, other in zip(seal_layers(packed).values(), seal_layers(model).values(), strict=True):
        difference = dequantised(mine) - dequantised(other)
        assert difference.norm() < 0.1 * dequantised(other).norm()


@packs_for_cpu
def test_training_through_weights_packed_for_the_cpu_is_refused():
    model = _repacking_adapter().train()
    with pytest.raises(RuntimeError, match="no gradient flows through that layout. Load the base model anew"):
        model(input_ids=INPUT_IDS, labels=INPUT_IDS)


def test_plain_weights_need_no_quantiser():
    model = adapted()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(base_model("llama")))


@needs("bitsandbytes")
@needs("torchao")
@needs("hqq")
def test_an_adapter_lives_its_whole_life_on_models_that_are_quantised_throughout(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks/quantized_bases.py"
    formats = ["bnb-nf4", "bnb-int8", "torchao-intx", "hqq"]
    command = [sys.executable, script, "--device", "cpu", "--output", tmp_path / "out.json", "--formats", *formats]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        stages = ["identity", "train", "base unchanged", "save and load", "merge", "unmerge"]
        assert list(row) == ["format", "granularity", *stages]
        assert all(row[stage].startswith("ok") for stage in stages)
