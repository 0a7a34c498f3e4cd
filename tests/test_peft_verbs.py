"""SEAL answers to every verb of PEFT as a built-in method does."""

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch.testing import assert_close

from custom_model import base, cases, config
from models import adapted, base_model, draw_scales, llama, logits, seal_layers
from offsets import both_granularities, loss_of, offsets, some_models
from seal_peft import SealConfig, scales


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("base")
    base_model("llama").save_pretrained(folder)
    return folder


# -- creating ---------------------------------------------------------------------------------------------------------


@cases()
def test_a_new_adapter_changes_nothing(name, granularity):
    model = get_peft_model(base(name), config(name, granularity))
    assert torch.equal(logits(model), logits(base(name)))
    assert all((scale == 1).all() for scale in scales(model).values())


def test_a_random_start_is_for_tests_and_changes_the_logits():
    model = get_peft_model(base_model("llama"), SealConfig(init_weights=False))
    assert (logits(model) - logits(base_model("llama"))).abs().max() > 0.01


@pytest.mark.parametrize(("granularity", "count"), [("head", 8), ("channel", 96)])
def test_trainable_parameters_are_counted(granularity, count, capsys):
    model = adapted("llama", granularity)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {count} || all params: ")
    assert model.get_nb_trainable_parameters()[0] == count


def test_layer_status_knows_the_method():
    status = adapted("llama").get_layer_status()
    assert [row.module_type for row in status] == ["seal.Linear"] * 2
    assert all(row.requires_grad == {"default": True} and row.active_adapters == ["default"] for row in status)


def test_an_adapter_can_be_injected_without_a_wrapper():
    model = inject_adapter_in_model(SealConfig(), base_model("llama"))
    draw_scales(model)
    assert torch.equal(logits(model), logits(adapted("llama")))


@pytest.mark.parametrize("sites", [("output",), ("output", "query")])
def test_an_adapter_can_be_injected_by_the_layers_of_a_state_dict(sites):
    source = inject_adapter_in_model(SealConfig(sites=sites, layers_to_transform=[1]), base_model("llama"))
    draw_scales(source)
    state = get_peft_model_state_dict(source)
    with pytest.warns(RuntimeWarning, match="inconsistency.*additional target modules"):  # as for every method
        model = inject_adapter_in_model(SealConfig(sites=sites), base_model("llama"), state_dict=state)
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    assert seal_layers(model).keys() == seal_layers(source).keys()
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": 0}, [0]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, [0]),
        ({"exclude_modules": ["layers.0.self_attn.o_proj"]}, [1]),
        ({"exclude_modules": r".*\.1\..*"}, [0]),
        ({"target_modules": r".*\.1\.self_attn\.o_proj"}, [1]),
        ({"target_modules": ["o_proj"]}, [0, 1]),
        ({"target_modules": ["model.layers.0.self_attn.o_proj"]}, [0]),
    ],
)
def test_layers_are_chosen_with_pefts_own_fields(settings, layers, tmp_path):
    model = adapted("llama", **settings)
    assert list(seal_layers(model)) == [f"model.layers.{layer}.self_attn.o_proj" for layer in layers]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path)), logits(model))


def test_modules_to_save_train_and_travel_with_the_adapter(tmp_path):
    model = adapted("llama", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path)), logits(model))
    assert len(scales(tmp_path)) == 2


# -- saving and loading -----------------------------------------------------------------------------------------------


@some_models
@both_granularities
def test_a_saved_adapter_holds_the_scales_only_and_loads_again(name, granularity, tmp_path):
    model = adapted(name, granularity)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    numbers = sum(scale.numel() for scale in scales(model).values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 1000
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_model(name), tmp_path, is_trainable=True)
    assert all(offset.requires_grad for offset in offsets(trainable))


def test_scales_come_in_the_same_order_from_a_model_and_its_folder(tmp_path):
    model = get_peft_model(llama(num_hidden_layers=12), SealConfig(sites=("output", "query"), init_weights=False))
    model.save_pretrained(tmp_path)
    assert list(scales(tmp_path)) == list(scales(model))
    names = [f"{layer}.self_attn.{module}" for layer in range(12) for module in ("o_proj", "q_proj")]
    assert [name.removeprefix("model.layers.") for name in scales(tmp_path)] == names


def test_the_auto_class_finds_base_and_adapter(base_folder, tmp_path):
    base = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity="channel"))
    draw_scales(model)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.active_peft_config, SealConfig)
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_the_saved_card_names_the_import_once(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import seal_peft") == 1


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_loading_through_the_meta_device_leaves_nothing_on_it(granularity, tmp_path):
    model = adapted("llama", granularity)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert all(offset.dtype == torch.float32 for offset in offsets(loaded))
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))


# -- several adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    """A model with adapter "default" of one scale per head and "other" of one per channel; the first is active."""
    model = adapted("llama", "head")
    model.add_adapter("other", SealConfig(granularity="channel"))
    draw_scales(model, "other", seed=2)
    return model


