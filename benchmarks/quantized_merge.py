"""Check on this machine that SEAL merges into quantised attention output projections as promised.

python benchmarks/quantized_merge.py --output results/quantized-merge.json

For each format and granularity: is the merged weight the quantised one times the scales, without rounding, and does
unmerging (also after a move between devices) give the original outputs back bit for bit? Formats whose package is
missing are listed as skipped, with the reason. Exit status 1 if a promise is broken.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from seal_peft import SealConfig, SealLayer

HEADS, HEAD_DIM, HIDDEN = 8, 128, 512
# One rounding of a group scale in bf16, and one of the kernel's output.
EXACT_BOUND = 2**-7


def bnb4(linear: nn.Linear, device: str, **kwargs: Any) -> nn.Module:
    """Quantise to NF4 or FP4."""
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=torch.bfloat16, **kwargs)
    new.load_state_dict(linear.state_dict())
    return new.to(device)


def bnb8(linear: nn.Linear, device: str) -> nn.Module:
    """Quantise to bitsandbytes' int8."""
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    return new.to(device)


def hqq(linear: nn.Linear, device: str, axis: int) -> nn.Module:
    """Quantise with HQQ to 4 bits."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    return HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=device)


def torchao(linear: nn.Linear, device: str, config: str) -> nn.Module:
    """Quantise with torchao."""
    from torchao.quantization import quantize_

    linear = linear.to(device)
    quantize_(linear, torchao_config(config))
    if type(linear.weight) is nn.Parameter:
        raise RuntimeError("torchao left the weight as it was")
    return linear


def torchao_config(name: str) -> Any:
    """Return the torchao config of a short name."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if name == "int8":
        return Int8WeightOnlyConfig()
    if name == "intx":
        return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return Int4WeightOnlyConfig(group_size=128, int4_packing_format=name)


# Name -> (how to quantise, torchao config name, granularities that merge without rounding).
FORMATS: dict[str, tuple[Callable[[nn.Linear, str], nn.Module], str | None, tuple[str, ...]]] = {
    "bnb-nf4": (lambda x, d: bnb4(x, d, quant_type="nf4", compress_statistics=False), None, ("head",)),
    "bnb-nf4-double": (lambda x, d: bnb4(x, d, quant_type="nf4", compress_statistics=True), None, ("head",)),
    "bnb-fp4": (lambda x, d: bnb4(x, d, quant_type="fp4", compress_statistics=False), None, ("head",)),
    "bnb-int8": (bnb8, None, ()),
    "hqq-axis1": (lambda x, d: hqq(x, d, axis=1), None, ("head",)),
    "hqq-axis0": (lambda x, d: hqq(x, d, axis=0), None, ("head", "channel")),
    "torchao-intx": (lambda x, d: torchao(x, d, "intx"), "intx", ("head",)),
    "torchao-int8": (lambda x, d: torchao(x, d, "int8"), "int8", ()),
    "torchao-int4-plain": (lambda x, d: torchao(x, d, "plain"), "plain", ("head",)),
    "torchao-int4-tiles": (lambda x, d: torchao(x, d, "tile_packed_to_4d"), "tile_packed_to_4d", ("head",)),
}


def build(name: str, device: str) -> nn.Module:
    """Return a one-layer bf16 Llama whose output projection is quantised."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    quantise, torchao_name, _ = FORMATS[name]
    attention = model.model.layers[0].self_attn
    attention.o_proj = quantise(attention.o_proj, device)
    if torchao_name:
        quantization = types.SimpleNamespace(get_apply_tensor_subclass=lambda: torchao_config(torchao_name))
        model.hf_quantizer = types.SimpleNamespace(quantization_config=quantization)
    return model.to(device).eval()


@torch.no_grad()
def effective_weight(layer: nn.Module, device: str) -> Tensor:
    """Read the weight through the kernel: every format has a forward, not every one a dequantisation."""
    return layer(torch.eye(HEADS * HEAD_DIM, dtype=torch.bfloat16, device=device)).float().T


def measure(base: nn.Module, name: str, granularity: str, device: str) -> dict[str, Any]:
    """Merge, unmerge and move one model; return what was seen."""
    model = get_peft_model(base, SealConfig(granularity=granularity)).eval()
    (layer,) = (module for module in model.modules() if isinstance(module, SealLayer))
    scale = torch.rand(layer.seal_delta["default"].weight.shape, device=device) * 2 - 0.5
    scale[0] = 0.0
    layer.seal_delta["default"].weight.data = scale - 1
    vector = (scale if scale.dim() == 2 else scale.unsqueeze(-1)).expand(HEADS, HEAD_DIM).reshape(-1)
    original = effective_weight(layer.get_base_layer(), device)
    exact = granularity in FORMATS[name][2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.merge_adapter(safe_merge=True)
        except ValueError as error:
            return {"status": "ok" if not exact else "BROKEN", "refused": str(error)}
    rounds = any("rounds" in str(warning.message) for warning in caught)
    wanted = original * vector
    error = float((effective_weight(layer.get_base_layer(), device) - wanted).norm() / wanted.norm())
    model.unmerge_adapter()
    back = torch.equal(effective_weight(layer.get_base_layer(), device), original)
    promise = (error <= EXACT_BOUND and not rounds) if exact else rounds
    return {
        "status": "ok" if promise and back else "BROKEN",
        "exact_promised": exact,
        "warned_of_rounding": rounds,
        "relative_error": error,
        "unmerged_bit_for_bit": back,
        "moved_bit_for_bit": moved(model, layer, original, device),
    }


def moved(model: nn.Module, layer: SealLayer, original: Tensor, device: str) -> bool | str:
    """Merge on the CPU what was quantised on the device, come back, and unmerge there."""
    if device == "cpu" or not hasattr(layer.get_base_layer(), "weight"):
        return "not applicable"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.merge_adapter()
            model.to("cpu").to(device)
            model.unmerge_adapter()
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"[:200]
    return torch.equal(effective_weight(layer.get_base_layer(), device), original)


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Run every format in both granularities, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/quantized-merge.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "hqq", "mslk")
    rows = []
    for name in FORMATS:
        for granularity in ("head", "channel"):
            try:
                base = build(name, arguments.device)
            except (ImportError, RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
                row = {"status": "skipped", "reason": f"{type(error).__name__}: {error}"[:300]}
            else:
                row = measure(base, name, granularity, arguments.device)
            rows.append({"format": name, "granularity": granularity, **row})
            details = {key: value for key, value in row.items() if key != "status"}
            print(f"{name:20} {granularity:8} {row['status']:8} {details}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": f"python benchmarks/quantized_merge.py --device {arguments.device}",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "versions": {package: version(package) for package in packages},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(row["status"] == "BROKEN" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
