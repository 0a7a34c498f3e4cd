"""What is public is documented: a line in docs/api.md, a docstring, and for the front door an example that runs."""

import importlib
import inspect
import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch

import seal_peft
from models import INPUT_IDS, adapted, base_model
from test_docs_code import furnished, workplace  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))]
PEFT_FIELDS = {field.name for field in fields(peft.PeftConfig)}
PUBLIC = [name for name in seal_peft.__all__ if name != "__version__"]
WITH_EXAMPLE = [
    *PUBLIC,
    "context.rope.apply_rope",
    "context.rope.read_rope",
    "tokens.AnswerCollator",
    "dataset.training_rows",
]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find(path: str) -> object:
    """Return what a dotted path names, importing modules on the way."""
    found, *rest = path.split(".")
    result = importlib.import_module(found)
    for part in rest:
        found += "." + part
        result = getattr(result, part) if hasattr(result, part) else importlib.import_module(found)
    return result


def mentioned() -> set[str]:
    """Return the full name of everything of ours that the pages name, in words or in code."""
    names: set[str] = set()
    for page in PAGES:
        names |= set(re.findall(r"\bseal_peft(?:\.[A-Za-z_]\w*)+", text(page)))
        for module, imported in re.findall(r"from (seal_peft[\w.]*) import ([\w, ]+)", text(page)):
            names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    return names


def test_the_pages_name_nothing_that_is_not_there():
    for name in mentioned():
        assert find(name) is not None, name


def test_the_api_page_holds_every_public_name():
    listed = set(re.findall(r"^::: (\S+)$", text("docs/api.md"), re.MULTILINE))
    assert {f"seal_peft.{name}" for name in PUBLIC} <= listed
    for name in mentioned():
        target = find(name)
        if inspect.isclass(target) or inspect.isfunction(target):
            assert name in listed, f"docs/api.md lacks `::: {name}`"


def test_all_of_the_api_page_has_words():
    names = re.findall(r"^::: (\S+)$", text("docs/api.md"), re.MULTILINE)
    assert len(names) == len(set(names))
    for name in names:
        target = find(name)
        words = inspect.getdoc(target)
        assert words, name
        if inspect.isfunction(target):
            documented = re.findall(r"^ {4}(\w+): ", words, re.MULTILINE)
            assert set(inspect.signature(target).parameters) <= set(documented), name
            assert inspect.signature(target).return_annotation == "None" or "Returns:" in words, name
            assert not re.search(r"^ +raise ", inspect.getsource(target), re.MULTILINE) or "Raises:" in words, name


def test_the_table_of_settings_is_that_of_the_config():
    own = [f for f in fields(seal_peft.SealConfig) if f.name not in PEFT_FIELDS and f.metadata["help"][:6] != "Filled"]
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in own]
    table = text("docs/adapters.md").partition("\n## Settings\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `.+$", table, re.MULTILINE) == rows


# huggingface_hub 2.4.0 uploads large files in a way that httpx2 no longer likes.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Merging lora module:UserWarning")
@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_in_the_docstring_runs(name, workplace):  # noqa: F811 (pytest's way to name a fixture)
    examples = re.findall(r"```python\n(.+?)```", inspect.getdoc(find(f"seal_peft.{name}")) or "", re.DOTALL)
    assert examples, f"{name} has no example"
    if name == "push":  # the adapter of the pages, with its results
        metrics = Path("runs/my/eval/metrics.json").read_text().replace("runs/my/adapter", "runs/demo/adapter")
        Path("runs/demo/eval").mkdir()
        Path("runs/demo/eval/metrics.json").write_text(metrics)
        config = Path("runs/demo/adapter/adapter_config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "someone/model"}))
    else:
        for folder in ("runs/demo/adapter", "runs/heads"):
            seal_peft.save_adapter(adapted("llama"), folder)
    lora = peft.get_peft_model(base_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained("runs/style")
    known = {
        "seal_peft": seal_peft,
        "base_model": base_model("llama"),
        "model": adapted("llama"),
        **vars(peft),
        name.rpartition(".")[2]: find(f"seal_peft.{name}"),
    }
    for example in examples:
        exec(compile(textwrap.dedent(example), name, "exec"), known)
    if isinstance(known["model"], torch.nn.Module):
        assert known["model"](input_ids=INPUT_IDS).logits.isfinite().all()
