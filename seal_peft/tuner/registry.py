"""Makes SEAL a PEFT method like any other: a real member of `PeftType` and PEFT's own registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft import mapping as peft_mapping
from peft.utils import PeftType, register_peft_method

from .beside import watch
from .config import SealConfig
from .model import SealModel

_NAME = "SEAL"


def register(describe: Callable[..., None]) -> None:
    """Register SEAL with PEFT. Calling it again changes nothing.

    PEFT has no plugin entry point and only accepts members of `PeftType`, so a member is added to that enum.

    Args:
        describe: Writes the card of an adapter folder, which it gets, and before an upload the repository's id, too.

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
    SealConfig._describe = describe
    _describe_on_push(describe)


def _describe_on_push(describe: Callable[..., None]) -> None:
    """Give `PeftModel.push_to_hub` the last word on the card to SEAL; models without a SEAL adapter are left alone.

    transformers writes a plain card over the saved one between `save_pretrained` and the upload, and asks nobody.
    """

    def _upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(config, SealConfig) for config in self.peft_config.values()):
            describe(working_dir, repo_id)
        return super(PeftModel, self)._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    PeftModel._upload_modified_files = _upload_modified_files  # type: ignore[method-assign]


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
