"""Blocks and lines of README and docs that the suite does not run from the page name what is there.

Python blocks and `seal-peft` lines run in test_docs_code.py; its `NOT_RUN` says where the others do.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

from seal_peft import cli
from seal_peft.data import read_samples
from test_docs_code import PAGES, ROOT

# Packages that no file of ours pins, and the results that were made with them.
FOR_RESULTS = {
    "lm-eval": "lm-eval-cpu.json",
    "llama-cpp-python": "serving-cpu.json",
}
CONVERTER = "sentencepiece"  # llama.cpp's converter imports it


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [code for page in PAGES for code in re.findall(rf"^```{language}\n(.+?)^```$", text(page), re.M | re.S)]


def commands(start: str) -> Iterator[list[str]]:
    for line in "".join(blocks("bash")).splitlines():
        for part in re.split(r" &&? |(?<= )& ", line):
            if part.startswith(start):
                yield shlex.split(part, comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_the_tests_know(page: str) -> None:
    fences = re.findall(r"^ *```(.*)$", text(page), re.MULTILINE)
    assert not fences[1::2] or set(fences[1::2]) == {""}
    assert set(fences[::2]) <= {"python", "bash", "json", "yaml", "bibtex"}
    assert not re.search(r"^ +```", text(page), re.MULTILINE)


def test_the_make_lines_name_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    named = {words[1] for words in commands("make ")}
    assert "demo" in named
    assert named <= targets


def test_the_pip_lines_name_packages_and_extras_of_ours() -> None:
    pinned = "\n".join(text(path.name) for path in [ROOT / "pyproject.toml", *ROOT.glob("constraints*.txt")])
    pinned += text("Makefile")
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    seen = 0
    for words in commands("pip "):
        for option, value in zip(words, words[1:], strict=False):
            assert option != "-c" or (ROOT / value).is_file()
            if option == "-e":
                assert set(value.removeprefix(".[").removesuffix("]").split(",")) <= extras.keys()
        for word in words[2:]:
            if word.startswith((".", "-")) or word == "constraints.txt":
                continue
            name, seen = Requirement(word).name, seen + 1
            if name == CONVERTER:
                continue
            here = text(f"results/{FOR_RESULTS[name]}") if name in FOR_RESULTS else pinned
            assert re.search(name.replace("-", "[-_]"), here), name
    assert seen > 5


def test_the_scripts_and_flags_of_the_other_lines_are_there() -> None:
    scripts = [words[1:] for words in commands("python examples/")]
    for words in commands("accelerate launch"):
        options = launch_command_parser().parse_args(words[2:])
        assert options.num_processes == 2
        if options.module:
            assert options.training_script == "seal_peft"
            stage, *flags = options.training_script_args
            cli.parse_stage(cli._stage_parser(stage, cli.STAGES[stage]), flags)
        else:
            scripts.append([options.training_script, *options.training_script_args])
    assert len(scripts) >= 4
    for script, *words in scripts:
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in text(script), (script, flag)
    for words in commands("seal-peft reproduce"):
        cli.parse_stage(cli._stage_parser(words[1], cli.STAGES[words[1]]), words[2:], cli.STAGES[words[1]].words)
    (asked,) = commands("curl ")
    assert json.loads(asked[asked.index("-d") + 1]).keys() <= set(
        re.findall(r'"(\w+)":', text("examples/ask_server.py"))
    )


def test_rows_settings_and_the_citation_are_what_they_stand_for(tmp_path: Path) -> None:
    rows, settings = blocks("json"), blocks("yaml")
    assert rows
    (tmp_path / "my.jsonl").write_text("".join(rows), encoding="utf-8")
    assert [sample.target for sample in read_samples(tmp_path / "my.jsonl")] == ["The landlord."] * len(rows)
    assert len(settings) == 1
    (tmp_path / "run.yaml").write_text(settings[0], encoding="utf-8")
    parser = cli._stage_parser("train", cli.STAGES["train"])
    arguments, training = cli.parse_stage(parser, ["--config", str(tmp_path / "run.yaml")])
    assert (arguments.granularity, training.learning_rate) == ("head", 0.03)
    (citation,) = blocks("bibtex")
    for name in ("title", "booktitle"):
        (value,) = re.findall(rf"^  {name} += {{(.+)}}", citation, re.MULTILINE)
        assert f'"{value}"' in text("CITATION.cff")
