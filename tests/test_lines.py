"""Line retrieval: what a register holds, what is asked, and how answers are scored."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_peft.tasks import SPLITS, TASKS, Sample, get_task, lines, metrics

seeds = st.integers(min_value=0, max_value=2**53)
depths = st.floats(min_value=0.0, max_value=1.0)
splits = st.sampled_from(SPLITS)


def register(sample: Sample) -> list[tuple[str, int]]:
    """Entries as a reader of the prompt finds them."""
    found = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", sample.messages[0]["content"], re.MULTILINE)
    return [(key, int(value)) for key, value in found]


def asked_key(question: str) -> str:
    return re.findall(r"in line ([a-z]+-[a-z]+)\?", question)[-1]


@given(seed=seeds, size=st.integers(1, 60), depth=depths, split=splits)
def test_the_asked_line_stands_at_the_asked_depth_and_holds_the_answer(
    seed: int, size: int, depth: float, split: str
) -> None:
    sample = lines.make(seed=seed, size=size, depth=depth, split=split)
    entries = register(sample)
    key = asked_key(sample.messages[-1]["content"])
    place = [index for index, entry in enumerate(entries) if entry[0] == key]
    assert len(entries) == size
    assert place == [round(depth * (size - 1))]
    assert sample.answers == [str(entries[place[0]][1])]
    assert sample.target == f"The <REGISTER_CONTENT> in line {key} is {sample.answers[0]}."


@given(seed=seeds, size=st.integers(1, 60), split=splits)
def test_keys_and_numbers_of_a_register_differ_and_numbers_are_in_range(seed: int, size: int, split: str) -> None:
    entries = register(lines.make(seed=seed, size=size, depth=0.5, split=split))
    assert len({key for key, _ in entries}) == len({value for _, value in entries}) == size
    assert all(1 <= value <= 50_000 for _, value in entries)


def test_keys_and_numbers_differ_where_longeval_runs_out_of_words() -> None:
    registers = [register(lines.make(seed=0, size=5000, depth=1.0, split=split)) for split in SPLITS]
    assert [len(set(column)) for entries in registers for column in zip(*entries, strict=True)] == [5000] * 4
    assert not {value for _, value in registers[0]} & {value for _, value in registers[1]}


@given(seed=seeds, size=st.integers(1, 60))
def test_no_key_and_no_number_of_the_training_split_occurs_in_the_test_split(seed: int, size: int) -> None:
    train, test = (register(lines.make(seed=seed, size=size, depth=0.0, split=split)) for split in SPLITS)
    assert not {key.split("-")[1] for key, _ in train} & {key.split("-")[1] for key, _ in test}
    assert not {value for _, value in train} & {value for _, value in test}
    assert not set(lines._words("train")[1]) & set(lines._words("test")[1])


@given(seed=seeds, size=st.integers(3, 60), questions=st.integers(1, 3))
def test_one_more_line_leaves_the_others_as_they_are(seed: int, size: int, questions: int) -> None:
    shorter, longer = (lines.make(seed=seed, size=n, depth=0.5, questions=questions) for n in (size, size + 1))
    assert register(longer)[:-1] == register(shorter)


@given(seed=seeds, size=st.integers(4, 40), depth=depths, questions=st.integers(1, 4))
def test_every_question_asks_another_line_and_every_answer_is_right(
    seed: int, size: int, depth: float, questions: int
) -> None:
    sample = lines.make(seed=seed, size=size, depth=depth, questions=questions)
    entries = register(sample)
    turns = [*sample.messages, {"role": "assistant", "content": sample.target}]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * questions
    keys = [asked_key(turn["content"]) for turn in turns[::2]]
    assert len(set(keys)) == questions
    assert keys[-1] == entries[round(depth * (size - 1))][0]
    assert [metrics.last_integer(turn["content"]) for turn in turns[1::2]] == [dict(entries)[key] for key in keys]


def test_the_same_seed_gives_the_same_sample_and_another_seed_another() -> None:
    settings = {"size": 20, "depth": 0.3, "split": "train", "questions": 2}
    assert lines.make(seed=1, **settings) == lines.make(seed=1, **settings)
    assert lines.make(seed=1, **settings).messages != lines.make(seed=2, **settings).messages


def test_a_sample_says_how_to_build_it_again() -> None:
    sample = lines.make(seed=5, size=7, depth=0.25, split="train", questions=2)
    assert lines.make(seed=sample.seed, depth=sample.depth, **sample.meta) == sample


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"size": 2, "questions": 3}, "size=2 lines cannot answer questions=3"),
        ({"size": 0}, "size=0 lines"),
        ({"questions": 0}, "questions=0"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"depth": float("nan")}, "depth=nan"),
        ({"split": "dev"}, "split='dev' was given; use one of train, test"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        lines.make(**{"seed": 0, "size": 5, "depth": 0.5, "split": "test", "questions": 1, **arguments})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The <REGISTER_CONTENT> in line old-cat is 24169.", 24169),
        ("It is <7>", 7),
        ("line 3 holds 007", 7),
        ("first 1, no, 22", 22),
        ("none", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_the_last_integer_of_an_answer_is_read(text: str, number: int | None) -> None:
    assert metrics.last_integer(text) == number


@given(before=st.text(), number=st.integers(0, 10**9))
def test_whatever_stands_before_it_the_last_integer_counts(before: str, number: int) -> None:
    assert metrics.last_integer(f"{before} {number}.") == number
    assert metrics.last_integer_match(f"{before} {number}.", [str(number)]) == 1.0
    assert metrics.last_integer_match(f"{before} {number + 1}.", [str(number)]) == 0.0


def test_an_answer_without_a_number_scores_nothing() -> None:
    assert get_task("lines").score("I do not know.", ["5"]) == 0.0


def test_an_unknown_task_is_refused_with_the_names_of_the_known_ones() -> None:
    assert all(task.name == name for name, task in TASKS.items())
    with pytest.raises(ValueError, match="There is no task 'line'. Known tasks: .*lines"):
        get_task("line")
