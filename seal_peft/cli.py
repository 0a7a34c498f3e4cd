"""The command line: `seal-peft <stage> [--config run.yaml] [--flags]`. It parses and calls, nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
import yaml
from transformers import HfArgumentParser

from . import __version__
from .advise import AdviseArguments, advise
from .demo import DemoArguments, demo
from .evaluate import EvaluateArguments, evaluate
from .heads.stage import HeadsArguments, heads
from .hub import PushArguments, push_stage
from .make_data import MakeDataArguments, make_data
from .merge import MergeArguments, merge
from .report import ReportArguments, guard_tables, markdown_table, notes, overall_rows, report
from .reproduce.stage import ReproduceArguments, reproduce
from .train import RECIPES, SealTrainingArguments, TrainArguments, train

OK, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True)
class Stage:
    """One verb of the command line.

    Attributes:
        run: What it calls, with one object per dataclass.
        arguments: Flat dataclasses whose fields are its flags.
        help: One line.
        example: A line to copy.
        words: The flag whose values the words right behind the stage's name are, too.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    help: str
    example: str
    words: str | None = None


# In the order of use, as --help lists them.
STAGES = {
    "make-data": Stage(
        make_data,
        (MakeDataArguments,),
        "generate training or test samples of a task",
        "seal-peft make-data --model_name_or_path smollm2 --split train --lengths 1024 --num_samples 50 "
        "--output_file runs/my/train.jsonl",
    ),
    "train": Stage(
        train,
        (TrainArguments, SealTrainingArguments),
        "train an adapter on samples with the HF Trainer",
        "seal-peft train --model_name_or_path smollm2 --train_file runs/my/train.jsonl --output_dir runs/my/adapter",
    ),
    "evaluate": Stage(
        evaluate,
        (EvaluateArguments,),
        "answer the same prompts with the base model and adapters, and score them",
        "seal-peft evaluate --model_name_or_path smollm2 --adapters runs/my/adapter --test_file runs/my/test.jsonl "
        "--output_dir runs/my/eval",
    ),
    "report": Stage(
        report,
        (ReportArguments,),
        "tables and pictures from result files",
        "seal-peft report --metrics_file runs/my/eval/metrics.json --adapter runs/my/adapter --output_dir runs/my",
    ),
    "heads": Stage(
        heads,
        (HeadsArguments,),
        "score every attention head, beside the scales that an adapter learned",
        "seal-peft heads --model_name_or_path smollm2 --test_file runs/my/test.jsonl --adapter runs/my/adapter "
        "--output_dir runs/my/heads",
    ),
    "merge": Stage(
        merge,
        (MergeArguments,),
        "fold an adapter into its base model, for serving without this package",
        "seal-peft merge --adapter runs/my/adapter --output_dir runs/my/merged",
    ),
    "push": Stage(
        push_stage,
        (PushArguments,),
        "upload an adapter and its model card to the Hub",
        "seal-peft push --adapter runs/my/adapter --metrics_file runs/my/eval/metrics.json --repo_id me/my-adapter",
    ),
    "advise": Stage(
        advise,
        (AdviseArguments,),
        "which context extension lets a model read a length, in tokens",
        "seal-peft advise --model_name_or_path smollm2 --length 32768",
    ),
    "demo": Stage(
        demo,
        (DemoArguments,),
        "the whole path on a real model: data, base accuracy, training, adapter, merged model",
        "seal-peft demo --output_dir runs/demo",
    ),
    "reproduce": Stage(
        reproduce,
        (ReproduceArguments,),
        "the paper's experiments by name, on SmolLM2",
        "seal-peft reproduce lines needle --output_dir results",
        words="parts",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage.

    Args:
        argv: The words after the program's name; `None` takes them from the shell.

    Returns:
        0 done, 1 the job failed, 2 wrong usage, 130 interrupted.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    # peft 0.21.2 reads a name that transformers 5.23 renamed; nothing a user of the command line can act on. Remove
    # when PEFT reads the new name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    argv = list(sys.argv[1:] if argv is None else argv)
    top = _top_parser()
    if not argv or argv[0] not in STAGES:
        top.parse_args(argv)  # --help and --version end here; anything else is an error that lists the stages
        top.print_help()
        return WRONG_USAGE
    stage = STAGES[argv[0]]
    parser = _stage_parser(argv[0], stage)
    try:
        try:
            arguments = parse_stage(parser, argv[1:], stage.words)
        except (ValueError, TypeError) as error:
            parser.error(_one_line(error))
        result = stage.run(*arguments)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"seal-peft {argv[0]}: interrupted. Start the same command again: it goes on from what is finished.\n"
        )
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        # Errors with something to tell the user; a traceback would bury it. Others are bugs and keep theirs.
        sys.stderr.write(f"seal-peft {argv[0]}: error: {_one_line(error)}\n")
        return FAILED
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # its threads can abort a process that ends while they run
    _show(result)
    return OK


def parse_stage(parser: HfArgumentParser, argv: list[str], words: str | None = None) -> tuple[Any, ...]:
    """Turn flags, the YAML file of `--config` and the recipe into dataclasses; flags win over file over recipe.

    Args:
        parser: The parser of one stage.
        argv: The words after the stage's name.
        words: The flag that those of them stand for that come before any flag.

    Raises:
        ValueError: The file is not a flat mapping of known flags.
    """
    if words and argv and not argv[0].startswith("-"):
        argv = [f"--{words}", *argv]
    early_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A flag without its value is left to the stage's own parser, which says so.
    early_parser.add_argument("--config", nargs="?")
    early_parser.add_argument("--recipe", nargs="?", default=parser.get_default("recipe"))
    early, _ = early_parser.parse_known_args(argv)
    if early.config:
        # The file's lines stand in front as flags: typed and checked like them, and the last word on a flag wins.
        argv = [*_flags_of_file(early.config, parser), *argv]
        early, _ = early_parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES.get(early.recipe, {}))
    namespace = parser.parse_args(argv)
    return tuple(
        kind(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init})
        for kind in parser.dataclass_types
    )


