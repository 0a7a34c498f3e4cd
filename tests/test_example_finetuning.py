"""The fine-tuning example in PEFT's style, its page, and the settings for PEFT's method comparison."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftConfig, get_peft_model

import seal_peft
import tokenizers_for_tests
from models import INPUT_IDS, base_model, causal
from seal_peft import SealConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPERIMENTS = sorted((EXAMPLES / "method_comparison" / "MetaMathQA" / "experiments" / "seal").iterdir())
# What the benchmark's own training settings hold, as far as a method may change them.
TRAINING_FIELDS = {"optimizer_kwargs", "optimizer_type", "lr_scheduler", "max_steps", "batch_size", "grad_norm_clip"}


def script():
    path = EXAMPLES / "seal_finetuning" / "seal_finetuning.py"
    spec = importlib.util.spec_from_file_location("seal_finetuning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_the_tiny_run_trains_saves_and_merges(granularity, tmp_path, capsys):
    words = ["--tiny", "--granularity", granularity, "--num_epochs", "2", "--output_dir", str(tmp_path)]
    losses = script().main(words)
    assert losses["after"] < losses["before"]
    assert losses["merged"] == pytest.approx(losses["after"], abs=1e-5)
    assert "loss on held-out answers, merged" in capsys.readouterr().out
    scales = seal_peft.scales(tmp_path)
    assert all(scale.shape == ((4,) if granularity == "head" else (4, 8)) for scale in scales.values())
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is transformers.LlamaForCausalLM


# The Trainer's defaults pin memory, which torch warns about where there is no GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_code_of_its_page_runs(tmp_path, monkeypatch):
    tokenizer = tokenizers_for_tests.bpe(tokenizers_for_tests.CHATML)
    causal(transformers.LlamaConfig, vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    page = (EXAMPLES / "seal_finetuning" / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.+?)^```$", page, re.MULTILINE | re.DOTALL):
        block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path)).replace(
            "num_samples=50", "num_samples=2"
        )
        exec(compile(block, "README.md", "exec"), known)
    assert type(known["plain"]) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_the_settings_for_the_method_comparison_work(folder):
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is SealConfig
    assert set(json.loads((folder / "adapter_config.json").read_text())) <= set(SealConfig().to_dict())
    if folder.name.endswith("default"):
        assert config.to_dict() == SealConfig().to_dict()
        optimizer = {}
    else:
        settings = json.loads((folder / "training_params.json").read_text())
        assert set(settings) <= TRAINING_FIELDS
        optimizer = settings["optimizer_kwargs"]
    model = get_peft_model(base_model("llama"), config)
    step = torch.optim.AdamW(model.parameters(), **optimizer)
    before = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    before.backward()
    step.step()
    assert model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss < before
