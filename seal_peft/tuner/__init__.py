"""The method: SEAL as a PEFT tuner. Imports torch, peft and transformers types only."""

from .config import SealConfig
from .ia3 import export_ia3, import_ia3
from .layer import SealLayer
from .model import SealModel
from .registry import register
from .saving import save_adapter
from .scales import scales

__all__ = ["SealConfig", "SealLayer", "SealModel", "export_ia3", "import_ia3", "register", "save_adapter", "scales"]
