"""The rest of the PEFT contract: training, generating, dtypes and several adapters. The list is in its first file."""

import contextlib

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.testing import assert_close

from custom_model import CASES, DECODERS, adapt, base, cases, config, result, sites
from models import INPUT_IDS, base_model, draw_scales, seal_layers
from seal_peft import scales

every_model = pytest.mark.parametrize("name", CASES)


def trained(model):
    return {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}


# -- training and generating ------------------------------------------------------------------------------------------


@cases()
def test_one_step_moves_the_scales_and_nothing_else(name, granularity):
    model = adapt(name, granularity)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss = model(input_ids=INPUT_IDS).logits.square().mean()
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "seal_delta" in key}


@cases()
def test_fewer_layers_train_fewer_parameters(name, granularity):
    every, first = trained(adapt(name, granularity)), trained(adapt(name, granularity, layers_to_transform=[0]))
    assert first.keys() == {key for key in every if ".0." in key} and len(first) == sites(granularity)
    assert all(first[key].shape == every[key].shape for key in first)


@cases(DECODERS)
def test_a_prepared_model_passes_gradients_to_its_inputs(name, granularity):
    prepared = prepare_model_for_kbit_training(base_model(name), use_gradient_checkpointing=False)
    prepared.enable_input_require_grads()
    model = get_peft_model(prepared, config(name, granularity))
    draw_scales(model)
    inputs = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: inputs.append(output))
    model(input_ids=INPUT_IDS).logits.square().mean().backward()
    assert inputs[0].requires_grad
    assert all((parameter.grad != 0).any() for parameter in trained(model).values())


@cases()
def test_embeddings_can_be_passed(name, granularity):
    model = adapt(name, granularity)
    embedded = model.get_input_embeddings()(INPUT_IDS)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, result(model))


@cases(DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_takes_every_kind_of_call(name, granularity, dtype):
    model = adapt(name, granularity, task_type="CAUSAL_LM").to(dtype)
    adapt(name, granularity, adapter_name="other", model=model, seed=5)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(INPUT_IDS, **settings)
    assert alone.shape == (2, 11)
    assert torch.equal(alone, model.generate(input_ids=INPUT_IDS, **settings))
    beams = {**settings, "num_beams": 2}
    mixed = model.generate(input_ids=INPUT_IDS, adapter_names=["default", "other"], **beams)
    if dtype == torch.float32:
        assert torch.equal(mixed[0], model.generate(input_ids=INPUT_IDS, **beams)[0])
        model.set_adapter("other")
        assert torch.equal(mixed[1], model.generate(input_ids=INPUT_IDS, **beams)[1])


# -- dtypes -----------------------------------------------------------------------------------------------------------


@cases()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_no_dtype_clashes_and_offsets_have_the_dtype_asked_for(name, granularity, dtype, autocast, tmp_path):
    model = get_peft_model(base(name).to(dtype), config(name, granularity), autocast_adapter_dtype=autocast)
    model.add_adapter("other", config(name, granularity), autocast_adapter_dtype=autocast)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (True, False):
        name_of_load = f"loaded-{low_cpu_mem_usage}"
        model.load_adapter(
            tmp_path, name_of_load, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage
        )
    offsets = {key: parameter.dtype for key, parameter in model.named_parameters() if "seal_delta" in key}
    assert len(offsets) == 8 * sites(granularity) and set(offsets.values()) == {torch.float32 if autocast else dtype}
    within = torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext()
    with within:
        loss = model(input_ids=INPUT_IDS).logits.float().square().mean()
    assert loss.isfinite()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())


# -- several adapters -------------------------------------------------------------------------------------------------


def with_two(name):
    """Return a model with an adapter per head and one per channel on both layers, the first one active."""
    return adapt(name, "channel", adapter_name="other", model=adapt(name, "head"), seed=5)


@cases(merged=True)
def test_any_adapters_merge_and_unmerge_together_or_one_by_one(name, granularity):
    model = adapt(name, granularity)
    adapt(name, "head", adapter_name="other", model=model, seed=5)
    adapt(name, granularity, adapter_name="third", model=model, seed=6, layers_to_transform=[1])
    names = ["default", "other", "third"]
    alone = {}
    for adapter_name in names:
        model.set_adapter(adapter_name)
        alone[adapter_name] = result(model)
    model.base_model.set_adapter(names)
    together = result(model)
    assert all((together - logits).abs().max() > 1e-3 for logits in alone.values())
    model.merge_adapter(names)
    at_once = result(model)
    assert_close(at_once, together, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(result(model), together)
    model.merge_adapter(["third"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["other"])
    assert_close(result(model), at_once, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    plain = base(name)
    for key, layer in seal_layers(model).items():
        assert torch.equal(layer.base_layer.weight, plain.get_submodule(key).weight)
    for adapter_name in names:
        model.set_adapter(adapter_name)
        assert torch.equal(result(model), alone[adapter_name])


@cases()
def test_rows_of_a_batch_have_adapters_of_their_own(name, granularity):
    model = adapt(name, granularity)
    adapt(name, granularity, adapter_name="other", model=model, seed=5)
    with torch.no_grad():
        mixed = model(input_ids=INPUT_IDS, adapter_names=["other", "__base__"]).logits
    assert_close(mixed[1], result(base(name))[1], rtol=0, atol=1e-5)
    model.set_adapter("other")
    assert_close(mixed[0], result(model)[0], rtol=0, atol=1e-5)


@cases()
def test_adapters_combine_with_negative_weights(name, granularity):
    model = adapt(name, granularity)
    adapt(name, granularity, adapter_name="other", model=model, seed=5)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -0.25], "sum")
    for key, scale in scales(model, "sum").items():
        parts = [scales(model, part)[key] - 1 for part in ("default", "other")]
        assert_close(scale, 1 + 0.5 * parts[0] - 0.25 * parts[1])
    before = result(model)
    model.set_adapter("sum")
    assert not torch.equal(result(model), before)


@every_model
def test_leaving_a_context_restores_what_was_active(name):
    two = with_two(name)
    two.set_adapter("other")
    for adapters in (["other"], ["default", "other"]):
        two.base_model.set_adapter(adapters)
        before, trainable = result(two), set(trained(two))
        with two.disable_adapter():
            assert two.get_model_status().enabled is False
            assert torch.equal(result(two), result(base(name)))
        assert two.get_model_status().enabled is True
        assert two.active_adapters == adapters
        assert set(trained(two)) == trainable
        assert torch.equal(result(two), before)
    first, second = seal_layers(two).values()
    second.enable_adapters(False)  # an irregular state: one layer of two is disabled
    irregular = result(two)
    assert two.get_model_status().enabled == "irregular"
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), two.disable_adapter():
        assert torch.equal(result(two), result(base(name)))
    assert (first.disable_adapters, second.disable_adapters) == (False, False)
    assert not torch.equal(result(two), irregular)


