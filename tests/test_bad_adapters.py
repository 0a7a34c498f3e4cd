"""Bad settings and broken adapters: one clear error that says what to do, and a base model that is as it was."""

import json
import math
import os

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import adapted, base_model, llama, logits, seal_layers
from seal_peft import SealConfig, scales
from seal_peft.tuner.weights import take_settings

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """The folder of a good adapter."""
    adapted("llama", "head").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load_fresh(base, folder):
    return PeftModel.from_pretrained(base, folder)


def load_beside(base, folder):
    """Load into a model that carries a good adapter already."""
    model = get_peft_model(base, SealConfig())
    try:
        return model.load_adapter(folder, "other")
    finally:
        assert list(model.peft_config) == ["default"], "half an adapter was left behind"


both_ways_to_load = pytest.mark.parametrize("load", [load_fresh, load_beside])


def assert_refused(load, folder, match, base=None):
    """Loading fails with one clear error, and the base computes what it computed before."""
    base = base_model("llama") if base is None else base
    before = logits(base)
    with pytest.raises(ValueError, match=match):
        load(base, folder)
    assert torch.equal(logits(base), before)
    if load is load_fresh:
        assert not seal_layers(base)


@pytest.mark.parametrize("granularity", ["heads", "HEAD", "", None, 1])
def test_a_wrong_granularity_is_refused_with_the_allowed_ones(granularity):
    with pytest.raises(ValueError, match=r"granularity=.* not allowed\. Use 'head' .* or 'channel'"):
        SealConfig(granularity=granularity)


@pytest.mark.parametrize("name", ["num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "4", True])
def test_a_head_geometry_that_is_no_positive_number_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* not allowed\. Use a positive whole number"):
        SealConfig(**{name: value})


def test_layer_choices_that_peft_would_ignore_are_refused():
    with pytest.raises(ValueError, match="layers_to_transform.*regular expression"):
        SealConfig(target_modules=".*o_proj", layers_to_transform=[0])
    with pytest.raises(ValueError, match="layers_pattern.*layers_to_transform"):
        SealConfig(layers_pattern="layers")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["attention_out"]},
        {"target_modules": r".*\.attention_out"},
        {"layers_to_transform": [7]},
        {"exclude_modules": ["o_proj"]},
    ],
)
def test_settings_that_match_no_module_are_refused(settings):
    base = base_model("llama")
    before = logits(base)
    with pytest.raises(ValueError, match=r"[Tt]arget modules|excluded"):
        get_peft_model(base, SealConfig(**settings))
    assert torch.equal(logits(base), before)
    assert not seal_layers(base)


@both_ways_to_load
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, 0.5, -64, -1])
def test_a_truncated_file_is_refused(load, keep, saved):
    content = (saved / WEIGHTS).read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep if keep >= 0 else len(content) + keep
    (saved / WEIGHTS).write_bytes(content[:length])
    message = rf"{WEIGHTS} is cut off or damaged \({length} bytes.*Save the adapter again, or download it again"
    assert_refused(load, saved, message)
    with pytest.raises(ValueError, match=message):
        scales(saved)


