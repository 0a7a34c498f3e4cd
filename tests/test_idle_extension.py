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


def test_what_changes_short_texts_too_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings_for(caplog)
    for kind in ("linear", "ntk", "yarn"):
        assert not warnings_for(caplog, rope_parameters={"rope_type": kind, "factor": 2.0})


def test_what_the_base_has_by_itself_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not warnings_for(caplog, models.llama(max_position_embeddings=NATIVE, rope_parameters=dynamic))
    under = models.llama(max_position_embeddings=NATIVE)
    apply_self_extend(under, group_size=4, window=400)
    assert not warnings_for(caplog, under)
