"""Exchange with PEFT's IA3: what is exported loads in stock PEFT, without this package, and gives the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from models import ARCHITECTURES, adapted, base_model, draw_scales, llama, logits, seal_layers
from seal_peft import SealConfig, add_beside, export_ia3, import_ia3, save_adapter, scales, set_strength

ROUND_TRIP = ["llama", "gemma3_text", "deepseek_v3", "gpt2", "opt", "gpt_neox", "llava-clip"]
granularities = pytest.mark.parametrize("granularity", ["head", "channel"])


def ia3_adapter(base: nn.Module, targets: list[str], inputs: list[str] | None = None, **settings: Any) -> PeftModel:
    """Return a model with IA3 vectors that are not the identity."""
    inputs = targets if inputs is None else inputs
    config = IA3Config(target_modules=targets, feedforward_modules=inputs, **settings)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(0.2, 1.8)
    return model


@granularities
@pytest.mark.parametrize("name", ROUND_TRIP)
def test_an_exported_adapter_is_a_stock_ia3_adapter(name, granularity, tmp_path):
    model = adapted(name, granularity)
    export_ia3(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    assert loaded.peft_config["default"].peft_type == "IA3"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=0, atol=2e-5)


def test_a_strength_goes_into_the_exported_factors(tmp_path):
    model = adapted("llama", sites=("output", "query"))
    set_strength(model, -0.5)
    export_ia3(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt2", "falcon-new-decoder"])
def test_query_scales_are_factors_on_the_outputs_of_the_projection(name, tmp_path):
    model = adapted(name, sites=("output", "query"))
    export_ia3(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


def test_query_scales_that_ia3_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Qwen3RMSNorm; IA3 knows linear layers only"):
        export_ia3(adapted("qwen3", sites=("query",)), tmp_path / "ia3")
    adapted("llama", sites=("query",)).save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"folder scales queries, .* export_ia3\(model, ...\)"):
        export_ia3(tmp_path / "folder", tmp_path / "ia3")
    assert not (tmp_path / "ia3").exists()


def test_an_adapter_is_exported_from_whatever_surrounds_it(tmp_path):
    beside = add_beside(adapted("llama", sites=("output", "query")), LoraConfig(target_modules=["o_proj"]), "lora")
    mixed = adapted("qwen3")
    mixed.add_adapter("other", SealConfig(sites=("query",)))  # on a norm, but not exported
    injected = base_model("llama")
    injected.add_adapter(SealConfig(init_weights=False), "default")  # by transformers, without PEFT's wrapper
    for name, model in (("llama", beside), ("qwen3", mixed), ("llama", injected)):
        export_ia3(model, tmp_path)
        loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


def test_a_folder_with_an_adapter_of_another_method_is_not_written_over(tmp_path):
    adapted("llama").save_pretrained(tmp_path / "seal")
    export_ia3(tmp_path / "seal", tmp_path / "ia3")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("seal", "ia3")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(ValueError, match="holds an adapter of the method SEAL, which would be lost"):
        export_ia3(tmp_path / "seal", tmp_path / "seal")
    with pytest.raises(ValueError, match="holds an adapter of the method IA3, which would be lost"):
        import_ia3(tmp_path / "ia3", tmp_path / "ia3", base_model=base_model("llama"))
    assert [file.read_bytes() for file in files] == before


@granularities
def test_a_folder_exports_like_its_model(granularity, tmp_path):
    model = adapted("llama", granularity)
    model.save_pretrained(tmp_path / "seal")
    export_ia3(model, tmp_path / "a")
    export_ia3(tmp_path / "seal", tmp_path / "b")
    first, second = ((tmp_path / side / "adapter_model.safetensors").read_bytes() for side in "ab")
    assert first == second


@granularities
@pytest.mark.parametrize("name", ROUND_TRIP)
def test_there_and_back_gives_the_same_scales(name, granularity, tmp_path):
    model = adapted(name, granularity)
    export_ia3(model, tmp_path / "ia3")
    import_ia3(tmp_path / "ia3", tmp_path / "seal", granularity=granularity, base_model=base_model(name))
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path / "seal")
    for key, layer in seal_layers(model).items():
        again = seal_layers(loaded)[key].seal_delta["default"].weight
        torch.testing.assert_close(again, layer.seal_delta["default"].weight, rtol=0, atol=2e-7)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


def test_a_stock_ia3_adapter_becomes_seal_c(tmp_path):
    model = ia3_adapter(base_model("llama"), ["self_attn.o_proj"])
    model.save_pretrained(tmp_path / "ia3")
    import_ia3(tmp_path / "ia3", tmp_path / "seal", base_model=base_model("llama"))
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "seal")
    assert isinstance(loaded.peft_config["default"], SealConfig)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


def test_import_builds_the_base_from_its_config(tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    model = adapted("llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    export_ia3(model, tmp_path / "ia3")
    import_ia3(tmp_path / "ia3", tmp_path / "seal", granularity="head")
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "seal")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


def test_every_full_name_survives_many_layers(tmp_path):
    # PEFT shortens long lists of targets when it loads them (PEFT issue 2429).
    base = llama(num_hidden_layers=24)
    model = get_peft_model(llama(num_hidden_layers=24), SealConfig(layers_to_transform=list(range(1, 24))))
    draw_scales(model)
    export_ia3(model, tmp_path / "ia3")
    names = sorted(f"model.layers.{index}.self_attn.o_proj" for index in range(1, 24))
    stock = PeftModel.from_pretrained(llama(num_hidden_layers=24), tmp_path / "ia3")
    stock.save_pretrained(tmp_path / "again")
    for folder in ("ia3", "again"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == sorted(config["feedforward_modules"]) == names
    import_ia3(tmp_path / "again", tmp_path / "seal", granularity="head", base_model=base)
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=24), tmp_path / "seal")
    assert sorted(seal_layers(loaded)) == names
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-4)


def test_conv1d_is_recorded(tmp_path):
    export_ia3(adapted("gpt2"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_layers_of_different_head_sizes_keep_theirs(tmp_path):
    if "gemma4_text" not in ARCHITECTURES:
        pytest.skip("needs a transformers with Gemma 4: `pip install -U transformers`")
    model = adapted("gemma4_text")
    export_ia3(model, tmp_path / "ia3")
    import_ia3(tmp_path / "ia3", tmp_path / "seal", granularity="head", base_model=base_model("gemma4_text"))
    loaded = PeftModel.from_pretrained(base_model("gemma4_text"), tmp_path / "seal")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="does not tell the head size of .* Load the adapter on its base model"):
        export_ia3(tmp_path / "folder", tmp_path / "other")


def test_modules_to_save_travel(tmp_path):
    model = adapted("llama", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    export_ia3(model, tmp_path / "ia3")
    stock = PeftModel.from_pretrained(base_model("llama"), tmp_path / "ia3")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=4e-5)
    import_ia3(tmp_path / "ia3", tmp_path / "seal", base_model=base_model("llama"))
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "seal")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=4e-5)


@pytest.mark.parametrize(
    ("targets", "inputs", "message"),
    [
        (["o_proj"], [], "scales the outputs of that module"),
        (["k_proj", "o_proj"], ["o_proj"], r"k_proj scales the outputs of that module"),
        (["o_proj", "down_proj"], None, "down_proj scales a module that does not read attention heads"),
        (["q_proj"], None, "q_proj scales a module that does not read attention heads"),
    ],
)
def test_other_ia3_adapters_are_refused(targets, inputs, message, tmp_path):
    ia3_adapter(base_model("llama"), targets, inputs).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match=message):
        import_ia3(tmp_path / "ia3", tmp_path / "seal", base_model=base_model("llama"))
    assert not (tmp_path / "seal").exists()


def test_query_scales_do_not_come_back_and_the_error_says_how_the_output_scales_do(tmp_path):
    model = adapted("llama", sites=("output", "query"))
    export_ia3(model, tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"q_proj scales the outputs .*If export_ia3 wrote this one for query scales"):
        import_ia3(tmp_path / "ia3", tmp_path / "seal", base_model=base_model("llama"))
    save_adapter(model, tmp_path / "outputs", sites=["output"])
    export_ia3(tmp_path / "outputs", tmp_path / "ia3")
    import_ia3(tmp_path / "ia3", tmp_path / "seal", granularity="head", base_model=base_model("llama"))
    learned = scales(model)
    for key, scale in scales(tmp_path / "seal").items():
        torch.testing.assert_close(scale, learned[key], rtol=0, atol=2e-7)
    assert len(scales(tmp_path / "seal")) == len(learned) / 2


def test_factors_that_differ_within_a_head_are_no_scales_per_head(tmp_path):
    export_ia3(adapted("llama", "channel"), tmp_path / "ia3")
    with pytest.raises(ValueError, match="differ within a head.*Use granularity='channel'"):
        import_ia3(tmp_path / "ia3", tmp_path / "seal", granularity="head", base_model=base_model("llama"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: llama(head_dim=16), "has 48 factors, but the base model has 4 heads of 16 channels"),
        (lambda: llama(num_hidden_layers=1), r"layers\.1\.self_attn\.o_proj has no such module in the base model"),
        (lambda: base_model("gpt2"), r"layers\.0\.self_attn\.o_proj has no such module in the base model"),
        (
            lambda: llama(num_hidden_layers=3),
            r"targets model\.layers\.2\.self_attn\.o_proj .*but has no vector for it",
        ),
        (
            lambda: llama(vocab_size=80),
            r"lm_head\.weight has shape \(64, 32\), but the base model has shape \(80, 32\)",
        ),
        (
            lambda: base_model("llama").model,
            r"(no such module in the base model|lm_head\.weight has .* nothing of that name)",
        ),
    ],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(other, message, tmp_path):
    ia3_adapter(base_model("llama"), ["o_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match=rf"{message}.* Import it with the base model that it was trained on"):
        import_ia3(tmp_path / "ia3", tmp_path / "seal", base_model=other())
    assert not (tmp_path / "seal").exists()


def test_a_base_of_another_name_is_taken_and_one_that_is_gone_is_asked_for(tmp_path):
    model = ia3_adapter(base_model("llama"), ["o_proj"])
    model.save_pretrained(tmp_path / "ia3")
    file = tmp_path / "ia3" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(OSError, match=r"names, '.*gone', cannot be read\. Pass base_model=\.\.\."):
        import_ia3(tmp_path / "ia3", tmp_path / "seal")
    import_ia3(tmp_path / "ia3", tmp_path / "seal", base_model=base_model("llama"))
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "seal")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


def test_adapters_of_the_wrong_kind_are_refused(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path / "seal")
    export_ia3(model, tmp_path / "ia3")
    with pytest.raises(ValueError, match="import_ia3 reads IA3 adapters"):
        import_ia3(tmp_path / "seal", tmp_path / "x")
    with pytest.raises(ValueError, match="export_ia3 writes SEAL adapters"):
        export_ia3(tmp_path / "ia3", tmp_path / "x")
    with pytest.raises(ValueError, match=r"no SEAL adapter named 'other'. SEAL adapters: \['default'\]"):
        export_ia3(model, tmp_path / "x", adapter_name="other")
    with pytest.raises(ValueError, match="does not name its base model. Pass base_model"):
        import_ia3(tmp_path / "ia3", Path(tmp_path / "x"))
