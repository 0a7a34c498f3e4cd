"""Folding scales into quantised weights: exactly where every quantisation group has one scale, rounding elsewhere.

Grouped formats store `code * group_scale (+ offset)`. A factor that is the same for a whole group goes into the group
scale and leaves the codes alone, so nothing is quantised a second time. With one scale per head that is the case
whenever the groups run along the inputs and divide the head size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import SealLayer

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Snapshot(NamedTuple):
    """What merging into a quantised layer replaces. The tensors are held, not copied: merging writes none in place.

    Attributes:
        base: The quantised layer; HQQ layers are replaced as a whole.
        weight: Its weight, where it has one.
        weight_vars: Attributes of the weight, where bitsandbytes keeps its statistics.
        state_vars: Attributes of the `state` of an 8-bit bitsandbytes layer, which moves the weight in there.
        quant_state: The second reference that a 4-bit bitsandbytes layer keeps to its statistics.
    """

    base: nn.Module
    weight: Any
    weight_vars: dict[str, Any]
    state_vars: dict[str, Any] | None
    quant_state: Any


def take_snapshot(base: nn.Module) -> Snapshot:
    """Hold on to everything that makes up the weight of a quantised layer."""
    weight = base._parameters.get("weight")
    state = getattr(base, "state", None)
    return Snapshot(
        base,
        weight,
        {} if weight is None else dict(vars(weight)),
        None if state is None else dict(vars(state)),
        getattr(base, "quant_state", None),
    )


def restore_snapshot(layer: SealLayer, snapshot: Snapshot) -> None:
    """Put the quantised weight back as it was, bit for bit, on the device where the layer is now."""
    base, weight = snapshot.base, snapshot.weight
    layer.base_layer = base
    if weight is None:
        return
    device = getattr(base, "weight", weight).device
    base.weight = weight
    vars(weight).clear()
    vars(weight).update(snapshot.weight_vars)
    if snapshot.state_vars is not None:
        vars(base.state).clear()
        vars(base.state).update(snapshot.state_vars)
    if hasattr(base, "quant_state"):
        base.quant_state = snapshot.quant_state
    if weight.device != device:
        base.to(device)


def check_gradients_flow(base: nn.Module) -> None:
    """Refuse to train through a weight whose kernel silently drops gradients.

    Raises:
        RuntimeError: bitsandbytes has laid the weight out for inference on the CPU.
    """
    state = getattr(base, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False) and torch.is_grad_enabled():
        raise RuntimeError(
            "bitsandbytes has repacked the 4-bit weights of this model for inference on the CPU, and no gradient "
            "flows through that layout. Load the base model anew and train before any inference, or train on a GPU."
        )


def check_format(base: nn.Module, backend: Any) -> None:
    """Refuse to merge into a weight that nobody here can write.

    PEFT finds no backend for formats that it does not know (quanto, compressed-tensors, fp8) and for those whose
    library is missing. Their weights are no plain parameters, and writing a product into one gives other numbers.

    Raises:
        ValueError: PEFT's backend does not merge, or there is none and the weight is no plain floating-point one.
    """
    weight: Any = getattr(base, "weight", None)
    scheme = getattr(base, "quantization_scheme", None)  # of compressed-tensors, whose layers are plain ones
    if backend is None:
        plain = type(weight).__name__ in ("Parameter", "Tensor", "DTensor") and weight.dtype in _PLAIN
        mergeable = scheme is None and not hasattr(base, "qweight") and (plain or weight is None)
    else:
        mergeable = backend.supports_merge
    if not mergeable:
        kinds = [type(part) for part in (base, scheme, weight) if part is not None]
        kind = next((kind for kind in kinds if not kind.__module__.startswith("torch.nn.")), kinds[0])
        raise ValueError(
            f"Scales cannot be merged into {getattr(backend, 'backend_name', 'quantised')} weights "
            f"({kind.__module__}.{kind.__qualname__}). Keep the adapter unmerged, which runs on any quantised base, "
            "or load the base model unquantised."
        )


def merge_quantized(layer: SealLayer, scale: Tensor, axis: int) -> Tensor:
    """Fold a scale into a quantised weight, exactly if its format allows it, else by quantising again with a warning.

    Args:
        layer: The wrapped layer; its base layer is changed or replaced.
        scale: Factor of each input or output feature, fp32, one dimension.
        axis: 1 for inputs, 0 for outputs.

    Returns:
        The scaled numbers before they are rounded to what the format stores: group scales, or the whole weight.

    Raises:
        ValueError: The format can neither take the scale nor be dequantised.
    """
    base = layer.get_base_layer()
    # A layer whose weight is a plain tensor, such as HQQ's, is its own format.
    name = next((n for n in (type(base).__name__, _weight_type(base)) if n in _EXACT), None)
    written = _EXACT[name](layer, base, scale, axis) if name else None
    # A column of factors multiplies the rows, which are the outputs.
    return _requantize(layer, base, scale if axis else scale.unsqueeze(-1)) if written is None else written


def _weight_type(base: nn.Module) -> str:
    return type(base._parameters.get("weight")).__name__


def _requantize(layer: SealLayer, base: nn.Module, scale: Tensor) -> Tensor:
    """Go through PEFT's backend: dequantise, multiply, quantise again."""
    kind = getattr(layer.quantization_backend, "backend_name", "quantised")
    if "weight" in base._parameters:
        kind += f" ({_weight_type(base)})"
    if _weight_type(base) == "Params4bit":
        base.weight = _unpacked(base.weight)  # PEFT cannot read the CPU layout
    try:
        weight = layer.get_base_weight()
    except NotImplementedError as error:
        raise ValueError(
            f"These scales cannot be merged into {kind} weights: their quantisation groups have more than one scale, "
            f"and the weights cannot be dequantised ({error}). Keep the adapter unmerged, which runs on any quantised "
            "base, or load the base model unquantised to merge."
        ) from error
    warnings.warn(
        f"Merging into {kind} weights rounds: they are dequantised, scaled and quantised again. Keep the adapter "
        "unmerged, or use one scale per head and a format whose groups divide the head size, to lose nothing.",
        stacklevel=2,
    )
    merged = weight * scale
    layer.set_base_weight(merged.to(weight.dtype))
    if layer.base_layer is not base:
        layer.base_layer.bias = base.bias  # PEFT's HQQ backend builds a new layer and leaves the bias behind
    return merged


