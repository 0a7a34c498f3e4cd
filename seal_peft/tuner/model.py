"""SealModel: finds the attention output projections of a model and wraps them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast, get_args

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists, onload_layer
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from ..context.switch import position_switch
from . import joint, positions
from .adapters import check_weighted, layers_to_merge, weighted_config, write_weighted_sum
from .beside import check_free_name, seal_inside, surround, tuner_layers
from .chosen import keep_chosen
from .config import SealConfig, Site, check_sites
from .geometry import TARGET_MODULES, default_target_modules, is_linear
from .layer import Linear, SealLayer
from .offset import ScaleOffset
from .query import QueryLinear, QueryNorm
from .rows import refuse_names, scaled_rows, stop_refusing_names
from .scales import layers_with
from .targets import check_targets, check_untied, geometry_of, is_target
from .weights import add_settings, check_scales, check_settings, take_settings


class SealModel(BaseTuner):
    """A model whose attention heads carry learned scales.

    Example:
        ```python
        import seal_peft
        from peft import get_peft_model

        model = get_peft_model(base_model, seal_peft.SealConfig(granularity="channel"))
        model.print_trainable_parameters()
        ```
    """

    prefix: str = "seal_"
    tuner_layer_cls = SealLayer
    target_module_mapping = TARGET_MODULES

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_free_name(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(peft_config, SealConfig) and peft_config.fingerprint and peft_config.sites:
            # Not for a PeftModel, so maybe for transformers, which reads the weights without asking this class.
            first, *_ = layers_with(model, adapter_name).values()
            cast(ScaleOffset, first.seal_delta[adapter_name]).expect_settings(peft_config)

    def _prepare_adapter_config(self, peft_config: SealConfig, model_config: dict) -> SealConfig:
        if peft_config.target_modules is None:
            names = default_target_modules(self.model, model_config)
            full_names = names <= {name for name, _ in self.model.named_modules()}
            if full_names and peft_config.layers_to_transform is not None:
                # PEFT takes full names, which parts of a larger model get, without asking which layers are wanted.
                by_layer = copy.copy(peft_config)
                by_layer.target_modules = {name.partition(".")[2] for name in names}
                names = {name for name in names if check_target_module_exists(by_layer, name)}
                if not names:
                    raise ValueError(f"No attention layer has one of the indices {peft_config.layers_to_transform}.")
            peft_config.target_modules = names
        return peft_config

    def _prepare_model(self, peft_config: SealConfig, model: nn.Module) -> None:
        """Check every target before the first one is wrapped, so that an error leaves the model as it was."""
        peft_config.heads = check_targets(peft_config, model)

    def _check_target_module_exists(self, peft_config: SealConfig, key: str) -> Any:
        return is_target(peft_config, self.model, key)

    def _create_and_replace(
        self,
        peft_config: SealConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        seal = seal_inside(target)
        if seal is not None:
            seal.update_layer(adapter_name, peft_config)
            keep_chosen(seal, adapter_name, peft_config, current_key)
            return
        geometry, layout = geometry_of(peft_config, self.model, target, current_key)
        around: list[Any] = tuner_layers(target)
        if around:  # SEAL goes inside all other tuners: `W diag(s) x + B A x`
            parent, target_name, target = around[-1], "base_layer", around[-1].get_base_layer()
        kwargs = get_quantization_kwargs(self.model)
        new_module: Linear
        if layout is None:
            new_module = Linear(target, adapter_name, peft_config, geometry, **kwargs)
        else:
            query_class = QueryLinear if is_linear(target) else QueryNorm
            new_module = query_class(target, adapter_name, peft_config, geometry, layout, **kwargs)
        keep_chosen(new_module, adapter_name, peft_config, current_key)
        new_module.model_configs = self.peft_config
        wrapped = next((layer for layer in self.model.modules() if isinstance(layer, SealLayer)), None)
        if wrapped is not None and wrapped.disable_adapters:
            new_module.enable_adapters(False)  # until the whole model is enabled again
        if adapter_name not in self.active_adapters:
            # An additional adapter is not trainable until it is activated.
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
        for outer in reversed(around):
            surround(new_module, outer)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; the RoPE and Self-Extend that it asks for are checked before the first module is wrapped."""
        rope = position_switch(model)
        wanted = positions.wanted(rope, self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        refuse_names(model, self)
        if rope is not None:
            positions.connect(rope, model, self.peft_config, adapter_name, wanted)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters among those of the same method; adapters of other methods stay as they are.

        Args:
            adapter_name: One name or several, of SEAL or of a method beside it. See `seal_peft.activate` for choosing
                across methods.
            inference_mode: Whether the activated adapters are frozen.
        """
        if joint.is_joint(self.peft_config):
            joint.set_adapter(self, adapter_name, inference_mode)
        else:
            positions.ask_before(self.model, adapter_name)
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, of SEAL or of a method beside it."""
        if joint.is_joint(self.peft_config):
            joint.delete_adapter(self, adapter_name)
        else:
            super().delete_adapter(adapter_name)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        sites: Sequence[Site] | None = None,
    ) -> None:
        """Merge adapters into the weights, where `unmerge_adapter` takes them out again.

        Args:
            adapter_names: Adapters to merge; `None` merges the active ones.
            safe_merge: Refuse to write weights that are not finite.
            sites: Merge SEAL's scales at these sites only; they act at the others as before. `None` merges all that
                the adapters hold, those of other methods too.

        Raises:
            ValueError: Something cannot be merged, or there are no scales at one of `sites`; nothing has been merged.
        """
        self._check_layers(adapter_names, get_args(Site) if sites is None else check_sites(sites))
        self._check_merge_allowed()
        for layer, names in layers_to_merge(self.model, adapter_names, sites).items():
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=names)

    def unmerge_adapter(self) -> None:
        """Take all that is merged out of the weights again; layers without are passed by, a model without warns."""
        merged = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer) and layer.merged]
        if not merged:
            super().unmerge_adapter()
        for layer in merged:
            with onload_layer(layer):
                layer.unmerge()

    def _check_layers(self, adapter_names: list[str] | None, sites: Sequence[Site]) -> None:
        if unknown := sorted(set(adapter_names or ()) - set(self.peft_config)):
            known = ", ".join(self.peft_config)
            raise ValueError(f"The model has no adapters named {', '.join(unknown)} to merge. It has {known}.")
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, Linear) and m.site in sites}
        check_untied(self.model, list(layers.values()))
        for name, layer in layers.items():
            try:
                layer.check_can_merge(layer.active_adapters if adapter_names is None else adapter_names)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        """As in PEFT; the model keeps the RoPE and Self-Extend of what is in its weights."""
        names = (kwargs.get("adapter_names") or self.active_adapters) if merge else []
        if merge:
            self._check_layers(kwargs.get("adapter_names"), get_args(Site))
        with positions.unloading(position_switch(self.model), self.model, names):
            super()._unload_and_optionally_merge(merge=merge, **kwargs)
        stop_refusing_names(self.model)
        return self.model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in PEFT, but put a base layer back as it is: HQQ's has no `weight`, which PEFT copies when unloading."""
        if isinstance(child, SealLayer) and new_module is child.get_base_layer():
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Offsets are fp32 from the start; give them the dtype of the base only to those who ask for it."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in self.modules():
            if isinstance(layer, SealLayer) and adapter_name in layer.seal_delta:
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                if dtype is not None and dtype.is_floating_point:
                    layer.seal_delta[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around every forward and generate; it brings the `adapter_names` of mixed batches."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        rope = position_switch(self.model)
        with scaled_rows(self, self.model, adapter_names), rope.rows(adapter_names) if rope else nullcontext():
            yield

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose offsets are the weighted sum of others': `s - 1 = sum(w * (s_i - 1))`.

        A weight may be negative. Layers that an adapter does not scale count as unchanged. The new adapter is per
        channel if any of the others is; it is inactive and frozen until `set_adapter`.

        Args:
            adapters: Names of the adapters to combine.
            weights: One finite weight per adapter.
            adapter_name: Name of the new adapter.

        Raises:
            ValueError: A name is unknown or taken, weights are missing or not finite, or an adapter is of another
                method or trains whole modules, which cannot be summed.
        """
        check_weighted(self, adapters, weights, adapter_name)
        layers = {
            name.replace(".base_layer", ""): layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, SealLayer) and any(adapter in layer.seal_delta for adapter in adapters)
        }
        rope = position_switch(self.model)
        if rope is not None:
            rope.wanted(adapters)
        self.peft_config[adapter_name] = weighted_config(self.peft_config, adapters, layers)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in layers.values():
                write_weighted_sum(layer, adapters, weights, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SealConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select what is saved, unless PEFT has already dropped it.

        Raises:
            ValueError: Another adapter has the name of a module on the way to the scales. PEFT takes all keys with
                that name for the other adapter's and would write an empty file.
        """
        paths = [f"{name}.seal_delta" for name, module in model.named_modules() if isinstance(module, SealLayer)]
        if shared := {part for path in paths for part in path.split(".")} & set(unwanted_adapter_names):
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be saved beside an adapter named {min(shared)!r}: modules of the "
                "model have that name, too, and PEFT cannot tell them apart. Load that adapter under another name."
            )
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return add_settings(found, config, ending=f".seal_delta.{adapter_name}.weight")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SealConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map saved keys to the model's, refusing what would give wrong logits; missing scales become the identity.

        Raises:
            ValueError: A scale is not finite or not of its layer's shape, or the weights are of another config.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        remapped, settings = take_settings(remapped)  # a module that expects them gets and checks them itself
        check_settings(config, settings)
        own = {name: param for name, param in model.named_parameters() if f".{cls.prefix}" in name}
        given = check_scales(remapped, own)
        for name in own.keys() - given:
            if name.endswith(f".seal_delta.{adapter_name}.weight"):
                nn.init.zeros_(own[name])  # an adapter of this name may have been there; PEFT reports missing keys
        return remapped
