"""A scale that is kept between inference calls, and what tells that it is no longer right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .layer import SealLayer


class KeptScale(NamedTuple):
    """The product of some adapters' scales with everything it was made from.

    Attributes:
        scale: One scale per input feature, fp32.
        names: The adapters in it.
        active: The layer's active adapters at that time; PEFT replaces the list when they change.
        merged: The adapters merged at that time.
        parts: Per adapter its parameter, the address and version of its values, and its strength.
    """

    scale: Tensor
    names: list[str]
    active: object
    merged: list[str]
    parts: Sequence[tuple[str, Tensor, int, int, float]]

    @classmethod
    def of(cls, layer: SealLayer, names: list[str], scale: Tensor) -> KeptScale:
        """Note down what the scale was made from."""
        weights = {name: layer.offset(name) for name in names}
        parts = [(n, w, w.data_ptr(), w._version, layer.seal_alpha[n]) for n, w in weights.items()]
        return cls(scale, names, layer.active_adapter, list(layer.merged_adapters), parts)

    def still_holds(self, layer: SealLayer) -> bool:
        """Tell whether the scale would come out the same again.

        A version counts in-place writes, the address sees moves, and holding on to a parameter keeps a new one from
        getting the address of the old one. Writing in place through `.data` of a frozen parameter is the one change
        that leaves no trace (`p.data.mul_(2)`; torch does not track it): write under `torch.no_grad()` instead.
        """
        if layer.active_adapter is not self.active or layer.merged_adapters != self.merged:
            return False
        modules, alphas = layer.seal_delta._modules, layer.seal_alpha
        for name, weight, address, version, alpha in self.parts:
            offset = modules.get(name)
            if (
                offset is None
                or offset._parameters["weight"] is not weight
                or weight._version != version
                or weight.requires_grad
                or weight.data_ptr() != address
                or alphas[name] != alpha
            ):
                return False
        return True
