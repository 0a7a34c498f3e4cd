"""The notebook runs from top to bottom, on a tiny model in place of SmolLM2, and is kept without outputs."""

import json
import re
from pathlib import Path

import pytest

from stages import save_model

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    smaller = re.sub(r"MODEL = .*", f"MODEL = {str(model)!r}", CODE[0])
    smaller = re.sub(r"(LENGTH, .*) = .*", r"\1 = 500, 3, 2, 2", smaller)
    defined: dict = {}
    for cell in [smaller, *CODE[1:]]:
        exec(compile(cell, "quickstart.ipynb", "exec"), defined)
    printed = capsys.readouterr().out
    assert [name for name in ("base:", "with SEAL:", "loaded:", "merged:") if name not in printed] == []
    assert type(defined["plain"]).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "runs" / "notebook" / "scales.png").is_file()


def test_it_is_kept_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4
    assert not [cell for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")]
