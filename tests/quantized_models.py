"""Tiny models whose projections are quantised in each format, and how to read what they store."""

import importlib.metadata
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from models import (
    HIDDEN,
    draw_scales,
    llama,
    multiply_by_hand,
    seal_layers,
)
from seal_peft import SealConfig

HEAD_DIM = 64
PIP = {
    "bitsandbytes": "pip install --no-deps bitsandbytes",
    "torchao": "pip install --no-deps torchao",
    "hqq": "pip install --no-deps hqq termcolor",
    "optimum-quanto": "pip install --no-deps optimum-quanto",
    "compressed-tensors": "pip install --no-deps compressed-tensors loguru",
    "gptqmodel": "make test-quantized",
}


def needs(package: str) -> pytest.MarkDecorator:
    missing = not any(importlib.metadata.distributions(name=package))
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
