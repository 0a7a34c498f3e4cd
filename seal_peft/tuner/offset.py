"""The learned numbers of one adapter in one layer, and what scale they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .weights import BASE, MEANING, check_settings

if TYPE_CHECKING:
    from .config import SealConfig


class ScaleOffset(nn.Module):
    """The learned numbers of one adapter in one layer: `weight = scale - 1`.

    Zero is the identity, so weight decay, missing keys and zero filling all mean "unchanged", and small changes
    survive rounding. A module of its own with a `.weight` is what FSDP's wrap policy looks for.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._chosen: list[int] | None = None
        self.weight = nn.Parameter(torch.zeros(shape))

    def choose(self, heads: list[int]) -> None:
        """Keep all heads but these at a scale of exactly 1, whatever an optimizer does, or a file says."""
        self._chosen = heads
        self._clear_others()

    @torch.no_grad()
    def _clear_others(self) -> None:
        # For all who read the weight: saving, exporting, combining and reporting.
        if self._chosen is not None and not self.weight.is_meta:
            self.weight.mul_(self._mask())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._clear_others()

    def values(self) -> Tensor:
        """Return `scale - 1`, shape `(num_heads,)` or `(num_heads, head_dim)`: the weight at the heads that count."""
        weight = cast(Tensor, self._parameters["weight"])
        return weight if self._chosen is None else weight * self._mask()

    def _mask(self) -> Tensor:
        # No buffer: models that are built on the meta device would leave it there.
        mask = torch.zeros(self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device)
        mask[self._chosen] = 1.0
        return mask.view(-1, *[1] * (self.weight.dim() - 1))

    def expect_settings(self, config: SealConfig) -> None:
        """Check the settings that come with the weights which transformers is about to load, once.

        It asks the class of a module for that, and takes a key that the state dict lacks for a mistake.
        """
        self._config = config
        self.__class__ = _ExpectingOffset

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter, unless it is broken: transformers' `load_adapter` assigns what it read without a check."""
        if type(param) is nn.Parameter and not param.is_meta and not torch.isfinite(param).all():
            raise ValueError(
                "The adapter holds NaN or infinite scales. Its file is broken or its training diverged; do not use it."
            )
        super().register_parameter(name, param)
        self._clear_others()

    def forward(self, alpha: float) -> Tensor:
        """Return the scale `1 + alpha * weight` in fp32, shape `(num_heads, 1)` or `(num_heads, head_dim)`."""
        weight = self.values()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        scale = 1 + alpha * weight
        return scale.unsqueeze(-1) if scale.dim() == 1 else scale


class _ExpectingOffset(ScaleOffset):
    """Scales that are about to be loaded without PEFT, which checks the settings itself."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel():
            check_settings(self._config, state, names=(*MEANING, BASE))
            self.__class__ = ScaleOffset  # type: ignore[assignment]
