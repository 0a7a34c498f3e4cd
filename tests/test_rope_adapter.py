"""RoPE in an adapter: on record when it is saved, in force when it is loaded, and left in the model by a merge."""

import json
import warnings

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn

import seal_peft
from models import draw_scales
from rope_models import LONG, NTK, TYPES, YARN, adapted, alone, built, extended, gemma3, llama, logits, switching, told
from seal_peft import SealConfig
from seal_peft.context.rope import apply_rope, read_rope

# -- in an adapter ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return str(folder)


def yarn_base():
    model = llama()
    apply_rope(model, YARN)
    return model


def test_the_base_is_on_record(tmp_path):
    model = get_peft_model(gemma3(), SealConfig())
    own = read_rope(gemma3())
    assert model.peft_config["default"].base_rope == own
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_rope"] == own
    assert own["max_position_embeddings"] == 32


def test_an_adapter_brings_its_rope_along(tmp_path):
    model = extended()
    expected = get_peft_model(yarn_base(), SealConfig())
    expected.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rope_parameters"] == YARN
    assert saved["base_rope"] == read_rope(llama())


@pytest.mark.parametrize("request_", [YARN, NTK, {"full_attention": YARN}], ids=["yarn", "ntk", "gemma3"])
def test_it_has_the_same_logits_in_a_fresh_base(request_, tmp_path):
    build = gemma3 if "full_attention" in request_ else llama
    model = extended(request_, build)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert read_rope(loaded) == read_rope(model) != read_rope(build())
    assert torch.equal(logits(loaded), logits(model))
    assert read_rope(loaded)["max_position_embeddings"] == 128


def test_auto_peft_and_transformers_load_it_rightly(base_folder, tmp_path):
    base = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, SealConfig(rope_parameters=YARN))
    draw_scales(model)
    model.eval().save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    loaded = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    plain = logits(loaded)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), plain)
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), plain)


def test_another_base_is_warned_about_once_with_both_values(tmp_path):
    model = adapted(llama())
    model.save_pretrained(tmp_path)
    base = built(llama, {**TYPES["default"], "max_position_embeddings": 32})
    other, (warning,) = told(lambda: PeftModel.from_pretrained(base, tmp_path))
    assert "rope_theta 10000.0 (adapter) and 500.0 (base)" in warning
    assert "config.rope_parameters = config.base_rope" in warning
    assert not torch.equal(logits(other), logits(model))
    swapped = adapted(built(llama, {**TYPES["default"], "max_position_embeddings": 32}))
    _, (warning,) = told(lambda: seal_peft.hotswap_adapter(swapped, tmp_path))
    assert "rope_theta 10000.0 (adapter) and 500.0 (base)" in warning


def test_a_longer_maximum_alone_is_no_other_rope(tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(max_position_embeddings=64), tmp_path)


def test_the_recorded_rope_is_applied_when_asked(tmp_path):
    model = adapted(yarn_base())
    model.save_pretrained(tmp_path)
    config = SealConfig.from_pretrained(tmp_path)
    config.rope_parameters = config.base_rope
    loaded = PeftModel.from_pretrained(llama(), tmp_path, config=config)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_the_way_that_the_warning_names_works_with_auto_peft(base_folder, tmp_path):
    base = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    applied = apply_rope(base, YARN)
    model = adapted(base)
    model.save_pretrained(tmp_path)
    rope = read_rope(base)
    _, (warning,) = told(lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path))
    assert "rope_type yarn (adapter) and default (base)" in warning
    longest = rope.pop("max_position_embeddings")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope, max_position_embeddings=longest)
    assert torch.equal(logits(loaded), logits(model))
    applied.restore()


def test_a_request_is_completed_from_the_base_that_it_was_trained_on(tmp_path):
    model = extended(NTK)
    model.save_pretrained(tmp_path)
    other = built(llama, {**TYPES["default"], "max_position_embeddings": 32})
    loaded, (warning,) = told(lambda: PeftModel.from_pretrained(other, tmp_path))
    assert "own rope_parameters are applied" in warning
    assert torch.equal(logits(loaded), logits(model))


def test_one_config_for_two_bases_takes_from_each():
    config = SealConfig(rope_parameters=NTK)
    for theta in (10000.0, 500.0):
        base = built(llama, {"rope_type": "default", "rope_theta": theta, "max_position_embeddings": 32})
        assert read_rope(get_peft_model(base, config))["rope_theta"] == theta * 4 ** (12 / 10)


def test_a_request_that_does_not_work_leaves_the_model_as_it_was():
    model = llama()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="beta_fast='x' is not allowed"):
        get_peft_model(model, SealConfig(rope_parameters={**YARN, "beta_fast": "x"}))
    with pytest.raises(ValueError, match="cannot be built"):
        get_peft_model(model, SealConfig(rope_parameters={**YARN, "mscale": "x", "mscale_all_dim": "x"}))
    assert [type(module) for module in model.modules()] == modules
    for given in ("yarn", {}):
        with pytest.raises(ValueError, match=f"rope_parameters={given!r} is not allowed"):
            SealConfig(rope_parameters=given)


def test_an_adapter_that_brings_neither_scales_nor_rope_is_refused():
    with pytest.raises(ValueError, match="this adapter would do nothing"):
        SealConfig(sites=(), rope_parameters={})


# -- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gemma3])
@pytest.mark.parametrize("request_", [YARN, NTK, TYPES["dynamic"]], ids=["yarn", "ntk", "dynamic"])
def test_the_merged_model_reloads_plainly(build, request_, tmp_path):
    model = extended(request_, build)
    expected, rope = logits(model), read_rope(model)
    merged = model.merge_and_unload()
    assert "_position_switch" not in vars(merged)
    assert not any(module._forward_pre_hooks for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_rope(plain) == rope
    assert torch.equal(logits(plain), logits(merged))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] == rope["max_position_embeddings"]


@pytest.mark.parametrize("request_", [YARN, NTK], ids=["yarn", "ntk"])
def test_a_site_that_is_not_merged_loads_on_the_merged_model_without_a_warning(request_, tmp_path):
    model = extended(request_, sites=("output", "query"))
    seal_peft.save_adapter(model, tmp_path / "rest", sites=["query"])
    before = logits(model)
    model.merge_adapter(sites=["output"])
    model.unload().save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded, messages = told(lambda: PeftModel.from_pretrained(base, tmp_path / "rest"))
    assert not messages
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-5)


def test_what_is_merged_keeps_its_rope_until_it_is_unmerged():
    model = extended()
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), expected)


def test_merging_takes_the_rope_of_what_is_merged():
    model = switching()
    model.set_adapter("plain")
    expected = alone(model, "ntk", NTK)
    merged = model.merge_and_unload(adapter_names=["ntk"])
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="one RoPE at a time"):
        switching().merge_and_unload(adapter_names=["ntk", "yarn"])


def test_adapters_without_a_request_change_nothing_about_the_rope():
    model = adapted(llama())
    assert isinstance(model, nn.Module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert read_rope(merged) == read_rope(llama())


def test_a_compiled_model_is_one_graph_and_follows_the_switch():
    model = switching()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for name in ("yarn", "plain", "ntk", "yarn"):
            model.set_adapter(name)
            torch.testing.assert_close(compiled(input_ids=LONG).logits, logits(model), atol=1e-4, rtol=1e-4)
