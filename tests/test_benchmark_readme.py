"""The commands of benchmarks/README.md are commands of the scripts."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from seal_peft.reproduce.parts import PARTS

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
BLOCKS = re.findall(r"^```bash\n(.+?)^```$", (SCRIPTS / "README.md").read_text(encoding="utf-8"), re.M | re.S)
LINES = [line.removeprefix("timeout 540 ") for block in BLOCKS for line in block.splitlines()]


class ParsedError(Exception):
    """A script has read its command line."""


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python benchmarks/")])
def test_a_command_of_the_page_is_one_of_the_script(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *words):
        read(parser, *words)
        raise ParsedError

    _, script, *words = shlex.split(line)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(ParsedError):
        runpy.run_path(str(SCRIPTS.parent / script), run_name="__main__")


def test_every_other_line_is_known() -> None:
    shell = ("export ", "mkdir ", "python -c ", "nvidia-cuda-mps-control ")
    others = [line for line in LINES if not line.startswith(("python benchmarks/", *shell))]
    assert [re.findall(r"seal-peft reproduce (\w+)", line) for line in others] == [["lines"] * 4]
    assert "lines" in PARTS
