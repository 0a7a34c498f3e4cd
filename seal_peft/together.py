"""PATH+PATH on the command line: adapters that compute together, such as LoRA and SEAL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft.utils import PeftType

from .tuner.reading import read_adapter


def split_together(text: str) -> list[str]:
    """Split PATH+PATH, what a user calls adapters that compute together, such as LoRA and SEAL.

    Paths may hold the sign, too: what exists is one path.

    Args:
        text: PATH or PATH+PATH.

    Returns:
        The paths, in the order given.
    """
    paths = text.split("+")
    return [text] if Path(text).exists() or not all(paths) else paths


def check_together(paths: Sequence[str]) -> None:
    """Make sure, before any model is read, that adapters are there and can compute together.

    Args:
        paths: One adapter of any PEFT method, or several; none will do.

    Raises:
        ValueError: One is not there or broken. Or there are several and none is SEAL's, or one has no layers, such as
            prompts.
    """
    configs = [read_adapter(path) for path in paths]
    if len(paths) < 2:
        return
    methods = [str(PeftType(config.peft_type).value) for config in configs]
    if "SEAL" not in methods or any(config.is_prompt_learning for config in configs):
        raise ValueError(
            f"{'+'.join(paths)} are of the methods {', '.join(methods)}, which do not compute together. Give SEAL "
            "and LoRA as PATH+PATH, others one by one."
        )
