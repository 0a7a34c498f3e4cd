"""SEAL answers to every verb of PEFT as a built-in method does."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from torch.testing import assert_close

import seal_peft
from custom_model import base, cases, config
from models import ARCHITECTURES, INPUT_IDS, adapted, base_model, draw_scales, llama, logits, seal_layers
from seal_peft import SealConfig, scales

both_granularities = pytest.mark.parametrize("granularity", ["head", "channel"])
some_models = pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "opt", "gpt2"])


def offsets(model, adapter_name="default"):
    return [layer.seal_delta[adapter_name].weight for layer in seal_layers(model).values()]


def loss_of(model):
    return model(input_ids=INPUT_IDS).logits.float().square().mean()


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


def test_scales_come_in_the_order_of_the_layers_from_a_folder_too(tmp_path):
    model = get_peft_model(llama(num_hidden_layers=12), SealConfig(init_weights=False))
    model.save_pretrained(tmp_path)
    assert list(scales(tmp_path)) == list(scales(model))
    assert [name.split(".")[2] for name in scales(tmp_path)] == [str(layer) for layer in range(12)]


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


# -- config and registration ------------------------------------------------------------------------------------------


FULL_CONFIG = {
    "granularity": "channel",
    "target_modules": ["o_proj", "out_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "modules_to_save": ["norm"],
    "init_weights": False,
    "num_attention_heads": 4,
    "head_dim": 12,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
}


@pytest.mark.parametrize("settings", [{}, FULL_CONFIG], ids=["default", "full"])
def test_a_config_survives_files_pickling_and_copying(settings, tmp_path):
    config = SealConfig(**settings)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SEAL" and saved["sites"] == config.to_dict()["sites"]
    for other in (
        SealConfig.from_pretrained(tmp_path),
        PeftConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        copy.copy(config),
    ):
        assert type(other) is SealConfig
        assert other.to_dict() == {**config.to_dict(), "inference_mode": other.inference_mode}
        assert other.peft_type is PeftType.SEAL


def test_a_file_of_a_later_version_with_more_fields_still_loads(tmp_path):
    SealConfig(granularity="channel").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_the_future": 1}))
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert SealConfig.from_pretrained(tmp_path).granularity == "channel"


def test_one_config_object_serves_several_models():
    config = SealConfig()
    for name in ("llama", "deepseek_v3", "llama"):
        assert len(seal_layers(get_peft_model(base_model(name), copy.deepcopy(config)))) == 2
    reused = SealConfig(target_modules=["o_proj"])
    for name in ("llama", "deepseek_v3"):
        assert len(seal_layers(get_peft_model(base_model(name), reused))) == 2


def test_seal_is_a_member_of_the_enum_like_any_other():
    member = PeftType.SEAL
    assert type(member) is PeftType and member in list(PeftType)
    assert member is PeftType("SEAL") is PeftType["SEAL"] is pickle.loads(pickle.dumps(member))
    assert (member.name, member.value, str.__str__(member)) == ("SEAL", "SEAL", "SEAL")
    assert json.dumps(member) == '"SEAL"'
    assert len({type_.value for type_ in PeftType}) == len(list(PeftType)) == len(PeftType.__members__)


def test_registering_again_changes_nothing():
    before = (list(PeftType), dict(peft.PEFT_TYPE_TO_CONFIG_MAPPING), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING))
    seal_peft.tuner.register(print)
    assert SealConfig._describe is not print
    assert before == (list(PeftType), dict(peft.PEFT_TYPE_TO_CONFIG_MAPPING), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING))
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SEAL] is SealConfig


def test_a_method_of_the_same_name_is_not_overwritten(monkeypatch):
    class Other:
        """What PEFT might ship one day."""

    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SEAL, Other)
    with pytest.raises(RuntimeError, match=r"already has a method named SEAL \(.*Other\).*import only one of the two"):
        seal_peft.tuner.register(print)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SEAL] is Other


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


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both_granularities
def test_offsets_stay_fp32_on_a_base_of_any_dtype(dtype, granularity, tmp_path):
    base = base_model("llama").to(dtype)
    model = get_peft_model(copy.deepcopy(base), SealConfig(granularity=granularity))
    draw_scales(model)
    model.add_adapter("other", SealConfig())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.load_adapter(tmp_path, "third")
    for tensor in [*offsets(model), *offsets(model, "other"), *offsets(loaded), *offsets(loaded, "third")]:
        assert tensor.dtype == torch.float32
    assert logits(model).dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    loss_of(model).backward()
    assert all(offset.grad.dtype == torch.float32 for offset in offsets(model))


def test_offsets_take_the_dtype_of_the_base_where_that_is_asked_for():
    model = get_peft_model(base_model("llama").bfloat16(), SealConfig(), autocast_adapter_dtype=False)
    assert all(offset.dtype == torch.bfloat16 for offset in offsets(model))
    assert torch.equal(logits(model), logits(base_model("llama").bfloat16()))


def test_a_whole_model_can_be_cast():
    model = adapted("llama").to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert_close(logits(model).float(), logits(adapted("llama")), rtol=0, atol=0.3)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_works(base_dtype):
    model = adapted("llama")
    model.base_model.model.to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    assert all((offset.grad != 0).any() for offset in offsets(model))


# -- training ---------------------------------------------------------------------------------------------------------


@some_models
@both_granularities
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(name, granularity, use_reentrant):
    def gradients(checkpointed):
        model = adapted(name, granularity)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            # transformers is renaming it: the old name warns, the new one is missing in older versions.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        calls = []
        for layer in seal_layers(model).values():
            layer.register_forward_hook(lambda *_: calls.append(1))
        model(input_ids=INPUT_IDS, use_cache=False).logits.square().mean().backward()
        assert len(calls) == (4 if checkpointed else 2), "each of the two layers runs again only when checkpointed"
        return [offset.grad for offset in offsets(model)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert (plain != 0).all()
        assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_weight_decay_alone_leaves_every_scale_at_one(optimizer_class):
    model = get_peft_model(base_model("llama"), SealConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trained, lr=0.1, weight_decay=0.1)
    for _ in range(10):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all((scale == 1).all() for scale in scales(model).values())


def test_weight_decay_pulls_a_scale_towards_one():
    model = adapted("llama")
    distance = [offset.detach().abs().clone() for offset in offsets(model)]
    optimizer = torch.optim.AdamW(offsets(model), lr=0.1, weight_decay=0.1)
    for offset in offsets(model):
        offset.grad = torch.zeros_like(offset)
    optimizer.step()
    assert all((offset.abs() < before).all() for offset, before in zip(offsets(model), distance, strict=True))


def test_training_moves_the_scales_and_nothing_else():
    model = get_peft_model(base_model("llama"), SealConfig(granularity="channel"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(offsets(model), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "seal_delta" in key}


def test_a_frozen_adapter_passes_gradients_on_after_inference_mode(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    with torch.inference_mode():
        model(input_ids=INPUT_IDS)
    embedded = model.get_input_embeddings()(INPUT_IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert (embedded.grad != 0).any()


# -- compiling and generating -----------------------------------------------------------------------------------------


# torch 2.13's dynamo does this itself when it traces any `torch.autograd.Function`.
traced_by_dynamo = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@traced_by_dynamo
@both_granularities
def test_a_compiled_model_is_one_graph_with_the_same_results(granularity):
    torch.compiler.reset()
    model = adapted("llama", granularity)
    loss_of(model).backward()
    expected = [offset.grad.clone() for offset in offsets(model)]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled), logits(model), rtol=0, atol=1e-5)
    loss_of(compiled).backward()
    for offset, gradient in zip(offsets(model), expected, strict=True):
        assert_close(offset.grad, gradient, rtol=1e-4, atol=1e-6)


@traced_by_dynamo
def test_a_compiled_bf16_model_sees_new_scales():
    torch.compiler.reset()
    model = adapted("llama").to(torch.bfloat16).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = logits(compiled)
    draw_scales(model, seed=5)
    assert (logits(compiled) - before).abs().max() > 0.1
    assert_close(logits(compiled), logits(model), rtol=0, atol=0.05)


@some_models
@both_granularities
def test_generating_with_a_cache_equals_generating_without(name, granularity):
    model = adapted(name, granularity, seed=3)  # drawn so that greedy tokens differ from the base's
    settings = {
        "attention_mask": torch.ones_like(INPUT_IDS),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = model.generate(input_ids=INPUT_IDS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=INPUT_IDS, use_cache=False, **settings))
    assert cached.shape == (2, 14)
    assert not torch.equal(cached, base_model(name).generate(input_ids=INPUT_IDS, **settings))
    merged = model.merge_and_unload()
    assert torch.equal(cached, merged.generate(input_ids=INPUT_IDS, **settings))


# -- the scale that inference keeps between calls ---------------------------------------------------------------------


def step_with(**settings):
    def change(model):
        trained = offsets(model)
        for offset in trained:
            offset.requires_grad_(True)
            offset.grad = torch.ones_like(offset)
        torch.optim.AdamW(trained, lr=0.3, **settings).step()

    return change


def train_between_frozen_calls(model):
    step = step_with(fused=True)
    for offset in offsets(model):
        offset.requires_grad_(True)
    loss_of(model).backward()
    step(model)
    for offset in offsets(model):
        offset.requires_grad_(False)


def load_state(model):
    model.load_state_dict(
        {key: value + 0.3 if "seal_delta" in key else value for key, value in model.state_dict().items()}
    )


def assign_state(model):
    state = {key: value + 0.3 for key, value in model.state_dict().items() if "seal_delta" in key}
    model.load_state_dict(state, strict=False, assign=True)


def switch(model):
    model.set_adapter("other")


def cast(model):
    model.to(torch.bfloat16)


def weaken(model):
    for layer in seal_layers(model).values():
        layer.seal_alpha["default"] = 0.5


def replace_parameter(model):
    for layer in seal_layers(model).values():
        shape = layer.seal_delta["default"].weight.shape
        layer.seal_delta["default"].weight = None  # frees the address for the new tensor
        layer.seal_delta["default"].weight = nn.Parameter(torch.full(shape, 0.7), requires_grad=False)


def replace_data(model):
    for offset in offsets(model):
        offset.data = torch.full_like(offset, 0.7)


def delete_and_add_again(model):
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", SealConfig())
    draw_scales(model, seed=8)
    model.set_adapter("default")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        step_with(foreach=False),
        step_with(foreach=True),
        step_with(fused=True),
        train_between_frozen_calls,
        load_state,
        assign_state,
        switch,
        cast,
        weaken,
        replace_parameter,
        replace_data,
        delete_and_add_again,
    ],
    ids=lambda change: change.__qualname__.partition(".")[0] if callable(change) else None,
)
def test_inference_never_uses_a_scale_of_before_the_change(change, frozen):
    model = adapted("llama")
    model.add_adapter("other", SealConfig())
    draw_scales(model, "other", seed=4)
    if frozen:
        model.requires_grad_(False)
    before = logits(model)
    assert torch.equal(logits(model), before)
    change(model)
    after = logits(model)
    # Merging reads the parameters themselves.
    expected = logits(copy.deepcopy(model).merge_and_unload())
    assert_close(after.float(), expected.float(), rtol=0, atol=1e-5 if after.dtype == torch.float32 else 0.25)
    assert (after - before).abs().max() > (0.05 if after.dtype == torch.float32 else 0)


def test_scales_have_the_same_names_whatever_is_wrapped_around_the_model():
    model = adapted("llama")
    names = set(scales(model))
    compiled = torch.compile(model, backend="eager")
    for outer in (model.base_model, model.get_base_model(), compiled):
        assert set(scales(outer)) == names
    assert names == set(ARCHITECTURES["llama"].projections)
