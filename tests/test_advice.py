"""Advice on context extension: every setting that is given reaches the length, and the model takes it."""

import math
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import Cohere2Config, Exaone4Config, JetMoeConfig, NanoChatConfig, Qwen3NextConfig

import models
from seal_peft import SealConfig
from seal_peft.context.advice import advise
from seal_peft.context.rope import apply_rope, reach_of, read_rope
from seal_peft.context.self_extend import apply_self_extend, extended_window
from seal_peft.data import window_of
from stages import error_of, save_model, save_samples, seal

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def by_method(config, length):
    return {advice.method: advice for advice in advise(config, length)}


@settings(max_examples=5, deadline=None)
@given(length=st.integers(129, 5000))
def test_whatever_is_advised_reaches_and_can_be_trained_under(length):
    for method, advice in by_method(models.llama().config, length).items():
        assert advice.reach >= length
        model = get_peft_model(models.llama(), SealConfig(**advice.settings))
        if method in ("linear", "yarn"):
            now = read_rope(model)
            factor = now["factor"] if method == "linear" else 1  # which is not in the maximum
            assert int(factor * now["max_position_embeddings"]) == advice.reach
        if method == "self_extend":
            group_size, window = advice.settings["self_extend"].values()
            assert advice.reach == (128 - window) * group_size + window - window % group_size
            assert window + (length - window) / group_size < 2 / 3 * 128
            assert window + (length - window) / (group_size - 1) >= 2 / 3 * 128 if group_size > 1 else True


@given(native=st.integers(2, 60), group_size=st.integers(2, 9), data=st.data())
def test_self_extend_reaches_exactly_as_far_as_its_positions_are_known(native, group_size, data):
    window = data.draw(st.integers(1, native - 1))
    longest = extended_window(native, {"group_size": group_size, "window": window})

    def furthest(tokens):
        """The furthest position of a query, of those that read a key beyond the window."""
        return max(p // group_size + window - window // group_size for p in range(window, tokens))

    assert furthest(longest) == native - 1
    assert furthest(longest + 1) == native


@settings(max_examples=8, deadline=None)
@given(length=st.integers(129, 5000))
def test_under_the_advised_base_no_channel_turns_to_an_angle_that_the_model_has_not_seen(length):
    config = models.llama().config
    channels = config.head_dim

    def new_angles(factor, rounding=0.0):
        base = [config.rope_parameters["rope_theta"] ** (-i / channels) for i in range(0, channels, 2)]
        raised = config.rope_parameters["rope_theta"] * factor ** (channels / (channels - 2))
        turned = [length * raised ** (-i / channels) for i in range(0, channels, 2)]
        return any(128 * a < 2 * math.pi and b > 128 * a * (1 + rounding) for a, b in zip(base, turned, strict=True))

    factor = by_method(config, length)["ntk"].settings["rope_parameters"]["factor"]
    assert not new_angles(factor, rounding=1e-4)
    assert new_angles(factor - 0.25) or (factor - 0.25) * 128 < length


LONGROPE = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
LONGROPE |= {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.0 + i for i in range(6)]}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OWN = {
    "default": {},
    "linear": {"max_position_embeddings": 256, "rope_parameters": LINEAR},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "yarn": {"max_position_embeddings": 512, "rope_parameters": YARN},
    "llama3": {"max_position_embeddings": 512, "rope_parameters": LLAMA3},
    "longrope": {"max_position_embeddings": 512, "rope_parameters": LONGROPE},
    "yarn by hand": {"rope_parameters": YARN},  # as Qwen's cards say: the maximum stays the native length
}


def turned(model, longest):
    """The furthest angle of each pair of channels, in texts that grow from one token to the longest."""
    rotary, furthest = model.model.rotary_emb, torch.zeros(6)
    for n in sorted({128, longest, *range(1, longest, 37)} & set(range(longest + 1))):
        rotary(torch.zeros(1, 1, 24), torch.arange(n)[None])
        furthest = torch.maximum(furthest, n * rotary.inv_freq)
    return furthest


