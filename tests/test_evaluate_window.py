"""Evaluation and the window: each system is held against its own, before any weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import models
import tokenizers_for_tests as tokenizers_
from seal_peft import SealConfig
from seal_peft.data import read_samples, window_of
from seal_peft.evaluate import EvaluateArguments, evaluate
from seal_peft.loading import check_adapter
from seal_peft.merge import MergeArguments, merge
from seal_peft.reach import reach
from seal_peft.tasks import Sample
from stages import WINDOW, error_of, save_model, save_samples, seal

LONG = 1500
ROPES = {
    "yarn": ({"rope_type": "yarn", "factor": 2.0}, 2 * WINDOW),
    "ntk": ({"rope_type": "ntk", "factor": 4.0}, 4 * WINDOW),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 2 * WINDOW),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, 3 * WINDOW),
    "wider": ({"rope_theta": 20000.0}, WINDOW),
}
GROUPS = {"group_size": 3, "window": 24}
EXTENDED: dict[str, tuple[dict[str, Any], int]] = {
    **{name: ({"rope_parameters": rope}, reached) for name, (rope, reached) in ROPES.items()},
    "self-extend": ({"self_extend": GROUPS}, 3 * (WINDOW - 24) + 24),
    "self-extend over ntk": ({"self_extend": GROUPS, "rope_parameters": ROPES["ntk"][0]}, 3 * (4 * WINDOW - 24) + 24),
    "ntk without scales": ({"sites": (), "rope_parameters": ROPES["ntk"][0]}, 4 * WINDOW),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples longer than its window, and adapters that extend it or do not."""
    folder = tmp_path_factory.mktemp("house")
    save_model(folder / "model")
    save_samples(folder / "long.jsonl", "test", length=LONG, num_samples=2)
    configs: dict[str, Any] = {name: SealConfig(**settings) for name, (settings, _) in EXTENDED.items()}
    configs |= {"seal": SealConfig(), "lora": LoraConfig(target_modules=["o_proj"], r=2)}
    for name, config in configs.items():
        config.task_type = "CAUSAL_LM"
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        get_peft_model(base, config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def no_weights(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails in another way than by a complaint about lengths."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("seal_peft.evaluate.load_model", refuse)


def words(house: Path, out: Path, *adapters: str) -> list[object]:
    named = ["--adapters", *(house / name for name in adapters)] if adapters else []
    given = ["evaluate", "--model_name_or_path", house / "model", "--test_file", house / "long.jsonl", *named]
    return [*given, "--output_dir", out, "--max_new_tokens", 4, "--dtype", "float32"]


@pytest.mark.parametrize("name", EXTENDED)
def test_an_adapter_reaches_what_its_extension_reaches(house: Path, name: str) -> None:
    adapted = check_adapter(str(house / "model"), str(house / name))
    assert adapted is not None
    assert adapted.get_input_embeddings().weight.device.type == "meta"
    assert reach(adapted) == EXTENDED[name][1]


@pytest.mark.parametrize("name", ROPES)
def test_a_merged_model_reaches_what_its_adapter_did(house: Path, tmp_path: Path, name: str) -> None:
    merge(MergeArguments(str(house / name), str(tmp_path / "merged")))
    assert window_of(AutoConfig.from_pretrained(tmp_path / "merged")) == ROPES[name][1]


@pytest.mark.parametrize("name", ["seal", "lora"])
def test_an_adapter_without_extension_reaches_what_its_base_does(house: Path, name: str) -> None:
    assert reach(check_adapter(str(house / "model"), str(house / name))) == WINDOW
    assert reach(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(house / "model"))) == WINDOW


def test_the_base_is_refused_beyond_its_window_by_name_and_its_extension_is_not(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_weights: None
) -> None:
    assert seal(*words(house, tmp_path / "out", "yarn")) == 1
    complaint = error_of(capsys)
    assert "System 'base': A length of" in complaint
    assert f"window of this model is {WINDOW} tokens" in complaint
    assert "pass --allow_beyond_window" in complaint
    assert complaint.endswith("Other systems are evaluated without it by --skip_base.")
    assert seal(*words(house, tmp_path / "out", "yarn", "lora"), "--skip_base") == 1
    complaint = error_of(capsys)
    assert "System 'lora': A length of" in complaint
    assert "--skip_base" not in complaint
    assert not (tmp_path / "out").exists()


def test_an_extended_adapter_answers_beyond_the_window_of_its_base(house: Path, tmp_path: Path) -> None:
    assert seal(*words(house, tmp_path, "yarn"), "--skip_base") == 0
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, house / "yarn").eval()
    for sample in read_samples(house / "long.jsonl"):
        assert answers_to(sample, tmp_path) == {"yarn": greedy_answer(model, sample)}


def test_the_base_answers_beyond_its_window_where_the_user_says_so(house: Path, tmp_path: Path) -> None:
    arguments = EvaluateArguments(
        str(house / "model"),
        str(house / "long.jsonl"),
        str(tmp_path),
        adapters=[str(house / "yarn"), str(house / "lora")],
        allow_beyond_window=True,
        max_new_tokens=4,
        dtype="float32",
    )
    metrics = evaluate(arguments)
    assert metrics["windows"] == {"base": WINDOW, "yarn": 2 * WINDOW, "lora": WINDOW}
    assert list(metrics["systems"]) == ["base", "yarn", "lora"]
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32).eval()
    for sample in read_samples(house / "long.jsonl"):
        answers = answers_to(sample, tmp_path)
        assert answers.keys() == {"base", "yarn", "lora"}
        assert answers["base"] == answers["lora"] == greedy_answer(base, sample)


def answers_to(sample: Sample, folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {row["system"]: row["answer"] for row in rows if row["id"] == sample.id}


def greedy_answer(model: Any, sample: Sample) -> str:
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    prompt = tokenizer.apply_chat_template(
        sample.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        written = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_table_of_positions_has_nothing_beyond_whatever_the_user_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=400, vocab_size=len(tokenizer), bos_token_id=1)
    models.seeded(config, AutoModelForCausalLM._model_mapping[GPT2Config]).save_pretrained(tmp_path / "model")
    save_samples(tmp_path / "long.jsonl", "test", length=600)
    assert seal(*words(tmp_path, tmp_path / "out"), "--allow_beyond_window") == 1
    complaint = error_of(capsys)
    assert "its positions are a learned table" in complaint
    assert "--allow_beyond_window" not in complaint


def test_prompts_near_the_window_share_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has another number of tokens left in the window, which is no limit where positions are computed."""
    save_model(tmp_path / "model")
    save_samples(tmp_path / "test.jsonl", "test", length=WINDOW, num_samples=8)
    widths = []

    def count(model: Any, tokenizer: Any, prompts: list, limit: int, *rest: list) -> list[str]:
        widths.append((len(prompts), limit))
        return ["0"] * len(prompts)

    monkeypatch.setattr("seal_peft.evaluate.generate_answers", count)
    evaluate(EvaluateArguments(str(tmp_path / "model"), str(tmp_path / "test.jsonl"), str(tmp_path / "out")))
    assert widths == [(8, 64)]


def test_data_beyond_the_window_is_made_where_the_user_says_so(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["make-data", "--model_name_or_path", house / "model", "--lengths", LONG, "--num_samples", 1]
    given += ["--output_file", tmp_path / "data.jsonl"]
    assert seal(*given) == 1
    assert "pass --allow_beyond_window" in error_of(capsys)
    assert seal(*given, "--allow_beyond_window") == 0
    (sample,) = read_samples(tmp_path / "data.jsonl")
    assert sample.n_tokens > WINDOW
