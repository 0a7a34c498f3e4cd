"""The query site: a learned temperature for every head, as a scale on its query.

Attention sees queries only in their products with keys, so a scale `s` on the query of a head divides the temperature
of its softmax by `s`: above 1 the head attends more sharply, below 1 more evenly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .beside import merged_product
from .config import SealConfig, Site
from .geometry import HeadGeometry
from .layer import Linear, Snapshot
from .queries import QueryLayout, heads_axis
from .scale import apply_scale


class QueryLinear(Linear):
    """SEAL around a projection to queries, alone or fused with keys and values, which stay as they are.

    Computes `diag(s) (W x + b)` with one scale per query head.
    """

    site: Site = "query"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SealConfig,
        geometry: HeadGeometry,
        layout: QueryLayout,
        **kwargs: Any,
    ) -> None:
        self.layout = layout  # before the rest, which asks for it
        super().__init__(base_layer, adapter_name, config, geometry, **kwargs)

    def _offset_shape(self, config: SealConfig) -> tuple[int, ...]:
        return self.geometry[:1]

    def spread(self, scale: Tensor) -> Tensor:
        """Complete scales of the query heads, `(..., num_heads, 1)`, by ones for keys and values beside them."""
        return self.layout.spread(scale)

    def _scaled(self, scale: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = apply_scale(self.base_layer(x, *args, **kwargs), scale)
        if any(outer.merged_adapters for outer in self.outer_layers):
            # What is merged from the layers around is not scaled: `+ B A x - s B A x`.
            product = merged_product(self, x).to(result.dtype)
            result = result + (product - apply_scale(product, scale))
        return result

    @torch.no_grad()
    def _write_scaled(self, adapter_names: list[str]) -> list[Tensor]:
        scale = self._per_channel(adapter_names)
        written = [self._write_weight(scale, axis=0)]
        bias = getattr(self.get_base_layer(), "bias", None)
        if isinstance(bias, Tensor):
            bias.data = (bias * scale).to(bias.dtype)
            written.append(bias)
        return written

    def _snapshot(self) -> Snapshot:
        bias = getattr(self.get_base_layer(), "bias", None)
        return super()._snapshot()._replace(bias=bias.data if isinstance(bias, Tensor) else None)

    def _restore(self, snapshot: Snapshot) -> None:
        super()._restore(snapshot)
        if snapshot.bias is not None:
            bias: Any = self.get_base_layer().bias
            bias.data = snapshot.bias.to(bias)


class QueryNorm(QueryLinear):
    """SEAL around a norm of queries: a scale before it would be undone.

    What comes out has the heads side by side, `(batch, tokens, num_heads * head_dim)`, or on an axis of their own.
    """

    def _sizes(self) -> tuple[int, int]:
        size = self.geometry.num_heads * self.geometry.head_dim
        return size, size

    def _scaled(self, scale: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._scale_heads(self.base_layer(x, *args, **kwargs), scale)

    def _scale_heads(self, x: Tensor, scale: Tensor) -> Tensor:
        if x.dim() == 3:
            return apply_scale(x, scale)
        axis = heads_axis(x.shape, self.geometry.num_heads, self.layout, type(self.get_base_layer()).__name__)
        heads_last = x if axis == -2 else x.transpose(-2, -3)
        scaled = apply_scale(heads_last.flatten(-2), scale).unflatten(-1, self.geometry)
        return scaled if axis == -2 else scaled.transpose(-2, -3)

    def check_can_merge(self, adapter_names: Sequence[str]) -> None:
        """Raise a ValueError if the norm has no weight of its own for every channel of every head."""
        super().check_can_merge(adapter_names)
        norm: Any = self.get_base_layer()
        if any(name in self.seal_delta for name in adapter_names) and not self._takes_scales(norm):
            weight = getattr(norm, "weight", None)
            held = "no weight of its own" if weight is None else f"a weight of shape {tuple(weight.shape)}"
            raise ValueError(
                f"Query scales cannot be merged into this model's {type(norm).__name__}: it has {held}, not one "
                f"factor for each channel of all {self.geometry.num_heads} heads. They stay an adapter. Output scales "
                "merge alone: `seal-peft merge --sites output` keeps the others as an adapter beside the model; in "
                "Python, `seal_peft.save_adapter(model, folder, sites=['query'])`, "
                "`model.merge_adapter(sites=['output'])` and `model.unload().save_pretrained(merged)`."
            )

    @torch.no_grad()
    def _takes_scales(self, norm: Any) -> bool:
        """Tell whether the norm multiplies by its weight, channel by channel, by doing it once with other weights."""
        weight = getattr(norm, "weight", None)
        heads, head_dim = self.geometry
        if not isinstance(weight, Tensor) or weight.numel() != heads * head_dim:
            return False
        if weight.is_meta:
            return True  # offloaded; merging asks again when the weight is here
        factor = torch.linspace(0.5, 2, heads, device=weight.device).repeat_interleave(head_dim).to(weight.dtype)
        other = copy.copy(norm)
        other._parameters = {
            name: None if p is None else nn.Parameter(p * factor.view(p.shape), requires_grad=False)
            for name, p in norm._parameters.items()
        }
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, *weight.shape, generator=generator).to(weight.device, weight.dtype)
        # A norm that accelerate offloads has a `forward` of its own, which in the copy is still that of the original.
        forward = type(norm).forward
        expected, found = forward(norm, x) * factor.view(weight.shape), forward(other, x)
        return bool(torch.allclose(found, expected, rtol=2e-2, atol=1e-3))

    @torch.no_grad()
    def _write_scaled(self, adapter_names: list[str]) -> list[Tensor]:
        scale = self._per_channel(adapter_names)
        norm = self.get_base_layer()
        for parameter in norm.parameters(recurse=False):
            parameter.data = (parameter * scale.view(parameter.shape)).to(parameter.dtype)
        return list(norm.parameters(recurse=False))
