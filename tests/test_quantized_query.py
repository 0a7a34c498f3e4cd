"""The query site on quantised projections: a row of the weight has one scale, so most formats take it exactly."""

import types

import pytest
import torch
from peft import PeftModel, get_peft_model

from models import HEADS, INPUT_IDS, draw_scales, llama, logits, seal_layers
from quantized_models import FORMATS, HEAD_DIM, _torchao_config, codes, dequantised, every_format, needs, stored
from seal_peft import SealConfig
from seal_peft.tuner.query import QueryLinear

ROUNDS = ["hqq-outputs"]


def base(name):
    """Return a tiny Llama whose query projections, with bias, are quantised in rows of 64."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model = llama(head_dim=HEAD_DIM, hidden_size=64, attention_bias=True).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data = torch.linspace(-1, 1, HEADS * HEAD_DIM, dtype=dtype)
        layer.self_attn.q_proj = FORMATS[name].quantise(layer.self_attn.q_proj)
    if FORMATS[name].package == "torchao":
        config = types.SimpleNamespace(get_apply_tensor_subclass=lambda: _torchao_config(name.split("-")[1]))
        model.hf_quantizer = types.SimpleNamespace(quantization_config=config)
    return model.eval()


def adapter(name):
    model = get_peft_model(base(name), SealConfig(sites=("query",))).eval()
    draw_scales(model)
    with torch.no_grad():
        for layer in seal_layers(model).values():
            layer.offset("default")[:2] = torch.tensor([-1.0, -1.7])
    return model


@every_format
def test_the_forward_pass_scales_what_the_quantised_projection_returns(name, tmp_path):
    model = adapter(name)
    layer = next(iter(seal_layers(model).values()))
    assert type(layer) is QueryLinear
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    factor = (1 + layer.offset("default").detach()).repeat_interleave(HEAD_DIM)
    with torch.no_grad():
        expected = (layer.get_base_layer()(x) * factor).to(x.dtype)
        assert torch.equal(layer(x), expected)
    model(input_ids=INPUT_IDS).logits.square().mean().backward()
    assert all(own.offset("default").grad.abs().sum() > 0 for own in seal_layers(model).values())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(name), tmp_path)), logits(model))


@every_format
def test_merging_takes_rows_exactly_or_says_that_it_rounds_and_comes_out_bit_for_bit(name):
    model = adapter(name)
    expected = logits(model)
    layers = list(seal_layers(model).values())
    weights = [dequantised(layer) for layer in layers]
    before = [(codes(layer), stored(layer), layer.get_base_layer().bias.clone()) for layer in layers]
    if name in ROUNDS:
        with pytest.warns(UserWarning, match="rounds"):
            model.merge_adapter(safe_merge=True)
    else:
        model.merge_adapter(safe_merge=True)
    for layer, weight, (code, _, bias) in zip(layers, weights, before, strict=True):
        factor = (1 + layer.offset("default").detach()).repeat_interleave(HEAD_DIM)
        rows = weight * factor.unsqueeze(1)
        error = (dequantised(layer) - rows).abs()
        if name in ROUNDS:
            assert error.norm() < 0.2 * rows.norm()
        else:
            assert torch.equal(codes(layer), code)
            assert (error <= FORMATS[name].scale_bound * rows.abs().clamp_min(1e-3)).all()
        assert torch.equal(layer.get_base_layer().bias, (bias * factor).to(bias.dtype))
    bound = 3.0 if name in ROUNDS else max(FORMATS[name].forward_bound, 1e-4)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=bound)
    model.unmerge_adapter()
    for layer, (_, kept, bias) in zip(layers, before, strict=True):
        found = stored(layer)
        assert found.keys() == kept.keys()
        assert all(torch.equal(kept[key], found[key]) for key in kept)
        assert torch.equal(layer.get_base_layer().bias, bias)
    assert torch.equal(logits(model), expected)


@needs("bitsandbytes")
def test_int8_statistics_take_the_scales_before_and_after_the_first_call_moves_them():
    called, fresh = adapter("bnb-int8"), adapter("bnb-int8")
    expected = logits(called)
    for model in (called, fresh):
        before = [{key: value.clone() for key, value in stored(own).items()} for own in seal_layers(model).values()]
        model.merge_adapter()
        # Activations are rounded, too, the same ones on both sides.
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
        model.unmerge_adapter()
        for own, kept in zip(seal_layers(model).values(), before, strict=True):
            assert stored(own).keys() == kept.keys()
            assert all(torch.equal(kept[key], value) for key, value in stored(own).items())
        assert torch.equal(logits(model), expected)
