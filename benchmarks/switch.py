"""One base model that wears one adapter at a time, so that all systems share weights and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import get_peft_model
from torch import nn

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Switch:
    """Builds adapters on the attention projections of a Llama, and puts those of one system in place."""

    def __init__(self, model: nn.Module, configs: dict[str, Callable[[], Any]]) -> None:
        self.model = model
        self.wrapped: dict[str, dict[str, nn.Module]] = {"base": self.projections()}
        for name, config in configs.items():
            get_peft_model(model, config())
            self.wrapped[name] = self.projections()
            self.undress()

    def undress(self) -> None:
        """Put the plain projections back and forget the adapter that PEFT noted on the model."""
        self._put(self.wrapped["base"])
        del self.model.peft_config

    def projections(self) -> dict[str, nn.Module]:
        """Return what stands in the places of the projections now."""
        return {
            f"{index}.{name}": getattr(layer.self_attn, name)
            for index, layer in enumerate(self.model.model.layers)
            for name in QKVO
        }

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            index, name = path.split(".")
            setattr(self.model.model.layers[int(index)].self_attn, name, module)

    def wear(self, system: str) -> nn.Module:
        """Put one system's projections in place."""
        self._put(self.wrapped["base"])
        self._put(self.wrapped[system])
        return self.model
