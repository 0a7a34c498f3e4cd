"""The wrapped attention output projection: holds the scales, applies them to its input, folds them into its weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .beside import check_all_names, check_can_merge, check_names, correct_for_merged, with_merged
from .config import SealConfig
from .geometry import HeadGeometry
from .scale import scale_channels, scale_rows

# Spread of the random scales when `init_weights=False`; only tests want them.
_RANDOM_INIT_STD = 0.1


class ScaleOffset(nn.Module):
    """The learned numbers of one adapter in one layer: `weight = scale - 1`.

    Zero is the identity, so weight decay, missing keys and zero filling all mean "unchanged", and small changes
    survive rounding. A module of its own with a `.weight` is what FSDP's wrap policy looks for.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, alpha: float) -> Tensor:
        """Return the scale `1 + alpha * weight` in fp32, shape `(num_heads, 1)` or `(num_heads, head_dim)`."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        scale = 1 + alpha * weight
        return scale.unsqueeze(-1) if scale.dim() == 1 else scale


class SealLayer(BaseTunerLayer):
    """What every wrapped module shares: the scales of its adapters.

    Attributes:
        geometry: How the input of the base layer splits into heads.
        seal_delta: One `ScaleOffset` per adapter.
        seal_alpha: Strength of each adapter, 1.0 unless changed.
        row_scale: Within `scaled_rows`, the scale of every row of the batch.
        outer_layers: Layers of other tuners around this one, the innermost first; see `beside.py`.
        model_configs: The configs of all adapters of the model, of other methods too.
    """

    adapter_layer_names: tuple[str, ...] = ("seal_delta",)
    other_param_names: tuple[str, ...] = ("seal_alpha",)

    def __init__(self, base_layer: nn.Module, geometry: HeadGeometry, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.geometry = geometry
        self.seal_delta = nn.ModuleDict()
        self.seal_alpha: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.row_scale: Tensor | None = None
        self._cached_scale: tuple[Any, list[Tensor], Tensor] | None = None
        self.outer_layers: tuple[BaseTunerLayer, ...] = ()
        self.model_configs: Mapping[str, Any] = {}
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)

    def update_layer(self, adapter_name: str, config: SealConfig) -> None:
        """Add the scales of one adapter, at the identity unless the config says otherwise."""
        num_heads, head_dim = self.geometry
        offset = ScaleOffset((num_heads,) if config.granularity == "head" else (num_heads, head_dim))
        if not config.init_weights:
            nn.init.normal_(offset.weight, std=_RANDOM_INIT_STD)
        self.seal_delta[adapter_name] = offset
        self.seal_alpha[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the base layer to its device but not to its dtype: offsets stay fp32, or small steps round away."""
        if device is None:
            device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        offset = self.seal_delta[adapter_name] if adapter_name in self.seal_delta else None
        meta = torch.device("meta")
        if offset is not None and device not in (None, meta) and offset.weight.device != meta:
            self.seal_delta[adapter_name] = offset.to(device)

    def get_scale(self, adapter_names: list[str]) -> Tensor | None:
        """Return the product of the given adapters' scales.

        Args:
            adapter_names: Adapters to combine; names that this layer does not hold count as the identity.

        Returns:
            fp32, shape `(num_heads, 1)` or `(num_heads, head_dim)`; `None` where no adapter applies.
        """
        names = [name for name in adapter_names if name in self.seal_delta]
        if not names:
            return None
        scale = self.seal_delta[names[0]](self.seal_alpha[names[0]])
        for name in names[1:]:
            scale = scale * self.seal_delta[name](self.seal_alpha[name])
        return scale


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
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [n for n in self.active_adapters if n in self.seal_delta and n not in self.merged_adapters]
        if self.row_scale is not None:
            scaled = scale_rows(x, self.row_scale)
        elif names:
            scaled = scale_channels(x, self._scale_for(names))
        else:
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(scaled, *args, **kwargs)
        return correct_for_merged(self, x, scaled, result) if self.outer_layers else result

    def _per_channel(self, adapter_names: list[str]) -> Tensor:
        """Product of the adapters' scales for each input feature, fp32, shape `(num_heads * head_dim,)`."""
        return self.get_scale(adapter_names).expand(self.geometry).reshape(-1)

    def _scale_for(self, names: list[str]) -> Tensor:
        """The same for adapters that act unmerged; kept between calls as long as nothing it depends on changes."""
        if torch.compiler.is_compiling():
            return self._per_channel(names)
        check_names(self, names)
        weights = [self.seal_delta[name].weight for name in names]
        if any(w.requires_grad or w.is_inference() for w in weights):
            # Fused optimizers write to weights without counting versions, so nothing may outlive a training step.
            self._cached_scale = None
            return self._per_channel(names)
        # `_version` counts in-place writes and `data_ptr` sees moves and replaced tensors; holding on to the tensors
        # keeps a new one from getting the address of an old one.
        key = [(n, w.data_ptr(), w._version, self.seal_alpha[n]) for n, w in zip(names, weights, strict=True)]
        if self._cached_scale is None or self._cached_scale[0] != key:
            # A tensor made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                self._cached_scale = (key, [w.detach() for w in weights], self._per_channel(names))
        return self._cached_scale[2]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold scales into the weight, `W <- W diag(s)`, computed in fp32; the bias stays.

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
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"Scales cannot be merged into {backend.backend_name} weights. Keep the adapter unmerged (it runs on "
                "any quantised base), or load the base model unquantised to merge."
            )
        check_can_merge(self)
        before = self._snapshot()
        original = self._original if self.merged else (before[0], with_merged(self, before[1], sign=-1))
        self._restore(original)
        with torch.no_grad():
            weight = self.get_base_weight()
            scale = self._per_channel(self.merged_adapters + names)
            # Conv1D keeps its weight as (in_features, out_features).
            scale = scale.unsqueeze(-1) if isinstance(self.get_base_layer(), Conv1D) else scale
            merged = with_merged(self, weight * scale).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            self._restore(before)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self.set_base_weight(merged)
        self._original = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, weight = self._original
        self._restore((base, with_merged(self, weight)))
        self._original = None
        self.merged_adapters.clear()

    def _snapshot(self) -> tuple[nn.Module, Any]:
        """What merging replaces: nothing is written in place, so holding the old objects is a full copy."""
        base = self.get_base_layer()
        return base, base.weight.data if self.quantization_backend is None else getattr(base, "weight", None)

    def _restore(self, snapshot: tuple[nn.Module, Any]) -> None:
        base, weight = snapshot
        if self.quantization_backend is None:
            base.weight.data = weight.to(base.weight)
            return
        self.base_layer = base
        if weight is not None:
            base.weight = weight

    def __repr__(self) -> str:
        return "seal." + super().__repr__()
