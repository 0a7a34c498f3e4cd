"""A model that was merged under Self-Extend: its config notes the settings, and every stage runs it under them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from seal_peft import SealConfig
from seal_peft.context.self_extend import read_self_extend
from seal_peft.loading import load_config, load_model, load_skeleton
from seal_peft.reach import reach, reach_of_folder
from stages import error_of, save_model, save_samples, seal

NATIVE, SETTINGS = 400, {"group_size": 3, "window": 99}
REACHED = (NATIVE - 99) * 3 + 99
IDS = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model, its base, an adapter that was trained on it, and samples beyond the native length."""
    folder = tmp_path_factory.mktemp("house")
    base = AutoModelForCausalLM.from_pretrained(save_model(folder / "base", max_position_embeddings=NATIVE))
    adapted = get_peft_model(base, SealConfig(self_extend=SETTINGS))
    models.draw_scales(adapted)
    with pytest.warns(UserWarning, match="The merged model needs self_extend"):
        merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "merged")
    torch.save(logits(merged), folder / "logits")
    save_samples(folder / "train.jsonl", length=600)
    save_samples(folder / "test.jsonl", "test", length=600, num_samples=2)
    words = ["train", "--model_name_or_path", folder / "merged", "--train_file", folder / "train.jsonl"]
    assert seal(*words, "--output_dir", folder / "adapter", "--dtype", "float32") == 0
    return folder


def test_it_answers_as_it_did_when_it_was_merged(house: Path) -> None:
    expected = torch.load(house / "logits")
    assert torch.equal(logits(load_model(str(house / "merged"), "float32")), expected)
    plain = AutoModelForCausalLM.from_pretrained(house / "merged", dtype=torch.float32)
    assert not torch.allclose(logits(plain), expected, atol=1e-3)


def test_it_reads_as_far_loaded_without_weights_and_by_its_config(house: Path) -> None:
    name = str(house / "merged")
    assert {reach_of_folder(load_config(name)), reach(load_skeleton(name)), reach(load_model(name))} == {REACHED}
    assert reach(AutoModelForCausalLM.from_pretrained(house / "merged")) == NATIVE


def test_an_adapter_that_is_trained_on_it_has_that_on_record(house: Path) -> None:
    saved = json.loads((house / "adapter" / "adapter_config.json").read_text())
    assert (saved["base_self_extend"], saved["self_extend"]) == (SETTINGS, None)


def test_it_is_evaluated_as_what_it_is(house: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    words = ["evaluate", "--model_name_or_path", house / "merged", "--adapters", house / "adapter"]
    words += ["--models", f"plain={house / 'base'}", "--test_file", house / "test.jsonl", "--allow_beyond_window"]
    assert seal(*words, "--max_new_tokens", 8, "--dtype", "float32", "--output_dir", tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["windows"] == {"base": REACHED, "adapter": REACHED, "plain": NATIVE}
    assert not [warning for warning in recwarn if "trained on a base" in str(warning.message)]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    answers = {(row["system"], row["id"]): row["answer"] for row in rows}
    model = load_model(str(house / "merged"), "float32").eval()
    assert read_self_extend(model) == SETTINGS
    adapted = PeftModel.from_pretrained(model, house / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(house / "merged")
    for line in (house / "test.jsonl").read_text().splitlines():
        sample = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            sample["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = adapted.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers["adapter", sample["id"]] == answer


def test_data_advice_and_heads_go_by_what_it_reaches(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model_name_or_path", house / "merged"]
    assert seal("advise", *model, "--length", REACHED) == 0
    assert f"| none | {REACHED:,} |  | by the Self-Extend that its config notes |" in capsys.readouterr().out
    assert seal("advise", *model, "--length", REACHED + 1) == 0
    assert "| yarn |" in capsys.readouterr().out
    data = ["make-data", *model, "--num_samples", 1, "--output_file", tmp_path / "data.jsonl"]
    assert seal(*data, "--lengths", REACHED) == 0
    assert seal(*data, "--lengths", REACHED + 1) == 1
    assert f"the window of this model is {REACHED} tokens" in error_of(capsys)
    scored = ["heads", *model, "--test_file", house / "test.jsonl", "--output_dir", tmp_path, "--scores", "gradient"]
    assert seal(*scored, "--sites", "output") == 0


def test_merging_more_into_it_is_refused_as_merging_self_extend_is(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert seal("merge", "--adapter", house / "adapter", "--output_dir", tmp_path / "more") == 1
    assert f"The base model needs self_extend={SETTINGS}" in error_of(capsys)


def test_a_note_that_is_no_self_extend_is_refused(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", weights=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "self_extend": True}))
    words = ["evaluate", "--model_name_or_path", folder, "--test_file", house / "test.jsonl"]
    assert seal(*words, "--output_dir", tmp_path / "out") == 1
    assert "self_extend=True is not allowed" in error_of(capsys)
