"""SEAL beside LoRA, saved, loaded and trained: two adapters, each of which is one of its own method."""

import warnings

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

import seal_peft
from lora_pairs import (
    add_lora_to_seal,
    add_seal_to_lora,
    build,
    by_hand,
    draw_lora,
    granularities,
    lora_config,
    merged_more_than_once,
    names,
    orders,
    places,
    same,
)
from models import INPUT_IDS, adapted, base_model, draw_scales, logits
from seal_peft import SealConfig, scales

pytestmark = merged_more_than_once


# -- saving and loading -----------------------------------------------------------------------------------------------


def read(folder):
    return load_file(folder / "adapter_model.safetensors")


@orders
@names
@places
@granularities
def test_a_pair_is_saved_as_two_adapters_and_loaded_by_one_call(order, name, shared, granularity, tmp_path):
    model = build(order, name, shared, granularity)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "heads", "style"}
    folders = {"style": tmp_path / "style", "heads": tmp_path / "heads"}
    for source in (folders, dict(reversed(folders.items())), tmp_path):
        loaded = seal_peft.load_adapters(base_model(name), source)
        assert sorted(loaded.active_adapters) == ["heads", "style"]
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(logits(loaded), logits(model))
        same(loaded.merge_and_unload(), by_hand(model, name))


@orders
@places
def test_the_files_are_those_of_either_adapter_alone(order, shared, tmp_path):
    build(order, shared=shared).save_pretrained(tmp_path)
    alone = get_peft_model(base_model("llama"), SealConfig())
    draw_scales(alone)
    alone.save_pretrained(tmp_path / "seal")
    assert (tmp_path / "seal/adapter_model.safetensors").read_bytes() == (
        tmp_path / "heads/adapter_model.safetensors"
    ).read_bytes()
    assert scales(tmp_path / "heads").keys() == scales(tmp_path / "seal").keys()
    lora = get_peft_model(base_model("llama"), lora_config(shared=shared))
    draw_lora(lora, "default")
    lora.save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora/adapter_model.safetensors").read_bytes() == (
        tmp_path / "style/adapter_model.safetensors"
    ).read_bytes()


@orders
def test_either_adapter_of_a_pair_loads_alone(order, tmp_path):
    model = build(order)
    model.save_pretrained(tmp_path)
    for name in ("heads", "style"):
        same(PeftModel.from_pretrained(base_model("llama"), tmp_path / name), by_hand(model, active=[name]))


@places
def test_adapters_that_were_trained_apart_are_loaded_together(shared, tmp_path):
    lora = get_peft_model(base_model("llama"), lora_config(shared=shared))
    draw_lora(lora, "default")
    lora.save_pretrained(tmp_path / "a")
    adapted("llama").save_pretrained(tmp_path / "b")
    model = seal_peft.load_adapters(base_model("llama"), {"lora": tmp_path / "a", "seal": str(tmp_path / "b")})
    expected = build(shared=shared)
    assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(seal_peft.load_adapters(base_model("llama"), tmp_path / "c")), logits(model))


