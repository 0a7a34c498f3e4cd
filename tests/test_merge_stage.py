"""The merge stage: a plain checkpoint, whole or not there at all."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import models
from faults import die, in_a_process_of_its_own
from seal_peft import SealConfig, add_beside
from seal_peft.loading import load_adapter, load_model
from seal_peft.merge import MergeArguments, merge
from seal_peft.tuner.config import Site
from stages import WINDOW, error_of, save_model, save_samples, seal


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    save_adapter(folder, save_model(folder / "model"))
    return folder


def save_adapter(folder: Path, model: Path, name: str = "adapter", **settings: Any) -> Path:
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32)
    adapted = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity="channel", **settings))
    models.draw_scales(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(str(folder / name))
    return folder / name


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_merged_model_is_alone_in_its_folder_and_may_be_read_by_whom_the_umask_says(
    umask: int, house: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        merged = merge(MergeArguments(str(house / "adapter"), str(tmp_path / "new" / "merged")))
    finally:
        os.umask(before)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
    assert merged.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {0o666 & ~umask}


def test_only_the_attention_outputs_of_the_base_change(house: Path, tmp_path: Path) -> None:
    merged = load_file(merge(MergeArguments(str(house / "adapter"), str(tmp_path / "merged"))) / "model.safetensors")
    base = load_file(house / "model" / "model.safetensors")
    assert merged.keys() == base.keys()
    for name in base:
        assert torch.equal(merged[name], base[name]) != ("o_proj" in name), name


def save_pair(folder: Path, norm: bool, sites: tuple[Site, ...] = ("output", "query")) -> tuple[Path, PeftModel]:
    """Save LoRA and scales that compute together, on a model whose heads share a norm of queries or on one without."""
    model = save_model(folder / "model")
    if norm:
        qwen3 = models.causal(
            tf.Qwen3Config, head_dim=models.HEAD_DIM, vocab_size=len(AutoTokenizer.from_pretrained(model))
        )
        qwen3.save_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    pair = add_beside(get_peft_model(base, lora, "style"), SealConfig(sites=sites), "heads").eval()
    models.draw_scales(pair, "heads")
    for config in pair.peft_config.values():
        config.base_model_name_or_path = str(model)
    pair.save_pretrained(str(folder))
    return model, pair


def test_one_site_merges_and_the_other_becomes_an_adapter_of_the_merged_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", sites=("output", "query")))
    models.draw_scales(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "run.json").write_text('["a file of another tool"]')
    words = ["--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    assert seal("merge", *words, "--sites", "output") == 0
    rest = tmp_path / "merged" / "seal_adapter"
    assert f"Scales at query are not in the merged model; they stay an adapter of it: {rest}." in caplog.messages
    plain, old = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", model))
    assert {name for name in old if not torch.equal(old[name], plain[name])} == {
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(models.LAYERS)
    }
    loaded = AutoPeftModelForCausalLM.from_pretrained(rest, dtype=torch.float32)
    assert loaded.peft_config["default"].sites == ("query",)
    torch.testing.assert_close(models.logits(loaded), models.logits(adapted), rtol=0, atol=1e-5)
    assert "are not recorded" in (rest / "README.md").read_text()


def test_what_is_not_merged_keeps_the_record_of_its_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, merged = save_samples(tmp_path / "train.jsonl", num_samples=2), tmp_path / "merged"
    words = ["--model_name_or_path", save_model(tmp_path / "model"), "--train_file", samples, "--max_steps", 1]
    sites = ["--sites", "output", "query", "--granularity", "head"]
    assert seal("train", *words, *sites, "--dtype", "float32", "--output_dir", tmp_path / "adapter") == 0
    words = ["--adapter", tmp_path / "adapter", "--output_dir", merged]
    assert seal("merge", *words, "--sites", "output") == 0
    card = (merged / "seal_adapter" / "README.md").read_text()
    assert "| sites | query |" in card
    assert "| trained together with | scales at output, which the base model holds merged |" in card
    assert "| lengths | 400 tokens |" in card and "not recorded" not in card
    assert "trained together with" not in (tmp_path / "adapter" / "README.md").read_text()
    capsys.readouterr()
    words = ["--model_name_or_path", merged, "--test_file", samples, "--output_dir", tmp_path / "eval"]
    assert seal("evaluate", *words, "--adapters", merged / "seal_adapter") == 1
    assert "were in the training data of 'seal_adapter'" in error_of(capsys)


@pytest.mark.parametrize("sites", [("query",), ("output", "query")])
def test_lora_and_output_scales_merge_under_query_scales_that_stay_an_adapter(
    sites: tuple[Site, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, pair = save_pair(tmp_path, norm=True, sites=sites)
    merged = tmp_path / "new" / "merged"
    words = ["--adapter", f"{tmp_path / 'style'}+{tmp_path / 'heads'}", "--output_dir", merged]
    assert seal("merge", *words) == 1
    assert "`seal-peft merge --sites output`" in error_of(capsys)
    assert not (tmp_path / "new").exists()
    assert seal("merge", *words, "--sites", "output") == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(merged / "seal_adapter", dtype=torch.float32)
    assert loaded.peft_config["default"].sites == ("query",)
    torch.testing.assert_close(models.logits(loaded), models.logits(pair), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("merged", "module"), [("output", "q_proj"), ("query", "o_proj")])
def test_scales_stay_no_adapter_of_a_model_whose_lora_they_would_scale(
    merged: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, norm=False)
    words = ["--adapter", f"{tmp_path / 'heads'}+{tmp_path / 'style'}", "--output_dir", tmp_path / "merged"]
    assert seal("merge", *words, "--sites", merged) == 1
    assert f"(model.layers.0.self_attn.{module}), and once it is merged, they would scale it" in error_of(capsys)
    assert not (tmp_path / "merged").exists()
    assert seal("merge", *words) == 0


@pytest.mark.parametrize(("kind", "limit"), [("yarn", 2 * WINDOW), ("linear", 2 * WINDOW), (None, WINDOW)])
def test_the_tokenizer_of_an_extended_model_truncates_where_its_window_ends(
    kind: str | None, limit: int, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = WINDOW
    tokenizer.save_pretrained(model)
    rope = {"rope_type": kind, "factor": 2.0} if kind else None
    merge(MergeArguments(str(save_adapter(tmp_path, model, rope_parameters=rope)), str(tmp_path / "merged")))
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.model_max_length == limit
    assert len(merged("a " * 3 * WINDOW, truncation=True)["input_ids"]) == limit


@pytest.mark.parametrize(("asked", "stored"), [("stored", "bfloat16"), ("float32", "float32")])
def test_the_merged_model_has_the_dtype_of_the_base_unless_asked(
    house: Path, tmp_path: Path, asked: str, stored: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(house / "model").save_pretrained(tmp_path / "model")
    merged = tmp_path / "merged"
    words = ["--model_name_or_path", tmp_path / "model", "--adapter", house / "adapter"]
    assert seal("merge", *words, "--dtype", asked, "--output_dir", merged) == 0
    assert {str(weight.dtype) for weight in load_file(merged / "model.safetensors").values()} == {f"torch.{stored}"}


def test_sites_that_leave_all_or_scales_of_two_adapters_are_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = save_pair(tmp_path, norm=False)
    save_adapter(tmp_path, model)
    (model / "model.safetensors").unlink()
    out = ["--output_dir", tmp_path / "merged"]
    assert seal("merge", "--adapter", tmp_path / "adapter", "--sites", "query", *out) == 1
    assert f"--sites query would merge nothing: {tmp_path / 'adapter'} has scales at output alone. Merge" in error_of(
        capsys
    )
    both = f"{tmp_path / 'adapter'}+{tmp_path / 'heads'}"
    assert seal("merge", "--adapter", both, "--sites", "query", *out) == 1
    assert "--sites query leaves scales of 2 adapters, and a merged model takes one" in error_of(capsys)


# --- faults --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("step", "written"),
    [
        ("transformers.modeling_utils.safe_save_file", False),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", False),
        ("os.rename", False),
        ("seal_peft.merge.shutil.rmtree", True),
    ],
)
def test_a_killed_merge_leaves_a_whole_model_or_none(
    step: str, written: bool, house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, target = contents(house), tmp_path / "merged"
    (tmp_path / ".merged-of-mine").mkdir()

    def merge_and_die() -> None:
        monkeypatch.setattr(step, die)
        merge(MergeArguments(str(house / "adapter"), str(target)))

    assert in_a_process_of_its_own(merge_and_die) == signal.SIGKILL
    assert target.exists() == written
    assert contents(house) == before
    if not written:
        assert len(list(tmp_path.iterdir())) == 2  # what the kill left is hidden, and swept by the next merge
        merge(MergeArguments(str(house / "adapter"), str(target)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged-of-mine", "merged"]
    model = load_model(str(house / "model"), "float32").eval()
    adapted = models.logits(load_adapter(model, str(house / "adapter")))
    torch.testing.assert_close(models.logits(load_model(str(target), "float32").eval()), adapted)


@pytest.mark.parametrize("what", ["model", "tokenizer", "folder"])
def test_a_full_disk_is_named_and_nothing_is_left(
    what: str, house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "model": "transformers.modeling_utils.safe_save_file",
        "tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
        "folder": "seal_peft.merge.Path.mkdir",
    }

    def no_space(*args: object, **options: object) -> None:
        if what == "folder":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise Exception("No space left on device (os error 28)")  # as libraries written in Rust say it

    monkeypatch.setattr(places[what], no_space)
    message = refusal(capsys, house / "adapter", tmp_path / "merged")
    assert "The disk is full: the merged model was not written, and nothing is left of it" in message
    assert "Free some space or choose an --output_dir on another disk, and merge again" in message
    assert str(tmp_path / "merged") in message
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_really_full_keeps_what_was_there(
    house: Path, tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_disk / "notes.txt").write_text("mine")
    assert "The disk is full" in refusal(capsys, house / "adapter", tiny_disk / "merged")
    assert [path.name for path in tiny_disk.iterdir()] == ["notes.txt"]


def test_other_errors_pass_through_and_leave_nothing(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="something else"):
        merge(MergeArguments(str(house / "adapter"), str(tmp_path / "merged")))
    assert not list(tmp_path.iterdir())


# --- bad input -----------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], adapter: object, target: Path) -> str:
    capsys.readouterr()
    assert seal("merge", "--adapter", adapter, "--output_dir", target) == 1
    return error_of(capsys)


def test_an_existing_target_is_refused_and_untouched(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists already. Remove it or choose another --output_dir" in refusal(capsys, house / "adapter", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_broken_and_homeless_adapters_are_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tmp_path, save_model(tmp_path / "weightless", weights=False))
    target = tmp_path / "merged"
    assert "is not an adapter" in refusal(capsys, tmp_path / "weightless", target)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "does not name its base model. Pass --model_name_or_path" in refusal(capsys, adapter, target)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/model"}))
    assert "There is no model folder '/no/such/model'" in refusal(capsys, adapter, target)
    save_model(tmp_path / "deeper", weights=False, num_hidden_layers=3)
    deeper = {**config, "base_model_name_or_path": str(tmp_path / "deeper")}
    (adapter / "adapter_config.json").write_text(json.dumps(deeper))
    assert f"does not fit the model {tmp_path / 'deeper'}" in refusal(capsys, adapter, target)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "cut off or damaged" in refusal(capsys, adapter, target)
    assert not target.exists()