@pytest.mark.parametrize("own", OWN)
def test_no_text_up_to_the_advised_length_turns_a_channel_to_an_angle_that_the_model_has_not_seen(own):
    config = models.llama(**OWN[own]).config
    found = by_method(config, 1000)
    seen = turned(models.llama(**OWN[own]), reach_of(read_rope(models.llama(**OWN[own]))))
    for method in ("linear", "dynamic", "ntk", "yarn"):
        if found[method].settings is None:
            assert "whatever its factor, some channels turn" in found[method].note
            continue
        model = models.llama(**OWN[own])
        apply_rope(model, found[method].settings["rope_parameters"])
        furthest = found[method].reach
        assert furthest >= 1000
        assert ((turned(model, furthest) <= seen * 1.001) | (seen >= 2 * math.pi)).all()
        # It is what the setting reaches: more is beyond its window, or turns a channel further.
        window = reach_of(read_rope(model))
        assert ("reaches less than its window" in found[method].note) == (furthest < window)
        assert furthest == window or (((turned(model, furthest + 3) > seen) & (seen < 2 * math.pi)).any())
    # Up to `max_position_embeddings` a dynamic type rotates by the unscaled frequencies.
    assert (found["dynamic"].settings is None) == (own in ("yarn", "llama3", "longrope"))


@pytest.mark.parametrize("own", OWN)
def test_it_begins_at_the_window_that_samples_are_made_for(own):
    model = models.llama(**OWN[own])
    window = window_of(model.config)
    assert reach_of(read_rope(model)) == window
    assert by_method(model.config, window).keys() == {"none"}
    assert "none" not in by_method(model.config, window + 1)


def test_a_model_without_full_attention_is_told_so():
    config = models.gemma3(layer_types=["sliding_attention"] * 2).config
    assert all(advice.settings is None for advice in advise(config, 1000))
    assert "has no layer of type 'full_attention'" in by_method(config, 1000)["yarn"].note


SLIDING = {"num_hidden_layers": 4, "sliding_window": 16, "head_dim": models.HEAD_DIM}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
ASKED = {name: lambda name=name: models.base_model(name) for name in ("mixtral", "qwen3_moe", "gpt_oss", "llava-clip")}
ASKED |= {
    "exaone4": lambda: models.causal(
        Exaone4Config, **SLIDING, sliding_window_pattern=4
    ),  # no positions in full layers
    "cohere2": lambda: models.causal(Cohere2Config, **SLIDING),
    "qwen3_next": lambda: models.causal(Qwen3NextConfig, **HYBRID),
    "jetmoe": lambda: models.causal(JetMoeConfig),  # does not run without weights
}


@pytest.mark.parametrize("name", ASKED)
def test_self_extend_is_advised_where_the_loaded_model_takes_it(name):
    model = ASKED[name]()
    advice = by_method(model.config, 5000)["self_extend"]
    if name in ("exaone4", "cohere2", "gpt_oss"):
        with pytest.raises(ValueError, match="Self-Extend"):
            apply_self_extend(model, group_size=4, window=16)
        assert advice.settings is None
        assert advice.note.startswith(
            "No layer of" if name != "gpt_oss" else "GptOssForCausalLM has attention with s_aux"
        )
    else:
        apply_self_extend(model, **advice.settings["self_extend"])
        assert advice.reach >= 5000


def test_what_only_weights_show_may_be_refused_and_is_said_so():
    model = models.causal(NanoChatConfig)  # normalises its queries and keys after their rotation
    assert "may be refused by the loaded model" in by_method(model.config, 5000)["self_extend"].note
    with pytest.raises(ValueError, match="does not rotate"):
        apply_self_extend(model, group_size=4, window=16)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_models_that_read_images_are_advised_what_they_take(name):
    found = by_method(models.base_model(name).config, 1000)
    for method in ("linear", "dynamic", "ntk", "yarn"):
        model = models.base_model(name)
        apply_rope(model, found[method].settings["rope_parameters"])
        assert reach_of(read_rope(model)) >= 1000


