"""What a person sees of `seal-peft heads` in the terminal: the outermost heads and the rank correlations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHOWN = 5


def show(comparison: Mapping[str, Any], folder: Path) -> list[str]:
    """Return lines of Markdown tables.

    Args:
        comparison: What `compare` returned.
        folder: Where the files are.
    """
    lines = ["| map | greatest | least |", "| --- | --- | --- |"]
    for name in comparison["top"]:
        ends = [
            ", ".join(f"{head} {value:+.3g}" for head, value in comparison[end][name][:_SHOWN])
            for end in ("top", "bottom")
        ]
        lines.append(f"| {name} | {ends[0]} | {ends[1]} |")
    for length, pairs in comparison["rank_correlations"].items():
        lines += ["", f"Rank correlations at {length} tokens:", "", "| |" + "".join(f" {name} |" for name in pairs)]
        lines.append("|" + " --- |" * (len(pairs) + 1))
        for name, own in pairs.items():
            cells = ("" if own.get(other) is None else f"{own[other]:+.2f}" for other in pairs)
            lines.append(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    return [*lines, "", f"All heads: {folder / 'heads.json'}"]
