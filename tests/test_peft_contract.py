"""What PEFT's own suite asks of every method, for SEAL over decoders and a model that is not from transformers.

PEFT's test (`tests/testing_common.py`, then `tests/test_custom_models.py`) -> ours. Names without a file are below;
`verbs` is `test_peft_verbs.py` and `test_training.py`, `arch` `test_architectures.py`, `rest`
`test_peft_contract_more.py`.

    model_attr, adapter_name           -> test_parameters_and_files_carry_the_name_of_the_adapter
    prepare_for_training               -> rest: test_a_prepared_model_passes_gradients_to_its_inputs
    load_model_low_cpu_mem_usage       -> test_loading_through_the_meta_device_gives_the_same_model
    save_pretrained                    -> test_both_file_formats_hold_the_same; card and config: verbs
    save_pretrained_selected_adapters, .._adapter_name_substring
                                       -> test_names_that_contain_each_other_stay_apart
    from_pretrained_config_construction, load_multiple_adapters
                                       -> test_a_config_that_is_passed_is_used_and_more_adapters_load
    merge_layers, .._fp16, .._is_idempotent, safe_merge
                                       -> test_merging_keeps_the_results (arch and test_merge.py for exactness)
    merge_layers_nan                   -> test_a_safe_merge_refuses_nan
    merge_layers_multi, TestMultipleActiveAdapters.* (sequential merges)
                                       -> rest: test_any_adapters_merge_and_unmerge_together_or_one_by_one
    mixed_adapter_batches, generate_with_mixed_.._and_beam_search
                                       -> rest: test_rows_of_a_batch_have_adapters_of_their_own; test_mixed_batch.py
    generate, .._pos_args, .._half_prec -> rest: test_generation_takes_every_kind_of_call; verbs
    training, test_only_params_are_updated, test_forward_output_finite
                                       -> rest: test_one_step_moves_the_scales_and_nothing_else; arch
    inference_safetensors, test_save_load_roundtrip, test_parameters_after_loading_model
                                       -> test_both_file_formats_hold_the_same; arch
    training_layer_indexing            -> rest: test_fewer_layers_train_fewer_parameters; verbs
    training_gradient_checkpointing    -> verbs
    peft_model_device_map              -> test_loading_takes_a_device_map
    training_prompt_learning_tasks     -> (prompt learning only)
    delete_adapter, .._inactive_.., .._unknown_.., test_delete_adapter_properly_cleans_up_after_itself
                                       -> test_deleting_leaves_nothing_behind
    unload_adapter                     -> test_unloading_leaves_no_trace_of_peft
    weighted_combination_of_adapters   -> rest: test_adapters_combine_with_negative_weights; test_combine.py
    disable_adapter, test_disable_adapters(_with_merging)
                                       -> test_disabling_gives_the_base_merged_or_not
    adding_multiple_adapters_with_bias_raises, test_disable_adapter_with_bias_warns
                                       -> (only where there is a `bias` setting)
    passing_input_embeds_works         -> rest: test_embeddings_can_be_passed
    lora_conversion                    -> test_a_product_is_not_offered_as_a_lora
    get_base_model_state_dict          -> test_the_state_of_the_base_goes_out_and_in
    test_in_features_out_features_exposed -> test_wrapped_layers_tell_their_sizes
    test_forward_(b)float16(_no_autocast), test_adapter_dtype_autocast
                                       -> rest: test_no_dtype_clashes_and_offsets_have_the_dtype_asked_for
    test_disable_adapters_exiting_context_restores_(previous|irregular)_state, test_active_adapter
                                       -> rest: test_leaving_a_context_restores_what_was_active
    test_set_requires_grad, TestRequiresGrad
                                       -> rest: test_only_what_was_asked_for_requires_gradients
    test_set_adapter_non_overlapping_modules
                                       -> rest: test_adapters_of_different_layers_switch_cleanly
    test_delete_merged_adapter_raises_without_mutation, .._only_rejects_the_merged_one
                                       -> rest: test_only_a_merged_adapter_cannot_be_deleted
    test_multiple_active_adapters_with_{same,overlapping,different}_modules_to_save_*
                                       -> rest: test_whole_modules_belong_to_one_active_adapter
    test_adapter_name_makes_no_difference
                                       -> test_parameters_and_files_carry_the_name_of_the_adapter
    TestDefaultTargetModules           -> arch: test_an_unknown_model_is_refused_with_what_was_found_..
    TestMixedAdapterBatches            -> test_mixed_batch.py; rest: test_rows_may_have_adapters_of_other_layers
    TestPeftFsdpStateDict              -> (several GPUs)
"""

import math

import pytest
import torch
import transformers as tf
from peft import PeftModel
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file
from torch.testing import assert_close

