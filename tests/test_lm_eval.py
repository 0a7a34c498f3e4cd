"""lm-eval answers with a SEAL adapter, offline, by the line of the page about evaluation. Skipped without it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from seal_peft import SealConfig
from stages import save_model

pytest.importorskip("lm_eval")

# As on a machine without a name server.
NO_NETWORK = """
import socket
def refuse(*words, **named):
    raise socket.gaierror("there is no network here")
socket.getaddrinfo = refuse
"""
PAGE = Path(__file__).parents[1] / "docs" / "evaluate.md"


def test_the_line_of_the_page_answers_with_the_adapter_and_without_a_network(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=8192)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity="channel"))
    models.draw_scales(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))

    (line,) = re.findall(r"^HF_HUB_OFFLINE=1 (python -c .+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    line = line.replace("MODEL_FOLDER", f"{model},dtype=float32").replace("ADAPTER_FOLDER", str(tmp_path / "adapter"))
    words = [re.sub("^niah_single_1,.*", "niah_single_1", word) for word in shlex.split(line)[1:]]
    words += ["--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")]
    words[1] = f"{NO_NETWORK}\n{words[1]}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "HF_HOME": str(tmp_path / "hf")}
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    (results,) = tmp_path.glob("out/**/results_*.json")
    assert "niah_single_1" in json.loads(results.read_text())["results"]

    tokenizer = AutoTokenizer.from_pretrained(model)
    model_again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter").eval()
    (samples,) = tmp_path.glob("out/**/samples_niah_single_1_*.jsonl")
    rows = [json.loads(row) for row in samples.read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        prompt = tokenizer(row["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt", return_token_type_ids=False)
        written = model_again.generate(**prompt, max_new_tokens=128, do_sample=False)
        answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["resps"] == [[answer]]
