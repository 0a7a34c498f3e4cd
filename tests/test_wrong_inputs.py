"""What public entries say to inputs of the wrong kind: what was given, and what to give instead."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import seal_peft
from models import adapted, base_model
from seal_peft import SealConfig
from seal_peft.data import read_samples, trained_prompts
from seal_peft.dataset import training_rows
from seal_peft.heads import find_heads
from seal_peft.make_data import MakeDataArguments, make_data
from seal_peft.report import read_metrics
from seal_peft.resume import find_checkpoint
from seal_peft.tuner.weights import SETTINGS


@pytest.mark.parametrize("samples", ["my.jsonl", [{"messages": []}], [Path("my.jsonl")]])
def test_rows_are_made_of_samples_alone(samples):
    with pytest.raises(TypeError, match=r"read_samples.*got"):
        training_rows(samples, None, adapted("llama", "head"))


@pytest.mark.parametrize("name", ["nothing.jsonl", "."])
def test_samples_come_from_a_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="There is no file .*make-data"):
        read_samples(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing.json", "."])
def test_metrics_come_from_a_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*metrics\.json that `seal-peft evaluate`"):
        read_metrics(tmp_path / name)


@pytest.mark.parametrize("name", ["run.json", "unfinished.json", "adapter_config.json"])
def test_a_record_that_is_cut_off_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"a": ')
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    read = {
        "run.json": lambda: trained_prompts(tmp_path),
        "unfinished.json": lambda: find_checkpoint(tmp_path, {}, overwrite=False),
        "adapter_config.json": lambda: seal_peft.push(tmp_path, "me/heads"),
    }[name]
    with pytest.raises(ValueError, match=f"{name} is not JSON .*: it was cut off or edited. Restore it"):
        read()


def test_samples_are_not_written_over_a_folder(tmp_path):
    with pytest.raises(ValueError, match="--output_file .* is a folder"):
        make_data(MakeDataArguments("unread", str(tmp_path)))


def test_a_second_method_comes_to_a_peft_model():
    with pytest.raises(TypeError, match=r"got a LlamaForCausalLM and a SealConfig.*get_peft_model"):
        seal_peft.add_beside(base_model("llama"), SealConfig(), "heads")
    with pytest.raises(TypeError, match="got a PeftModel and a str"):
        seal_peft.add_beside(get_peft_model(base_model("llama"), SealConfig()), "style", "style")


def test_a_folder_without_adapters_is_named(tmp_path):
    with pytest.raises(ValueError, match="There is no adapter in .*a dictionary"):
        seal_peft.load_adapters(base_model("llama"), tmp_path)


def test_folders_without_names_are_told_how_to_be_named():
    with pytest.raises(TypeError, match=r"folders=\['a', 'b'\] was given; use a dictionary from names"):
        seal_peft.load_adapters(base_model("llama"), ["a", "b"])


@pytest.mark.parametrize(
    "read",
    [
        lambda name, out: seal_peft.hotswap_adapter(adapted("llama"), name),
        lambda name, out: seal_peft.load_adapters(base_model("llama"), {"heads": name}),
        lambda name, out: seal_peft.export_ia3(name, out),
        lambda name, out: seal_peft.import_ia3(name, out, base_model=base_model("llama")),
    ],
    ids=["hotswap_adapter", "load_adapters", "export_ia3", "import_ia3"],
)
def test_a_folder_that_holds_no_adapter_is_told_from_one_that_is_not_there(read, tmp_path):
    with pytest.raises(
        ValueError, match=r"There is no folder '.*nowhere'\. Give the folder of an adapter, or a Hub id"
    ):
        read(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' is not an adapter: give a folder that holds an adapter_config.json"):
        read(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, SealConfig])
def test_an_adapter_without_its_weights_is_told_so(config, tmp_path):
    config(target_modules=["o_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"There is an adapter_config.json in .* but no adapter_model\.safetensors"):
        seal_peft.load_adapters(base_model("llama"), {"one": tmp_path})


def test_heads_are_those_of_a_model_of_transformers():
    with pytest.raises(TypeError, match="a model of transformers, got a Linear"):
        find_heads(torch.nn.Linear(2, 2))


def test_settings_are_read_from_weights_that_were_cast_and_missed_aloud_after_other_arithmetic(tmp_path):
    for name, head in (("one", "L0H1"), ("other", "L0H0")):
        adapted("llama", "head", target_heads=[head]).save_pretrained(tmp_path / name)
    path = tmp_path / "other" / "adapter_model.safetensors"
    weights = load_file(tmp_path / "one" / path.name)  # from here on beside the config of the other
    save_file({name: value.to(torch.float16) for name, value in weights.items()}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="is not the one that the weights beside it were saved with"):
        assert SealConfig.from_pretrained(str(path.parent)).target_heads == ["L0H1"]
    save_file({n: v // 2 if n.endswith(SETTINGS) else v for n, v in weights.items()}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="cannot be read.*The config is taken as it is"):
        assert SealConfig.from_pretrained(str(path.parent)).target_heads == ["L0H0"]
