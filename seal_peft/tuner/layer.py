"""The wrapped attention output projection: holds the scales, applies them to its input, folds them into its weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .beside import check_all_names, check_can_merge, check_names, merged_product, with_merged
from .config import SealConfig, Site
from .geometry import HeadGeometry, in_out_features
from .kept import KeptScale
from .offset import ScaleOffset
from .quantized import check_format, check_gradients_flow, merge_quantized, restore_snapshot, take_snapshot
from .scale import apply_scale

# Spread of the random scales when `init_weights=False`; only tests want them.
_RANDOM_INIT_STD = 0.1


class Snapshot(NamedTuple):
    """What merging replaces: nothing is written in place, so holding the old objects is a full copy."""

    base: Any
    weight: Any
    bias: Tensor | None = None


class SealLayer(BaseTunerLayer):
    """What every wrapped module shares: the scales of its adapters.

    Attributes:
        site: What is scaled, `"output"` of the heads or `"query"`.
        geometry: How many heads there are and how many channels each has.
        seal_delta: One `ScaleOffset` per adapter.
        seal_alpha: Strength of each adapter, 1.0 unless changed; also of those without scales.
        row_scale: Within `scaled_rows`, the scale of every row of the batch.
        outer_layers: Layers of other tuners around this one, the innermost first; see `beside.py`.
        model_configs: The configs of all adapters of the model, of other methods too.
        rope: What gives the model the RoPE of the adapters in use; see `positions.py`.

    Example:
        ```python
        layers = [module for module in model.modules() if isinstance(module, seal_peft.SealLayer)]
        num_heads, head_dim = layers[0].geometry
        ```
    """

    adapter_layer_names: tuple[str, ...] = ("seal_delta",)
    other_param_names: tuple[str, ...] = ("seal_alpha",)
    site: Site = "output"

    def __init__(self, base_layer: nn.Module, geometry: HeadGeometry, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.geometry = geometry
        self.seal_delta = nn.ModuleDict()
        self.seal_alpha: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.row_scale: Tensor | None = None
        self._kept_scale: KeptScale | None = None
        self.outer_layers: tuple[BaseTunerLayer, ...] = ()
        self.model_configs: Mapping[str, Any] = {}
        self.rope: Any = None
        self.in_features, self.out_features = self._sizes()
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)

    def _sizes(self) -> tuple[int | None, int | None]:
        return in_out_features(self.get_base_layer())

    def _offset_shape(self, config: SealConfig) -> tuple[int, ...]:
        return self.geometry[:1] if config.granularity == "head" else self.geometry

    def spread(self, scale: Tensor) -> Tensor:
        """Complete scales of the heads, `(..., num_heads, n)`, to all that the scaled tensor is made of."""
        return scale

    def update_layer(self, adapter_name: str, config: SealConfig) -> None:
        """Add the scales of one adapter, at the identity unless the config says otherwise; none without a site."""
        if config.sites:
            self.seal_delta[adapter_name] = ScaleOffset(self._offset_shape(config))
            if not config.init_weights:
                nn.init.normal_(self.offset(adapter_name), std=_RANDOM_INIT_STD)
        self.seal_alpha[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if adapter_name in self.seal_delta:
            # PEFT's layers set this for all their adapters again; with thousands, adding one more takes seconds.
            trains = adapter_name in self.active_adapters and not config.inference_mode
            self.seal_delta[adapter_name].requires_grad_(trains)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; a RoPE that cannot be is refused before anything changes."""
        if self.rope is not None:
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            ask = self.rope.wanted if self.disable_adapters else self.rope.use
            ask([*names, *self.merged_adapters])
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off."""
        if self.rope is not None:
            self.rope.use([*self.active_adapters, *self.merged_adapters] if enabled else [])
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)
        if self.rope is not None:
            self.rope.drop(adapter_name)

    def rope_names(self) -> list[str]:
        """Return the adapters whose RoPE the model should have."""
        return [] if self.disable_adapters else [*self.active_adapters, *self.merged_adapters]

    def _use_rope(self) -> None:
        if self.rope is not None:
            self.rope.use(self.rope_names())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the base layer to its device but not to its dtype: offsets stay fp32, or small steps round away."""
        base = self.get_base_layer()
        if device is None:
            device = self._get_base_layer_device_and_dtype(base)[0]
        if device is None:  # packed layers without `weight` and `qweight`
            device = next((tensor.device for tensor in chain(base.parameters(), base.buffers())), None)
        offset = self.seal_delta[adapter_name] if adapter_name in self.seal_delta else None
        meta = torch.device("meta")
        if offset is not None and device not in (None, meta) and offset.weight.device != meta:
            self.seal_delta[adapter_name] = offset.to(device)

    def offset(self, adapter_name: str) -> nn.Parameter:
        """Return the learned numbers of an adapter, `s - 1`, shape `(num_heads,)` or `(num_heads, head_dim)`."""
        return cast(ScaleOffset, self.seal_delta[adapter_name]).weight

    def values(self, adapter_name: str) -> Tensor:
        """Return what acts of `offset`: the same numbers, with 0 at heads that the adapter does not scale."""
        return cast(ScaleOffset, self.seal_delta[adapter_name]).values()


