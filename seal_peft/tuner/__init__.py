"""The method: SEAL as a PEFT tuner. Imports torch, peft and transformers types only."""

from .adapters import hotswap_adapter, set_strength
from .config import SealConfig
from .layer import SealLayer
from .model import SealModel
from .registry import register
from .scales import scales

__all__ = ["SealConfig", "SealLayer", "SealModel", "hotswap_adapter", "register", "scales", "set_strength"]
