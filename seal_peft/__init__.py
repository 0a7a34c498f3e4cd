"""SEAL as a PEFT method: learn how strongly each attention head counts. Importing registers it with PEFT."""

from typing import TYPE_CHECKING, Any

from .tuner import (
    SealConfig,
    SealLayer,
    SealModel,
    activate,
    add_beside,
    export_ia3,
    hotswap_adapter,
    import_ia3,
    load_adapters,
    register,
    save_adapter,
    scales,
    set_strength,
)

if TYPE_CHECKING:
    from .hub import push

__version__ = "0.1.0"  # here, and not in pyproject.toml, for a source tree that was never installed


def _describe(folder: str, **where: Any) -> None:
    from .describe import describe  # fetched at the first save: it brings reports and tasks along

    describe(folder, **where)


register(_describe)

__all__ = [
    "SealConfig",
    "SealLayer",
    "SealModel",
    "__version__",
    "activate",
    "add_beside",
    "export_ia3",
    "hotswap_adapter",
    "import_ia3",
    "load_adapters",
    "push",
    "save_adapter",
    "scales",
    "set_strength",
]


def __getattr__(name: str) -> Any:
    if name == "push":  # it brings reports and tasks along, which training and loading adapters do not need
        from .hub import push

        return push
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
