"""SEAL as a PEFT method: learn how strongly each attention head counts. Importing registers it with PEFT."""

from importlib.metadata import PackageNotFoundError, version

from .tuner import SealConfig, SealLayer, SealModel, export_ia3, import_ia3, register, save_adapter, scales

try:
    __version__ = version("seal-peft")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

register()

__all__ = ["SealConfig", "SealLayer", "SealModel", "__version__", "export_ia3", "import_ia3", "save_adapter", "scales"]
