"""Say which context extension reaches a length, for a model that need not be loaded.

seal-peft advise --model_name_or_path smollm2 --length 32768
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from .context.advice import Advice
from .context.advice import advise as advice_for
from .loading import load_config
from .reach import reach_of_folder
from .report import markdown_table


@dataclass
class AdviseArguments:
    """Which model, and how far it should read."""

    model_name_or_path: str = field(metadata={"help": "Model: Hub id, local folder, or `smollm2`. Only its config."})
    length: int = field(metadata={"help": "Target length in tokens, the answer included."})


def advise(arguments: AdviseArguments) -> str:
    """Return a table of settings that reach the length; see `seal_peft.context.advice.advise`.

    Args:
        arguments: See `AdviseArguments`.

    Raises:
        ValueError: The length is not positive, or nothing extends the model.
    """
    rows = [["method", "reaches (tokens)", "flags of `seal-peft train`", "note"]]
    config = load_config(arguments.model_name_or_path)
    advices, window = advice_for(config, arguments.length), reach_of_folder(config)
    if advices[0].method != "none" and window is not None and arguments.length <= window:
        advices = [Advice("none", {}, window, "by the Self-Extend that its config notes")]
    for advice in advices:
        flags = " ".join(f"--{name} '{json.dumps(value)}'" for name, value in (advice.settings or {}).items())
        rows.append([advice.method, f"{advice.reach:,}" if advice.reach else "no", flags, advice.note])
    return markdown_table(rows)
