"""For the same inputs RULER's prompts and scores are those of NVIDIA's own code."""

import random
import re
import string

import pytest

import nvidia_ruler as nvidia
from seal_peft.tasks import TASKS, Sample, haystacks, metrics, qa, ruler_niah, ruler_templates

pytestmark = nvidia.needs_nvidia


def make(name: str, size: int, seed: int = 11, depth: float = 0.4) -> Sample:
    return TASKS[f"ruler_{name}"].make(seed=seed, size=size, depth=depth, split="test", questions=1)


def context_of(sample: Sample, template: ruler_templates.Template, fields: dict[str, str]) -> str:
    """What stands at the place of the context, found by the words around it."""
    before, after = template.prompt.split("{context}")
    (message,) = sample.messages
    start, end = before.format(**fields), after.format(**fields)
    assert message["content"].startswith(start) and message["content"].endswith(end)
    return message["content"][len(start) : len(message["content"]) - len(end)]


def pattern(template: str, **groups: str) -> str:
    """A regular expression for the texts that a template makes."""
    return re.sub(r"\\\{(\w+)\\\}", lambda field: groups[field.group(1)], re.escape(template))


def whole(sample: Sample) -> str:
    """The prompt as NVIDIA's generator writes it for a base model: the answer's beginning follows at once."""
    (message,) = sample.messages
    return message["content"] + sample.answer_prefix


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ruler_niah.FORMS)
def test_needles(name: str, seed: int) -> None:
    form, words_ = ruler_niah.FORMS[name], ruler_templates.wording()
    size = {"noise": 200, "essay": 3000, "needle": 60}[form.haystack]
    sample = make(name, size, seed)
    text = whole(sample)
    # Read back what the sample is made of, and let NVIDIA's code build it again.
    needle = pattern(words_.needle, type_needle_v=form.values, key=r"(\S+)", value=r"(\S+)")
    found = re.findall(needle + r"(?=\s)", text)
    template = words_.niah_one if form.asks_one else words_.niah_many
    query = re.search(pattern(template.question, type_needle_v=r"\w+", query="(.*?)"), text).group(1)
    asked = re.split(r", (?:and )?", query)
    hidden = [pair for pair in found if pair[0] in asked or form.haystack == "essay"]
    keys = list(dict.fromkeys(key for key, _ in hidden))
    # Keys and values are drawn in the order in which the needles stand in the text.
    words = [word for key in keys for word in (key, *(value for other, value in hidden if other == key))]
    needles = [words_.needle.format(type_needle_v=form.values, key=key, value=value) for key, value in hidden]
    settings = {
        "kind": {"noise": "repeat"}.get(form.haystack, form.haystack),
        "type_v": form.values,
        "keys": len(keys),
        "values": form.num_values,
        "asked": [keys.index(key) for key in asked],
    }
    fields = {"type_needle_v": form.values[:-1] if form.asks_one else form.values, "query": query}
    context = context_of(sample, template, fields)
    if form.haystack == "essay":
        prose = haystacks.prose("test")
        sentences = prose.passage(random.Random(f"{name}/places/{seed}").randrange(len(prose.sentences)), size)
        gaps = gaps_of(context, needles, sentences)
        percent = [100 * (gap + 0.5) / len(sentences) for gap in gaps]
        prompt, answers = nvidia.niah(
            haystack=["-"], words=words, gaps=percent, sentences=sentences, units=1, **settings
        )
        # Where a needle has no sentence beside it, NVIDIA's blanks are doubled.
        assert "  " not in context
        prompt = re.sub(r" *\n *", "\n", re.sub(" +", " ", prompt))
    else:
        lines = context.split("\n")
        (place,) = [index for index, line in enumerate(lines) if line in needles]
        if form.haystack == "needle":
            words += [word for pair in found if pair not in hidden for word in pair]
        prompt, answers = nvidia.niah(
            haystack=words_.noise, words=words, gaps=[place], units=len(lines) - 1, **settings
        )
    assert text == prompt
    assert sorted(sample.answers) == sorted(answers)


def gaps_of(context: str, needles: list[str], sentences: list[str]) -> list[int]:
    gaps, rest = [], context
    units = iter([*sentences, ""])
    unit, passed = next(units), 0
    waiting = list(needles)
    while rest:
        if waiting and rest.startswith(waiting[0]):
            gaps.append(passed)
            rest = rest[len(waiting.pop(0)) :].lstrip(" ")
        else:
            assert rest.startswith(unit)
            rest = rest[len(unit) :].lstrip(" ")
            unit, passed = next(units), passed + 1
    return gaps


@pytest.mark.parametrize("seed", range(3))
def test_variable_tracking(seed: int) -> None:
    sample = make("vt", 175, seed)
    text = whole(sample)
    words = ruler_templates.wording()
    before, after = words.variable_tracking.prompt.split("{context}")
    last = words.noise.rpartition(". ")[2]
    parts = []
    for piece in text.split(before)[1:]:
        context = piece.partition(after.partition("{")[0])[0] + "\n"
        units = re.findall(rf"VAR \w+ = (?:VAR )?\w+|{re.escape(last)}\n", context)
        names = re.findall(r"VAR (\w+) =", context)
        chain = [index for index, unit in enumerate(units) if unit.startswith("VAR")]
        places = [index - before for before, index in enumerate(chain)]
        parts.append((re.search(r"VAR \w+ = (\d+)", context).group(1), names, places, len(units) - len(chain)))
    prompt, answers = nvidia.variable_tracking(parts)
    # The one letter that we correct.
    assert text == prompt.replace("assgined", "assigned")
    assert sample.answers == answers
    assert sample.target == sample.answer_prefix + " " + " ".join(answers)