from custom_model import CASES, DECODERS, adapt, base, cases, result, sites
from models import base_model, logits, seal_layers
from seal_peft import SealConfig, SealLayer
from seal_peft.tuner.weights import take_settings

every_model = pytest.mark.parametrize("name", CASES)
every_decoder = pytest.mark.parametrize("name", DECODERS)
both_granularities = pytest.mark.parametrize("granularity", ["head", "channel"])


def trained(model):
    return {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}


# -- creating, saving, loading ----------------------------------------------------------------------------------------


@cases()
def test_parameters_and_files_carry_the_name_of_the_adapter(name, granularity, tmp_path):
    model = adapt(name, granularity, adapter_name="mine")
    keys = list(trained(model))
    assert len(keys) == 2 * sites(granularity) and all(key.endswith(".seal_delta.mine.weight") for key in keys)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "README.md"}
    saved = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert sorted(take_settings(saved)[0]) == sorted(key.replace(".mine", "") for key in keys)
    loaded = PeftModel.from_pretrained(base(name), tmp_path / "mine", adapter_name="yours")
    assert torch.equal(result(loaded), result(model)), "a name makes no difference"


@cases()
def test_wrapped_layers_tell_their_sizes(name, granularity):
    for key, layer in seal_layers(adapt(name, granularity)).items():
        weight = base(name).get_submodule(key).weight
        inputs, outputs = weight.shape if name == "gpt2" else weight.shape[::-1] if weight.dim() == 2 else (48, 48)
        assert (layer.in_features, layer.out_features) == (inputs, outputs)
        if name != "gpt2" or layer.site == "output":  # GPT-2's queries share their projection with keys and values
            assert math.prod(layer.geometry) == (inputs if layer.site == "output" else outputs)


@cases()
def test_loading_through_the_meta_device_gives_the_same_model(name, granularity, tmp_path):
    model = adapt(name, granularity)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for adapter_name in ("default", "other"):
        loaded.set_adapter(adapter_name)
        assert torch.equal(result(loaded), result(model))


@cases()
def test_both_file_formats_hold_the_same(name, granularity, tmp_path):
    model = adapt(name, granularity)
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert {path.name for path in (tmp_path / "pickle").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.bin",
    }
    safe = load_file(tmp_path / "safe" / "adapter_model.safetensors")
    pickled = torch.load(tmp_path / "pickle" / "adapter_model.bin", weights_only=True)
    assert safe.keys() == pickled.keys()
    assert all(torch.equal(value, pickled[key]) for key, value in safe.items())
    for folder in ("safe", "pickle"):
        loaded = PeftModel.from_pretrained(base(name), tmp_path / folder)
        assert torch.equal(result(loaded), result(model))


@cases()
def test_names_that_contain_each_other_stay_apart(name, granularity, tmp_path):
    names = ["my", "my_task", "task", "seal_delta2"]
    model = adapt(name, granularity, adapter_name=names[0])
    for seed, adapter_name in enumerate(names[1:], start=5):
        adapt(name, granularity, adapter_name=adapter_name, model=model, seed=seed)
    model.save_pretrained(tmp_path, selected_adapters=names[1:])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(names[1:])
    with pytest.raises(ValueError, match="typo"):
        model.save_pretrained(tmp_path, selected_adapters=["typo"])
    for adapter_name in names[1:]:
        model.set_adapter(adapter_name)
        saved, _ = take_settings(load_file(tmp_path / adapter_name / "adapter_model.safetensors"))
        assert len(saved) == 2 * sites(granularity) and all(key.endswith(".seal_delta.weight") for key in saved)
        assert torch.equal(result(PeftModel.from_pretrained(base(name), tmp_path / adapter_name)), result(model))


def test_an_adapter_named_like_a_module_never_empties_the_file_of_another(tmp_path):
    model = adapt("llama", adapter_name="o_proj")
    expected = result(model)
    model.save_pretrained(tmp_path / "alone")
    assert torch.equal(result(PeftModel.from_pretrained(base("llama"), tmp_path / "alone" / "o_proj")), expected)
    adapt("llama", adapter_name="other", model=model)
    with pytest.raises(ValueError, match="'other' cannot be saved beside an adapter named 'o_proj'"):
        model.save_pretrained(tmp_path / "both")
    model.set_adapter("other")
    model.delete_adapter("o_proj")
    adapt("llama", adapter_name="seal_delta", model=model)
    with pytest.raises(ValueError, match="'other' cannot be saved beside an adapter named 'seal_delta'"):
        model.save_pretrained(tmp_path / "both")


