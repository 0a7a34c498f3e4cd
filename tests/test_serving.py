"""Serving a merged model by others' servers: what they answer over HTTP is what the adapter answers here."""

import importlib.util
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from seal_peft import SealConfig
from stages import save_model, save_samples, seal, some_samples

QUESTION = [{"role": "user", "content": some_samples("test")[0].messages[-1]["content"]}]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter with scales that are felt, and the two merged."""
    folder = tmp_path_factory.mktemp("house")
    base = AutoModelForCausalLM.from_pretrained(save_model(folder / "model"), dtype=torch.float32)
    adapted = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity="channel"))
    models.draw_scales(adapted)
    adapted.save_pretrained(folder / "adapter")
    assert seal("merge", "--adapter", folder / "adapter", "--output_dir", folder / "merged") == 0
    return folder


@pytest.fixture(scope="module")
def server(house: Path) -> Iterator[str]:
    """`transformers serve` in a process that could not import this package."""
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]:
        pytest.skip(f'needs {", ".join(missing)}: pip install "transformers[serving]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; sys.modules['seal_peft'] = None; sys.argv[0] = 'transformers'; "
        "from transformers.cli.transformers import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = house / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def answer_of(model: Any, house: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(house / "model")
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_transformers_serve_answers_as_the_adapter_does(house: Path, server: str) -> None:
    body = {"model": str(house / "merged"), "messages": QUESTION, "max_tokens": 12, "temperature": 0.0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        served = json.load(response)["choices"][0]["message"]["content"]
    adapted = answer_of(AutoPeftModelForCausalLM.from_pretrained(house / "adapter", dtype=torch.float32), house)
    base = answer_of(AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32), house)
    assert served == adapted
    assert adapted != base


def test_the_example_asks_a_server_and_scores_what_it_says(
    house: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_file = save_samples(tmp_path / "test.jsonl", "test", num_samples=2)
    words = ["--url", f"{server}/v1", "--model", house / "merged", "--test_file", test_file]
    monkeypatch.setattr(sys, "argv", ["ask_server.py", *map(str, words), "--output_file", str(tmp_path / "out.json")])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "ask_server.py"), run_name="__main__")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["n"], result["score"], len(result["answers"])) == (2, 0.0, 2)