@every_model
def test_only_what_was_asked_for_requires_gradients(name, tmp_path):
    two = with_two(name)

    def trained_names():
        return {key.split(".")[-2] for key in trained(two)}

    assert trained_names() == {"default"}
    two.set_adapter("other")
    assert trained_names() == {"other"}
    two.set_adapter("default", inference_mode=True)
    assert trained_names() == set()
    two.set_requires_grad(["default", "other"])
    assert trained_names() == {"default", "other"}
    two.set_requires_grad("default", requires_grad=False)
    assert trained_names() == {"other"}
    two.base_model.set_adapter(["default", "other"])
    assert trained_names() == {"default", "other"}
    two.save_pretrained(tmp_path)
    two.load_adapter(tmp_path, "frozen")
    assert trained_names() == {"default", "other"}
    two.load_adapter(tmp_path, "trainable", is_trainable=True)
    assert trained_names() == {"default", "other", "trainable"}


@cases(merged=True)
def test_adapters_of_different_layers_switch_cleanly(name, granularity):
    model = adapt(name, granularity, layers_to_transform=[0])
    adapt(name, granularity, adapter_name="other", model=model, seed=5, layers_to_transform=[1])
    for adapter_name, layers, seed in (("other", [1], 5), ("default", [0], 1)):
        model.set_adapter(adapter_name)
        assert torch.equal(result(model), result(adapt(name, granularity, seed=seed, layers_to_transform=layers)))
    model.base_model.set_adapter(["default", "other"])
    both = result(model)
    model.merge_adapter()
    assert_close(result(model), both, rtol=0, atol=1e-5)


@every_model
def test_only_a_merged_adapter_cannot_be_deleted(name):
    two = with_two(name)
    two.merge_adapter(["default"])
    before, keys = result(two), set(two.state_dict())
    with pytest.raises(ValueError, match="merged"):
        two.delete_adapter("default")
    assert set(two.state_dict()) == keys and set(two.peft_config) == {"default", "other"}
    assert torch.equal(result(two), before)
    two.delete_adapter("other")
    assert torch.equal(result(two), before)
    two.unmerge_adapter()
    assert_close(result(two), before, rtol=0, atol=1e-5)


# GPT-2 and OPT tie the two modules that are trained whole here.
@cases(["llama", "qwen2", "qwen3", "gemma3_text", "custom"])
def test_whole_modules_belong_to_one_active_adapter(name, granularity, tmp_path):
    inputs, outputs = ("embed", "head") if name == "custom" else ("embed_tokens", "lm_head")
    model = adapt(name, granularity, modules_to_save=[outputs])
    adapt(name, granularity, adapter_name="same", model=model, seed=5, modules_to_save=[outputs])
    adapt(name, granularity, adapter_name="different", model=model, seed=6, modules_to_save=[inputs])
    wrapper = model.base_model.model.get_submodule(outputs)
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
        wrapper.modules_to_save["same"].weight.mul_(3)
    results = {}
    for adapter_name in ("default", "same", "different"):
        model.set_adapter(adapter_name)
        results[adapter_name] = result(model)
    with pytest.raises(ValueError, match="modules_to_save|Only one adapter"):
        model.base_model.set_adapter(["default", "same"])
    model.base_model.set_adapter(["default", "different"])
    result(model)
    model.save_pretrained(tmp_path)
    for adapter_name, expected in results.items():
        folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
        assert torch.equal(result(PeftModel.from_pretrained(base(name), folder)), expected)


@every_model
def test_rows_may_have_adapters_of_other_layers(name):
    model = adapt(name, "channel", layers_to_transform=[0])
    adapt(name, "head", adapter_name="other", model=model, seed=5, layers_to_transform=[1])
    with torch.no_grad():
        mixed = model(input_ids=INPUT_IDS, adapter_names=["default", "other"]).logits
    assert_close(mixed[0], result(model)[0], rtol=0, atol=1e-5)
    model.set_adapter("other")
    assert_close(mixed[1], result(model)[1], rtol=0, atol=1e-5)
