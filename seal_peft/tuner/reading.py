"""From the name of an adapter, a folder or a Hub id, to its config: whether there is one, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .saving import finish_save
from .weights import check_weights_file


def read_adapter(path: str) -> PeftConfig:
    """Load an adapter's config, and find missing and damaged files before any model is loaded.

    Args:
        path: Folder or Hub id of an adapter of any PEFT method.

    Raises:
        ValueError: There is no adapter, its method is not known, or its files are broken or missing.
    """
    if reason := not_found(path, CONFIG_NAME):
        raise ValueError(f"{reason} Give the folder of an adapter, or a Hub id.")
    if not (Path(path) / CONFIG_NAME).is_file():
        finish_save(path)  # a first save that was killed late; no older adapter can have been read here
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path!r} is not an adapter: give a folder that holds an adapter_config.json, or a Hub id ({error})."
        ) from error
    except KeyError as error:
        raise ValueError(f"The adapter {path!r} is of the method {error}, which this PEFT does not know.") from error
    weights = [Path(path) / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    check_weights_file(str(weights[0]))
    # The config of a method may check more than the general one: SEAL's reads the scales.
    config = type(config).from_pretrained(path)
    if Path(path).is_dir() and not any(file.is_file() for file in weights):
        raise ValueError(
            f"There is an {CONFIG_NAME} in {path} but no {SAFETENSORS_WEIGHTS_NAME}. Save the adapter again, or "
            "download it again."
        )
    return config


def not_found(name: str, file: str) -> str | None:
    """Say in a sentence why there is neither a folder nor a Hub repository of this name; `None` where there is one.

    Most often a folder is mistyped, which may look like a Hub id. One request tells, where those that download would
    try for half a minute to reach the Hub.
    """
    if Path(name).is_dir():
        return None
    try:
        if isinstance(try_to_load_from_cache(name, file), str) or HfApi().file_exists(name, file):
            return None
    except HFValidationError:
        return f"There is no folder {name!r}."
    except Exception as error:  # what a network can do to a request depends on the Hub's client and its version
        return (
            f"There is no folder {name!r}, and the Hub, where it was looked up, refused or did not answer ({error})."
        )
    return (
        f"There is no folder {name!r}, and the Hub, where it was looked up, has no such {file} either. (For a private "
        "repository, log in with `hf auth login`.)"
    )