def _per_group(scale: Tensor, group_size: int, inputs: int, axis: int) -> Tensor | None:
    """Return the factor of each group of inputs, shape `(1, groups in a row)`, or `(outputs, 1)` for `axis=0`.

    `None` where one group has weights with different factors.
    """
    if inputs % group_size:
        return None  # groups would run on into the next row
    if axis == 0:
        return scale.unsqueeze(1)
    groups = scale.view(-1, group_size)
    return groups[:, 0].unsqueeze(0) if bool((groups == groups[:, :1]).all()) else None


def _bnb_4bit(layer: SealLayer, base: Any, scale: Tensor, axis: int) -> Tensor | None:
    """NF4 and FP4: `absmax` of each block, in fp32; doubly quantised ones are expanded first."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise
    from bitsandbytes.nn import Params4bit

    state = base.weight.quant_state
    outputs, inputs = state.shape
    groups = _per_group(scale, state.blocksize, inputs, axis) if state.shape[axis] == len(scale) else None
    if groups is None:
        return None
    weight = _unpacked(base.weight)
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    absmax = (absmax.float().view(outputs, -1) * groups).view(-1)
    base.quant_state = QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
    base.weight = Params4bit(
        weight.data,
        quant_state=base.quant_state,
        blocksize=state.blocksize,
        compress_statistics=False,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
        module=base,
        bnb_quantized=True,
    )
    return absmax


def _bnb_8bit(layer: SealLayer, base: Any, scale: Tensor, axis: int) -> Tensor | None:
    """The int8 of bitsandbytes: one statistic for each output, which the first call moves from weight to `state`."""
    holders = [part for part in (base.weight, base.state) if getattr(part, "SCB", None) is not None and axis == 0]
    for holder in holders:
        holder.SCB = (holder.SCB.float() * scale.to(holder.SCB.device)).to(holder.SCB.dtype)
    return holders[0].SCB if holders else None


def _unpacked(weight: Any) -> Any:
    """Undo the layout that bitsandbytes gives a weight at its first inference on a CPU with AVX512-BF16.

    Its own inverse quantises `absmax` again and leaves it transposed; only the codes are taken from it.
    """
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
    from bitsandbytes.nn import Params4bit

    state = copy.copy(weight.quant_state)
    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = weight.quant_state.absmax.T.float().reshape(-1)
    kwargs = {key: value for key, value in vars(weight).items() if not key.startswith("_")}
    return Params4bit(data, requires_grad=False, **{**kwargs, "quant_state": state, "compress_statistics": False})


def _hqq(layer: SealLayer, base: Any, scale: Tensor, axis: int) -> Tensor | None:
    """HQQ: `(code - zero) * scale` by group, in the compute dtype."""
    meta = base.meta
    if "scale" not in meta or not meta.get("channel_wise", True):
        return None  # group scales that are themselves quantised or kept on another device
    (outputs, inputs), group_size = meta["shape"], meta["group_size"]
    if meta["axis"] == 1:
        groups = _per_group(scale, group_size, inputs, axis)
        factor = None if groups is None else groups.expand(outputs, inputs // group_size).reshape(-1, 1)
    elif axis == 1 and outputs % group_size == 0:  # groups run along the outputs, so that each belongs to one input
        factor = scale.repeat(outputs // group_size).unsqueeze(0)
    else:
        factor = None
    if factor is None:
        return None
    scaled = (meta["scale"].float() * factor).to(meta["scale"].dtype)
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters)  # a shallow copy of a module shares its tables
    merged.meta = {**meta, "scale": scaled}
    layer.base_layer = merged
    return scaled


def _torchao(fields: tuple[str, ...], transposed: bool) -> Callable[[Any, Any, Tensor, int], Tensor | None]:
    """Build the function for a torchao format with the given group scales and offsets, `(outputs, groups)` at first.

    Args:
        fields: Names of the group scales and offsets.
        transposed: Whether they lie as `(groups, outputs)`.
    """

    def absorb(layer: SealLayer, base: Any, scale: Tensor, axis: int) -> Tensor | None:
        weight = base.weight
        groups = _per_group(scale, weight.block_size[-1], base.in_features, axis)
        if groups is None:
            return None
        groups = groups.T if transposed else groups
        attributes = {name: getattr(weight, name) for name in _attribute_names(type(weight))}
        for name in fields:
            stored = attributes[name]
            # Tile-packed weights are padded with groups of zeros.
            more = [0 if size == 1 else full - size for size, full in zip(groups.shape, stored.shape, strict=False)]
            factor = nn.functional.pad(groups, (0, more[1], 0, more[0]), value=1.0)
            factor = factor.view(*factor.shape, *[1] * (stored.dim() - 2))
            attributes[name] = (stored.float() * factor).to(stored.dtype)
        base.weight = nn.Parameter(type(weight)(**attributes), requires_grad=False)
        return torch.cat([attributes[name].flatten() for name in fields])

    return absorb


def _attribute_names(cls: Any) -> list[str]:
    optional = [*getattr(cls, "optional_tensor_data_names", []), *getattr(cls, "optional_tensor_attribute_names", [])]
    return [*cls.tensor_data_names, *cls.tensor_attribute_names, *optional]


# By the name of the weight's class, or of the layer's: importing the packages here would make them requirements.
_EXACT: dict[str, Callable[[Any, Any, Tensor, int], Tensor | None]] = {
    "Params4bit": _bnb_4bit,
    "Int8Params": _bnb_8bit,
    "HQQLinear": _hqq,
    "IntxUnpackedToInt8Tensor": _torchao(("scale",), transposed=False),
    "Int8Tensor": _torchao(("scale",), transposed=False),
    "Int4Tensor": _torchao(("scale", "zero_point"), transposed=True),
    "Int4TilePackedTo4dTensor": _torchao(("scale_and_zero",), transposed=True),
}
