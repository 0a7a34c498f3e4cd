"""Look into the answers of `seal-peft reproduce` for what mean scores do not tell; docs/reproduce.md quotes it.

How many answers about documents hold the right words, and what came of the needles of each wording, beside an earlier
training on other wordings.

    python benchmarks/reproduce_answers.py --work runs/reproduce --before runs/before/needle/21fff68a
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from seal_peft.data import read_samples
from seal_peft.files import read_json, write_json
from seal_peft.predictions import fingerprint
from seal_peft.provenance import provenance
from seal_peft.reproduce.parts import PARTS
from seal_peft.statistics import paired_difference
from seal_peft.systems import BASE
from seal_peft.tasks.facts import _TEMPLATES
from seal_peft.tasks.metrics import share_of_answers

Rows = list[dict[str, Any]]


def read(folder: Path) -> dict[str, Rows]:
    """Answers of a part by system, each in the order of samples."""
    found: dict[str, Rows] = defaultdict(list)
    for line in (folder / "all" / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["system"]].append(row)
    return {system: sorted(rows, key=lambda row: row["id"]) for system, rows in found.items()}


def compared(own: list[float], other: list[float]) -> dict[str, float]:
    """Mean difference on the same samples, with its interval."""
    return dict(zip(("mean", "low", "high"), paired_difference(own, other), strict=True))


def documents(systems: dict[str, Rows], task: str) -> dict[str, Any]:
    """By system: how many answers hold one of the accepted answers as whole words, and how long they are."""
    found: dict[str, Any] = {}
    held: dict[str, list[float]] = {}
    for system, rows in systems.items():
        own = [row for row in rows if row["task"] == task]
        held[system] = [float(any(share_of_answers(row["answer"], [a]) for a in row["answers"])) for row in own]
        words = mean(len(row["answer"].split()) for row in own)
        found[system] = {"n": len(own), "held": int(sum(held[system])), "words": words}
    return {name: {**entry, "difference_to_base": compared(held[name], held[BASE])} for name, entry in found.items()}


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
    folders = {name: options.work / name / fingerprint(asdict(PARTS[name]))[:8] for name in ("qa", "needle")}
    now = {name: read(folder) for name, folder in folders.items()}
    samples = read_samples(options.work / "data" / f"{PARTS['needle'].test.name}-test-0.jsonl")
    sources = {name: read_json(folder / "all" / "metrics.json") for name, folder in folders.items()}
    sources["needle before"] = read_json(options.before / "all" / "metrics.json")
    result = {
        "answers": {name: {key: own[key] for key in ("date", "commit", "device")} for name, own in sources.items()},
        "qa": {task: documents(now["qa"], task) for task in PARTS["qa"].test.tasks},
        "needle": needles(now["needle"], read(options.before), {sample.id: sample.target for sample in samples}),
    }
    write_json(options.output, {**result, **provenance()})


if __name__ == "__main__":
    main()
