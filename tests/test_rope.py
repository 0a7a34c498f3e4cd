"""RoPE on a loaded model: applied as if built so, and put back bit for bit."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import models
from rope_models import HERE, LONG, NTK, TYPES, YARN, built, gemma3, llama, logits, phi3, phi3_longrope
from seal_peft import SealConfig
from seal_peft.context.rope import apply_rope, read_rope
from versions import longrope_per_layer_type


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


@pytest.mark.skipif(not hasattr(tf, "Gemma4TextConfig"), reason="younger than the oldest transformers")
def test_ntk_slows_the_slowest_pair_by_its_factor_where_few_channels_rotate():
    now = apply_and_compare(models.gemma4_text, NTK)
    frequencies = []
    for model in (models.gemma4_text(), built(models.gemma4_text, now)):
        kept = model.model.rotary_emb.full_attention_inv_freq
        frequencies.append(kept[kept > 0])
    before, after = frequencies
    assert len(before) == 2 and len(kept) == 10
    torch.testing.assert_close(before[-1] / after[-1], torch.tensor(4.0))
    assert before[0] == after[0]


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


def test_what_a_request_leaves_out_stays_if_the_type_is_that_of_the_model():
    further = {"beta_fast": 16.0, "attention_factor": 1.0, "truncate": False}
    own = {**YARN, **further, "original_max_position_embeddings": 32, "rope_theta": 500.0}

    def yarn(**kwargs):
        return llama(**{"max_position_embeddings": 128, "rope_parameters": dict(own), **kwargs})

    now = apply_and_compare(yarn, {"rope_type": "yarn", "factor": 8.0})
    # The attention factor is that of the other factor.
    kept = {name: value for name, value in own.items() if name != "attention_factor"}
    assert now == {**kept, "factor": 8.0, "max_position_embeddings": 256}
    model = yarn()
    apply_rope(model, {"rope_type": "yarn", "factor": 4.0})
    assert read_rope(model) == {**own, "max_position_embeddings": 128}
    now = apply_and_compare(yarn, {"rope_type": "dynamic", "factor": 8.0})
    assert now == {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 500.0, "max_position_embeddings": 128}


def test_lengths_may_be_whole_floats_as_some_configs_have_them():
    model, other = llama(), llama()
    apply_rope(model, {**YARN, "original_max_position_embeddings": 32.0, "max_position_embeddings": 96.0})
    apply_rope(other, {**YARN, "original_max_position_embeddings": 32, "max_position_embeddings": 96})
    assert read_rope(model) == read_rope(other)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("given", [None, "yarn", ["yarn", 4.0]])
def test_what_is_no_dictionary_is_refused(given):
    with pytest.raises(TypeError, match="is not allowed. Use a dictionary such as"):
        apply_rope(llama(), given)


@pytest.mark.parametrize("kind", [kind for kind in HERE if kind not in ("default", "proportional")])
def test_attention_that_scales_queries_by_the_native_length_keeps_it(kind):
    own = {**YARN, "original_max_position_embeddings": 16, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}

    def ministral(**kwargs):
        return models.causal(
            tf.Ministral3Config,
            **{"head_dim": 12, "max_position_embeddings": 64, "rope_parameters": dict(own), **kwargs},
        )

    now = apply_and_compare(ministral, {**TYPES[kind], "factor": 8.0})
    assert now["original_max_position_embeddings"] == 16
    assert now["llama_4_scaling_beta"] == 0.1


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
        ({"rope_type": "yarn"}, r"'yarn' does not work without \['factor'\].*Add it"),
        ({"type": "dynamic", "factor": None}, r"'dynamic' does not work without \['factor'\]"),
        ({"rope_type": "linear"}, r"'linear' does not work without \['factor'\]"),
        ({"rope_type": "llama3", "factor": 4.0}, r"without \['high_freq_factor', 'low_freq_factor'\]"),
        ({"rope_type": "longrope", "factor": 4.0}, r"without \['long_factor', 'short_factor'\]"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 is not allowed"),
        ({"rope_type": "linear", "factor": True}, "factor=True is not allowed"),
        ({"factor": 4.0}, r"'default' does nothing with \['factor'\]. Give another rope_type"),
        ({"rope_type": "yarn", "factor": 4.0, "faktor": 4.0}, r"No RoPE takes \['faktor'\]"),
        ({"rope_type": "ntk"}, "takes a factor"),
        ({**NTK, "beta_fast": 3}, "takes a factor"),
        (
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0] * 5},
            "must have 6 positive numbers",
        ),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": 1.0, "long_factor": 2.0}, "must have 6 positive"),
        ({"rope_theta": 0}, "rope_theta=0 is not allowed.*positive finite"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 is not allowed"),
        ({**NTK, "rope_theta": "x"}, "rope_theta='x' is not allowed"),
        ({**NTK, "factor": 1e300}, "factor=1e.300 is not allowed"),
        ({**YARN, "factor": float("nan")}, "factor=nan is not allowed"),
        ({**YARN, "max_position_embeddings": -1}, "max_position_embeddings=-1 is not allowed.*whole number"),
        ({**YARN, "original_max_position_embeddings": 2.5}, "original_max_position_embeddings=2.5 is not allowed"),
        ({**TYPES["linear"], "beta_fast": 3}, r"'linear' does nothing with \['beta_fast'\]"),
        ({**TYPES["llama3"], "low_freq_factor": 8.0}, "low_freq_factor=8.0 and high_freq_factor=4.0 are not allowed"),
        ({**YARN, "beta_fast": 0.5}, "beta_slow=1 and beta_fast=0.5 are not allowed"),
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


@pytest.mark.parametrize("factor", [np.float32(4), torch.tensor(4.0), {4}])
def test_numbers_that_are_not_pythons_are_refused(factor):
    model = llama()
    with pytest.raises(TypeError, match="cannot be saved as JSON.*Use numbers, lists and texts of Python's own"):
        apply_rope(model, {**YARN, "factor": factor})
    assert read_rope(model) == read_rope(llama())


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


@pytest.mark.skipif(not hasattr(tf, "GraniteSWAConfig"), reason="younger than the oldest transformers")
def test_a_model_whose_layers_read_copies_of_its_config_is_refused():
    model = models.causal(tf.GraniteSWAConfig, max_position_embeddings=32)
    plain, before = logits(model), read_rope(model)
    with pytest.raises(ValueError, match="gives some of its layers a RoPE of their own"):
        apply_rope(model, YARN)
    assert read_rope(model) == before
    assert torch.equal(logits(model), plain)


def test_attention_that_depends_on_mscale_is_refused():
    model = models.ARCHITECTURES["deepseek_v3"].build()
    apply_rope(model, YARN).restore()
    with pytest.raises(ValueError, match="mscale_all_dim"):
        apply_rope(model, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_a_model_that_is_cast_runs_on_frequencies_of_that_dtype(kind, dtype):
    model, plain = llama(), llama().to(dtype)
    applied = apply_rope(model, TYPES[kind])
    expected = built(llama, read_rope(model)).to(dtype)
    model.to(dtype)
    for _ in range(2):
        assert torch.equal(logits(model), logits(expected))
        applied.restore()
        assert torch.equal(logits(model), logits(plain))
        applied = apply_rope(model, TYPES[kind])
        expected = built(llama, read_rope(model)).to(dtype)


def test_frequencies_that_grew_after_a_cast_come_back_as_they_were():
    dynamic = {**TYPES["dynamic"], "rope_theta": 10000.0}
    model = llama(rope_parameters=dict(dynamic)).to(torch.bfloat16)
    expected = logits(model)
    grown = model.model.rotary_emb.inv_freq
    apply_rope(model, YARN).restore()
    assert model.model.rotary_emb.inv_freq.dtype == grown.dtype
    assert torch.equal(model.model.rotary_emb.inv_freq, grown)
    assert torch.equal(logits(model), expected)
