"""Weights of one save beside the config of another: read as the adapter that the weights are of, or refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from faults import die, in_a_process_of_its_own
from models import adapted, base_model, draw_scales, llama, logits, seal_layers
from seal_peft import SealConfig, export_ia3, hotswap_adapter, push, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings under which the same tensors mean something else.
SETTINGS = {
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "self-extend": {"self_extend": {"group_size": 2, "window": 4}},
    "heads": {"target_heads": ["L0H1", "L1H2"]},
}
mixed_up = pytest.mark.filterwarnings("ignore:The config in .* is not the one that the weights beside it")

# transformers injects through PEFT's low-level call, which warns about a second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """Folders of the base model and, for each setting, of an adapter that has it; "plain" has none."""
    folder = tmp_path_factory.mktemp("house")
    base_model("llama").save_pretrained(folder / "base")
    for seed, (name, settings) in enumerate({"plain": {}, **SETTINGS}.items()):
        model = adapted("llama", seed=seed + 1, task_type="CAUSAL_LM", **settings)
        for layer in seal_layers(model).values():  # heads that are not chosen are at 1 in the file, too
            offset = layer.seal_delta["default"]
            offset.weight.data = offset(1.0).detach().squeeze(-1) - 1
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    return folder


def beside(first: Path, second: Path, folder: Path) -> Path:
    """Make a folder of the weights of one adapter and the config of another."""
    folder.mkdir(exist_ok=True)
    shutil.copy(first / WEIGHTS, folder)
    shutil.copy(second / CONFIG, folder)
    return folder


def by_peft(folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(base_model("llama"), folder))


def as_another(folder: Path) -> Tensor:
    model = get_peft_model(base_model("llama"), SealConfig())
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return logits(model)


def by_auto_class(folder: Path) -> Tensor:
    return logits(AutoPeftModelForCausalLM.from_pretrained(folder))


def by_transformers(folder: Path) -> Tensor:
    model = base_model("llama")
    report = model.load_adapter(folder)
    assert not report.missing_keys and not report.unexpected_keys
    return logits(model)


def as_a_model(folder: Path) -> Tensor:
    return logits(tf.AutoModelForCausalLM.from_pretrained(folder))


def swapped_into(settings: dict, folder: Path) -> Tensor:
    model = adapted("llama", seed=9, **settings)
    hotswap_adapter(model, folder)
    return logits(model)


PEFT_LOADERS, TRANSFORMERS_LOADERS = (by_peft, as_another, by_auto_class), (by_transformers, as_a_model)


@mixed_up
@pytest.mark.parametrize("special", SETTINGS)
@pytest.mark.parametrize("weights_are", ["plain", "special"])
def test_no_loader_takes_weights_of_one_save_for_those_of_another(special, weights_are, house, tmp_path):
    first, second = (house / "plain", house / special)[:: 1 if weights_are == "plain" else -1]
    folder = beside(first, second, tmp_path)
    right = by_peft(first)
    for load in PEFT_LOADERS:
        assert torch.equal(load(folder), right), load.__name__
    for load in TRANSFORMERS_LOADERS:
        with pytest.raises(ValueError, match="do not belong to its config: they were saved with .*not"):
            load(folder)
    model = base_model("llama")  # what the message says helps
    model.load_adapter(folder, peft_config=SealConfig.from_pretrained(folder))
    assert torch.equal(logits(model), right)
    own, others = ({}, SETTINGS[special])[:: 1 if weights_are == "plain" else -1]
    assert torch.equal(swapped_into(own, folder), right)
    if (special, weights_are) == ("heads", "special"):  # an adapter of all heads can hold one of some
        assert torch.equal(swapped_into(others, folder), right)
    else:
        with pytest.raises(ValueError, match="asks for RoPE and Self-Extend|scales other heads"):
            swapped_into(others, folder)
    save_adapter(PeftModel.from_pretrained(base_model("llama"), folder), folder)
    assert torch.equal(by_transformers(folder), right)


def test_the_warning_names_the_settings(house, tmp_path):
    with pytest.warns(UserWarning, match="read as its weights were saved, with other rope_parameters. Save it again"):
        assert SealConfig.from_pretrained(beside(house / "rope", house / "plain", tmp_path)).rope_parameters


def test_pickled_weights_of_another_save_are_refused(house, tmp_path):
    model = PeftModel.from_pretrained(base_model("llama"), house / "rope")
    model.save_pretrained(tmp_path, safe_serialization=False)
    shutil.copy(house / "plain" / CONFIG, tmp_path)
    with pytest.raises(ValueError, match="do not belong to its config: they were saved with rope_parameters="):
        by_peft(tmp_path)


@mixed_up
def test_the_rope_of_the_base_belongs_to_the_weights(house, tmp_path):
    other = llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model = get_peft_model(other, SealConfig())
    draw_scales(model, seed=5)
    model.save_pretrained(tmp_path / "other")
    folder = beside(tmp_path / "other", house / "plain", tmp_path)
    with pytest.raises(UserWarning, match=r"trained with other RoPE parameters .*rope_theta 500\.0 \(adapter\)"):
        by_peft(folder)
    with pytest.raises(ValueError, match="saved with base_rope="):
        by_transformers(folder)


@mixed_up
def test_weights_for_another_base_are_refused_until_the_config_names_it(house, tmp_path):
    shutil.copytree(house / "base", tmp_path / "base")
    model = adapted("llama", seed=6, task_type="CAUSAL_LM", **SETTINGS["rope"])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "other")
    folder = beside(tmp_path / "other", house / "plain", tmp_path)
    assert str(tmp_path).encode() not in (folder / WEIGHTS).read_bytes()  # nobody's business
    for load in (*PEFT_LOADERS, *TRANSFORMERS_LOADERS):
        with pytest.raises(ValueError, match="saved (for|with) another base model"):
            load(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    assert torch.equal(by_auto_class(folder), logits(model))


def test_a_save_that_loading_completes_is_not_put_on_the_old_base(house, tmp_path):
    other = llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    other.save_pretrained(tmp_path / "base")
    model = get_peft_model(other, SealConfig(task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    folder = shutil.copytree(house / "plain", tmp_path / "adapter")
    model.save_pretrained(folder / ".saved")  # as `save_adapter` leaves it when killed before it moves the files
    with pytest.raises(ValueError, match="complete now, but the adapter is for another base model.*Load it again"):
        by_auto_class(folder)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert loaded.get_base_model().config.rope_parameters["rope_theta"] == 500.0


# -- real kills -------------------------------------------------------------------------------------------------------

# What is killed when it is called, in the order in which the two libraries come to it.
PEFT_STEPS = [
    "peft.peft_model.safe_save_file",
    "peft.config.PeftConfigMixin.save_pretrained",
    "os.replace",  # of the config, which is complete
]
TRANSFORMERS_STEPS = [
    "seal_peft.SealConfig.save_pretrained",
    "os.replace",
    "transformers.modeling_utils.safe_save_file",
]


@mixed_up
@pytest.mark.parametrize(
    ("library", "step"), [*(("peft", step) for step in PEFT_STEPS), *(("transformers", s) for s in TRANSFORMERS_STEPS)]
)
def test_a_save_killed_between_its_files_is_one_adapter_to_peft(library, step, house, tmp_path, monkeypatch):
    folder = shutil.copytree(house / "plain", tmp_path / "adapter")
    new = base_model("llama")
    if library == "transformers":
        new.load_adapter(house / "rope")
    else:
        new = PeftModel.from_pretrained(new, house / "rope")

    def save() -> None:
        monkeypatch.setattr(step, die)
        new.save_pretrained(folder)

    assert in_a_process_of_its_own(save) == signal.SIGKILL
    weights_are_new = (folder / WEIGHTS).read_bytes() == (house / "rope" / WEIGHTS).read_bytes()
    assert weights_are_new == (library == "peft" and step != PEFT_STEPS[0])
    config_is_new = json.loads((folder / CONFIG).read_text())["rope_parameters"] is not None
    assert config_is_new == (step == TRANSFORMERS_STEPS[-1])
    right = by_peft(house / ("rope" if weights_are_new else "plain"))
    assert torch.equal(by_peft(folder), right)
    if weights_are_new == config_is_new:
        assert torch.equal(by_transformers(folder), right)
    else:
        with pytest.raises(ValueError, match="do not belong to its config"):
            by_transformers(folder)


# -- what is no half save ---------------------------------------------------------------------------------------------


def test_adapters_that_were_saved_before_weights_carried_settings_load(house, tmp_path):
    folder = shutil.copytree(house / "rope", tmp_path / "adapter")
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if name.endswith(".weight")}
    assert len(weights) == len(load_file(folder / WEIGHTS)) - 1
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    assert config.pop("fingerprint")
    (folder / CONFIG).write_text(json.dumps(config))
    right = by_peft(house / "rope")
    for load in (by_peft, by_auto_class, by_transformers):
        assert torch.equal(load(folder), right), load.__name__
    assert torch.equal(swapped_into(SETTINGS["rope"], folder), right)
    # An old folder that was overwritten halfway is known by its settings alone.
    shutil.copy(house / "plain" / WEIGHTS, folder)
    with pytest.warns(UserWarning, match="is not the one that the weights"):
        assert SealConfig.from_pretrained(folder).rope_parameters is None


def test_settings_that_were_changed_on_purpose_count(house, tmp_path):
    folder = shutil.copytree(house / "rope", tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    config["rope_parameters"]["factor"] = 3.0
    (folder / CONFIG).write_text(json.dumps(config))
    changed = adapted("llama", seed=2, rope_parameters={"rope_type": "linear", "factor": 3.0})
    for load in (by_peft, by_transformers):
        assert torch.equal(load(folder), logits(changed)), load.__name__
    settings = SealConfig.from_pretrained(house / "rope")
    settings.rope_parameters = None
    model = PeftModel.from_pretrained(base_model("llama"), house / "rope", config=settings)
    assert torch.equal(logits(model), logits(adapted("llama", seed=2)))


def test_a_config_made_anew_is_told_what_the_weights_were_saved_with(house):
    for folder, kwargs, message in (
        ("rope", {}, "rope_parameters=.*linear.*, not None"),
        ("plain", {"target_heads": ["L0H0"]}, r"target_heads=None, not \['L0H0'\]"),
    ):
        model = get_peft_model(base_model("llama"), SealConfig(**kwargs))
        with pytest.warns(UserWarning, match=f"weights were saved with {message}"):
            model.load_adapter(house / folder, "default")


def test_a_state_dict_of_other_settings_is_refused_by_an_adapter_that_was_loaded(house):
    model = PeftModel.from_pretrained(base_model("llama"), house / "plain")
    with pytest.raises(ValueError, match="saved with target_heads="):
        set_peft_model_state_dict(model, load_file(house / "heads" / WEIGHTS))
    same = {name: value / 2 for name, value in load_file(house / "plain" / WEIGHTS).items()}  # of the settings, too
    with pytest.warns(UserWarning, match="cannot be read"):
        result = set_peft_model_state_dict(model, same)
    assert not result.unexpected_keys
    assert not torch.equal(logits(model), by_peft(house / "plain"))


def test_a_model_that_was_injected_by_hand_takes_the_weights_and_is_plain_again(house):
    model = base_model("llama")
    inject_adapter_in_model(SealConfig.from_pretrained(house / "rope"), model)
    with pytest.raises(ValueError, match="do not belong to its config: they were saved with"):
        set_peft_model_state_dict(model, load_file(house / "plain" / WEIGHTS))
    result = set_peft_model_state_dict(model, load_file(house / "rope" / WEIGHTS))
    assert not result.unexpected_keys
    assert torch.equal(logits(model), by_peft(house / "rope"))
    assert all(name.endswith(".weight") for name in model.state_dict())


def test_settings_stay_out_of_other_formats(house, tmp_path):
    folder = export_ia3(house / "heads", tmp_path / "ia3")
    assert all(name.endswith(".ia3_l") for name in load_file(folder / WEIGHTS))
    assert os.path.getsize(house / "plain" / WEIGHTS) < 1000


@mixed_up
def test_files_of_two_saves_are_not_published(house, tmp_path):
    with pytest.raises(ValueError, match="not that of the weights beside it. Load the adapter and save it again"):
        push(beside(house / "rope", house / "plain", tmp_path), "me/mine", base_model="me/base")
