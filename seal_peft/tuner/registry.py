"""Makes SEAL a PEFT method like any other: a real member of `PeftType` and PEFT's own registration."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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
        describe: Writes the card of an adapter folder, which it gets; before an upload the repository's id, too, and
            `by_trainer=True` where a Trainer wrote one before.

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
    """Give the two pushes the last word on the card to SEAL; models without a SEAL adapter are left alone.

    transformers writes a plain card over the saved one between `save_pretrained` and the upload, and asks nobody. Its
    Trainer does the same, and then lets PEFT add its lines.
    """
    update = PeftModel.create_or_update_model_card

    def _upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if _has_seal(self):
            describe(working_dir, repo_id=repo_id)
        return super(PeftModel, self)._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @wraps(update)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        update(self, output_dir)
        if _has_seal(self):
            describe(output_dir, by_trainer=True)

    PeftModel._upload_modified_files = _upload_modified_files  # type: ignore[method-assign]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]


def _has_seal(model: Any) -> bool:
    return any(isinstance(config, SealConfig) for config in model.peft_config.values())


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
