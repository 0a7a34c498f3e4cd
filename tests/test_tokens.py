"""From a sample to tokens and labels: the answers alone are learned."""

from dataclasses import replace

import pytest

import tokenizers_for_tests as tokenizers_
from data_samples import TOKENIZERS, every_tokenizer, some_samples
from seal_peft import tokens
from seal_peft.tasks import lines
from seal_peft.tokens import IGNORED, encode_prompt, encode_question, encode_training

# -- tokens and labels ------------------------------------------------------------------------------------------------


@every_tokenizer
@pytest.mark.parametrize("questions", [1, 3])
def test_training_tokens_begin_with_exactly_the_prompt_tokens(tokenizer, questions: int) -> None:
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1, questions_per_context=questions)
    prompt = encode_prompt(sample, tokenizer)
    encoded = encode_training(sample, tokenizer)
    assert encoded["input_ids"][: len(prompt)] == prompt
    answer = encoded["input_ids"][len(prompt) :]
    assert encoded["labels"][len(prompt) :] == answer
    assert answer[-1] == tokenizer.eos_token_id
    assert encode_question(sample, tokenizer) == (prompt, answer)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "words"])
def test_labels_are_the_answers_and_their_ends_of_turn_and_nothing_else(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1, questions_per_context=3)
    answers = [message["content"] for message in sample.messages if message["role"] == "assistant"] + [sample.target]
    encoded = encode_training(sample, tokenizer)
    spoken = [label for label in encoded["labels"] if label != IGNORED]
    text = tokenizer.decode(spoken)
    if name == "last_thought":
        answers[-1] = f"<think>\n\n</think>\n\n{answers[-1]}"
    if name.endswith("brackets"):
        answers = [f" {answer} " for answer in answers]
    expected = "".join(answer + tokenizer.eos_token for answer in answers)
    assert text.lstrip() == expected.lstrip()
    assert all(label in (IGNORED, token) for label, token in zip(encoded["labels"], encoded["input_ids"], strict=True))


@every_tokenizer
def test_pieces_together_are_the_tokens_of_the_whole_text(tokenizer) -> None:
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1, questions_per_context=3)
    if tokenizer.chat_template is None:
        pieces = tokens.cut_pieces(sample, tokenizer)[:-1]
        whole = tokenizer("".join(piece.text for piece in pieces)).input_ids
    else:
        text = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer(text, add_special_tokens=False).input_ids
    assert encode_prompt(sample, tokenizer) == whole


@pytest.mark.parametrize(("name", "count"), [("base", 1), ("base_metaspace", 1), ("chatml", 0), ("brackets", 1)])
def test_bos_is_never_doubled(name: str, count: int) -> None:
    tokenizer = TOKENIZERS[name]
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1)
    assert encode_training(sample, tokenizer)["input_ids"].count(tokenizer.bos_token_id) == count


def test_a_template_that_rewrites_earlier_turns_serves_one_question_and_refuses_several() -> None:
    tokenizer = tokenizers_.bpe(tokenizers_.THINKING)
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1)
    prompt = encode_prompt(sample, tokenizer)
    assert tokenizer.decode(prompt).endswith("<think>\n")
    answer = encode_training(sample, tokenizer)["input_ids"][len(prompt) :]
    assert tokenizer.decode(answer) == sample.target + tokenizer.eos_token
    with pytest.raises(ValueError, match="rewrites earlier turns.*questions_per_context=1"):
        some_samples(tokenizer=tokenizer, questions_per_context=2)


# -- batches ----------------------------------------------------------------------------------------------------------


@every_tokenizer
def test_an_answer_prefix_is_part_of_the_prompt_and_carries_no_label(tokenizer) -> None:
    plain = lines.make(seed=3, size=5, depth=0.5, split="train", questions=2)
    prefixed = replace(plain, answer_prefix="The <REGISTER_CONTENT>")
    bare, prompt = encode_prompt(plain, tokenizer), encode_prompt(prefixed, tokenizer)
    training = encode_training(prefixed, tokenizer)
    assert len(prompt) > len(bare) and training["input_ids"][: len(prompt)] == prompt
    assert set(training["labels"][len(bare) : len(prompt)]) == {IGNORED}
    assert IGNORED not in training["labels"][len(prompt) :]
