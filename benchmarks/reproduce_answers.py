"""Look into the answers of `seal-peft reproduce` for what mean scores do not tell; docs/reproduce.md quotes it.

Which of two systems is better on the same samples, how many answers about documents hold the right words or are empty,
how many heads are clearly better or worse pruned, and what came of the needles of each wording, beside an earlier
training on other wordings.

    python benchmarks/reproduce_answers.py --work runs/reproduce --before runs/before/needle/21fff68a
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from seal_peft.data import read_samples
from seal_peft.files import read_json, write_json
from seal_peft.predictions import fingerprint
from seal_peft.provenance import provenance
from seal_peft.reproduce.parts import PARTS
from seal_peft.statistics import paired_difference, sign_test
from seal_peft.systems import BASE
from seal_peft.tasks.facts import _TEMPLATES
from seal_peft.tasks.metrics import share_of_answers

Rows = list[dict[str, Any]]

# Part, two systems, and a length; `None` is all of them.
PAIRS: list[tuple[str, tuple[str, str], int | None]] = [
    *product(["samples"], combinations(("seal-c 10", "seal-c 25", "seal-c 50"), 2), (1024, 4096, 8192)),
    *product(
        ["grid"], product(["0.02 x 99"], ("0.01 x 99", "0.02 x 70", *(f"0.03 x {n}" for n in (50, 70, 99)))), [None]
    ),
    *product(["needle"], combinations(("lora", "dora", "seal-c", "seal-h"), 2), [None]),
    *product(["extension"], [("ntk+seal-c", "self-extend+seal-c")], (4096, 8192, 16384, 24576, 31744)),
]


def read(folder: Path) -> dict[str, Rows]:
    """Answers of a part by system, each in the order of samples."""
    found: dict[str, Rows] = defaultdict(list)
    for line in (folder / "all" / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["system"]].append(row)
    return {system: sorted(rows, key=lambda row: row["id"]) for system, rows in found.items()}


def compared(own: list[float], other: list[float]) -> dict[str, float]:
    """Mean difference on the same samples, with its interval and the sign test."""
    difference, low, high = paired_difference(own, other)
    return {"mean": difference, "low": low, "high": high, "p_value": sign_test(own, other)}


def documents(systems: dict[str, Rows], task: str, closed: bool = True) -> dict[str, Any]:
    """By system: how many answers hold one of the accepted ones as whole words, are empty, and how long they are.

    `f1_cut` is what F1 would be if those that hold one were just that. `closed=False` leaves out questions that want
    yes or no, which a long answer holds without knowing.
    """
    found: dict[str, Any] = {}
    held: dict[str, list[float]] = {}
    for system, rows in systems.items():
        own = [row for row in rows if row.get("task") == task and (closed or row["answers"][0] not in ("yes", "no"))]
        held[system] = [float(any(share_of_answers(row["answer"], [a]) for a in row["answers"])) for row in own]
        words = [len(row["answer"].split()) for row in own]
        f1 = [row["score"] for row in own]
        counts = {"n": len(own), "held": int(sum(held[system])), "empty": words.count(0)}
        found[system] = {**counts, "words": mean(words), "f1": mean(f1), "f1_cut": mean(map(max, f1, held[system]))}
    return {name: {**entry, "difference_to_base": compared(held[name], held[BASE])} for name, entry in found.items()}


def pruned(maps: dict[str, Any]) -> dict[str, int]:
    """How many heads are better or worse pruned at every length, by more than two standard errors."""
    z = torch.stack([torch.tensor(own["mean"]) / torch.tensor(own["standard_error"]) for own in maps.values()])
    return {"better": int((z > 2).all(0).sum()), "worse": int((z < -2).all(0).sum())}


def needles(now: dict[str, Rows], before: dict[str, Rows], targets: dict[str, str]) -> dict[str, Any]:
    """The difference that the training made for each system, and what all have for each wording."""
    patterns = {needle: re.sub(r"\\{\w+\\}", ".+", re.escape(needle)) for needle, _ in _TEMPLATES["test"]}
    wordings: dict[str, Any] = {}
    for needle, pattern in patterns.items():
        ids = {name for name, target in targets.items() if re.fullmatch(pattern, target)}
        scores = {
            when: {name: mean(row["score"] for row in rows if row["id"] in ids) for name, rows in systems.items()}
            for when, systems in (("before", before), ("now", now))
        }
        wordings[needle] = {"n": len(ids), **scores}
    pairs = {name: [[row["score"] for row in systems[name]] for systems in (now, before)] for name in now}
    return {"difference": {name: compared(*pair) for name, pair in pairs.items()}, "wordings": wordings}


def main() -> None:
    """Read the answers, write what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="--work_dir of reproduce")
    parser.add_argument("--before", type=Path, required=True, help="folder of the earlier answers about needles")
    parser.add_argument("--output", type=Path, default=Path("results/reproduce-answers.json"))
    options = parser.parse_args()
    names = ("samples", "grid", "needle", "extension", "qa", "guard", "heads")
    folders = {name: options.work / name / fingerprint(asdict(PARTS[name]))[:8] for name in names}
    now = {name: read(folder) for name, folder in folders.items()}
    samples = read_samples(options.work / "data" / f"{PARTS['needle'].test.name}-test-0.jsonl")
    sources = {name: read_json(folder / "all" / "metrics.json") for name, folder in folders.items()}
    sources["needle before"] = read_json(options.before / "all" / "metrics.json")
    differences = {}
    for part, pair, length in PAIRS:
        scores = [[row["score"] for row in now[part][name] if length in (None, row["length"])] for name in pair]
        differences[f"{part}: {' - '.join(pair)}" + (f", {length}" if length else "")] = compared(*scores)
    result = {
        "answers": {name: {key: own[key] for key in ("date", "commit", "device")} for name, own in sources.items()},
        "differences": differences,
        "qa": {task: documents(now["qa"], task) for task in PARTS["qa"].test.tasks},
        "qa_multi_open": documents(now["qa"], "qa_multi", closed=False),
        "guard_qa": documents(now["guard"], "guard_qa"),
        "pruned": pruned(read_json(folders["heads"] / "heads" / "pruning.json")["maps"]["pruning_zero"]),
        "needle": needles(now["needle"], read(options.before), {sample.id: sample.target for sample in samples}),
    }
    write_json(options.output, {**result, **provenance()})


if __name__ == "__main__":
    main()