class Linear(nn.Module, SealLayer):
    """SEAL around a linear attention output projection: `nn.Linear`, GPT-2's `Conv1D`, or a quantised one."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SealConfig, geometry: HeadGeometry, **kwargs: Any
    ) -> None:
        super().__init__()
        SealLayer.__init__(self, base_layer, geometry, **kwargs)
        self._active_adapter = adapter_name
        self._original: Any = None
        self.register_state_dict_pre_hook(check_all_names)
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scale the heads in `x`, shape `(..., num_heads * head_dim)`, and apply the base layer."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        scale = self.row_scale if self.row_scale is not None else self._acting_scale()
        return self.base_layer(x, *args, **kwargs) if scale is None else self._scaled(scale, x, *args, **kwargs)

    def _scaled(self, scale: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer under a scale of all rows, `(features,)`, or of each, `(batch, heads, 1 or head_dim)`."""
        scaled = apply_scale(x, scale)
        result = self.base_layer(scaled, *args, **kwargs)
        if any(outer.merged_adapters for outer in self.outer_layers):
            # What is merged from the layers around gets its unscaled input back: `+ B A (x - s x)`.
            result = result + merged_product(self, x - scaled).to(result.dtype)
        return result

    def _acting_scale(self) -> Tensor | None:
        """Product of the active scales that are not in the weight yet; kept between calls while nothing changes."""
        if torch.compiler.is_compiling():
            names = self._acting_names()
            return self._per_channel(names) if names else None
        kept = self._kept_scale
        if kept is not None and kept.still_holds(self):
            check_names(self, kept.names)
            return kept.scale
        self._kept_scale = None
        names = self._acting_names()
        check_names(self, names)
        weights = [self.offset(name) for name in names]
        if any(weight.requires_grad for weight in weights):
            # Fused optimizers write to weights without counting versions, so nothing may outlive a training step.
            check_gradients_flow(self.get_base_layer())
            return self._per_channel(names)
        if not names or any(weight.is_inference() for weight in weights):
            return self._per_channel(names) if names else None
        # A tensor made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False):
            self._kept_scale = KeptScale.of(self, names, self._per_channel(names))
        return self._kept_scale.scale

    def _acting_names(self) -> list[str]:
        return [n for n in self.active_adapters if n in self.seal_delta and n not in self.merged_adapters]

    def _per_channel(self, adapter_names: list[str]) -> Tensor:
        """Product of the adapters' scales for each scaled feature, fp32, one dimension."""
        scales = [self.seal_delta[n](self.seal_alpha[n]) for n in adapter_names if n in self.seal_delta]
        return self.spread(reduce(torch.mul, scales)).expand(-1, self.geometry.head_dim).reshape(-1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold scales into the weight, computed in fp32: `W <- W diag(s)` for outputs of heads, whose bias stays.

        The original weight is kept until `unmerge`, so that it comes back bit for bit.

        Args:
            safe_merge: Refuse to write weights that are not finite.
            adapter_names: Adapters to merge; `None` merges the active ones.

        Raises:
            ValueError: `safe_merge` is set and the result is not finite, or the quantised format, or the adapter of
                another method around this layer, does not allow it.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.seal_delta]
        if not names:
            return
        self.check_can_merge(names)
        if self.rope is not None:
            self.rope.wanted([*names, *self.active_adapters, *self.merged_adapters])
        before = self._snapshot()
        original = self._original if self.merged else before._replace(weight=with_merged(self, before.weight, sign=-1))
        self._restore(original)
        try:
            merged = self._write_scaled(self.merged_adapters + names)
            if safe_merge and not all(torch.isfinite(part).all() for part in merged):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
                )
        except Exception:
            self._restore(before)
            raise
        self._original = original
        self.merged_adapters.extend(names)
        self._use_rope()

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore(self._original._replace(weight=with_merged(self, self._original.weight)))
        self._original = None
        self.merged_adapters.clear()
        self._use_rope()

    def check_can_merge(self, adapter_names: Sequence[str]) -> None:
        """Raise a ValueError if scales of these adapters cannot become part of the weight."""
        check_can_merge(self)
        if any(name in self.seal_delta for name in adapter_names):
            check_format(self.get_base_layer(), self.quantization_backend)

    @torch.no_grad()
    def _write_scaled(self, adapter_names: list[str]) -> list[Tensor]:
        """Multiply the original weight by the scales; return what is written as it is before a quantiser rounds it."""
        return [self._write_weight(self._per_channel(adapter_names), axis=1)]

    def _write_weight(self, scale: Tensor, axis: int) -> Tensor:
        """Multiply the weight, seen as `(outputs, inputs)`, along an axis."""
        if self.quantization_backend is not None:
            return merge_quantized(self, scale, axis)
        # Conv1D keeps its weight as (inputs, outputs).
        by_inputs = (axis == 1) != isinstance(self.get_base_layer(), Conv1D)
        weight = self.get_base_weight()
        merged = with_merged(self, weight * (scale if by_inputs else scale.unsqueeze(-1))).to(weight.dtype)
        self.set_base_weight(merged)
        return merged

    def _snapshot(self) -> Snapshot:
        base = self.get_base_layer()
        return Snapshot(base, base.weight.data if self.quantization_backend is None else take_snapshot(base))

    def _restore(self, snapshot: Snapshot) -> None:
        if self.quantization_backend is None:
            snapshot.base.weight.data = snapshot.weight.to(snapshot.base.weight)
        else:
            restore_snapshot(self, snapshot.weight)

    def __repr__(self) -> str:
        return "seal." + super().__repr__()
