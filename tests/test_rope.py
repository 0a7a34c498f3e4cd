"""RoPE on a loaded model: applied as if built so, put back bit for bit, carried by adapters and merged models."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import models
import seal_peft
from models import draw_scales
from seal_peft import SealConfig
from seal_peft.context.rope import apply_rope, read_rope
from versions import longrope_per_layer_type

# Positions beyond `max_position_embeddings` and `original_max_position_embeddings`, so that every type shows.
LONG = torch.arange(1, 49).remainder(63).unsqueeze(0)
YARN = {"rope_type": "yarn", "factor": 4.0}
NTK = {"rope_type": "ntk", "factor": 4.0}

TYPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {**YARN, "beta_fast": 16.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
HERE = sorted({"default", *ROPE_INIT_FUNCTIONS} & set(TYPES))


def logits(model, ids=LONG):
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapted(base, **kwargs):
    """Give a base an adapter with drawn scales."""
    model = get_peft_model(base, SealConfig(**kwargs))
    draw_scales(model)
    return model.eval()


def llama(**kwargs):
    return models.llama(**{"max_position_embeddings": 32, **kwargs})


def gemma3(**kwargs):
    return models.gemma3(**{"max_position_embeddings": 32, "sliding_window": 16, **kwargs})


def phi3(**kwargs):
    sizes = {"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 32, "original_max_position_embeddings": 32}
    return models.causal(tf.Phi3Config, **{**sizes, "partial_rotary_factor": 0.5, **kwargs})


def phi3_longrope(factor):
    return {
        "rope_type": "longrope",
        "factor": factor,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }


def built(build, rope):
    """Build a model from a config with the parameters that `read_rope` gives."""
    rope = copy.deepcopy(rope)
    return build(max_position_embeddings=rope.pop("max_position_embeddings"), rope_parameters=rope)


def apply_and_compare(build, request):
    """Check the three promises: as if built so, restored bit for bit, and other than before."""
    model, plain = build(), logits(build())
    before = read_rope(model)
    applied = apply_rope(model, request)
    now = read_rope(model)
    assert json.loads(json.dumps(now)) == now
    # Twice: dynamic frequencies grow with the first input.
    expected = built(build, now)
    for ids in (LONG, LONG[:, :8]):
        assert torch.equal(logits(model, ids), logits(expected, ids))
    assert not torch.equal(logits(model), plain)
    applied.restore()
    assert read_rope(model) == before
    assert torch.equal(logits(model), plain)
    assert model.state_dict().keys() == build().state_dict().keys()
    return now


# -- on a loaded model ------------------------------------------------------------------------------------------------


def test_every_type_of_this_transformers_is_tested():
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == set(HERE)


@pytest.mark.parametrize("kind", HERE)
def test_applying_to_llama_equals_building(kind):
    now = apply_and_compare(llama, TYPES[kind])
    assert now["rope_type"] == kind
    # Engines multiply the maximum of `linear` and `dynamic` by the factor themselves.
    maximum = 32 if kind in ("default", "dynamic", "linear", "proportional") else 128
    assert now["max_position_embeddings"] == maximum
    assert now.get("original_max_position_embeddings", 32) == 32


def test_ntk_raises_the_base():
    now = apply_and_compare(llama, NTK)
    theta = 10000.0 * 4 ** (12 / 10)
    assert now == {"rope_type": "default", "rope_theta": theta, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    "request_", [NTK, phi3_longrope(4.0), {"rope_type": "default", "rope_theta": 500.0}], ids=["ntk", "long", "theta"]
)
def test_applying_to_phi3_with_partial_rotation_equals_building(request_):
    now = apply_and_compare(phi3, request_)
    assert now["partial_rotary_factor"] == 0.5
    if request_ is NTK:
        assert now["rope_theta"] == 10000.0 * 4 ** (8 / 6)


def test_phi3_takes_its_native_length_from_the_request():
    request = {**phi3_longrope(4.0), "original_max_position_embeddings": 16}
    model = phi3()
    apply_rope(model, request)
    assert model.config.original_max_position_embeddings == 16
    other = {"rope_type": "longrope", **read_rope(model)}
    longest = other.pop("max_position_embeddings")
    expected = phi3(max_position_embeddings=longest, original_max_position_embeddings=16, rope_parameters=other)
    assert longest == 64
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=longrope_per_layer_type if k == "longrope" else ()) for k in HERE]
)
def test_applying_per_layer_type_to_gemma3_equals_building(kind):
    other = {"rope_type": "linear", "factor": 2.0}
    now = apply_and_compare(gemma3, {"full_attention": TYPES[kind], "sliding_attention": other})
    assert now["full_attention"]["rope_type"] == kind
    assert now["sliding_attention"] == {**other, "rope_theta": 10000.0}
    assert now["full_attention"]["rope_theta"] == TYPES[kind].get("rope_theta", 1_000_000.0)


def test_parameters_without_a_layer_type_are_for_full_attention():
    own = read_rope(gemma3())
    now = apply_and_compare(gemma3, NTK)
    assert now["sliding_attention"] == own["sliding_attention"]
    assert now["full_attention"]["rope_theta"] == 1_000_000.0 * 4 ** (12 / 10)


def test_a_model_that_is_extended_already_can_be_extended_differently():
    own = {**YARN, "original_max_position_embeddings": 32, "rope_theta": 10000.0}

    def yarn(**kwargs):
        return llama(**{"max_position_embeddings": 128, "rope_parameters": dict(own), **kwargs})

    now = apply_and_compare(yarn, {"rope_type": "linear", "factor": 8.0})
    assert (now["rope_type"], now["max_position_embeddings"]) == ("linear", 32)
    assert apply_and_compare(yarn, {"factor": 8.0, "max_position_embeddings": 256})["rope_type"] == "yarn"


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_known_architecture_can_be_extended_and_restored(name):
    model, ids = models.base_model(name), models.INPUT_IDS
    if read_rope(model) is None:
        assert not getattr(model.config.get_text_config(), "rope_parameters", None)
        return
    before, plain = read_rope(model), logits(model, ids)
    if name == "gpt_neox":  # its tiny heads rotate two channels, and NTK leaves the fastest pair alone
        with pytest.raises(ValueError, match="needs more than 2 rotated channels"):
            apply_rope(model, NTK)
    applied = apply_rope(model, TYPES["linear"] if name == "gpt_neox" else NTK)
    assert not torch.equal(logits(model, ids), plain)
    applied.restore()
    assert read_rope(model) == before
    assert torch.equal(logits(model, ids), plain)


def test_only_the_language_part_of_a_multimodal_model_is_touched():
    model = models.ARCHITECTURES["qwen2_5_vl"].build()
    vision = [p.clone() for n, p in model.named_buffers() if "visual" in n]
    applied = apply_rope(model, NTK)
    assert read_rope(model)["mrope_section"] == [1, 1, 2]
    assert all(map(torch.equal, vision, [p for n, p in model.named_buffers() if "visual" in n]))
    applied.restore()
    assert read_rope(model)["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"rope_type": "spiral"}, "'spiral' is not known.*'ntk'"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 is not allowed"),
        ({"rope_type": "linear", "factor": True}, "factor=True is not allowed"),
        ({"rope_type": "ntk"}, "takes a factor"),
        ({**NTK, "beta_fast": 3}, "takes a factor"),
        (
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0] * 5},
            "must have 6 numbers",
        ),
        ({"full_attention": YARN}, "one RoPE for all layers"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5, "factor": "x"}, "factor='x'"),
    ],
)
def test_what_cannot_be_applied_is_refused_and_changes_nothing(request_, words):
    model = llama()
    before, plain = model.config.to_dict(), logits(model)
    with pytest.raises(ValueError, match=words):
        apply_rope(model, request_)
    assert model.config.to_dict() == before
    assert torch.equal(logits(model), plain)


def test_a_type_that_rotates_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="rotates another number of channels"):
        apply_rope(models.base_model("gemma4"), TYPES["linear"])


def test_unknown_layer_types_and_types_that_a_model_renames_are_refused():
    with pytest.raises(ValueError, match="No RoPE for the layer types"):
        apply_rope(gemma3(), {"middle_attention": YARN})
    with pytest.raises(ValueError, match="cannot be built"):
        apply_rope(phi3(), YARN)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_models_without_rope_say_so(name):
    model = models.base_model(name)
    assert read_rope(model) is None
    with pytest.raises(ValueError, match="no rotary position embedding"):
        apply_rope(model, YARN)
    assert get_peft_model(model, SealConfig()).peft_config["default"].base_rope is None
    with pytest.raises(ValueError, match="no rotary position embedding"):
        get_peft_model(models.base_model(name), SealConfig(rope_parameters=YARN))


def test_attention_that_depends_on_mscale_is_refused():
    model = models.ARCHITECTURES["deepseek_v3"].build()
    apply_rope(model, YARN).restore()
    with pytest.raises(ValueError, match="mscale_all_dim"):
        apply_rope(model, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})


def test_restoring_puts_back_fp32_frequencies_whatever_happened_to_the_weights():
    model = llama()
    before = model.model.rotary_emb.inv_freq.clone()
    applied = apply_rope(model, YARN)
    model.to(torch.bfloat16)
    applied.restore()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


# -- in an adapter ----------------------------------------------------------------------------------------------------


def extended(request=YARN, build=llama, adapter_name="default", **kwargs):
    """An adapter with drawn scales that asks for RoPE."""
    model = get_peft_model(build(), SealConfig(rope_parameters=request, **kwargs), adapter_name)
    draw_scales(model)
    return model.eval()


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
    with pytest.raises(ValueError, match="cannot be built"):
        get_peft_model(model, SealConfig(rope_parameters={**YARN, "beta_fast": "x"}))
    assert [type(module) for module in model.modules()] == modules
    with pytest.raises(ValueError, match="rope_parameters='yarn' is not allowed"):
        SealConfig(rope_parameters="yarn")


# -- in and out of force ----------------------------------------------------------------------------------------------


def test_disabling_gives_the_base_back_bit_for_bit():
    model, plain = extended(), logits(llama())
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert read_rope(model) == read_rope(llama())
    assert torch.equal(logits(model), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), plain)


def test_unloading_and_deleting_give_the_base_back_bit_for_bit():
    plain = logits(llama())
    model = extended()
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert read_rope(unloaded) == read_rope(llama())
    assert "_position_switch" not in vars(unloaded)
    again = get_peft_model(unloaded, SealConfig())
    assert torch.equal(logits(again), plain)
    model = extended()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), plain)


EVERY = {
    **{kind: (llama, TYPES[kind]) for kind in HERE},
    "ntk": (llama, NTK),
    "each layer type": (gemma3, {"full_attention": YARN, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
    "part of the channels": (phi3, phi3_longrope(4.0)),
}


BARE = ("ntk", "longrope", "each layer type", "part of the channels")


@pytest.mark.parametrize(("name", "scales"), [*((name, True) for name in EVERY), *((name, False) for name in BARE)])
def test_every_type_is_loaded_and_undone_bit_for_bit_and_merged(name, scales, tmp_path):
    build, request_ = EVERY[name]
    plain = logits(build())
    model = get_peft_model(build(), SealConfig(sites=("output",) if scales else (), rope_parameters=request_))
    if scales:
        draw_scales(model)
    expected, rope = logits(model.eval()), read_rope(model)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert read_rope(loaded) == rope
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded.base_model.model), plain)
    base = build()
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base), expected)
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    base.delete_adapter("default")
    assert torch.equal(logits(base), plain)
    merged = PeftModel.from_pretrained(build(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read_rope(again) == rope
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert unloaded.config.to_dict() == build().config.to_dict()


def told(make):
    """Return what `make` gives, and its user warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = make()
    return result, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def switching():
    """A model with four adapters: two under the same YaRN, one under NTK, one under the base's RoPE."""
    model = extended(YARN, adapter_name="yarn")
    model.add_adapter("yarn too", SealConfig(rope_parameters=dict(YARN)))
    model.add_adapter("ntk", SealConfig(rope_parameters=NTK))
    model.add_adapter("plain", SealConfig())
    for seed, name in enumerate(model.peft_config):
        draw_scales(model, name, seed)
    return model.eval()