@cases()
def test_a_config_that_is_passed_is_used_and_more_adapters_load(name, granularity, tmp_path):
    expected = {}
    for seed in (1, 2, 3):
        model = adapt(name, granularity, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        expected[str(seed)] = result(model)
    config = SealConfig.from_pretrained(tmp_path / "1")
    loaded = PeftModel.from_pretrained(base(name), tmp_path / "1", adapter_name="1", config=config)
    assert loaded.peft_config["1"] is config
    for adapter_name in ("2", "3"):
        assert not loaded.load_adapter(tmp_path / adapter_name, adapter_name).missing_keys
    for adapter_name, logits_alone in expected.items():
        loaded.set_adapter(adapter_name)
        assert loaded.active_adapter == adapter_name
        assert torch.equal(result(loaded), logits_alone)


@cases(DECODERS)
def test_loading_takes_a_device_map(name, granularity, tmp_path):
    model = adapt(name, granularity)
    model.save_pretrained(tmp_path / "adapter")
    base_model(name).save_pretrained(tmp_path / "base")
    mapped = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(mapped, tmp_path / "adapter", device_map={"": "cpu"})
    assert torch.equal(logits(loaded.eval()), logits(model))


@cases()
def test_the_state_of_the_base_goes_out_and_in(name, granularity):
    model = adapt(name, granularity)
    state, plain = get_base_model_state_dict(model), base(name).state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in state.items())
    before = result(model)
    doubled = {key: value * 2 if value.is_floating_point() else value for key, value in state.items()}
    set_base_model_state_dict(model, doubled)
    assert not torch.equal(result(model), before)
    set_base_model_state_dict(model, plain)
    assert torch.equal(result(model), before)


# -- merging, deleting, disabling -------------------------------------------------------------------------------------


@cases(merged=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_keeps_the_results(name, granularity, dtype, tmp_path):
    model = adapt(name, granularity).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    before = result(model)
    model.merge_adapter(safe_merge=True)
    merged = result(model)
    assert_close(merged, before, rtol=0, atol=tolerance)
    assert (merged - result(base(name).to(dtype))).abs().max() > tolerance
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(result(model), merged)
    model.save_pretrained(tmp_path)
    assert_close(result(PeftModel.from_pretrained(base(name).to(dtype), tmp_path)), before, rtol=0, atol=tolerance)
    plain = adapt(name, granularity).to(dtype).merge_and_unload()
    assert torch.equal(result(plain), merged)
    assert all(value.is_contiguous() for value in plain.state_dict().values())


@cases(merged=True)
def test_a_safe_merge_refuses_nan(name, granularity):
    model = adapt(name, granularity)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for layer in seal_layers(model).values():
        with torch.no_grad():
            layer.seal_delta["default"].weight[0] = math.nan
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_and_unload(safe_merge=True)
    after = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items() if "seal_delta" not in key)


@cases()
def test_deleting_leaves_nothing_behind(name, granularity):
    model = adapt(name, granularity)
    first = result(model)
    with pytest.raises(ValueError, match="typo"):
        model.delete_adapter("typo")
    adapt(name, granularity, adapter_name="other", model=model, seed=5)
    model.delete_adapter("other")  # inactive
    assert torch.equal(result(model), first)
    adapt(name, granularity, adapter_name="other", model=model, seed=5)
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(result(model), result(adapt(name, granularity, seed=5)))
    model.delete_adapter("other")  # the last one
    assert not model.peft_config
    assert not any("seal_" in key for key in model.state_dict())
    assert torch.equal(result(model.base_model.model), result(base(name)))
    for layer in model.modules():
        if isinstance(layer, SealLayer):
            per_adapter = [value for value in vars(layer).values() if isinstance(value, (dict, list, set, tuple))]
            assert not any("default" in value or "other" in value for value in per_adapter)


@cases()
def test_unloading_leaves_no_trace_of_peft(name, granularity):
    plain = adapt(name, granularity).unload()
    assert type(plain) is type(base(name))
    assert not hasattr(plain, "peft_config")
    assert not any(isinstance(module, SealLayer) for module in plain.modules())
    assert plain.state_dict().keys() == base(name).state_dict().keys()
    assert torch.equal(result(plain), result(base(name)))


@cases(merged=True)
def test_disabling_gives_the_base_merged_or_not(name, granularity):
    model = adapt(name, granularity)
    before = result(model)
    for prepare in (lambda: None, model.merge_adapter):
        prepare()
        with model.disable_adapter():
            assert torch.equal(result(model), result(base(name)))
        assert_close(result(model), before, rtol=0, atol=1e-4)


def test_a_product_is_not_offered_as_a_lora():
    assert not any(layer.supports_lora_conversion() for layer in seal_layers(adapt("llama")).values())