def test_adding_an_adapter_changes_neither_the_logits_nor_what_trains(two):
    assert torch.equal(logits(two), logits(adapted("llama", "head")))
    assert all(offset.requires_grad for offset in offsets(two))
    assert not any(offset.requires_grad for offset in offsets(two, "other"))


def test_an_adapter_on_other_layers_trains_only_once_it_is_active():
    model = adapted("llama", layers_to_transform=[0])
    model.add_adapter("other", SealConfig(layers_to_transform=[1]))
    first, second = seal_layers(model).values()
    assert first.seal_delta["default"].weight.requires_grad
    assert not second.seal_delta["other"].weight.requires_grad
    with torch.no_grad():
        second.seal_delta["other"].weight.fill_(0.5)
    assert torch.equal(logits(model), logits(adapted("llama", layers_to_transform=[0])))
    model.set_adapter("other")
    assert second.seal_delta["other"].weight.requires_grad
    assert not first.seal_delta["default"].weight.requires_grad
    assert not torch.equal(logits(model), logits(base_model("llama")))


def test_switching_adapters_switches_the_logits_and_what_trains(two):
    two.set_adapter("other")
    assert torch.equal(logits(two), logits(adapted("llama", "channel", seed=2)))
    assert all(offset.requires_grad for offset in offsets(two, "other"))
    assert not any(offset.requires_grad for offset in offsets(two))
    two.set_adapter("default")
    assert torch.equal(logits(two), logits(adapted("llama", "head")))


def test_several_active_adapters_multiply(two):
    two.base_model.set_adapter(["default", "other"])
    product = adapted("llama", "channel")
    with torch.no_grad():
        for key, value in scales(two).items():
            scale = value.unsqueeze(-1) * scales(two, "other")[key]
            seal_layers(product)[key].seal_delta["default"].weight.copy_(scale - 1)
    assert_close(logits(two), logits(product), rtol=0, atol=1e-5)
    loss_of(two).backward()
    assert all((offset.grad != 0).any() for name in ("default", "other") for offset in offsets(two, name))


def test_several_adapters_are_saved_side_by_side(two, tmp_path):
    two.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        two.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(two))
        assert all(torch.equal(value, scales(two, name)[key]) for key, value in scales(loaded, name).items())


def test_a_deleted_adapter_leaves_no_trace(two):
    two.delete_adapter("other")
    assert list(two.peft_config) == ["default"]
    assert not any("other" in key for key in two.state_dict())
    assert all("other" not in layer.seal_alpha for layer in seal_layers(two).values())
    assert torch.equal(logits(two), logits(adapted("llama", "head")))
    with pytest.raises(ValueError, match="other"):
        two.delete_adapter("other")


def test_disabling_gives_the_base_and_enabling_the_adapter_back(two):
    before = logits(two)
    with two.disable_adapter():
        assert torch.equal(logits(two), logits(base_model("llama")))
    assert torch.equal(logits(two), before)


def test_merging_an_adapter_that_is_not_there_is_refused_instead_of_merging_none():
    model = adapted("llama")
    expected = logits(model)
    for merge in (lambda: model.merge_adapter(["nope"]), lambda: model.merge_and_unload(adapter_names=["nope"])):
        with pytest.raises(ValueError, match="no adapters named nope to merge. It has default."):
            merge()
    assert torch.equal(logits(model), expected)


def test_disabling_a_merged_adapter_gives_the_base():
    model = adapted("llama")
    before = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model("llama")))
    assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_layer_that_is_wrapped_while_adapters_are_disabled_is_disabled_too():
    model = adapted("llama", layers_to_transform=[1])
    model.base_model.disable_adapter_layers()
    model.add_adapter("other", SealConfig(layers_to_transform=[0]))
    draw_scales(model, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(base_model("llama")))
    model.base_model.enable_adapter_layers()
    assert not torch.equal(logits(model), logits(base_model("llama")))


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]])
def test_merging_named_adapters_equals_activating_them(two, names):
    two.base_model.set_adapter(names)
    before = logits(two)
    two.merge_adapter(names)
    assert_close(logits(two), before, rtol=0, atol=1e-5)
    two.unmerge_adapter()
    assert torch.equal(logits(two), before)
    assert_close(logits(two.merge_and_unload(safe_merge=True, adapter_names=names)), before, rtol=0, atol=1e-5)


def test_strength_interpolates_between_base_and_adapter():
    model = adapted("llama")
    full = logits(model)
    for layer in seal_layers(model).values():
        layer.seal_alpha["default"] = 0.0
    assert torch.equal(logits(model), logits(base_model("llama")))
    for layer in seal_layers(model).values():
        layer.seal_alpha["default"] = 0.5
    half = adapted("llama")
    with torch.no_grad():
        for offset in offsets(half):
            offset.mul_(0.5)
    assert torch.equal(logits(model), logits(half))
    assert_close(logits(model.merge_and_unload()), logits(half), rtol=0, atol=1e-5)
    assert not torch.equal(logits(half), full)
