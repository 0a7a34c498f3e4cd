"""The method: SEAL as a PEFT tuner. Imports torch, peft and transformers types only."""

from .adapters import hotswap_adapter, set_strength
from .config import SealConfig
from .ia3 import export_ia3, import_ia3
from .joint import activate, add_beside, load_adapters
from .layer import SealLayer
from .model import SealModel
from .registry import register
from .saving import save_adapter
from .scales import scales

__all__ = [
    "SealConfig",
    "SealLayer",
    "SealModel",
    "activate",
    "add_beside",
    "export_ia3",
    "hotswap_adapter",
    "import_ia3",
    "load_adapters",
    "register",
    "save_adapter",
    "scales",
    "set_strength",
]
