"""The method: SEAL as a PEFT tuner. Imports torch, peft and transformers types only."""

from .adapters import hotswap_adapter, set_strength
from .config import SealConfig
from .joint import activate, add_beside, load_adapters
from .layer import SealLayer
from .model import SealModel
from .registry import register
from .scales import scales

__all__ = [
    "SealConfig",
    "SealLayer",
    "SealModel",
    "activate",
    "add_beside",
    "hotswap_adapter",
    "load_adapters",
    "register",
    "scales",
    "set_strength",
]
