"""The model card of an adapter folder, written from the files in it: what was trained, on what, and what came out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.utils import CONFIG_NAME

from .assets import public_id, smollm2_package
from .files import replacing
from .report import guard_tables, length_rows, markdown_table, notes, overall_rows
from .statistics import label_of
from .tuner import scales

CARD_NAME = "README.md"
MARKER = "<!-- Written by seal_peft, which replaces it. To keep changes of your own, remove this line. -->"
EMPTY_FORM = "# Model Card for Model ID"  # what PEFT and transformers write
TRAINER_NOTE = "<!-- This model card has been generated automatically according to the information the Trainer"
_TEMPLATE = Path(__file__).with_name("card.md")
_BASE = "base"


@dataclass(frozen=True)
class CardFacts:
    """What the files of the adapter folder do not say.

    Attributes:
        repo_id: Where the card is to stand on the Hub; `None` for a card that stays in the folder.
        base_model: Hub id of the base model; `None` takes it from the adapter's config.
        license: License of the adapter, as the Hub writes it (`apache-2.0`).
        datasets: Hub ids of the training data.
        metrics: What `seal-peft evaluate` wrote, cut to the base model and this adapter.
        picture: Name of a picture of the scales beside the card.
    """

    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    picture: str | None = None


def write_card(folder: str | os.PathLike[str], run: dict[str, Any], facts: CardFacts | None = None) -> None:
    """Write the card of an adapter that stays in its folder for now.

    Args:
        folder: Adapter folder.
        run: What `run.json` holds or is about to hold; empty if there is none.
        facts: What the files do not say.
    """
    text = render_card(folder, run, facts or CardFacts())
    with replacing(Path(folder) / CARD_NAME) as file:
        file.write(text)


def render_card(folder: str | os.PathLike[str], run: dict[str, Any], facts: CardFacts) -> str:
    """Render the card of an adapter.

    A card that its author has written or taken over (it has no `MARKER`) keeps its text; only its metadata is brought
    up to date, because that is how the Hub finds the adapter.

    Args:
        folder: Adapter folder.
        run: What `run.json` holds; empty if there is none.
        facts: What the files do not say.

    Returns:
        Markdown with a YAML head.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    data = metadata(config, facts)
    own = authors_card(folder / CARD_NAME)
    if own is not None:
        return bring_up_to_date(own, data)
    words = _words(folder, config, run, facts) | {"procedure": _procedure(folder / CARD_NAME)}
    card = ModelCard.from_template(data, template_path=str(_TEMPLATE), **words)
    return f"{card}\n"


def _procedure(path: Path) -> str:
    """Return what a Trainer's card says of the training: hyperparameters, losses and versions, to the card's end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.partition("\n## Training procedure\n")[2].strip() if TRAINER_NOTE in text else ""


def authors_card(path: Path) -> ModelCard | None:
    """Return the card at a path if it is its author's own; `None` for ours and the empty forms of PEFT and the Hub."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return None if any(sign in text for sign in (MARKER, EMPTY_FORM, TRAINER_NOTE)) else ModelCard(text)


def bring_up_to_date(card: ModelCard, data: ModelCardData) -> str:
    """Return an author's card with new metadata and without local paths in it; its text stays."""
    old, new = card.data.to_dict(), data.to_dict()
    tags = [tag for tag in old.get("tags", []) if not tag.startswith("base_model:")]  # PEFT's may name a local path
    card.data = ModelCardData(**old | new | {"tags": list(dict.fromkeys([*new["tags"], *tags]))})
    if card.data.base_model and public_id(str(card.data.base_model)) is None:
        card.data.base_model = None
    return f"{card}\n"


def metadata(config: dict[str, Any], facts: CardFacts) -> ModelCardData:
    """Return the head of a card: what the Hub finds an adapter by.

    Args:
        config: What the adapter's config file holds.
        facts: What it does not say.
    """
    return ModelCardData(
        library_name="peft",
        base_model=facts.base_model or public_id(config.get("base_model_name_or_path") or ""),
        base_model_relation="adapter",
        pipeline_tag="text-generation" if config.get("task_type") == "CAUSAL_LM" else None,
        tags=["peft", "seal", "long-context", "transformers"],
        license=facts.license,
        datasets=facts.datasets or None,
        model_name=title(facts.repo_id) if facts.metrics else None,
        eval_results=_eval_results(facts.metrics) if facts.metrics else None,
    )


def title(repo_id: str | None) -> str:
    """Return what a card is headed by. Folders have passing names, such as that of a checkpoint."""
    return repo_id.rpartition("/")[2] if repo_id else "SEAL adapter"