def test_a_length_that_the_model_reaches_needs_nothing():
    (advice,) = advise(models.llama().config, 128)
    assert (advice.method, advice.settings, advice.reach) == ("none", {}, 128)
    assert advice.note == "within the model's own window"


def test_a_raised_base_tells_its_window_and_not_how_far_it_was_advised():
    model = models.llama()
    ntk = by_method(model.config, 256)["ntk"]
    apply_rope(model, ntk.settings["rope_parameters"])
    (advice,) = advise(model.config, window_of(model.config))
    assert (advice.reach, advice.note) == (window_of(model.config), "within the model's own window")
    assert ntk.reach < advice.reach


def test_a_length_that_no_factor_reaches_gets_no_factor():
    found = by_method(models.llama().config, 10**8)
    assert found["ntk"].settings is None and found["dynamic"].settings is None
    assert found["yarn"].reach >= 10**8


def test_a_model_that_is_extended_already_is_extended_from_where_it_is():
    config = models.llama(max_position_embeddings=512, rope_parameters=YARN).config
    found = by_method(config, 1024)
    assert found["yarn"].settings == {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}
    assert found["ntk"].settings["rope_parameters"]["factor"] > 2  # twice the window, of which it reaches less
    config = models.llama(max_position_embeddings=256, rope_parameters=LINEAR).config
    assert by_method(config, 512).keys() == {"none"}
    assert by_method(config, 1024)["linear"].settings["rope_parameters"]["factor"] == 4.0


def test_the_base_reaches_its_window_where_every_channel_has_seen_a_full_turn():
    config = models.llama(rope_parameters={"rope_type": "default", "rope_theta": 10.0}).config
    ntk = by_method(config, 256)["ntk"]
    assert (ntk.settings["rope_parameters"]["factor"], ntk.reach) == (2.0, 256)
    assert "less than its window" not in ntk.note
    assert "less than its window" in by_method(models.llama().config, 256)["ntk"].note


def test_what_a_model_does_not_take_says_why():
    found = by_method(models.base_model("mistral").config, 1000)
    assert found["self_extend"].settings is None
    assert "sliding windows" in found["self_extend"].note
    assert found["yarn"].reach >= 1000
    assert "latent attention" in by_method(models.base_model("deepseek_v3").config, 1000)["self_extend"].note


def test_wrong_lengths_and_models_without_rope_are_refused():
    for length in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match="positive whole number"):
            advise(models.llama().config, length)
    with pytest.raises(ValueError, match="nothing extends it"):
        advise(models.gpt2().config, 1000)


def test_what_the_stage_prints_can_be_pasted_behind_train(tmp_path, capsys):
    folder = save_model(tmp_path / "model", max_position_embeddings=128)
    data = save_samples(tmp_path / "train.jsonl", num_samples=1)
    assert seal("advise", "--model_name_or_path", folder, "--length", 400) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " '{" in line]
    assert len(rows) == 5
    for number, (_, _, flags, _) in enumerate(rows):
        words = ["--model_name_or_path", folder, "--train_file", data, "--output_dir", tmp_path / str(number)]
        assert seal("train", *words, *shlex.split(flags), "--max_steps", 1, "--disable_tqdm", True) == 0


def test_the_stage_prints_a_table_from_the_config_alone(tmp_path, capsys):
    folder = save_model(tmp_path / "model", weights=False, max_position_embeddings=128)
    assert seal("advise", "--model_name_or_path", str(folder), "--length", "1000") == 0
    out = capsys.readouterr().out
    assert '| yarn | 1,024 | --rope_parameters \'{"rope_type": "yarn", "factor": 8.0}\' |' in out
    assert '--self_extend \'{"group_size":' in out
    assert {line.count("|") for line in out.strip().splitlines()} == {5}
    assert seal("advise", "--model_name_or_path", str(folder), "--length", "0") == 1
    assert "positive whole number" in error_of(capsys)
