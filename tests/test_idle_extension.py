"""Training on samples that are too short for what the adapter brings to read further: there is a warning."""

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model

import models
import tokenizers_for_tests as tokenizers_
from seal_peft import SealConfig
from seal_peft.context.self_extend import apply_self_extend
from seal_peft.dataset import training_rows
from stages import some_samples

NATIVE = 1024


def warnings_for(caplog: pytest.LogCaptureFixture, base: Any = None, **settings: Any) -> list[str]:
    """What is said of training on samples of about 400 tokens."""
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    with torch.device("meta"):
        base = base or models.llama(vocab_size=len(tokenizer), max_position_embeddings=NATIVE)
        model = get_peft_model(base, SealConfig(**settings))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "seal_peft"):
        rows = training_rows(some_samples("train"), tokenizer, model)
    assert 380 < max(len(row["input_ids"]) for row in rows) <= 400
    return [record.getMessage() for record in caplog.records]


def test_self_extend_whose_window_no_sample_leaves_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    (told,) = warnings_for(caplog, self_extend={"group_size": 4, "window": 400})
    assert "Self-Extend is never in force in this training: the longest sample has" in told
    assert "its window is 400" in told
    assert not warnings_for(caplog, self_extend={"group_size": 4, "window": 300})


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_a_dynamic_type_below_the_native_length_is_warned_about(name: str, caplog: pytest.LogCaptureFixture) -> None:
    (told,) = warnings_for(caplog, rope_parameters={name: "dynamic", "factor": 2.0})
    assert f"up to {NATIVE} it changes nothing" in told
    short = models.llama(vocab_size=2048, max_position_embeddings=300)
    assert not warnings_for(caplog, short, rope_parameters={name: "dynamic", "factor": 2.0})


def test_a_factor_that_brings_no_longer_window_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": NATIVE // 4}
    (told,) = warnings_for(caplog, rope_parameters=yarn)
    assert f"bring no longer window: the model reads {NATIVE} tokens" in told
    assert not warnings_for(caplog, rope_parameters={**yarn, "factor": 8.0})


def test_only_the_adapter_that_trains_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    model = get_peft_model(models.llama(max_position_embeddings=NATIVE), SealConfig())
    model.add_adapter("far", SealConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
    with caplog.at_level(logging.WARNING, "seal_peft"):
        training_rows(some_samples("train"), tokenizer, model)
        assert not caplog.records
        model.set_adapter("far")
        training_rows(some_samples("train"), tokenizer, model)
    assert "'dynamic' is never in force" in caplog.text


def test_transformers_own_adapters_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = models.llama(max_position_embeddings=NATIVE)
    model.add_adapter(SealConfig(self_extend={"group_size": 4, "window": 400}))
    with caplog.at_level(logging.WARNING, "seal_peft"):
        training_rows(some_samples("train"), tokenizers_.bpe(tokenizers_.CHATML), model)
    assert "Self-Extend is never in force" in caplog.text


def test_what_changes_short_texts_too_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings_for(caplog)
    for rope in ({"rope_type": kind, "factor": 2.0} for kind in ("linear", "ntk", "yarn")):
        assert not warnings_for(caplog, rope_parameters=rope)
    assert not warnings_for(caplog, rope_parameters={"rope_theta": 20000.0})


def test_what_the_base_has_by_itself_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not warnings_for(caplog, models.llama(max_position_embeddings=NATIVE, rope_parameters=dynamic))
    under = models.llama(max_position_embeddings=NATIVE)
    apply_self_extend(under, group_size=4, window=400)
    assert not warnings_for(caplog, under)
