"""Answers and needles are found in the tokens, whatever the tokenizer and the chat template."""

import dataclasses

import pytest

import tokenizers_for_tests as tokenizers_
from seal_peft.data import make_samples
from seal_peft.spans import encode_answers, needle_positions
from seal_peft.tokens import IGNORED, encode_training

TOKENIZERS = {
    "bpe": tokenizers_.bpe(),
    "metaspace": tokenizers_.metaspace(),
    **{name: tokenizers_.bpe(template) for name, template in tokenizers_.CHAT_TEMPLATES.items()},
    "metaspace_brackets": tokenizers_.metaspace(tokenizers_.BRACKETS),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def a_sample(tokenizer, task: str = "lines", **kwargs):
    options = {"split": "test", "lengths": [900], "num_samples": 1, **kwargs}
    return make_samples(task, tokenizer=tokenizer, **options)[0]


@every_tokenizer
def test_only_the_answer_is_measured_and_the_needle_is_its_line(tokenizer) -> None:
    sample = a_sample(tokenizer)
    row, whole = encode_answers(sample, tokenizer), encode_training(sample, tokenizer)
    assert row["input_ids"] == whole["input_ids"]
    measured = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(measured).strip().strip(".") == sample.answers[0]
    assert all(a in (IGNORED, b) for a, b in zip(row["labels"], whole["labels"], strict=True))
    needle = needle_positions(sample, tokenizer)
    assert needle == list(range(needle[0], needle[-1] + 1))
    text = tokenizer.decode([row["input_ids"][i] for i in needle]).strip()
    (line,) = (line for line in sample.messages[0]["content"].split("\n") if f"<{sample.answers[0]}>" in line)
    assert text == line


@every_tokenizer
def test_of_several_questions_the_last_one_is_measured(tokenizer) -> None:
    if tokenizer.chat_template == tokenizers_.LAST_THOUGHT:
        pytest.skip("this template takes one question")
    sample = a_sample(tokenizer, split="train", questions_per_context=3)
    labels = encode_answers(sample, tokenizer)["labels"]
    assert tokenizer.decode([t for t in labels if t != IGNORED]).strip().strip(".") == sample.answers[0]
    text = tokenizer.decode(
        [encode_training(sample, tokenizer)["input_ids"][i] for i in needle_positions(sample, tokenizer)]
    )
    assert sample.answers[0] in text


def test_all_answers_and_all_their_sentences_count() -> None:
    tokenizer = TOKENIZERS["chatml"]
    sample = a_sample(tokenizer, "needle_multi", lengths=[1500])
    ids = encode_answers(sample, tokenizer)
    said = tokenizer.decode([t for t in ids["labels"] if t != IGNORED])
    found = tokenizer.decode([ids["input_ids"][i] for i in needle_positions(sample, tokenizer)])
    for answer in sample.answers:
        assert answer in said
        assert answer in found
    assert "chat" not in found
    assert len(found) < 0.3 * len(sample.messages[0]["content"])


def test_a_number_inside_another_is_no_answer() -> None:
    tokenizer = TOKENIZERS["chatml"]
    sample = a_sample(tokenizer)
    value = sample.answers[0]
    content = sample.messages[0]["content"].replace(
        "\n\n", f"\n\nline other-line: REGISTER_CONTENT is <1{value}>\n", 1
    )
    longer = dataclasses.replace(sample, messages=[{"role": "user", "content": content}])
    ids = encode_training(longer, tokenizer)["input_ids"]
    assert "other-line" not in tokenizer.decode([ids[i] for i in needle_positions(longer, tokenizer)])


def test_what_cannot_be_found_is_refused_or_empty() -> None:
    tokenizer = TOKENIZERS["chatml"]
    sample = dataclasses.replace(a_sample(tokenizer), target="I do not know.")
    with pytest.raises(ValueError, match="'I do not know.*spells none of the accepted answers.*Measure all of it"):
        encode_answers(sample, tokenizer)
    assert needle_positions(dataclasses.replace(sample, answers=["nowhere"]), tokenizer) == []