def _eval_results(metrics: dict[str, Any]) -> list[EvalResult]:
    """Build the adapter's score for every task and length, as the Hub's model index wants it."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"seal_peft/{cell['task']}",
            dataset_name=f"{label_of(metrics, cell['task'])}, {cell['length']} tokens, {cell['n']} samples",
            dataset_split="test",
            metric_type="accuracy",
            metric_name="mean score",
            metric_value=round(cell["accuracy"], 4),
        )
        for cell in metrics["cells"]
        if cell["depth"] is None and cell["system"] != _BASE
    ]


def _words(folder: Path, config: dict[str, Any], run: dict[str, Any], facts: CardFacts) -> dict[str, Any]:
    """Fill the blanks of the template."""
    sites = config.get("sites", ["output"])
    learned = scales(folder) if sites else {}
    head = "head at each site" if len(sites) > 1 and config["granularity"] == "head" else "head"
    counts = {
        per: sum(scale.numel() for scale in learned.values() if scale.dim() == dim)
        for dim, per in ((1, head), (2, "channel of every head"))
    }
    numbers = " and ".join(f"{count:,}, one per {per}" for per, count in counts.items() if count) or "none"
    named = config.get("base_model_name_or_path") or ""
    base = facts.base_model or public_id(named)
    package = smollm2_package(named)
    return {
        "marker": MARKER,
        "name": title(facts.repo_id),
        "address": facts.repo_id or "path/of/this/folder",
        "address_is_open": facts.repo_id is None,
        "base": f"`{base}`" if base else f"a local model, `{Path(named).name or 'not named'}`",
        "base_is_local": base is None,
        "base_note": package
        and f"The weights at training were those of the 4-bit GGUF file in the Python package {package}, unpacked: "
        "close to the ones on the Hub, not equal.",
        "numbers": numbers,
        "on_norms": any("norm" in name.rpartition(".")[2] for name in learned),
        "trained": markdown_table(_trained_rows(config, run, numbers)),
        "has_run": bool(run),
        "has_scales": bool(sites),
        "self_extend": config.get("self_extend"),
        "extended": config.get("rope_parameters") or config.get("self_extend"),
        "picture": facts.picture,
        "versions": _versions(run, config),
        **(_result_words(facts.metrics) if facts.metrics else {}),
    }


def _trained_rows(config: dict[str, Any], run: dict[str, Any], numbers: str) -> list[list[str]]:
    sites, pairs = config.get("sites", ["output"]), config.get("heads") or []
    heads = sorted({f"{number} heads of {size} channels" for number, size in pairs})
    granularity = {"head": "head (SEAL-H)", "channel": "channel (SEAL-C)"}[config["granularity"]]
    rope, self_extend, chosen = (config.get(key) for key in ("rope_parameters", "self_extend", "target_heads"))
    rows = [
        ["", ""],
        ["scales", numbers],
        ["granularity", granularity],
        ["sites", ", ".join(sites) or "none: it brings a context extension alone"],
        ["heads", f"{'; '.join(heads)}, in {len(pairs) // max(1, len(sites))} layers"],
        ["RoPE", f"`{json.dumps(rope)}`" if rope else "the base model's own"],
    ]
    if self_extend:
        rows.append(["Self-Extend", f"`{json.dumps(self_extend)}`"])
    if chosen:
        rows.append(["chosen heads", ", ".join(chosen)])
    if run:
        settings = run["training_arguments"]
        if merged := run.get("merged_sites"):
            rows.append(["trained together with", f"scales at {', '.join(merged)}, which the base model holds merged"])
        rows += [
            ["samples", f"{run['samples']}; tasks {_listed(run.get('tasks'))}; {run['tokens']:,} tokens in all"],
            ["lengths", f"{_listed(run.get('lengths'))} tokens"],
            ["learning rate", f"{settings['learning_rate']:g}, {settings['lr_scheduler_type']}"],
            ["steps", str(run["steps"])],
            ["seed", str(settings["seed"])],
            ["time", f"{run['seconds']:.0f} s on {run['device']}"],
        ]
    return rows


def _listed(values: list[Any] | None) -> str:
    return ", ".join(map(str, values)) if values else "not recorded"


def _result_words(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "results": markdown_table(overall_rows(metrics)),
        "results_by_length": markdown_table(length_rows(metrics)),
        "guard": "\n\n".join(f"{title}\n\n{markdown_table(rows)}" for title, rows in guard_tables(metrics).items()),
        "notes": "\n\n".join(notes(metrics)),
        "evaluated_on": f"{metrics['device']}, {metrics['date']}",
    }


def _versions(run: dict[str, Any], config: dict[str, Any]) -> str:
    known = run.get("versions") or {"peft": config.get("peft_version")}
    commit = f"; commit {run['commit']} of seal_peft" if run.get("commit") else ""
    return ", ".join(f"{name} {number}" for name, number in known.items() if number) + commit + "."