@pytest.mark.parametrize("junk", [b"not a safetensors file at all", b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"])
def test_a_file_of_another_kind_is_refused(junk, saved):
    (saved / WEIGHTS).write_bytes(junk)
    assert_refused(load_fresh, saved, "cut off or damaged")


def test_a_truncated_file_is_refused_by_the_auto_class(saved, tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (saved / "adapter_config.json").write_text(json.dumps(config))
    AutoPeftModelForCausalLM.from_pretrained(saved)
    os.truncate(saved / WEIGHTS, 100)
    with pytest.raises(ValueError, match="cut off or damaged"):
        AutoPeftModelForCausalLM.from_pretrained(saved)


@both_ways_to_load
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_are_refused(load, value, saved):
    tensors = load_file(saved / WEIGHTS)
    next(iter(tensors.values()))[2] = value
    save_file(tensors, saved / WEIGHTS, {"format": "pt"})
    assert_refused(load, saved, r"NaN or infinite scales \(.*o_proj.*do not use it")


@both_ways_to_load
@pytest.mark.parametrize(
    "other",
    [{"num_attention_heads": 8}, {"num_attention_heads": 2}, {"head_dim": 16}, {"num_hidden_layers": 3}],
    ids=["more-heads", "fewer-heads", "larger-heads", "more-layers"],
)
def test_a_base_with_other_heads_is_refused(load, other, saved):
    message = r"trained on 2 modules with \(num_heads, head_dim\) = \(4, 12\), but the base model has .* Load it"
    assert_refused(load, saved, message, llama(**other))


def test_an_adapter_of_more_layers_than_the_base_has_is_refused(tmp_path):
    get_peft_model(llama(num_hidden_layers=3), SealConfig()).save_pretrained(tmp_path)
    assert_refused(load_fresh, tmp_path, r"trained on 3 modules.* but the base model has 2")


@both_ways_to_load
def test_layers_that_swap_their_head_sizes_are_refused(load, tmp_path):
    pytest.importorskip("transformers.models.gemma4")
    adapted("gemma4_text").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["heads"] = config["heads"][::-1]
    path.write_text(json.dumps(config))
    assert_refused(load, tmp_path, "but the base model has", base_model("gemma4_text"))


@both_ways_to_load
@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("random_start", [False, True])
def test_a_file_of_another_granularity_than_its_config_is_refused(load, granularity, random_start, tmp_path):
    adapted("llama", granularity, init_weights=not random_start).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["granularity"] = "channel" if granularity == "head" else "head"
    path.write_text(json.dumps(config))
    assert_refused(load, tmp_path, r"have shape .*does not fit its config \(sites=.*granularity='(head|channel)'")


def test_scales_of_another_length_than_the_config_says_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    short = {key: value[:3].clone() if value.is_floating_point() else value.clone() for key, value in tensors.items()}
    save_file(short, saved / WEIGHTS, {"format": "pt"})
    assert_refused(load_fresh, saved, r"have shape \(3,\), which does not fit its config")


def test_a_state_dict_with_broken_scales_is_refused():
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = adapted()
    good, _ = take_settings(get_peft_model_state_dict(model))
    before = logits(model)
    broken = {key: torch.full_like(value, math.nan) for key, value in good.items()}
    with pytest.raises(ValueError, match="NaN or infinite scales"):
        set_peft_model_state_dict(model, broken)
    wider = {key: value.unsqueeze(-1).expand(4, 12) for key, value in good.items()}
    with pytest.raises(ValueError, match=r"have shape \(4, 12\), but the base model needs \(4,\)"):
        set_peft_model_state_dict(model, wider)
    assert torch.equal(logits(model), before)


def test_layers_that_a_file_lacks_do_not_keep_what_was_there_before(tmp_path):
    adapted("llama", layers_to_transform=[1]).save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(base_model("llama"), tmp_path))

    model = adapted("llama", seed=2)
    before = logits(model)
    result = model.load_adapter(tmp_path, "default")
    assert any(".layers.0." in key for key in result.missing_keys)
    assert torch.equal(logits(model), expected) and not torch.equal(before, expected)

    refilled = adapted("llama", seed=2)
    weights, _ = take_settings(load_file(tmp_path / WEIGHTS))
    set_peft_model_state_dict(refilled, weights)
    assert torch.equal(logits(refilled), expected)

    own = base_model("llama")  # transformers' own call takes no name twice
    own.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="already exists"):
        own.load_adapter(str(tmp_path))


@both_ways_to_load
def test_a_missing_weights_file_is_refused(load, saved):
    (saved / WEIGHTS).unlink()
    assert_refused(load, saved, rf"adapter_config\.json in {saved} but no {WEIGHTS}.*Save the adapter again")
    with pytest.raises(ValueError, match=rf"{saved} is not an adapter folder: there is no {WEIGHTS}"):
        scales(saved)


def test_the_config_of_a_folder_without_weights_can_be_read_alone(saved, tmp_path):
    (saved / WEIGHTS).unlink()
    assert PeftConfig.from_pretrained(saved).heads == [[4, 12], [4, 12]]
    SealConfig(granularity="channel").save_pretrained(tmp_path / "settings")  # of no adapter
    assert SealConfig.from_pretrained(tmp_path / "settings").granularity == "channel"


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": 8}, {"head_dim": 6}, {"num_attention_heads": 8, "head_dim": 6}]
)
def test_heads_that_disagree_with_an_adapter_already_there_are_refused(wrong):
    model = adapted("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=r"disagrees with the adapters that model\.layers\.0.*which have"):
        model.add_adapter("other", SealConfig(**wrong))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)
    model.add_adapter("other", SealConfig(num_attention_heads=4, head_dim=12))  # the numbers that are true


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(load_fresh, tmp_path / "nowhere", r"Can't find 'adapter_config\.json' at .*nowhere")
    with pytest.raises(ValueError, match="nowhere is not an adapter folder"):
        scales(tmp_path / "nowhere")


def test_scales_names_the_adapters_there_are():
    with pytest.raises(ValueError, match=r"no SEAL adapter named 'other'\. Adapters it holds: \['default'\]"):
        scales(adapted(), "other")
    with pytest.raises(ValueError, match="Adapters it holds: none"):
        scales(base_model("llama"))


def test_scales_of_another_methods_folder_are_refused(tmp_path):
    save_file({"base_model.model.o_proj.lora_A.weight": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds no SEAL scales"):
        scales(tmp_path)


def test_a_good_adapter_loads_after_a_broken_one(saved):
    model = get_peft_model(base_model("llama"), SealConfig())
    good = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(good[:-3])
    with pytest.raises(ValueError, match="cut off"):
        model.load_adapter(saved, "other")
    (saved / WEIGHTS).write_bytes(good)
    model.load_adapter(saved, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(adapted("llama", "head")))


@pytest.mark.parametrize("target", ["q_proj", "self_attn.v_proj"])
def test_a_projection_that_reads_the_hidden_state_is_refused(target):
    model = base_model("llama")
    with pytest.raises(ValueError, match="does not read the outputs of heads.*o_proj"):
        get_peft_model(model, SealConfig(target_modules=[target], num_attention_heads=1))
    assert not seal_layers(model)


def test_a_projection_that_is_never_called_is_refused():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2)

    with pytest.raises(TypeError, match="without calling it.*exclude_modules"):
        get_peft_model(Block(), SealConfig(target_modules=["out_proj"], num_attention_heads=2))


def test_peft_keeps_two_methods_apart_in_the_words_of_the_faq():
    model = get_peft_model(base_model("llama"), LoraConfig(r=2))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("heads", SealConfig())


def test_a_base_folder_that_is_gone_is_missed_in_the_words_of_the_faq(tmp_path):
    base = base_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), SealConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="Repo id must be in the form"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(model))
