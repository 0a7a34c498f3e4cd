"""One PEFT model with SEAL and another method, mostly LoRA: adding, loading, switching and deleting their adapters.

PEFT's own tuner models know the layers of their own method only. Here SEAL's drives those of all methods.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.tuners_utils import delete_adapter as delete_from_layers
from peft.tuners.tuners_utils import set_adapter as set_on_layers
from peft.utils import CONFIG_NAME, PeftType
from peft.utils.other import _set_adapter as set_on_modules_to_save
from torch import nn

from .config import SealConfig
from .positions import ask_before, asking_otherwise
from .reading import read_adapter

if TYPE_CHECKING:
    from peft.peft_model import PeftModel

    from .model import SealModel

logger = logging.getLogger(__name__)

# What a Trainer writes into each of its checkpoints.
_TRAINER_STATE = "trainer_state.json"
# What PEFT says when a second method comes to a model; here that is what was asked for.
_EXPECTED_WARNINGS = ("Already found a `peft_config`", "You are trying to modify a model with PEFT for a second time")


# -- for users --------------------------------------------------------------------------------------------------------


def add_beside(model: PeftModel, config: PeftConfig, adapter_name: str) -> PeftModel:
    """Add an adapter of another method to a PEFT model: SEAL to one with LoRA, or LoRA to one with SEAL.

    The result computes `W diag(s) x + B A x` where both are on the same module, whichever came first. Both are active.
    The new adapter is trainable and the old ones stay as trainable or frozen as they are: one Trainer can train both.
    `save_pretrained` writes one folder per adapter.

    Args:
        model: A PEFT model with SEAL, or with another method. It shares its layers with the result.
        config: Config of the new adapter; SEAL's, if the model has none yet.
        adapter_name: A name that no adapter of the model has.

    Returns:
        The model to go on with. Its `set_adapter` switches among the adapters of the same method.

    Raises:
        TypeError: The model is no PEFT model yet, or the config is not one of PEFT's.
        ValueError: The name is taken, the model has adapters of the config's method only, or of prompt learning, or
            PEFT cannot add the adapter. The model has its old adapters then, and no other.

    Example:
        ```python
        model = get_peft_model(base_model, LoraConfig(target_modules=["q_proj", "o_proj"]), "style")
        model = seal_peft.add_beside(model, seal_peft.SealConfig(), "heads")
        ```
    """
    from peft.mapping_func import get_peft_model  # PEFT imports its tuners first
    from peft.peft_model import PeftModel

    if not isinstance(model, PeftModel) or not isinstance(config, PeftConfig):
        raise TypeError(
            f"add_beside needs a PeftModel and the config of another method, got a {type(model).__name__} and a "
            f"{type(config).__name__}. Begin with `get_peft_model(model, config)`."
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"The model has an adapter named {adapter_name!r} already. Give the new one another name.")
    old, new = (str(PeftType(kind).value) for kind in (model.peft_type, config.peft_type))
    if old == new:
        raise ValueError(f"The model is made for {new} already; add more of it with `model.add_adapter`.")
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The model is made for {old}, which has no layers that SEAL could stand beside. Only methods that put "
            "modules into the model go together with SEAL."
        )
    if not isinstance(config, SealConfig) and old != "SEAL":
        raise ValueError(f"Neither the model ({old}) nor the new adapter ({new}) is SEAL's. Add SEAL first.")
    inner: Any = model.get_base_model()
    driver: Any = model.base_model
    with warnings.catch_warnings(), _all_or_nothing(model, config, adapter_name):
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        if isinstance(config, SealConfig):
            config.task_type = config.task_type or model.active_peft_config.task_type
            model = get_peft_model(inner, config, adapter_name)
        else:
            config.base_model_name_or_path = inner.__dict__.get("name_or_path") or None
            inject_adapter_in_model(config, inner, adapter_name)
            driver._cast_adapter_dtype(adapter_name)
            for name in [name for name, known in model.peft_config.items() if isinstance(known, SealConfig)]:
                # Saved last, when all that its card tells of is there.
                model.peft_config[name] = model.peft_config.pop(name)
    _sync(model.base_model)
    return model


def load_adapters(
    base_model: nn.Module,
    folders: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
    is_trainable: bool = False,
) -> PeftModel:
    """Load SEAL and LoRA adapters that belong together, all active that can be.

    Args:
        base_model: The model that the adapters were trained on; it is modified in place.
        folders: Adapter name -> its folder or Hub id, with at least one SEAL adapter among them; or the one folder
            that `save_pretrained` or a Trainer wrote all of them to, checkpoints left out.
        is_trainable: Whether all of them go on training. `False` freezes them.

    Returns:
        A PEFT model with every adapter active. Of SEAL adapters that ask for different RoPE or Self-Extend, those are
        active that ask for what the first one does; a warning names the others. `save_pretrained` on it writes one
        folder per adapter.

    Raises:
        TypeError: Folders without names were given.
        ValueError: A folder or Hub id is no adapter, none is a SEAL adapter, or a file is broken.

    Example:
        ```python
        model = seal_peft.load_adapters(base_model, {"style": "runs/style", "heads": "runs/heads"})
        ```
    """
    from peft.peft_model import PeftModel

    folders = folders if isinstance(folders, Mapping) else _folders_in(folders)
    paths = {name: str(path) for name, path in folders.items()}
    configs = {name: read_adapter(path) for name, path in paths.items()}
    # SEAL's first: it becomes the driver. The nesting, and so the meaning, is the same for any order.
    names = sorted(paths, key=lambda name: not isinstance(configs[name], SealConfig))
    if not names or not isinstance(configs[names[0]], SealConfig):
        raise ValueError(
            f"None of the adapters is SEAL's: {paths}. Use `PeftModel.from_pretrained` for other methods."
        )
    model = PeftModel.from_pretrained(base_model, paths[names[0]], adapter_name=names[0], is_trainable=is_trainable)
    for name in names[1:]:
        if not isinstance(configs[name], SealConfig):
            configs[name].inference_mode = not is_trainable
            model = add_beside(model, configs[name], name)
        model.load_adapter(paths[name], name, is_trainable=is_trainable)
    scaled = [name for name in names if isinstance(configs[name], SealConfig)]
    apart = asking_otherwise(model, scaled)
    activate(model, [name for name in names if name not in apart], inference_mode=not is_trainable)
    if apart:
        logger.warning(
            "Adapters %s are loaded but not active: they ask for another RoPE or Self-Extend than %s. Choose with "
            "`seal_peft.activate(model, [...])`.",
            *(", ".join(apart), scaled[0]),
        )
    if len(multiplied := [name for name in scaled if name not in apart]) > 1:
        logger.warning(
            "Adapters %s are all active, so their scales multiply. Which were active when they were saved is not on "
            "record: choose with `seal_peft.activate(model, [...])`.",
            ", ".join(multiplied),
        )
    return model


def activate(model: nn.Module, adapter_names: Iterable[str], inference_mode: bool = False) -> None:
    """Make exactly these adapters active, of whatever methods, and no others.

    Args:
        model: A PEFT model, or a transformers model with adapters.
        adapter_names: Names of adapters of the model. None at all is fine.
        inference_mode: Whether the activated adapters are frozen. `False` makes them trainable, as PEFT does.

    Raises:
        TypeError: One name was given instead of a list.
        ValueError: The model has no adapter of one of the names, or they ask for different RoPE or Self-Extend;
            nothing has changed.

    Example:
        ```python
        seal_peft.activate(model, ["default"])
        ```
    """
    from peft.peft_model import PeftModel

    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names={adapter_names!r} was given; use a list of names: [{adapter_names!r}].")
    names = list(adapter_names)
    known = list(getattr(model, "peft_config", {}))
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"The model has no adapters named {', '.join(unknown)}. It has {', '.join(known) or 'none'}.")
    ask_before(model.get_base_model() if isinstance(model, PeftModel) else model, names)
    set_on_layers(model, names, inference_mode=inference_mode)
    if isinstance(model, PeftModel):
        driver: Any = model.base_model
        driver.active_adapter = names
        if names and model.active_adapter not in names:
            model.active_adapter = names[0]


@contextmanager
def _all_or_nothing(model: PeftModel, config: PeftConfig, adapter_name: str) -> Iterator[None]:
    """Take a new adapter back if adding it fails, in modules that were reached before, too; PEFT would leave it."""
    try:
        yield
    except BaseException:
        model.peft_config.pop(adapter_name, None)
        layer_class = getattr(_tuner_class(config), "tuner_layer_cls", ())  # prompts have no layers
        for layer in model.modules():
            if isinstance(layer, layer_class):
                layer.delete_adapter(adapter_name)
        raise


def _folders_in(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Find what PEFT wrote for a model with several adapters: "default" in the folder itself, others one below."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(
            f"folders={folder!r} was given; use a dictionary from names of your choice to the folders or Hub ids of "
            'the adapters, {"heads": "runs/heads", ...}, or the one folder that holds all of them.'
        )
    below = [path.parent for path in sorted(Path(folder).glob(f"*/{CONFIG_NAME}"))]
    # The adapter that PEFT calls "default" lies in a Trainer's checkpoints, too, as it was earlier in the training.
    found = {path.name: str(path) for path in below if not (path / _TRAINER_STATE).is_file()}
    found = ({"default": str(folder)} if (Path(folder) / CONFIG_NAME).is_file() else {}) | found
    if not found:
        raise ValueError(
            f"There is no adapter in {folder}: no {CONFIG_NAME} in it or in a folder below that is no checkpoint. A "
            "Trainer's checkpoint is loaded by its own folder. For adapters on the Hub give a dictionary, "
            '{"heads": "owner/name", ...}.'
        )
    return found


# -- for SealModel ----------------------------------------------------------------------------------------------------


def is_joint(configs: Mapping[str, PeftConfig]) -> bool:
    """Tell whether there are adapters of other methods than SEAL."""
    return not all(isinstance(config, SealConfig) for config in configs.values())


def set_adapter(model: SealModel, adapter_name: str | list[str], inference_mode: bool) -> None:
    """Activate adapters among those of their own methods."""
    by_method: dict[type[BaseTunerLayer], list[str]] = {}
    for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
        by_method.setdefault(_layer_class(model, name), []).append(name)
    by_method = by_method or {model.tuner_layer_cls: []}
    if model.tuner_layer_cls in by_method:
        ask_before(model.model, by_method[model.tuner_layer_cls])
    for layer_class, names in by_method.items():
        set_on_layers(model.model, names, inference_mode=inference_mode, layer_cls=layer_class)
    _sync(model, inference_mode)


def delete_adapter(model: SealModel, adapter_name: str) -> None:
    """Delete an adapter from the layers of its own method.

    Raises:
        ValueError: There is no such adapter, or it is merged.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"Adapter {adapter_name} does not exist")
    layer_class = _layer_class(model, adapter_name)
    prefix = _tuner_class(model.peft_config[adapter_name]).prefix
    layers = [layer for layer in model.model.modules() if isinstance(layer, layer_class)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Cannot delete adapter {adapter_name!r} while it is merged. Unmerge it first.")
    del model.peft_config[adapter_name]
    delete_from_layers(model.model, adapter_name, prefix, layer_cls=layer_class)
    _sync(model)


def _layer_class(model: SealModel, adapter_name: str) -> type[BaseTunerLayer]:
    config = model.peft_config.get(adapter_name)
    return _tuner_class(config).tuner_layer_cls if config else model.tuner_layer_cls


def _tuner_class(config: PeftConfig) -> type[BaseTuner]:
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]


def _sync(model: Any, inference_mode: bool | None = None) -> None:
    """Tell the driver, and the copies of `modules_to_save`, which adapters are active in the layers of all methods.

    Args:
        model: A SEAL model.
        inference_mode: Whether active copies are frozen; `None` leaves all parameters as trainable as they are.
    """
    # Of an adapter without scales a layer holds nothing, and yet it brings its positions.
    bare = {name for name, config in model.peft_config.items() if isinstance(config, SealConfig) and not config.sites}
    active: set[str] = set()
    for layer in model.model.modules():
        if isinstance(layer, BaseTunerLayer):
            held = layer._get_available_adapters()
            held = held | bare if isinstance(layer, model.tuner_layer_cls) else held
            active |= held & set(layer.active_adapters)
    model.active_adapter = [name for name in model.peft_config if name in active]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    set_on_modules_to_save(model.model, model.active_adapter, inference_mode=bool(inference_mode))
    for parameter, flag in trainable if inference_mode is None else ():
        parameter.requires_grad_(flag)
