"""How many tokens a model reads, and what extends it."""

import re

import pytest
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
)

from data_samples import llama_config
from seal_peft.context.advice import advise
from seal_peft.data import check_window, window_of


def test_lengths_up_to_the_window_pass_and_longer_ones_name_it_and_what_extends_it() -> None:
    check_window(llama_config(), 2048)
    message = r"2049 tokens .* window of this model is 2048 .*advise --length 2049.*rope_parameters"
    with pytest.raises(ValueError, match=message):
        check_window(llama_config(), 2049)


# By the published configs, whose windows their authors state.
@pytest.mark.parametrize(
    ("rope", "max_positions", "window"),
    [
        pytest.param({"rope_type": "linear", "factor": 4.0}, 4096, 16384, id="vicuna-16k"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, 2048, 4096, id="dynamic-ntk"),
        pytest.param(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072, id="qwen3"
        ),
        pytest.param({"rope_type": "yarn", "factor": 4.0}, 32768, 131072, id="qwen2.5"),
        pytest.param(
            {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
            163840,
            163840,
            id="deepseek-v3",
        ),
        pytest.param(
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            131072,
            131072,
            id="llama-3.2",
        ),
        pytest.param(
            {
                "rope_type": "longrope",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            131072,
            131072,
            id="phi-3",
        ),
    ],
)
def test_rope_scaling_extends_the_window_as_its_kind_does(rope: dict, max_positions: int, window: int) -> None:
    config = llama_config(max_position_embeddings=max_positions, rope_parameters={"rope_theta": 10000.0, **rope})
    assert window_of(config) == window
    check_window(config, window)
    with pytest.raises(ValueError, match=f"window of this model is {window} tokens"):
        check_window(config, window + 1)


def test_a_scaling_by_kind_of_layer_is_in_the_published_window() -> None:
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    config = Gemma3TextConfig(
        max_position_embeddings=131072,
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    )
    assert window_of(config) == 131072


def test_what_the_error_names_says_how_far_to_extend() -> None:
    with pytest.raises(ValueError, match="`seal-peft advise --length 5000` says") as error:
        check_window(llama_config(), 5000)
    (length,) = re.findall(r"--length (\d+)", str(error.value))
    (yarn,) = (advice for advice in advise(llama_config(), int(length)) if advice.method == "yarn")
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 2048, **yarn.settings["rope_parameters"]}
    check_window(llama_config(rope_parameters=rope), 5000)


def test_learned_positions_cannot_be_extended_and_the_error_says_so() -> None:
    with pytest.raises(ValueError, match="window of this model is 64 .*learned table"):
        check_window(GPT2Config(n_positions=64), 65)


def test_a_multimodal_model_is_asked_for_the_window_of_its_text_part() -> None:
    config = Gemma3Config(text_config={"max_position_embeddings": 512})
    check_window(config, 512)
    with pytest.raises(ValueError, match="512"):
        check_window(config, 513)


def test_a_model_without_positions_has_no_window() -> None:
    check_window(MambaConfig(num_hidden_layers=1), 10**9)
