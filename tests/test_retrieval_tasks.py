"""What all generated tasks promise, and what is special about pass keys, UUIDs, chains and landmarks."""

import json
import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizers_for_tests as tokenizers_
from seal_peft.data import encode_training, make_samples
from seal_peft.tasks import SPLITS, TASKS, Sample, associative, json_kv, metrics, passkey, uuid_chain
from seal_peft.tasks.landmarks import LANDMARKS

OURS = ("needle_noise", "passkey", "json_kv", "uuid_chain", "associative")
every_task = pytest.mark.parametrize("name", OURS)
seeds = st.integers(min_value=0, max_value=2**53)
depths = st.floats(min_value=0.0, max_value=1.0)
splits = st.sampled_from(SPLITS)
TOKENIZERS = {
    "bpe": tokenizers_.bpe(tokenizers_.CHATML),
    "characters": tokenizers_.metaspace(tokenizers_.BRACKETS),
    "words": tokenizers_.words(tokenizers_.CHATML_WITH_SYSTEM),
}
UUID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"


def make(name: str, **changes) -> Sample:
    arguments = {"seed": 0, "size": 30, "depth": 0.5, "split": "test", "questions": 1, **changes}
    return TASKS[name].make(**arguments)


def context(sample: Sample) -> str:
    return sample.messages[0]["content"].rpartition("\n\n")[0]


def questions_of(sample: Sample) -> list[str]:
    asked = [turn["content"] for turn in sample.messages[::2]]
    return [asked[0].rpartition("\n\n")[2], *asked[1:]]


def answers_of(sample: Sample) -> list[str]:
    return [*(turn["content"] for turn in sample.messages[1::2]), sample.target]


# --- all tasks -----------------------------------------------------------------------------------------------------


@every_task
@given(seed=seeds, size=st.integers(3, 60), depth=depths, split=splits, questions=st.integers(1, 3))
def test_the_same_arguments_give_the_same_sample_and_a_row_says_how(name, seed, size, depth, split, questions) -> None:
    sample = make(name, seed=seed, size=size, depth=depth, split=split, questions=questions)
    assert TASKS[name].make(seed=sample.seed, depth=sample.depth, **sample.meta) == sample
    assert Sample.from_row(json.loads(json.dumps(vars(sample)))) == sample
    assert make(name, seed=seed + 1).messages != make(name, seed=seed).messages


@every_task
@given(seed=seeds, size=st.integers(3, 60), questions=st.integers(1, 3))
def test_one_more_unit_only_adds_to_the_context(name: str, seed: int, size: int, questions: int) -> None:
    shorter, longer = (make(name, seed=seed, size=size + more, questions=questions) for more in (0, 1))
    units = [
        Counter(unit.strip() for unit in re.findall(r"[^.,\n]+", context(sample))) for sample in (longer, shorter)
    ]
    assert not units[1] - units[0]
    assert (units[0] - units[1]).total() == 1
    if name != "json_kv":
        assert questions_of(longer) == questions_of(shorter)
        assert longer.answers == shorter.answers


@every_task
@given(seed=seeds, depth=depths, split=splits, questions=st.integers(1, 6))
def test_the_last_answer_stands_in_the_context_once_and_the_targets_score_full(
    name: str, seed: int, depth: float, split: str, questions: int
) -> None:
    sample = make(name, seed=seed, depth=depth, split=split, questions=questions)
    assert len(set(questions_of(sample))) == len(set(answers_of(sample))) == questions
    assert context(sample).count(sample.answers[-1]) == 1
    assert not any(answer in questions_of(sample)[-1] for answer in sample.answers)
    assert TASKS[name].score(sample.target, sample.answers) == 1.0
    assert TASKS[name].score("I do not know.", sample.answers) == 0.0


@every_task
def test_depths_from_0_to_1_lead_from_the_start_of_the_context_to_its_end(name: str) -> None:
    steps = [index / 10 for index in range(11)]
    places = []
    for depth in steps:
        sample = make(name, depth=depth, size=200)
        places.append(context(sample).rindex(sample.answers[-1]) / len(context(sample)))
    assert places == pytest.approx(steps, abs=0.07)


