"""Drafts of answers change no answer: what a model says as guessed is read with the prompts, the rest is generated."""

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import models
from seal_peft import SealConfig, add_beside
from seal_peft.generation import generate_answers
from test_prefill import EXTENSIONS, PROMPTS, Ids, _dynamic, _hybrid

LIMIT = 10


def _with_adapter(extension: str) -> nn.Module:
    model = get_peft_model(models.llama(), SealConfig(task_type="CAUSAL_LM", **EXTENSIONS[extension])).eval()
    models.draw_scales(model)
    return model


def _with_two_adapters() -> nn.Module:
    model = _with_adapter("self-extend")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    add_beside(model, lora, "beside")
    return model.eval()


NAMES = ["llama", "gemma3_text", "gpt_oss", "gpt2", "falcon", "deepseek_v3", "opt"]
BUILD: dict[str, Any] = {name: functools.partial(models.base_model, name) for name in NAMES}
BUILD |= {name: functools.partial(_with_adapter, name) for name in EXTENSIONS}
BUILD["two adapters"] = _with_two_adapters
APART = list(BUILD)
BUILD |= {"qwen2_5_vl": functools.partial(models.base_model, "qwen2_5_vl"), "hybrid": _hybrid, "dynamic": _dynamic}


@functools.cache
def model_of(name: str) -> nn.Module:
    model = BUILD[name]()
    base_of(model).generation_config.eos_token_id = None
    return model


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answers(name: str, rows: list[int], limit: int, ends: list[int], drafts: Any = None) -> list[list[int]]:
    texts = generate_answers(model_of(name), Ids(), [PROMPTS[row] for row in rows], limit, ends, drafts)
    return [list(map(int, text[1:-1].split(", "))) for text in texts]


@functools.cache
def full_answers(name: str) -> list[list[int]]:
    return [answers(name, [row], LIMIT, [])[0] for row in range(len(PROMPTS))]


def passes(name: str, *given: Any) -> int:
    runs: list[int] = []
    hook = base_of(model_of(name)).register_forward_hook(lambda *args: runs.append(1))
    answers(name, *given)
    hook.remove()
    return len(runs)


@st.composite
def guesses_at(draw: st.DrawFn, right: list[int], ends: list[int]) -> list[int]:
    """A draft: right or not up to some token, shorter or longer than the answer, with ends of text in the middle."""
    other = st.lists(st.sampled_from([*ends, 0, 5, 40]), max_size=2 * LIMIT)
    return right[: draw(st.integers(0, LIMIT))] + draw(other)


@pytest.mark.parametrize("name", BUILD)
@given(data=st.data())
def test_drafts_of_any_kind_change_no_answer(name: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=4, unique=True))
    right = [full_answers(name)[row] for row in rows]
    ends = data.draw(st.lists(st.sampled_from(sum(right, [])), max_size=2, unique=True))
    limit = data.draw(st.integers(1, LIMIT))
    drafts = [data.draw(guesses_at(answer, ends)) for answer in right]
    expected = [answer[: min([limit, *(answer.index(end) + 1 for end in ends if end in answer)])] for answer in right]
    assert answers(name, rows, limit, ends) == expected
    assert answers(name, rows, limit, ends, drafts) == expected


@pytest.mark.parametrize("name", APART)
def test_only_what_was_not_guessed_is_generated(name: str) -> None:
    right, rows = full_answers(name), list(range(len(PROMPTS)))
    assert passes(name, rows, LIMIT, [], right) == len(PROMPTS)
    # One row is right for four tokens, so that six are left: the fifth is the model's own at the same price.
    drafts = [*right[:2], [*right[2][:4], right[2][4] ^ 1], *right[3:]]
    assert passes(name, rows, LIMIT, [], drafts) == len(PROMPTS) + LIMIT - 5
    # Wrong from the start, the first token comes from reading all the same, which spares one step.
    wrong = [[answer[0] ^ 1] for answer in right]
    assert passes(name, rows, LIMIT, [], wrong) == len(PROMPTS) + LIMIT - 1


@pytest.mark.parametrize("name", [name for name in BUILD if name not in APART])
def test_models_that_read_padded_batches_leave_drafts_alone(name: str) -> None:
    rows = list(range(len(PROMPTS)))
    assert passes(name, rows, LIMIT, [], full_answers(name)) == passes(name, rows, LIMIT, []) == LIMIT


def test_a_batch_of_one_is_read_as_ever_for_its_cache_would_be_held_twice() -> None:
    assert passes("llama", [0], LIMIT, [], full_answers("llama")[:1]) == LIMIT


def test_rows_of_a_model_whose_positions_are_a_table_wait_for_others_within_it() -> None:
    model = model_of("gpt2")
    end = model.config.n_positions
    prompts = [(PROMPTS[1] * 3)[: end - LIMIT], (PROMPTS[0] * 4)[: end - LIMIT]]
    plain = [generate_answers(model, Ids(), [prompt], LIMIT)[0] for prompt in prompts]
    first = list(map(int, plain[0][1:-1].split(", ")))
    assert generate_answers(model, Ids(), prompts, LIMIT, drafts=[[*first[:5], first[5] ^ 1], []]) == plain


@pytest.mark.parametrize("drafts", [[], [[1]], [[1]] * 9])
def test_drafts_of_other_prompts_are_refused(drafts: list[list[int]]) -> None:
    with pytest.raises(
        ValueError, match=f"{len(drafts)} drafts were given for {len(PROMPTS)} prompts. Give one for each"
    ):
        generate_answers(models.llama(), Ids(), PROMPTS, 2, drafts=drafts)
