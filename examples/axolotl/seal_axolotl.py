"""SEAL as an adapter of Axolotl, through its plugin interface; `seal.yaml` beside this file uses it.

Put this file where Python finds it (`PYTHONPATH=examples/axolotl`). `make test-axolotl` runs it, as docs/trainers.md
tells.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel

import seal_peft


class SealArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration."""

    seal_granularity: str = "channel"
    seal_sites: list[str] = ["output"]


class SealPlugin(BasePlugin):
    """Builds or loads a SEAL adapter where the configuration says `adapter: seal`."""

    def get_input_args(self) -> str:
        """Name the class of the added keys."""
        return "seal_axolotl.SealArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Make `adapter: seal` known."""
        return [AdapterCapabilities(name="seal")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Wrap the model, or load the adapter that `lora_model_dir`, Axolotl's key for any adapter, names."""
        if cfg.adapter != "seal":
            return None
        config = seal_peft.SealConfig(
            granularity=cfg.seal_granularity, sites=tuple(cfg.seal_sites), task_type="CAUSAL_LM"
        )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config
