"""Push an adapter to the Hub: its files and a model card, in one commit.

seal-peft push --adapter runs/demo/adapter --metrics_file runs/demo/eval/metrics.json --repo_id me/smollm2-lines-seal
"""

from __future__ import annotations

import json
import os
import shlex
import warnings
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

# The type checker sees neither as an explicit export. HTTPError is that of httpx, or of httpx2 in hub 2.x.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .assets import public_id
from .card import CARD_NAME, CardFacts, render_card
from .files import read_json, replacing
from .plots import plot_scales
from .report import read_metrics
from .systems import split_name
from .tuner import SealConfig, scales

_RUN, _METRICS, _PICTURE = "run.json", "metrics.json", "scales.png"
_ADVICE = {
    401: "You are not logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN.",
    403: "Your token may not write there: check the owner in repo_id, and that the token has write permission.",
    404: "There is no such repository, or your token may not see it: check repo_id.",
    429: "Too many requests: wait some minutes and push again.",
}


@dataclass
class PushArguments:
    """What to push, and where to."""

    adapter: str = field(metadata={"help": "SEAL adapter folder."})
    repo_id: str = field(metadata={"help": "Repository on the Hub, as owner/name; made if missing."})
    metrics_file: str | None = field(
        default=None, metadata={"help": "metrics.json of `seal-peft evaluate`, for the results in the card."}
    )
    system: str | None = field(
        default=None, metadata={"help": "Name of this adapter in the metrics. Default: found by its folder."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base model, where training used a local folder."}
    )
    license: str | None = field(default=None, metadata={"help": "License of the adapter, such as apache-2.0."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the training data, if any."})
    private: bool | None = field(
        default=None,
        metadata={
            "help": "Make a new repository private, or public with `false`. Default: as your account has it.",
            "nargs": "?",
            "const": True,
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if missing; default: main."})


def push_stage(arguments: PushArguments) -> str:
    """Call `push` with the flags of the command line."""
    return push(**asdict(arguments))


def push(
    adapter: str | os.PathLike[str],
    repo_id: str,
    *,
    metrics_file: str | os.PathLike[str] | None = None,
    system: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Push an adapter folder to the Hub, with a model card written from its files.

    Everything goes up in one commit: others see the old state or the new one. The folder gets the card, and a picture
    of the scales if matplotlib is there, before anything is sent. Uploaded are the adapter, the card, the picture with
    its numbers, `run.json` and the metrics; paths of this machine are cut to their last part. The token is the one of
    `hf auth login` or `HF_TOKEN`.

    Args:
        adapter: Folder of a SEAL adapter.
        repo_id: Repository as `owner/name`; made if missing.
        metrics_file: `metrics.json` of `seal-peft evaluate`, for the results in the card.
        system: Name of this adapter in the metrics; `None` finds it by its folder.
        base_model: Hub id of the base model, needed where training used a folder that the Hub does not know.
        license: License of the adapter, as the Hub writes it (`apache-2.0`).
        datasets: Hub ids of the training data.
        private: Whether a new repository is private; `None` leaves it to the account's default.
        revision: Branch to push to, made if missing; `None` is `main`.

    Returns:
        Address of the commit.

    Raises:
        ValueError: The folder holds no whole SEAL adapter, the metrics are not of it, or the base model has no Hub id;
            raised before anything is sent.
        OSError: The Hub refused, or cannot be reached. Nothing is lost: the folder is whole, the repository holds what
            it held, and the same call can be made again.

    Example:
        ```python
        seal_peft.push("runs/demo/adapter", "me/smollm2-lines-seal", metrics_file="runs/demo/eval/metrics.json")
        ```
    """
    folder = Path(adapter)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} was given; use owner/name.")
    config = _check_adapter(folder)
    base = base_model or public_id(config.base_model_name_or_path or "")
    if base is None:
        raise ValueError(
            f"The base model of this adapter is a folder of this machine ({config.base_model_name_or_path}), where "
            "nobody else could find it. Give the Hub id of the same model as base_model (--base_model)."
        )
    validate_repo_id(base)
    run = _read_record(folder / _RUN)
    metrics = _metrics_of(folder, metrics_file, system, run) if metrics_file is not None else None
    # Without matplotlib the card has no picture; that is no reason not to push.
    drawable = config.sites and find_spec("matplotlib")
    picture = plot_scales(scales(folder), folder / _PICTURE) if drawable else None
    facts = CardFacts(repo_id, base, license, datasets or [], metrics, picture.name if picture else None)
    card = render_card(folder, run, facts)
    if "seal_peft" not in ModelCard(card).text:
        warnings.warn(
            f"{folder / CARD_NAME} is kept as its author's own, but says nothing of seal_peft, without which nobody "
            "can load the adapter. Write `import seal_peft` into its code, or delete the file, and push again: "
            "without it you get the card of seal_peft.",
            stacklevel=2,
        )
    with replacing(folder / CARD_NAME) as file:
        file.write(card)
    files: dict[str, bytes | str] = {
        SAFETENSORS_WEIGHTS_NAME: str(folder / SAFETENSORS_WEIGHTS_NAME),
        CONFIG_NAME: _json(_read_record(folder / CONFIG_NAME) | {"base_model_name_or_path": base}),
        CARD_NAME: card.encode(),
    }
    files |= {name: _json(_without_folders(record)) for name, record in ((_RUN, run), (_METRICS, metrics)) if record}
    if picture:
        files |= {path.name: str(path) for path in (picture, picture.with_suffix(".json"))}
    try:
        return _commit(files, repo_id, private, revision)
    except (HTTPError, OSError, RuntimeError) as error:
        raise _explained(error, folder, repo_id) from error


def _check_adapter(folder: Path) -> SealConfig:
    saved = _read_record(folder / CONFIG_NAME)
    if not saved:
        inside = ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{CONFIG_NAME}")))
        several = f" It holds {inside}. Push each by itself, or all with `model.push_to_hub`." if inside else ""
        raise ValueError(f"{folder} is not an adapter folder: there is no {CONFIG_NAME} in it.{several}")
    if saved.get("peft_type") != "SEAL":
        raise ValueError(f"{folder} holds an adapter of another method; load it and push it with `model.push_to_hub`.")
    config = SealConfig.from_pretrained(str(folder))
    if config.fingerprint != saved.get("fingerprint"):
        raise ValueError(
            f"The config in {folder} is not that of the weights beside it. Load the adapter and save it again."
        )
    return config


def _read_record(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _metrics_of(
    folder: Path, metrics_file: str | os.PathLike[str], system: str | None, run: dict[str, Any]
) -> dict[str, Any]:
    """Read the metrics, and keep what is about the base model and this adapter.

    Raises:
        ValueError: The adapter is not in them, or was trained again since.
    """
    metrics = read_metrics(Path(metrics_file))
    if system is None:
        paths = dict(map(split_name, metrics.get("arguments", {}).get("adapters", [])))
        system = next((name for name, path in paths.items() if Path(path).resolve() == folder.resolve()), None)
    if system not in metrics["systems"]:
        raise ValueError(
            f"{metrics_file} has no results of {system or folder}, only of {', '.join(metrics['systems'])}. Evaluate "
            "the adapter, or give its name there as system (--system)."
        )
    if run and metrics["date"] < run["date"]:
        raise ValueError(
            f"{metrics_file} is of {metrics['date']}, but the adapter was trained after that ({run['date']}). "
            "Evaluate it again."
        )
    kept = {"base", system}
    metrics["systems"] = {name: result for name, result in metrics["systems"].items() if name in kept}
    metrics["cells"] = [cell for cell in metrics["cells"] if cell["system"] in kept]
    reached = metrics.get("effective_lengths", {}).get("systems", {})
    for part in (metrics.get("guard", {}), metrics.get("windows", {}), reached):
        for name in set(part) - kept:
            del part[name]
    return metrics


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _without_folders(value: Any) -> Any:
    """Cut the absolute paths in a JSON value to their last part: folders tell of people and machines."""
    if isinstance(value, dict):
        cut = {key: _without_folders(item) for key, item in value.items()}
        if "command" in cut:
            cut["command"] = shlex.join(map(_cut, shlex.split(cut["command"])))
        return cut
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    name, equals, path = text.rpartition("=")  # NAME=PATH, --flag=PATH
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return f"{name}{equals}{PureWindowsPath(path).name}" if absolute else text


def _commit(files: dict[str, bytes | str], repo_id: str, private: bool | None, revision: str | None) -> str:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # One commit, where `upload_folder` may make several: an interrupted upload must not leave half an adapter.
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return str(
        api.create_commit(repo_id, operations, commit_message="Upload SEAL adapter", revision=revision).commit_url
    )


def _explained(error: Exception, folder: Path, repo_id: str) -> OSError:
    """Say what a failed push means and what to do; the Hub's own words stand at the end."""
    cause: BaseException = error
    while getattr(cause, "response", None) is None and cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is None:
        advice = "The Hub could not be reached, or the connection broke: push again when it is back."
    else:
        advice = _ADVICE.get(status, "The Hub has trouble of its own: push again later." if status >= 500 else "")
    words = str(cause).strip().splitlines() or [type(cause).__name__]
    return OSError(
        f"The push to {repo_id} failed{f' ({status})' if status else ''}. {advice} Nothing was lost: {folder} is "
        f"whole, and the repository holds what it held before. The Hub's words: {words[0]}"
    )
