"""SEAL on quantised bases, on the CPU: forward, training, files, and models that live their whole life quantised.

`benchmarks/quantized_merge.py` and `quantized_bases.py` run the same claims on a GPU.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from models import (
    INPUT_IDS,
    adapted,
    base_model,
    draw_scales,
    llama,
    logits,
    seal_layers,
)
from quantized_models import (
    FORMATS,
    HEAD_DIM,
    PIP,
    _torchao_config,
    dequantised,
    every_format,
    granularities,
    in_full_precision,
    needs,
    quantised,
    quantised_adapter,
    stored,
)
from seal_peft import SealConfig


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
@pytest.mark.filterwarnings("ignore:Merging into .* rounds")
def test_unloading_gives_the_quantised_base_back(name):
    model = quantised_adapter(name, bias=True)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(quantised(name, bias=True)))


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
