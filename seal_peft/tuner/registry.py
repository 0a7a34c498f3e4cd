"""Makes SEAL a PEFT method like any other: a real member of `PeftType` and PEFT's own registration."""

from __future__ import annotations

from peft import mapping as peft_mapping
from peft.utils import PeftType, register_peft_method

from .beside import watch
from .config import SealConfig
from .model import SealModel

_NAME = "SEAL"


def register() -> None:
    """Register SEAL with PEFT. Calling it again changes nothing.

    PEFT has no plugin entry point and only accepts members of `PeftType`, so a member is added to that enum.

    Raises:
        RuntimeError: PEFT itself, or another package, already has a method of this name.
    """
    if _NAME not in PeftType.__members__:
        _add_enum_member(_NAME)
    member = PeftType[_NAME]
    owner = peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if owner is SealConfig:
        return
    if owner is not None:
        raise RuntimeError(
            f"PEFT already has a method named SEAL ({owner.__module__}.{owner.__qualname__}), so seal_peft cannot "
            "register its own. Use that implementation, or import only one of the two packages in a process."
        )
    register_peft_method(name=_NAME.lower(), config_cls=SealConfig, model_cls=SealModel)
    watch()


def _add_enum_member(name: str) -> None:
    """Add a genuine member to the closed enum `PeftType`, so that `.value`, pickling and iteration all hold.

    A bare string in PEFT's tables is not enough: transformers reads `peft_type.value` when it loads an adapter.
    """
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # From Python 3.12 on attribute access no longer falls back to the member map.
    type.__setattr__(PeftType, name, member)
