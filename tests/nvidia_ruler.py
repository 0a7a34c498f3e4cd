"""NVIDIA's own RULER code, read from its installed package and run with randomness that a test dictates.

The modules themselves cannot be imported: they parse a command line and need NLTK and scipy.
"""

import ast
import math
import random
import re
import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SPEC = find_spec("long_context_eval")
FOLDER = Path(SPEC.submodule_search_locations[0]) if SPEC else Path()
needs_nvidia = pytest.mark.skipif(not SPEC, reason="needs `pip install --no-deps nvidia-long-context-eval`")


def templates() -> dict[str, dict[str, Any]]:
    return runpy.run_path(str(FOLDER / "data/synthetic/constants.py"))["TASKS"]


def metrics() -> dict[str, dict[str, Callable]]:
    return runpy.run_path(str(FOLDER / "eval/synthetic/constants.py"))["TASKS"]


def functions(file: str, names: list[str], **globals_: Any) -> dict[str, Any]:
    """Run the definitions of some functions of a file, and nothing else of it."""
    tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(wanted) == len(names)
    space = {"re": re, "np": np, "random": random, **globals_}
    exec(compile(ast.Module(wanted, []), file, "exec"), space)
    return space


def constant(file: str, name: str) -> str:
    for node in ast.walk(ast.parse((FOLDER / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


class Dictated:
    """Stands in for the module `random`: what it draws comes from a list, and it shuffles into a given order."""

    def __init__(self, samples: list[list], orders: list[list | None], choices: list[str] | None = None) -> None:
        self.samples, self.orders, self.letters = samples, orders, choices or []

    def sample(self, population: Any, k: int) -> list:
        drawn = self.samples.pop(0)
        assert len(drawn) == k
        return drawn

    def choices(self, alphabet: str, k: int) -> list[str]:
        word = self.letters.pop(0)
        assert len(word) == k
        return list(word)

    def Random(self, seed: int) -> "Dictated":  # noqa: N802
        return self

    def shuffle(self, items: list) -> None:
        order = self.orders.pop(0)
        if order is not None:
            assert sorted(items) == sorted(order)
            items[:] = order


def niah(
    *,
    haystack: Any,
    kind: str,
    words: list[str],
    type_v: str,
    keys: int,
    values: int,
    asked: list[int],
    gaps: list,
    sentences: list[str] | None = None,
    units: int,
) -> tuple[str, list[str]]:
    task = templates()["niah"]
    args = SimpleNamespace(
        num_needle_k=keys,
        num_needle_v=values,
        num_needle_q=len(asked),
        type_needle_k="keys",
        type_needle_v=type_v,
        type_haystack=kind,
        random_seed=42,
        template=task["template"] + task["answer_prefix"],
    )
    drawn = iter(words)
    needle = constant("data/synthetic/niah.py", "needle")
    space = functions(
        "data/synthetic/niah.py",
        ["generate_input_output"],
        args=args,
        needle=needle,
        haystack=needle if kind == "needle" else haystack,
        DEPTHS=range(101),
        generate_random=lambda _: next(drawn),
        sent_tokenize=lambda _: sentences,
        random=Dictated([gaps, asked], [None]),
    )
    return space["generate_input_output"](units)


def variable_tracking(parts: list[tuple[str, list[str], list[int], int]]) -> tuple[str, list[str]]:
    """Put together as `sys_vartrack_w_noise_random` does; parts are value, names, places and lines of both chains."""
    task = templates()["variable_tracking"]
    texts = []
    for value, names, places, lines in parts:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
        space = functions(
            "data/synthetic/variable_tracking.py",
            ["generate_input_output"],
            args=SimpleNamespace(template=task["template"] + task["answer_prefix"]),
            TASKS=templates(),
            generate_chains=lambda *_, n=names, c=chain, **__: ([n], [c]),
            random=Dictated([places], []),
        )
        texts.append(space["generate_input_output"](lines, 1, 4))
    (example, example_names), (text, names) = texts
    return f" {example} {' '.join(example_names)}\n\n" + "\n\n" + text, names


def common_words(lists: list[tuple[list[str], list[str]]], length: int) -> tuple[str, list[str]]:
    """Lists are the different words, common ones first, and all words in order, of the example and the task."""
    task = templates()["common_words_extraction"]
    args = SimpleNamespace(
        max_seq_length=length,
        num_cw=10,
        freq_cw=30,
        freq_ucw=3,
        random_seed=42,
        template=task["template"] + task["answer_prefix"],
    )
    space = functions(
        "data/synthetic/common_words_extraction.py",
        ["get_example", "generate_input_output"],
        args=args,
        words=[],
        random=Dictated([different for different, _ in lists], [order for _, order in lists]),
    )
    return space["generate_input_output"](len(lists[1][0]))


def frequent_words(ranked: list[str], order: list[str], num_words: int) -> tuple[str, list[str]]:
    """Ranked are the coded words, most frequent first, and a first one in the place of the dots."""
    task = templates()["freq_words_extraction"]
    space = functions(
        "data/synthetic/freq_words_extraction.py",
        ["generate_input_output"],
        args=SimpleNamespace(template=task["template"] + task["answer_prefix"], random_seed=42),
        TOKENIZER=SimpleNamespace(text_to_tokens=str.split),
        zeta=lambda alpha: math.pi**2 / 6,
        string=SimpleNamespace(ascii_lowercase=""),
        random=Dictated([], [ranked, None, order], list(ranked)),
    )
    space["random"].orders = [ranked, order, order]
    text, answers, _ = space["generate_input_output"](10**9, num_words=num_words, vocab_size=len(ranked))
    return text, answers


def qa(documents: list[str], question: str, answers: list[str]) -> tuple[str, list[str]]:
    task = templates()["qa"]
    space = functions(
        "data/synthetic/qa.py",
        ["generate_input_output"],
        args=SimpleNamespace(template=task["template"] + task["answer_prefix"], random_seed=42),
        QAS=[{"query": question, "outputs": answers, "context": []}],
        DOCS=documents,
        DOCUMENT_PROMPT=constant("data/synthetic/qa.py", "DOCUMENT_PROMPT"),
        random=Dictated([], [None]),
    )
    return space["generate_input_output"](0, len(documents))
