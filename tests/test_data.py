"""Samples of every length, and their files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_samples import every_tokenizer, some_samples
from seal_peft import data
from seal_peft.data import make_samples, read_samples, write_samples
from seal_peft.tasks import Sample, lines
from seal_peft.tokens import encode_training

# -- lengths ----------------------------------------------------------------------------------------------------------


@every_tokenizer
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(900, 4000), questions=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_every_length_is_filled_to_97_percent_and_never_exceeded(tokenizer, length, questions, seed) -> None:
    (sample,) = make_samples(
        "lines",
        tokenizer=tokenizer,
        split="test",
        lengths=[length],
        num_samples=1,
        questions_per_context=questions,
        seed=seed,
    )
    used = len(encode_training(sample, tokenizer)["input_ids"])
    assert 0.97 * length <= used <= length
    assert (sample.n_tokens, sample.length) == (used, length)
    assert [message["role"] for message in sample.messages].count("user") == questions


def test_a_search_of_a_long_context_tokenises_it_only_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def counting(sample: Sample, tokenizer) -> dict[str, list[int]]:
        encoded = encode_training(sample, tokenizer)
        counted.append(len(encoded["input_ids"]))
        return encoded

    monkeypatch.setattr(data, "encode_training", counting)
    some_samples(lengths=[16_000], num_samples=5)
    assert sum(counted) < 4 * 5 * 16_000


def test_depths_are_used_in_turn_or_drawn_at_random() -> None:
    given_depths = some_samples(num_samples=5, depths=[0, 0.5, 1])
    assert [sample.depth for sample in given_depths] == [0.0, 0.5, 1.0, 0.0, 0.5]
    drawn = [sample.depth for sample in some_samples(num_samples=40, lengths=[600])]
    assert len(set(drawn)) == 40
    assert min(drawn) < 0.2 < 0.8 < max(drawn)


def test_each_length_gets_its_samples_in_the_order_asked() -> None:
    samples = some_samples(lengths=[1200, 700], num_samples=3)
    assert [sample.length for sample in samples] == [1200] * 3 + [700] * 3
    assert len({sample.id for sample in samples}) == 6


def test_splits_share_no_seed_and_neither_do_samples() -> None:
    seeds = {
        split: {sample.seed for sample in some_samples(split=split, num_samples=20)} for split in ("train", "test")
    }
    assert len(seeds["train"] | seeds["test"]) == 40


def test_a_row_alone_is_enough_to_build_its_sample_again() -> None:
    sample = some_samples(questions_per_context=2)[1]
    again = lines.make(seed=sample.seed, depth=sample.depth, **sample.meta)
    assert (again.messages, again.target) == (sample.messages, sample.target)


@pytest.mark.parametrize(("length", "questions"), [(20, 1), (200, 4)])
def test_a_length_too_short_is_refused_and_the_one_named_works(length: int, questions: int) -> None:
    with pytest.raises(ValueError, match=f"length={length} tokens is too short .* Use a length of at least") as error:
        some_samples(lengths=[4000, length], questions_per_context=questions)
    named = int(str(error.value).split()[-1].rstrip("."))
    assert all(
        sample.n_tokens >= 0.97 * named for sample in some_samples(lengths=[named], questions_per_context=questions)
    )


def test_a_length_that_cannot_be_filled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = lambda sample, tokenizer: {"input_ids": [0] * 1000 * sample.meta["size"]}  # noqa: E731
    monkeypatch.setattr(data, "encode_training", coarse)
    with pytest.raises(ValueError, match=r"length=1500 tokens cannot be filled to 97%.* at least 20\d\d"):
        some_samples(lengths=[1500])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"split": "dev"}, "split='dev'"),
        ({"lengths": []}, r"lengths=\[\]"),
        ({"lengths": [900, 900]}, r"lengths=\[900, 900\]"),
        ({"lengths": [-5]}, r"lengths=\[-5\]"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"depths": []}, r"depths=\[\]"),
        ({"depths": [0.5, 2]}, r"depths=\[0.5, 2\]"),
        ({"questions_per_context": 0}, "questions_per_context=0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        some_samples(**arguments)


# -- files ------------------------------------------------------------------------------------------------------------


def test_samples_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    samples = some_samples(questions_per_context=2)
    samples.append(replace(samples[0], id="other", depth=None, target="naïve \u2028 日本\n", meta={"any": [1, None]}))
    write_samples(tmp_path / "new" / "train.jsonl", samples)
    assert read_samples(tmp_path / "new" / "train.jsonl") == samples
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train.jsonl"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_samples(tmp_path / name, some_samples(lengths=[900, 1300], seed=seed))
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    samples = some_samples()
    write_samples(path, samples)

    def interrupted():
        yield samples[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(path, interrupted())
    assert read_samples(path) == samples
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""),
        ("task", 3),
        ("length", "1024"),
        ("length", True),
        ("depth", 1.5),
        ("depth", math.nan),
        ("messages", []),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "assistant", "content": "last"}]),
        ("target", None),
        ("answers", "24169"),
        ("answers", []),
        ("seed", 1.0),
        ("n_tokens", -1),
        ("answer_prefix", None),
        ("answer_prefix", "not how the target begins"),
        ("meta", None),
        ("colour", "red"),
    ],
)
def test_a_malformed_row_is_refused_with_file_line_and_field(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "train.jsonl"
    write_samples(path, some_samples())
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[1][field] = value
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=f"train.jsonl, line 2: Field '{field}'"):
        read_samples(path)


@pytest.mark.parametrize("row", [b"{", b"", b"[]", b'"text"', b"\xff\xfe{}", b"{}"])
def test_a_row_that_is_no_sample_at_all_is_refused_with_file_and_line(tmp_path: Path, row: bytes) -> None:
    path = tmp_path / "train.jsonl"
    write_samples(path, some_samples())
    path.write_bytes(path.read_bytes() + row + b"\n")
    with pytest.raises(ValueError, match="train.jsonl, line 3: "):
        read_samples(path)


def test_rows_of_turns_may_have_other_fields_unless_they_would_change_the_prompt(tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "Which shelf?"}, {"role": "assistant", "content": "Shelf 7."}
    path = tmp_path / "mine.jsonl"

    def read(**row: object) -> Sample:
        path.write_text(json.dumps(row), encoding="utf-8")
        return read_samples(path)[0]

    assert read(messages=[question, answer], source="a blog", id=3) == read(messages=[question, answer])
    for row, complaint in (
        (
            {"prompt": [question], "completion": [answer]},
            "has 'prompt', 'completion'. Give .* turns of 'prompt', then those",
        ),
        ({"instruction": "Which?", "output": "7"}, "Field 'messages' is missing; the row has 'instruction', 'output'"),
        ({"messages": [question, answer], "tools": []}, "Field 'tools' would change the prompt"),
        ({"messages": [question]}, "last turn must be the answer, .* not {'role': 'user', 'content': 'Which shelf"),
        ({"messages": [question, {**answer, "tool_calls": []}]}, "and nothing else, not .*tool_calls"),
        ({"messages": [question, answer], "task": "lines"}, "Field 'id' is missing"),
    ):
        with pytest.raises(ValueError, match=f"mine.jsonl, line 1: .*{complaint}"):
            read(**row)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "train.jsonl", some_samples()[:1] * 2)
    with pytest.raises(ValueError, match="line 2: the id 'lines-train-900-0000' is already that of line 1"):
        read_samples(tmp_path / "train.jsonl")