def _flags_of_file(path: str, parser: HfArgumentParser) -> list[str]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold `flag: value` lines, not a {type(values).__name__}.")
    known = {flag.removeprefix("--") for action in parser._actions for flag in action.option_strings}
    known -= {"help", "config"}
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(f"--config {path} names unknown flags: {', '.join(unknown)}. See --help for the known ones.")
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif value is not None:  # null leaves the default
            words.append(f"--{name}={value}")
    return words


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _top_parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {name:<10} {stage.help}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="seal-peft",
        usage=f"{STAGES['demo'].example}",
        description=f"SEAL: learn how strongly each attention head counts.\n\nstages:\n{stages}\n\n"
        "`seal-peft STAGE --help` shows the flags of a stage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("stage", choices=list(STAGES), metavar="STAGE", help="one of the stages above")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there is one to tell: flags that must be given have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Repeats no token of the Hub that stands behind a flag there is not: what a stage prints is kept in logs."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"\bhf_\w+", "hf_...", message))


def _stage_parser(name: str, stage: Stage) -> HfArgumentParser:
    parser = _Parser(
        stage.arguments,
        prog=f"seal-peft {name}",
        usage=stage.example,
        description=stage.help,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with `flag: value` lines; flags on the command line win.")
    return parser


def _show(result: Any) -> None:
    """Print what a stage made: tables of scores, a report, or the path that was written."""
    if isinstance(result, dict) and "systems" in result:
        _show_table(overall_rows(result))
        for title, rows in guard_tables(result).items():
            sys.stdout.write(f"\n{title}\n")
            _show_table(rows)
        for note in notes(result):
            sys.stdout.write(f"\n{note}\n")
        return
    if isinstance(result, Path) and result.suffix == ".md" and _draws():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(result.read_text(encoding="utf-8"), hyperlinks=False))
    if result:  # of several processes, only the first has something to show
        sys.stdout.write(f"{result}\n")


def _draws() -> bool:
    """Whether rich draws tables, for a person at a terminal; files, pipes and those without rich get Markdown."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def _show_table(rows: list[list[str]]) -> None:
    if not _draws():
        sys.stdout.write(markdown_table(rows) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