def alone(model, name, request):
    """The logits of one adapter by itself in a fresh base."""
    other = get_peft_model(llama(), SealConfig(rope_parameters=request))
    for own, layer in zip(models.seal_layers(model).values(), models.seal_layers(other).values(), strict=True):
        layer.offset("default").data.copy_(own.offset(name).data)
    return logits(other)


def test_switching_adapters_switches_the_rope():
    model = switching()
    for name, request in {"yarn": YARN, "plain": None, "ntk": NTK, "yarn too": YARN}.items():
        expected = alone(model, name, request)
        for _ in range(2):
            model.set_adapter(name)
            assert torch.equal(logits(model), expected), name
            with model.disable_adapter():
                assert torch.equal(logits(model), logits(llama()))
    model.delete_adapter("yarn")
    assert torch.equal(logits(model), alone(model, "yarn too", YARN))
    assert model.peft_config["plain"].base_rope == read_rope(llama())


def test_two_with_the_same_rope_act_together_and_two_with_different_ones_are_refused():
    model = switching()
    model.base_model.set_adapter(["yarn", "yarn too"])
    both = logits(model)
    for names in (["yarn", "ntk"], ["ntk", "plain"]):
        with pytest.raises(ValueError, match="one RoPE at a time"):
            model.base_model.set_adapter(names)
        with pytest.raises(ValueError, match="one RoPE at a time"):
            seal_peft.activate(model, names)
        with pytest.raises(ValueError, match="one RoPE at a time"):
            model.add_weighted_adapter(names, [0.5, 0.5], "sum")
    assert model.base_model.active_adapters == ["yarn", "yarn too"]
    assert torch.equal(logits(model), both)
    with pytest.raises(ValueError, match="one RoPE at a time"):
        model.merge_adapter(["ntk"])
    assert torch.equal(logits(model), both)