@every_task
@given(seed=seeds, other=seeds)
def test_the_splits_share_no_sentence_and_no_answer(name: str, seed: int, other: int) -> None:
    train, test = make(name, seed=seed, split="train"), make(name, seed=other, split="test")
    units = [set(re.findall(r"[^.\n]{15,}", context(sample).partition("\n\n")[2])) for sample in (train, test)]
    assert not units[0] & units[1]
    assert not set(train.answers) & set(test.answers)


@every_task
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=6)
@given(more=st.integers(0, 2000), questions=st.integers(1, 3), seed=seeds)
def test_every_length_is_filled_to_97_percent(name, tokenizer, more: int, questions: int, seed: int) -> None:
    shortest = len(encode_training(make(name, size=questions, questions=questions), tokenizer)["input_ids"])
    length = shortest * 6 // 5 + more
    (sample,) = make_samples(
        name,
        tokenizer=tokenizer,
        split="train",
        lengths=[length],
        num_samples=1,
        questions_per_context=questions,
        seed=seed,
    )
    assert 0.97 * length <= sample.n_tokens <= length


@every_task
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"size": 2, "questions": 3}, r"size=2 \w+ cannot answer questions=3: .* Use a size of at least 3"),
        ({"size": 0}, r"size=0 \w+ cannot answer"),
        ({"questions": 0}, "questions=0 was given, but a context is asked at least 1"),
        ({"depth": 1.5}, "depth=1.5 was given; use a number from 0.0"),
        ({"depth": float("nan")}, "depth=nan was given"),
        ({"split": "dev"}, "split='dev' was given; use one of train, test"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(name: str, arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(name, **arguments)


@pytest.mark.parametrize("name", ["needle_noise", "passkey", "associative"])
def test_more_questions_than_there_are_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"[Uu]se fewer"):
        make(name, size=5000, questions=5000)


# --- pass keys -----------------------------------------------------------------------------------------------------


@given(seed=seeds, questions=st.integers(1, 10))
def test_every_place_has_a_five_digit_pass_key_of_its_own(seed: int, questions: int) -> None:
    sample = make(passkey.NAME, seed=seed, questions=questions)
    told = re.findall(r"pass key to the ([a-z -]+) is ([1-9][0-9]{4})\.", context(sample))
    assert len(dict(told)) == len({key for _, key in told}) == len(told) == questions
    for question, answer in zip(questions_of(sample), answers_of(sample), strict=True):
        (place,) = re.findall(r"pass key to the ([a-z -]+)\?", question)
        assert f"is {dict(told)[place]}." in answer


# --- keys and values -----------------------------------------------------------------------------------------------


@given(seed=seeds, size=st.integers(1, 40), depth=depths)
def test_the_object_is_json_and_holds_the_answer_at_the_asked_depth(seed: int, size: int, depth: float) -> None:
    sample = make(json_kv.NAME, seed=seed, size=size, depth=depth)
    pairs = json.loads(context(sample).partition("\n\n")[2])
    (key,) = re.findall(f'"({UUID})"', questions_of(sample)[0])
    assert len(pairs) == len(set(pairs.values())) == size
    assert list(pairs).index(key) == round(depth * (size - 1))
    assert sample.answers == [pairs[key]]


# --- chains --------------------------------------------------------------------------------------------------------


@given(seed=seeds, size=st.integers(3, 120), questions=st.integers(1, 3))
def test_following_the_links_from_the_question_gives_the_answers(seed: int, size: int, questions: int) -> None:
    sample = make(uuid_chain.NAME, seed=seed, size=size, questions=questions)
    links = re.findall(f"The code ({UUID}) leads to the code ({UUID})", context(sample))
    following = dict(links)
    assert len(following) == len(links), "no code leads to two codes"
    for question, answer in zip(questions_of(sample), answers_of(sample), strict=True):
        (code,) = re.findall(UUID, question)
        reached = []
        while code in following:
            code = following[code]
            reached.append(code)
        assert re.findall(UUID, answer) == reached
        assert len(reached) == uuid_chain.HOPS
    assert sample.answers == reached


def test_larger_contexts_hold_links_that_nobody_asks_about() -> None:
    for seed in range(20):
        text = context(make(uuid_chain.NAME, size=130, seed=seed))
        assert text.count("leads to the code") == uuid_chain.HOPS + 10


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("b, c, d", 1.0), ("the end is d", 1.0), ("b then c", 2 / 3), ("C?", 2 / 3), ("a b", 1 / 3), ("abcd", 0.0)],
)
def test_the_score_of_a_chain_is_the_furthest_stop_named(prediction: str, score: float) -> None:
    assert metrics.furthest_answer(prediction, ["b", "c", "d"]) == score


