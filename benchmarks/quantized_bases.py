"""The life of a SEAL adapter on quantised models, loaded as users do: identity, training, files, merging, unmerging.

python benchmarks/quantized_bases.py --output results/quantized-bases.json

All linear layers of a small random Llama are quantised by transformers' `quantization_config`, or by HQQ itself. For
every format and granularity: a new adapter leaves the logits of the quantised base bit for bit, 20 steps of training
lower the loss and leave the base as it was, the saved adapter gives the same logits on a base that is loaded anew, and
merging keeps the logits, with or without rounding, or is refused; unmerging gives the same logits back. Formats whose
package or kernels are missing are listed as skipped, with the reason. Exit status 1 if a number is wrong.

`quantized_merge.py` looks closer at one thing, the merged weight.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from seal_peft import SealConfig
from seal_peft.files import write_json
from seal_peft.provenance import provenance

STEPS = 20
# Norm of the difference of logits, relative: a merged weight and the kernels round to bf16.
EXACT_BOUND = 0.03


def torchao(name: str, **settings: Any) -> TorchAoConfig:
    """Return transformers' config for one of torchao's, by its class name."""
    from torchao import quantization

    if name == "IntxWeightOnlyConfig":
        settings = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    return TorchAoConfig(getattr(quantization, name)(**settings))


def four_bit(kind: str, double: bool = False) -> BitsAndBytesConfig:
    """Return transformers' config for bitsandbytes' NF4 or FP4."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


FORMATS: dict[str, Callable[[], Any]] = {
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bnb-nf4": lambda: four_bit("nf4"),
    "bnb-nf4-double": lambda: four_bit("nf4", double=True),
    "bnb-fp4": lambda: four_bit("fp4"),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-intx": lambda: torchao("IntxWeightOnlyConfig"),
    "torchao-int4-plain": lambda: torchao("Int4WeightOnlyConfig", group_size=128),
    "torchao-int4-tiles": lambda: torchao(
        "Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d"
    ),
    "hqq": lambda: None,  # transformers 5 does not load it: `by_hqq`
}


def save_base(folder: Path) -> None:
    """Save a random two-layer Llama whose weights are drawn wide enough that every head is felt in the logits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    model.to(torch.bfloat16).save_pretrained(folder)


def by_hqq(model: nn.Module, device: str) -> None:
    """Quantise all linear layers with HQQ to 4 bits, in place."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
            model.set_submodule(path, HQQLinear(module, settings, compute_dtype=torch.bfloat16, device=device))


def quantised(folder: Path, name: str, device: str) -> nn.Module:
    """Load the base quantised; it is the same every time."""
    config = FORMATS[name]()
    if isinstance(config, TorchAoConfig):
        from torchao.quantization import quantize_

        # transformers only says that some layer failed; one alone says why.
        quantize_(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16, device=device), config.quant_type)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
    )
    if name == "hqq":
        by_hqq(model.model, device)
    projection = model.model.layers[0].self_attn.o_proj
    if type(projection) is nn.Linear and type(projection.weight) is nn.Parameter:
        raise RuntimeError("the weights are not quantised")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50.2 lays weights out anew on such CPUs, and `state_dict()` then breaks them.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def tokens(device: str) -> Tensor:
    """Return one fixed batch."""
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1)).to(device)


def logits(model: nn.Module, device: str) -> Tensor:
    """Return the logits of the batch, without gradient."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens(device)).logits


def train(model: nn.Module, device: str) -> tuple[float, float]:
    """Learn the batch by heart; return the first loss and the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=tokens(device), labels=tokens(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def life(folder: Path, name: str, granularity: str, device: str) -> Iterator[tuple[str, str]]:
    """Go through an adapter's life; yield what was looked at, and "ok", "BROKEN" or "refused" with details."""

    def base() -> nn.Module:
        return quantised(folder, name, device)

    def verdict(right: bool, details: str = "") -> str:
        return " ".join(filter(None, ("ok" if right else "BROKEN", details)))

    plain = logits(base(), device)
    config = SealConfig(granularity=granularity, task_type="CAUSAL_LM")
    fresh = get_peft_model(base(), copy.deepcopy(config))
    yield "identity", verdict(torch.equal(logits(fresh, device), plain))

    model = get_peft_model(base(), config)
    first, last = train(model, device)
    yield "train", verdict(last < first, f"{first:.3f} -> {last:.3f}")
    with model.disable_adapter():
        yield "base unchanged", verdict(torch.equal(logits(model, device), plain))

    expected = logits(model, device)
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        loaded = PeftModel.from_pretrained(base(), adapter)
    yield "save and load", verdict(torch.equal(logits(loaded, device), expected))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.merge_adapter(safe_merge=True)
        except ValueError as error:
            yield "merge", f"refused: {error}"
            return
    rounds = any("rounds" in str(warning.message) for warning in caught)
    error = float((logits(model, device) - expected).norm() / expected.norm())
    yield "merge", verdict(rounds or error <= EXACT_BOUND, f"{'rounds' if rounds else 'exact'}, logits {error:.1e}")
    model.unmerge_adapter()
    yield "unmerge", verdict(torch.equal(logits(model, device), expected))


def outcomes(folder: Path, name: str, granularity: str, device: str) -> dict[str, str]:
    """Collect what `life` yields; what a package cannot do ends it with the reason."""
    found: dict[str, str] = {}
    try:
        quantised(folder, name, device)
    except Exception as error:  # every package has its own ways to say that a kernel is missing
        return {"skipped": f"{type(error).__name__}: {error}"[:300]}
    try:
        for stage, outcome in life(folder, name, granularity, device):
            found[stage] = outcome
    except Exception as error:
        found["stopped"] = f"{type(error).__name__}: {error}"[:300]
    return found


def packages() -> dict[str, str | None]:
    """Return the versions of the quantisers; `None` where one is not installed."""
    found: dict[str, str | None] = {}
    for package in ("bitsandbytes", "torchao", "hqq", "mslk"):
        found[package] = None
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> int:
    """Go through all formats, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="results/quantized-bases.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    arguments = parser.parse_args()
    rows = []
    print(f"quantisers: {packages()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder))
        for name in arguments.formats:
            for granularity in ("head", "channel"):
                found = outcomes(Path(folder), name, granularity, arguments.device)
                rows.append({"format": name, "granularity": granularity, **found})
                print(f"{name:<19}{granularity:<9}" + "  ".join(f"[{k}] {v}" for k, v in found.items()), flush=True)
                report = {"arguments": vars(arguments), "quantisers": packages(), "rows": rows, **provenance()}
                write_json(arguments.output, report)
    return int(any("BROKEN" in value for row in rows for value in row.values()))


if __name__ == "__main__":
    raise SystemExit(main())