def test_a_merged_pair_saves_the_same_files(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for name in ("heads", "style"):
        before, merged = read(tmp_path / "before" / name), read(tmp_path / "merged" / name)
        assert before.keys() == merged.keys()
        assert all(torch.equal(before[key], merged[key]) for key in before)


def test_several_adapters_of_seal_load_beside_lora_and_say_that_all_act(tmp_path, caplog):
    build().save_pretrained(tmp_path)
    seal_peft.load_adapters(base_model("llama"), tmp_path)
    assert not caplog.messages
    adapted("llama", "channel", seed=7).save_pretrained(tmp_path / "fine")
    model = seal_peft.load_adapters(base_model("llama"), tmp_path)
    assert any(
        text.startswith("Adapters fine, heads are all active, so their scales multiply") for text in caplog.messages
    )
    assert sorted(model.active_adapters) == ["fine", "heads", "style"]
    seal_peft.activate(model, ["heads", "style"])
    same(model, by_hand(model))


def test_a_pair_without_seal_is_refused(tmp_path):
    get_peft_model(base_model("llama"), lora_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="None of the adapters is SEAL's"):
        seal_peft.load_adapters(base_model("llama"), {"style": tmp_path})


@pytest.mark.filterwarnings("ignore:Adapter style was active which is now deleted:UserWarning")
@pytest.mark.parametrize("first", ["style", "heads"])
@places
def test_transformers_own_loader_takes_the_pair_in_either_order(first, shared, tmp_path):
    model = build(shared=shared)
    model.save_pretrained(tmp_path)
    base = base_model("llama")
    for name in (first, {"style": "heads", "heads": "style"}[first]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            base.load_adapter(str(tmp_path / name), name)
    base.set_adapter(["style", "heads"])
    assert_close(logits(base), logits(model), rtol=0, atol=1e-6)
    for name in ("style", "heads"):
        saved = {key.removeprefix("base_model.model."): value for key, value in read(tmp_path / name).items()}
        state = base.get_adapter_state_dict(name)
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], value) for key, value in saved.items())
    base.set_adapter("heads")
    same(base, by_hand(model, active=["heads"]))
    base.set_adapter("style")
    same(base, by_hand(model, active=["style"]))
    base.delete_adapter("style")
    base.set_adapter("heads")
    same(base, by_hand(model, active=["heads"]))


# -- training ---------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = INPUT_IDS[index % 2].roll(index)
        return {"input_ids": row, "labels": row}


def trainer(model, folder, **kwargs):
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=0.02,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
        **kwargs,
    )
    return tf.Trainer(model=model, args=arguments, train_dataset=Rows())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("order", [add_seal_to_lora, add_lora_to_seal])
@places
def test_one_trainer_trains_both_and_resumes_both(order, shared, tmp_path):
    def fresh():
        torch.manual_seed(4)
        model = order(base_model("llama"), lora_config(shared=shared), SealConfig())
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {
            "lora_A",
            "lora_B",
            "seal_delta",
        }
        return model

    whole = trainer(fresh(), tmp_path, max_steps=4)
    before = {key: value.clone() for key, value in whole.model.state_dict().items()}
    whole.train()
    after = whole.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "lora_" in key or "seal_" in key}

    resumed = trainer(fresh(), tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sorted(resumed.model.active_adapters) == ["heads", "style"]
    for key, value in resumed.model.state_dict().items():
        assert_close(value, after[key], rtol=0, atol=1e-6)
    loaded = seal_peft.load_adapters(base_model("llama"), tmp_path / "checkpoint-4")
    assert_close(logits(loaded), logits(whole.model.eval()), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_trainers_checkpoints_are_no_adapters_of_the_pair_beside_them(tmp_path):
    torch.manual_seed(4)
    pair = seal_peft.add_beside(get_peft_model(base_model("llama"), SealConfig()), lora_config(), "style")
    trained = trainer(pair, tmp_path, max_steps=2)
    trained.train()
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="checkpoint is loaded by its own folder"):
        seal_peft.load_adapters(base_model("llama"), tmp_path)
    trained.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded = seal_peft.load_adapters(base_model("llama"), folder)
        assert sorted(loaded.active_adapters) == ["default", "style"]
        assert_close(logits(loaded), logits(trained.model.eval()), rtol=0, atol=1e-6)


def test_a_frozen_lora_stays_frozen_while_seal_trains(tmp_path):
    lora = get_peft_model(base_model("llama"), lora_config(), "style")
    lora.save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(base_model("llama"), tmp_path / "style", adapter_name="style")
    model = seal_peft.add_beside(lora, SealConfig(), "heads")
    assert all("seal_delta" in key for key, p in model.named_parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == 2


def test_the_task_of_the_model_stays_that_of_lora():
    lora = get_peft_model(base_model("llama"), lora_config(task_type="CAUSAL_LM"), "style")
    model = seal_peft.add_beside(lora, SealConfig(), "heads")
    assert type(model) is type(lora)
    assert model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.isfinite()
