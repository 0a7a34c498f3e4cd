"""The code in README and docs runs as it stands, on a tiny model in place of a real one."""

import re
from pathlib import Path

import pytest
import transformers
from peft import get_peft_model

from models import INPUT_IDS, base_model
from seal_peft import SealConfig, save_adapter

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"^```python\n(.+?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(page, names, tmp_path, monkeypatch):
    """Run all blocks of a page in order, in an empty folder that holds a saved adapter where the docs expect one."""
    base_model("llama").save_pretrained(tmp_path / "base")
    demo = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(get_peft_model(demo, SealConfig(task_type="CAUSAL_LM")), tmp_path / "runs" / "demo" / "adapter")
    original = transformers.AutoModelForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        # Only the hub id is replaced: there is no hub here.
        return original(cls, tmp_path / "base" if name.startswith("HuggingFaceTB/") else name, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    defined = {"__name__": "page", **names}
    for block in blocks(page):
        exec(compile(block, page, "exec"), defined)
    return defined


@pytest.mark.filterwarnings("ignore:Merging lora module:UserWarning")
def test_the_page_about_adapters_runs(tmp_path, monkeypatch):
    names = {name: base_model("llama") for name in ("base_model", "another_base_model", "fresh_base_model")}
    defined = run("docs/adapters.md", {**names, "two_prompts": INPUT_IDS}, tmp_path, monkeypatch)
    assert defined["output"].shape == (2, INPUT_IDS.shape[1] + 4)
    assert not any(hasattr(module, "seal_delta") for module in defined["plain"].modules())
    assert (tmp_path / "adapters" / "lines-again" / "adapter_config.json").is_file()


def test_the_page_about_context_extension_runs(tmp_path, monkeypatch):
    names = "base_model another_base_model fresh_base_model plain_model lora_base_model one_more_base_model".split()
    defined = run("docs/context.md", {name: base_model("llama") for name in names}, tmp_path, monkeypatch)
    assert defined["merged"].config.rope_parameters["rope_type"] == "yarn"
    assert defined["advice"].method == "self_extend"
    assert (tmp_path / "pair" / "long" / "adapter_config.json").is_file()


# The Trainer's defaults pin memory, which torch warns about where there is no GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_quickstart_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    ids = INPUT_IDS.tolist()
    rows = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in (ids[0], ids[1][:6])]
    defined = run("README.md", {"my_rows": rows}, tmp_path, monkeypatch)
    assert "trainable params" in capsys.readouterr().out
    assert type(defined["plain"]).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/concepts.md", "docs/heads.md"])
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    assert run(page, {}, tmp_path, monkeypatch)


def test_every_page_with_code_is_run():
    names = ("adapters", "concepts", "context", "heads", "quickstart", "tasks")
    covered = {"README.md", *(f"docs/{name}.md" for name in names)}
    pages = ["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if blocks(page)} <= covered