def test_layers_that_disagree_do_not_run():
    model = switching()
    list(models.seal_layers(model).values())[-1].set_adapter("plain")
    with pytest.raises(RuntimeError, match="Layers of this model use adapters with different RoPE"):
        logits(model)
    model.set_adapter("ntk")
    assert torch.equal(logits(model), alone(model, "ntk", NTK))


def test_a_batch_has_one_rope():
    model = switching()
    rows = LONG.repeat(2, 1)
    model.set_adapter("plain")
    plain = logits(model)
    mixed = model(input_ids=rows, adapter_names=["yarn", "yarn too"]).logits.detach()
    for row, name in enumerate(["yarn", "yarn too"]):
        torch.testing.assert_close(mixed[row : row + 1], alone(model, name, YARN), atol=1e-4, rtol=1e-4)
    for names in (["yarn", "ntk"], ["yarn", "__base__"], ["plain", "ntk"]):
        with pytest.raises(ValueError, match="one RoPE at a time"):
            model(input_ids=rows, adapter_names=names)
    model(input_ids=rows, adapter_names=["plain", "__base__"])
    assert torch.equal(logits(model), plain)
    generated = model.generate(input_ids=LONG, adapter_names=["yarn"], max_new_tokens=4, do_sample=False)
    model.set_adapter("yarn")
    assert torch.equal(generated, model.generate(input_ids=LONG, max_new_tokens=4, do_sample=False))


