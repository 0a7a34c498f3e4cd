"""SEAL as a PEFT method: learn how strongly each attention head counts. Importing registers it with PEFT."""

from importlib.metadata import PackageNotFoundError, version

from .hub import push
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

try:
    __version__ = version("seal-peft")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

register()

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