@pytest.mark.parametrize(("size", "length"), [(60, 2048), (700, 4096)])
def test_common_words(size: int, length: int) -> None:
    sample = make("cwe", size)
    text = whole(sample)
    lists = []
    template = ruler_templates.wording().common_words
    before, after = template.prompt.split("{context}")
    example, task = text.split(before)[1:]
    solved = re.findall(r"\d+\. (\S+)", example.rpartition(template.answer_prefix)[2])
    for piece, common in ((example, solved), (task, sample.answers)):
        order = re.findall(r"\d+\. (\S+)", piece.partition(after)[0])
        lists.append(([*common, *sorted(set(order) - set(common))], order))
    prompt, answers = nvidia.common_words(lists, length)
    assert text == prompt
    assert sample.answers == answers
    assert sample.target == sample.answer_prefix + " ".join(f"{i}. {w}" for i, w in enumerate(answers, 1))


def test_frequent_words() -> None:
    sample = make("fwe", 900)
    text = whole(sample)
    order = context_of(sample, ruler_templates.wording().frequent_words, {}).split()
    ranked = sorted(set(order) - {"..."}, key=lambda word: (-order.count(word), word not in sample.answers))
    ranked = [*sample.answers, *ranked[3:]]
    # NVIDIA's first word gives its place to the dots.
    prompt, answers = nvidia.frequent_words(["zzzzzz", *ranked], order, 900 + 73)
    assert text == prompt
    assert sample.answers == answers


@pytest.mark.parametrize(("name", "dataset"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_documents(name: str, dataset: str) -> None:
    sample = make(name, 200)
    text = whole(sample)
    words = ruler_templates.wording()
    (question,) = re.findall(pattern(words.qa.question, query="(.*)"), sample.messages[0]["content"])
    context = context_of(sample, words.qa, {"query": question})
    heads = pattern(words.document, i=r"\d+", document="")
    documents = [text.removesuffix("\n\n") for text in re.split(heads, context)[1:]]
    assert set(documents) <= set(qa.corpus(dataset, "test").documents)
    prompt, answers = nvidia.qa(documents, question, sample.answers)
    assert text == prompt
    assert sample.answers == answers


def test_new_tokens_are_nvidias_and_no_task_is_missing() -> None:
    tasks = nvidia.templates()
    base = {"vt": "variable_tracking", "cwe": "common_words_extraction", "fwe": "freq_words_extraction"}
    rows = re.findall(r"^(\w+):\n  task: (\w+)", (nvidia.FOLDER / "synthetic.yaml").read_text(), re.MULTILINE)
    assert len(rows) == 13
    for name, kind in rows:
        assert base.get(name, kind) == kind
        assert TASKS[f"ruler_{name}"].max_new_tokens == tasks[kind]["tokens_to_generate"]


def random_prediction(rng: random.Random, answers: list[str]) -> str:
    pieces = [*answers, *(answer.upper() for answer in answers), *(answer[1:] for answer in answers)]
    pieces += ["", " ", "\n", "\t", "\x00", "\x1f", "the answer is", "ß", "İ", ".", "12"]
    return rng.choice(["", " ", "\n\x02"]).join(rng.choice(pieces) for _ in range(rng.randrange(8)))


@pytest.mark.parametrize(
    "kind", ["niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa"]
)
def test_scores_equal_nvidias_on_200_random_predictions(kind: str) -> None:
    clean = nvidia.functions("eval/evaluate.py", ["postprocess_pred"])["postprocess_pred"]
    theirs = nvidia.metrics()[kind]
    name = {"niah": "niah_multivalue", "variable_tracking": "vt", "common_words_extraction": "cwe"}
    ours = TASKS[f"ruler_{name.get(kind, {'freq_words_extraction': 'fwe', 'qa': 'qa_1'}.get(kind))}"].score
    rng = random.Random(0)
    alphabet = string.ascii_letters + string.digits + " \n-"
    answers = [
        ["".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 5))] for _ in range(200)
    ]
    predictions = [random_prediction(rng, known) for known in answers]
    scores = [ours(text, known) for text, known in zip(predictions, answers, strict=True)]
    cleaned = [clean(text, {}) for text in predictions]
    assert [100 * score for score in scores] == pytest.approx(theirs["metric_fn_per_sample"](cleaned, answers))
    assert round(sum(scores) / 2, 2) == pytest.approx(theirs["metric_fn"](cleaned, answers), abs=0.011)
    assert 0.1 < sum(scores) / 200 < 0.9


def test_an_empty_answer_scores_nothing() -> None:
    assert metrics.string_match_all("", ["a"]) == metrics.string_match_part("", ["a"]) == 0.0