def test_a_weighted_sum_keeps_the_rope_of_its_parts():
    model = switching()
    model.add_weighted_adapter(["yarn", "yarn too"], [1.0, 0.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), alone(model, "yarn", YARN))


def test_hotswap_and_ia3_refuse_what_they_would_lose(tmp_path):
    extended().save_pretrained(tmp_path / "yarn")
    with pytest.raises(ValueError, match="asks for RoPE"):
        seal_peft.hotswap_adapter(adapted(llama()), tmp_path / "yarn")
    seal_peft.hotswap_adapter(extended(), tmp_path / "yarn")
    for source in (extended(), tmp_path / "yarn"):
        with pytest.raises(ValueError, match="an IA3 folder cannot carry"):
            seal_peft.export_ia3(source, tmp_path / "ia3")


def test_copies_and_pickles_switch_on_their_own():
    model = switching()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_adapter("plain")
        assert torch.equal(logits(other), alone(other, "plain", None))
        assert torch.equal(logits(model), expected)


def test_it_trains_under_its_rope_with_checkpointing():
    model = extended()
    model.train()
    ids = LONG
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    wanted = [layer.offset("default").grad.clone() for layer in models.seal_layers(model).values()]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for grad, layer in zip(wanted, models.seal_layers(model).values(), strict=True):
        torch.testing.assert_close(layer.offset("default").grad, grad)


def test_beside_lora_the_rope_is_that_of_seal():
    model = extended()
    expected = logits(model)
    model = seal_peft.add_beside(model, LoraConfig(target_modules=["q_proj", "o_proj"]), "style")
    assert torch.equal(logits(model), expected)
    seal_peft.activate(model, ["style"])
    assert torch.equal(logits(model), logits(llama()))
    seal_peft.activate(model, ["style", "default"])
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(llama()))


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