# --- landmarks -----------------------------------------------------------------------------------------------------

# Words that say nothing of the content. All others must not stand on both sides.
FUNCTION_WORDS = frozenset("a an and at each every from has in is of on one only that the to up which who".split())


def content_words(text: str) -> set[str]:
    """Stems, roughly: so that "Mexican" and "Mexico", or "lives" and "living", count as one word."""
    return {word[:5] for word in re.findall(r"\w+", text.casefold())} - FUNCTION_WORDS


def test_at_least_60_countries_stand_in_the_table_and_half_of_them_on_each_side() -> None:
    assert len({row.country for row in LANDMARKS}) == len({row.landmark for row in LANDMARKS}) == len(LANDMARKS) >= 60
    (train, train_people), (test, test_people) = (associative.pools(split) for split in SPLITS)
    assert not set(train) & set(test)
    assert not set(train_people) & set(test_people)
    assert min(map(len, (train, test))) >= 30
    assert min(map(len, (train_people, test_people))) >= max(map(len, (train, test)))


def test_no_question_shares_a_word_with_any_needle() -> None:
    told = set().union(*(content_words(row.landmark) for row in LANDMARKS))
    asked = set().union(*(content_words(f"{row.city} {row.country}") for row in LANDMARKS))
    people = set().union(*map(content_words, associative._PEOPLE))
    forms = [set().union(*map(content_words, table[split])) for table in (associative._NEEDLES, associative._QUESTIONS)
             for split in SPLITS]  # fmt: skip
    needles, questions = forms[0] | forms[1] | told | people, forms[2] | forms[3] | asked
    assert not (needles - {"perso", "landm"}) & (questions - {"place"})
    assert not forms[0] & forms[1] - {"perso", "landm"}
    assert not forms[2] & forms[3] - {"place", "chara"}


@given(seed=seeds, split=splits, questions=st.integers(1, 5))
def test_no_word_of_a_question_stands_anywhere_in_the_context(seed: int, split: str, questions: int) -> None:
    sample = make(associative.NAME, seed=seed, split=split, questions=questions, size=300)
    text = content_words(context(sample).partition("\n\n")[2])
    for question in questions_of(sample):
        asked = question.removeprefix("The text ends here. ").removesuffix(" Answer with the name.")
        assert not content_words(asked) & text


@given(seed=seeds, split=splits, questions=st.integers(1, 5))
def test_the_answer_lives_where_the_question_asks_and_nobody_else_does(seed: int, split: str, questions: int) -> None:
    sample = make(associative.NAME, seed=seed, split=split, questions=questions, size=60)
    present = [row for row in LANDMARKS if row.landmark.casefold() in context(sample).casefold()]
    assert len(present) >= questions + associative.DISTRACTORS
    sentences = re.split(r"(?<=\.) ", context(sample).partition("\n\n")[2])
    for question, answer in zip(questions_of(sample), answers_of(sample), strict=True):
        (place,) = re.findall(r" (?:in|of) (.+)\?", question)
        (row,) = [row for row in LANDMARKS if place in (row.city, row.country)]
        (sentence,) = [sentence for sentence in sentences if row.landmark.casefold() in sentence.casefold()]
        assert re.findall(r"It is (\w+)\.", answer)[0] in sentence


def test_no_person_is_a_place_or_part_of_another_name() -> None:
    people = associative._PEOPLE
    places = " ".join(f"{row.landmark} {row.city} {row.country}" for row in LANDMARKS).casefold()
    assert len(set(people)) == len(people)
    assert not [name for name in people if re.search(rf"\b{name.casefold()}\b", places)]
    assert not [(a, b) for a, b in product(people, people) if a != b and a in b]
