"""Samples like a user's own examples: word for word, hidden at any depth, training and testing apart."""

import json
import re
from pathlib import Path

import pytest

from seal_peft.data import read_samples
from seal_peft.tasks import Sample
from stages import error_of, save_model, seal


def row(number: int, **changes) -> dict:
    user = f"Order {number} goes to gate {chr(64 + number)}{number}.\n\nWhich gate does order {number} go to?"
    fields = {"id": f"order-{number}", "task": "passkey", "length": 0, "depth": None, "seed": 0}
    answer = f"gate {chr(64 + number)}{number}"
    return {
        **fields,
        "messages": [{"role": "user", "content": user}],
        "target": f"To {answer}.",
        "answers": [answer],
        **changes,
    }


def save_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), weights=False)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return save_rows(tmp_path / "ten.jsonl", [row(number) for number in range(1, 11)])


def make(model: Path, file: Path, out: Path, *words: object) -> int:
    given = ["--model_name_or_path", model, "--task_file", file, "--output_file", out]
    return seal("make-data", *given, *words)


def numbers_in(sample: Sample) -> set[int]:
    return {int(number) for number in re.findall(r"[Oo]rder (\d+)", json.dumps(sample.messages))}


def test_ten_examples_make_fifty_samples_of_the_asked_length(model: Path, ten: Path, tmp_path: Path) -> None:
    words = ["--num_samples", 25, "--lengths", 400, 800, "--questions_per_context", 2]
    assert make(model, ten, tmp_path / "train.jsonl", *words) == 0
    samples = read_samples(tmp_path / "train.jsonl")
    assert len(samples) == 50
    for sample in samples:
        assert 0.97 * sample.length <= sample.n_tokens <= sample.length
        context, _, question = sample.messages[0]["content"].rpartition("\n\n")
        assert [turn["role"] for turn in sample.messages] == ["user", "assistant", "user"]
        for answer, text in (
            (sample.messages[1]["content"], question),
            (sample.target, sample.messages[2]["content"]),
        ):
            number = int(re.fullmatch(r"Which gate does order (\d+) go to\?", text).group(1))
            assert answer == row(number)["target"]
            assert context.count(row(number)["messages"][0]["content"].partition("\n\n")[0]) == 1
    assert (tmp_path / "train.jsonl").read_bytes() == remade(model, ten, tmp_path / "again.jsonl", words)


def remade(model: Path, file: Path, out: Path, words: list) -> bytes:
    assert make(model, file, out, *words) == 0
    return out.read_bytes()


def test_no_example_is_in_both_splits_and_all_are_used(model: Path, ten: Path, tmp_path: Path) -> None:
    used = {}
    for split in ("train", "test"):
        assert make(model, ten, tmp_path / split, "--split", split, "--num_samples", 40, "--lengths", 300) == 0
        used[split] = set().union(*(numbers_in(sample) for sample in read_samples(tmp_path / split)))
    assert used == {"train": {1, 3, 5, 7, 9}, "test": {2, 4, 6, 8, 10}}


def test_facts_stand_at_the_asked_depth_in_their_order(model: Path, tmp_path: Path) -> None:
    two = [
        row(
            n,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"One is {n}.\n\nTwo is {n}.\n\nWhat is one?"},
            ],
        )
        for n in (1, 2)
    ]
    file = save_rows(tmp_path / "two.jsonl", two)
    assert make(model, file, tmp_path / "out", "--lengths", 600, "--num_samples", 4, "--depths", 0, 0.5) == 0
    for sample in read_samples(tmp_path / "out"):
        assert sample.messages[0] == {"role": "system", "content": "Be brief."}
        text = sample.messages[1]["content"]
        first, second = text.index("One is 1.") / len(text), text.index("Two is 1.") / len(text)
        assert (first, second) == pytest.approx((sample.depth, (1 + sample.depth) / 2), abs=0.1)


def asks(*contents: str) -> dict[str, list]:
    """Turns of user and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


NO_EMPTY_LINE = "bad.jsonl, line 2: Field 'messages' must hold the facts, an empty line"
TOLD_TWICE = "bad.jsonl, line 2: Field 'messages': 'Order 1 goes to gate A1.' stands in line 1, too"


@pytest.mark.parametrize(
    ("rows", "words", "complaint"),
    [
        ([row(1)], [], "bad.jsonl, examples given: 1; use at least 2"),
        ([row(1), row(2, task="chess")], [], "bad.jsonl, line 2: Field 'task': There is no task 'chess'"),
        ([row(1), row(2, answers=[])], [], "bad.jsonl, line 2: Field 'answers' must be a list of at least one text"),
        ([row(1), row(2, **asks("Why?"))], [], NO_EMPTY_LINE),
        ([row(1), row(2, messages=row(1)["messages"])], [], TOLD_TWICE),
        ([row(1), row(2, **asks("a\n\nb", "c", "d"))], [], "line 2: Field 'messages' of an example is one user turn"),
        ([row(1), row(2)], ["--questions_per_context", 2], "no more than 1 for one context"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_line_and_field(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list, words: list, complaint: str
) -> None:
    file = save_rows(tmp_path / "bad.jsonl", rows)
    assert make(model, file, tmp_path / "out.jsonl", "--lengths", 400, *words) == 1
    assert complaint in error_of(capsys)
    assert not (tmp_path / "out.jsonl").exists()
