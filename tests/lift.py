"""Moves the tuner into a copy of PEFT's source, as a pull request to PEFT would: `peft/tuners/seal`.

What is not a plain copy is listed here: the registration, the way to `context`, and the package's name in texts.
"""

import re
import shutil
from pathlib import Path

import seal_peft

_OURS = Path(seal_peft.__file__).parent
_NO_CONTEXT = "def position_switch(model):\n    return None\n"
_REGISTRATION = """
from peft.utils import register_peft_method

from .beside import watch

register_peft_method(name="seal", config_cls=SealConfig, model_cls=SealModel)
watch()
"""


def lift(peft: Path, with_context: bool = True) -> None:
    """Put the tuner into the package folder of a copy of PEFT.

    Args:
        peft: The folder `peft` to change.
        with_context: Whether adapters may bring positions along; without, no model is known to have rotary ones.
    """
    seal = peft / "tuners" / "seal"
    shutil.copytree(_OURS / "tuner", seal, ignore=shutil.ignore_patterns("__pycache__", "registry.py"))
    if with_context:
        shutil.copytree(_OURS / "context", seal / "context", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (seal / "context").mkdir()
        (seal / "context" / "switch.py").write_text(_NO_CONTEXT, encoding="utf-8")

    _edit(seal / "model.py", "from ..context.switch import", "from .context.switch import")
    _edit(seal / "__init__.py", "from .registry import register\n", "")
    _edit(seal / "__init__.py", '    "register",\n', "")
    _append(seal / "__init__.py", _REGISTRATION)
    for file in seal.rglob("*.py"):
        rename(file)

    _edit(peft / "utils" / "peft_types.py", '    LORA = "LORA"\n', '    LORA = "LORA"\n    SEAL = "SEAL"\n')
    _append(peft / "tuners" / "__init__.py", "\nfrom .seal import SealConfig, SealModel\n")
    _append(peft / "__init__.py", "\nfrom .tuners import SealConfig, SealModel\n")


def rename(file: Path) -> None:
    """Call the package by its name within PEFT, in a module or a test."""
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r"\bseal_peft(\.tuner)?\b", "peft.tuners.seal", text), encoding="utf-8")


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file} has {old!r} {text.count(old)} times, not once: mend tests/lift.py.")
    file.write_text(text.replace(old, new), encoding="utf-8")


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as end:
        end.write(text)
