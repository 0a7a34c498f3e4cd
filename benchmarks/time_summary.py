"""What benchmarks/time_to_accuracy.py found, as a record and as a table."""

from __future__ import annotations

import sys
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from jobs import interval_over_seeds
from time_bench import Bench
from time_data import SEEDS
from time_points import REACHED, reached

from seal_peft.files import write_json
from seal_peft.provenance import source_of
from seal_peft.report import markdown_table


def summary(bench: Bench) -> dict[str, Any]:
    """Everything that was found."""
    finals: dict[str, Any] = {}
    for phase, system, rate, seed in bench.jobs("final"):
        entry = finals.setdefault(
            system, {"rate": rate, "seconds_per_token": _seconds_per_token(bench, system), "runs": []}
        )
        entry["runs"].append({"seed": seed, **_outcome(bench, phase, system, rate, seed)})
    for system, entry in finals.items():
        runs = entry["runs"]
        entry["recipe"], entry["parameters"] = [run.pop("recipe") for run in runs][0], runs[0]["parameters"]
        for name, losses in (("search", bench.searched(system)), ("finalists", bench.finalists(system))):
            entry[name] = {f"{rate:g}": loss for rate, loss in losses.items()}
        entry["not_chosen"] = _not_chosen(bench, system, entry["rate"])
        for name in ("last", "reworded"):
            scores = [run.pop(f"{name}_scores") for run in runs]
            entry[name] = {**interval_over_seeds(scores), "seeds": [mean(own) for own in scores]}
        for target in map(str, REACHED):
            there = [run["to"][target] for run in runs]
            # A median only where most seeds get there; those that do not count as later than all others.
            tokens = median([point["tokens"] if point else float("inf") for point in there])
            seconds = tokens * median(entry["seconds_per_token"] or [float("inf")])
            reached_by = sum(point is not None for point in there)
            entry[f"to {target}"] = {"reached": reached_by, "tokens": _finite(tokens), "seconds": _finite(seconds)}
    knobs = {}
    if not bench.left("knobs") and not bench.left("choice"):
        for phase, knob, rate, seed in bench.jobs("choice"):
            outcome = _outcome(bench, phase, knob, rate, seed)
            for name in ("last", "reworded"):
                outcome[name] = interval_over_seeds([outcome.pop(f"{name}_scores")])
            search = {f"{rate:g}": loss for rate, loss in bench.searched(knob).items()}
            knobs[knob] = {"rate": rate, "search": search, **outcome}
    base = {name: interval_over_seeds([own]) for name, own in bench.base().items()}
    return {"size": asdict(bench.size), "base": base, "systems": finals, "knobs": knobs}


def _outcome(bench: Bench, phase: str, system: str, rate: float, seed: int) -> dict[str, Any]:
    """One training with the accuracy at its points, and from where on it had the accuracies that count."""
    run, scores = bench.train(phase, system, rate, seed), bench.test(phase, system, rate, seed)
    points = []
    for point in run["points"]:
        own = scores.get(str(point["step"]))
        points.append({**point, "accuracy": None if own is None else mean(own)})
    to = {str(target): reached(points, target) for target in REACHED}
    ends = {"last_scores": scores[str(points[-1]["step"])], "reworded_scores": scores["reworded"]}
    return {**run, "points": points, "to": to, **ends}


def _not_chosen(bench: Bench, system: str, chosen: float) -> dict[str, Any]:
    """Trainings with other rates that have answered all the same, before there was a better one."""
    found = {}
    for rate in bench.three_best(system):
        if rate != chosen and (bench.path("final", system, rate, 0) / "scores.json").is_file():
            outcome = _outcome(bench, "final", system, rate, 0)
            ends = {name: interval_over_seeds([outcome[f"{name}_scores"]]) for name in ("last", "reworded")}
            found[f"{rate:g}"] = {"to": outcome["to"], **ends}
    return found


def _seconds_per_token(bench: Bench, system: str) -> list[float]:
    """What a token took alone on the GPU, round by round; empty where not all rounds have been timed."""
    jobs = [job for job in bench.jobs("timing") if job[1] == system]
    if not all((bench.path(*job) / "run.json").is_file() for job in jobs):
        return []
    timed = [bench.train(*job)["points"] for job in jobs]
    return [_difference(own, "seconds_shared") / _difference(own, "tokens") for own in timed]


def _difference(points: list[dict[str, Any]], name: str) -> float:
    """From the first point, when everything is warm, to the last."""
    return points[-1][name] - (points[0][name] if len(points) > 1 else 0)


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None


def table(systems: dict[str, Any]) -> str:
    """Systems by what they cost and reach."""
    rows = [["system", "parameters", "rate", *(f"to {t:.2f}" for t in REACHED), "last", "reworded"]]
    for name, entry in systems.items():
        to = [entry[f"to {target}"] for target in REACHED]
        times = [f"{own['tokens']:,} tokens" if own["tokens"] else "not reached" for own in to]
        ends = [f"{entry[end]['mean']:.3f}" for end in ("last", "reworded")]
        rows.append([name, f"{entry['parameters']:,}", f"{entry['rate']:g}", *times, *ends])
    return markdown_table(rows)


def merge(bench: Bench) -> None:
    """Write the results file."""
    if missing := next(filter(None, map(bench.left, ("search", "finalists", "final"))), []):
        sys.exit(f"{len(missing)} jobs are left, {missing[0]} first: use `run`.")
    result = summary(bench)
    if untimed := len(bench.left("timing")):
        print(f"{untimed} jobs of `timing` are left, so some systems have tokens and no seconds.")
    there = {"search": True, "finalists": True, "final": True, "timing": not untimed, "knobs": result["knobs"]}
    phases = [phase for phase, done in there.items() if done]
    runs = [bench.train(*job) for phase in phases for job in bench.jobs(phase)]
    write_json(bench.options.output, {"task": "lines", "seeds": SEEDS, **result, **source_of(runs)})
    print(f"{table(result['systems'])}\nwritten to {bench.options.output}")
