"""Batches: nobody is forgotten, and none is larger than one batch of the longest prompts. Answers: where they end."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

import models
import tokenizers_for_tests as tokenizers_
from seal_peft import SealConfig
from seal_peft.generation import generate_answers, make_batches
from seal_peft.systems import read_questions
from stages import some_samples

prompts_and_limits = st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([8, 64, 128])), min_size=1, max_size=60)


@given(pairs=prompts_and_limits, batch_size=st.integers(1, 9))
def test_every_prompt_is_in_one_batch_of_one_limit_within_the_budget(pairs: list, batch_size: int) -> None:
    prompts, limits = [[0] * length for length, _ in pairs], [limit for _, limit in pairs]
    batches = make_batches(prompts, limits, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    budget = batch_size * max(max(128, length + limit) for length, limit in pairs)
    sizes = []
    for batch in batches:
        assert len({limits[index] for index in batch}) == 1
        sizes.append(len(batch) * (max(len(prompts[index]) for index in batch) + limits[batch[0]]))
        assert sizes[-1] <= budget


def test_short_prompts_share_a_batch_with_more_others() -> None:
    lengths = [250] * 8 + [500] * 4 + [1000] * 3
    batches = make_batches([[0] * (length - 10) for length in lengths], [10] * 15, 2)
    assert [[lengths[index] for index in batch] for batch in batches] == [
        [500, 500, 500, 250],
        [1000, 1000],
        [1000, 500],
        [250] * 7,
    ]


def test_an_answer_ends_at_the_first_of_the_given_tokens() -> None:
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    model = models.llama(vocab_size=len(tokenizer))
    prompt = tokenizer("line 17: REGISTER_CONTENT is <4")["input_ids"]
    with torch.inference_mode():
        written = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, pad_token_id=0)
    tokens = written[0, len(prompt) :].tolist()
    assert len(set(tokens)) > 2
    (answer,) = generate_answers(model, tokenizer, [prompt], 6, ends=[tokens[2]])
    assert answer == tokenizer.decode(tokens[: tokens.index(tokens[2]) + 1])


@pytest.mark.parametrize(
    "published", [{"repetition_penalty": 3.0, "no_repeat_ngram_size": 1}, {"num_beams": 3}, {"min_new_tokens": 6}]
)
@pytest.mark.parametrize("adapter", [False, True])
def test_answers_are_greedy_whatever_settings_a_model_was_published_with(published: dict, adapter: bool) -> None:
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    model = models.llama(vocab_size=len(tokenizer))
    if adapter:
        model = get_peft_model(model, SealConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    ids = tokenizer("line 17: REGISTER_CONTENT is <4")["input_ids"]
    prompt = list(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    model.generation_config.update(**published)
    kept = model.generation_config.to_dict()
    assert generate_answers(model, tokenizer, [prompt], 6) == [expected]
    assert model.generation_config.to_dict() == kept


@pytest.mark.parametrize(
    ("template", "end"), [(tokenizers_.CHATML, "<|im_end|>"), (tokenizers_.BRACKETS, "</s>"), (None, "</s>")]
)
def test_the_chat_template_says_how_a_turn_ends_whatever_the_tokenizer_calls_its_end(
    tmp_path: Path, template: str | None, end: str
) -> None:
    """As a base model that an adapter taught to chat: its own end of text is another token."""
    tokenizer = tokenizers_.bpe(template)
    tokenizer.eos_token = "</s>"
    models.llama(vocab_size=len(tokenizer)).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    questions = read_questions(str(tmp_path), some_samples("test"), None)
    assert questions.ends == [tokenizer.convert_tokens_to_ids(end)]
