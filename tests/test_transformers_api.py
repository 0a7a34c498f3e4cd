"""SEAL through transformers' own adapter API and Trainer, without and with PEFT's wrapper."""

import copy
import json
import math
import shutil

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from models import INPUT_IDS, adapted, base_model, draw_scales, llama, logits, seal_layers
from seal_peft import SealConfig, SealLayer, scales

WEIGHTS = "adapter_model.safetensors"
both_granularities = pytest.mark.parametrize("granularity", ["head", "channel"])
both_models = pytest.mark.parametrize("name", ["llama", "gemma3_text"])

# transformers injects one adapter after the other through PEFT's low-level call, which warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")


def offsets(model, adapter_name="default"):
    return [layer.seal_delta[adapter_name].weight for layer in seal_layers(model).values()]


def saved(folder, name="llama", granularity="head", seed=1, dtype=torch.float32):
    """Save an adapter by way of PEFT; return its logits."""
    model = get_peft_model(base_model(name).to(dtype), SealConfig(granularity=granularity))
    draw_scales(model, seed=seed)
    model.save_pretrained(folder)
    return logits(model)


# -- the verbs --------------------------------------------------------------------------------------------------------


@both_models
@both_granularities
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_gives_the_logits_of_the_peft_model(name, granularity, dtype, tmp_path):
    expected = saved(tmp_path, name, granularity, dtype=dtype)
    model = base_model(name).to(dtype)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(base_model(name).to(dtype)))
    assert all(offset.dtype == torch.float32 and not offset.requires_grad for offset in offsets(model))


@both_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_of_an_adapter_loads_as_a_model(name, dtype, tmp_path):
    base_model(name).to(dtype).save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = get_peft_model(base, SealConfig(granularity="channel", task_type="CAUSAL_LM"))
    draw_scales(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype)
    assert type(loaded) is type(base)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert all(offset.dtype == torch.float32 for offset in offsets(loaded))


@both_models
@both_granularities
def test_an_added_adapter_starts_at_the_identity_and_is_saved_for_everyone(name, granularity, tmp_path):
    model = base_model(name)
    model.add_adapter(SealConfig(granularity=granularity))
    assert torch.equal(logits(model), logits(base_model(name)))
    assert [key for key, p in model.named_parameters() if p.requires_grad and "seal_delta" not in key] == []
    draw_scales(model)
    assert torch.equal(logits(model), logits(adapted(name, granularity)))
    state = model.get_adapter_state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        f"{key}.seal_delta.weight": tuple(value.shape) for key, value in scales(model).items()
    }
    model.save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(base_model(name), tmp_path)
    by_transformers = base_model(name)
    by_transformers.load_adapter(tmp_path)
    assert torch.equal(logits(by_peft), logits(model))
    assert torch.equal(logits(by_transformers), logits(model))
    assert all(torch.equal(value, scales(tmp_path)[key]) for key, value in scales(model).items())


@both_models
def test_several_adapters_are_switched_multiplied_disabled_and_deleted(name, tmp_path):
    first = saved(tmp_path / "first", name, "head", seed=1)
    second = saved(tmp_path / "second", name, "channel", seed=2)
    model = base_model(name)
    model.load_adapter(tmp_path / "first", "first")
    model.load_adapter(tmp_path / "second", "second")
    for adapter_name, expected in (("first", first), ("second", second)):
        model.set_adapter(adapter_name)
        assert model.active_adapters() == [adapter_name]
        assert torch.equal(logits(model), expected)
        for key, value in load_file(tmp_path / adapter_name / WEIGHTS).items():
            assert torch.equal(
                model.get_adapter_state_dict(adapter_name)[key.removeprefix("base_model.model.")], value
            )
    model.set_adapter(["first", "second"])
    product = adapted(name, "channel")
    for key, layer in seal_layers(product).items():
        total = scales(model, "first")[key].unsqueeze(-1) * scales(model, "second")[key]
        layer.seal_delta["default"].weight.data = total - 1
    assert_close(logits(model), logits(product), rtol=0, atol=1e-5)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(base_model(name)))
    model.enable_adapters()
    assert_close(logits(model), logits(product), rtol=0, atol=1e-5)
    model.set_adapter("second")
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(base_model(name)))
    model.load_adapter(tmp_path / "first", "first")
    assert torch.equal(logits(model), first)


def test_unknown_and_taken_names_are_refused(tmp_path):
    expected = saved(tmp_path)
    model = base_model("llama")
    model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="default already exists"):
        model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="default already exists"):
        model.add_adapter(SealConfig())
    with pytest.raises(ValueError, match="typo"):
        model.set_adapter("typo")
    with pytest.raises(ValueError, match="typo"):
        model.delete_adapter("typo")
    assert torch.equal(logits(model), expected)


def test_names_of_rows_are_refused_without_pefts_wrapper(tmp_path):
    expected = saved(tmp_path)
    model = base_model("llama")
    model.load_adapter(tmp_path)
    model.load_adapter(tmp_path, "other")
    for same in (model, copy.deepcopy(model), get_peft_model(base_model("llama"), SealConfig()).get_base_model()):
        with pytest.raises(ValueError, match="needs PEFT's wrapper"):
            same(input_ids=INPUT_IDS, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="not used by the model: .'adapter_names'"):  # transformers' own
        model.generate(input_ids=INPUT_IDS, adapter_names=["default", "other"], max_new_tokens=2)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    plain = adapted("llama").unload()
    with torch.no_grad():  # as models without adapters do
        assert torch.equal(plain(INPUT_IDS, adapter_names=["default"]).logits, logits(base_model("llama")))


def test_a_loaded_adapter_can_be_trainable_and_then_moves(tmp_path):
    saved(tmp_path)
    model = base_model("llama").to(torch.bfloat16)
    model.load_adapter(tmp_path, is_trainable=True)
    assert all(offset.requires_grad and offset.dtype == torch.float32 for offset in offsets(model))
    before = [offset.detach().clone() for offset in offsets(model)]
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    torch.optim.SGD(offsets(model), lr=0.1).step()
    assert all((offset != old).any() for offset, old in zip(offsets(model), before, strict=True))


def test_a_state_dict_with_a_config_loads_without_files():
    source = adapted("llama", "channel")
    state = {key.replace(".default", ""): value for key, value in source.state_dict().items() if "seal_delta" in key}
    model = base_model("llama")
    model.load_adapter(adapter_state_dict=state, peft_config=SealConfig(granularity="channel"))
    assert torch.equal(logits(model), logits(source))


# -- broken adapters --------------------------------------------------------------------------------------------------


def assert_usable_after(model, good):
    """A refused adapter changed no logits, and its name is free once it is deleted."""
    assert torch.equal(logits(model), logits(base_model("llama")))
    if getattr(model, "peft_config", None):
        model.delete_adapter("default")
    good_logits = logits(adapted("llama"))
    model.load_adapter(good)
    assert torch.equal(logits(model), good_logits)


@pytest.fixture
def folders(tmp_path):
    """The folder of a good adapter and a copy to break."""
    saved(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    return tmp_path / "good", tmp_path / "bad"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("every", [True, False])
def test_scales_that_are_not_finite_are_refused(value, every, folders):
    good, bad = folders
    tensors = load_file(bad / WEIGHTS)
    for tensor in tensors.values() if every else list(tensors.values())[:1]:
        tensor[2] = value
    save_file(tensors, bad / WEIGHTS, {"format": "pt"})
    model = base_model("llama")
    with pytest.raises(ValueError, match="NaN or infinite scales.*do not use it"):
        model.load_adapter(bad)
    model.delete_adapter("default")
    assert_usable_after(model, good)


def test_scales_of_another_base_are_refused_before_anything_is_wrapped(folders):
    model = llama(num_attention_heads=8)
    with pytest.raises(ValueError, match=r"trained on .*\(4, 12\), but the base model has .*\(8, 12\)"):
        model.load_adapter(folders[0])
    assert not seal_layers(model)


def test_a_file_of_another_granularity_is_refused(folders):
    good, bad = folders
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "granularity": "channel"}))
    model = base_model("llama")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model.load_adapter(bad)
    assert_usable_after(model, good)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), SafetensorError, "file not fully covered"),
        (lambda file: file.unlink(), OSError, WEIGHTS),
    ],
    ids=["truncated", "missing"],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_loaders_own_error(damage, error, message, folders):
    good, bad = folders
    damage(bad / WEIGHTS)
    model = base_model("llama")
    with pytest.raises(error, match=message):
        model.load_adapter(bad)
    assert_usable_after(model, good)


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(file.read_bytes()[:-10]), lambda file: file.unlink()]
)
def test_reading_the_config_with_seal_first_checks_the_files_before_the_model_is_touched(damage, folders):
    good, bad = folders
    model = base_model("llama")
    model.load_adapter(good, peft_config=SealConfig.from_pretrained(good))
    assert torch.equal(logits(model), logits(adapted("llama")))
    damage(bad / WEIGHTS)
    model = base_model("llama")
    with pytest.raises(ValueError, match="Save the adapter again, or download it again"):
        model.load_adapter(bad, peft_config=SealConfig.from_pretrained(bad))
    assert not any(isinstance(module, SealLayer) for module in model.modules())


# -- the Trainer ------------------------------------------------------------------------------------------------------


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
        learning_rate=0.05,
        save_steps=2,
        max_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **kwargs,
    )
    return tf.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def by_peft(name, granularity):
    return get_peft_model(base_model(name), SealConfig(granularity=granularity))


def by_transformers(name, granularity):
    model = base_model(name)
    model.add_adapter(SealConfig(granularity=granularity))
    return model


# transformers' Trainer resumes and loads the best checkpoint of a `PeftModel` only, whatever the method.


@both_models
@both_granularities
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(name, granularity, tmp_path):
    whole = trainer(by_peft(name, granularity), tmp_path / "whole")
    whole.train()
    resumed = trainer(by_peft(name, granularity), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    halfway = scales(tmp_path / "whole" / "checkpoint-4")
    for key, scale in scales(whole.model).items():
        assert not torch.equal(scale, halfway[key])
        assert_close(scales(resumed.model)[key], scale, rtol=0, atol=1e-7)


@both_models
@pytest.mark.parametrize("prepare", [by_peft, by_transformers])
def test_the_trainer_moves_the_scales_alone_and_its_checkpoint_loads(prepare, name, tmp_path):
    run = trainer(prepare(name, "channel"), tmp_path)
    base_before = {key: value.clone() for key, value in run.model.state_dict().items() if "seal_" not in key}
    run.train()
    assert all((scale != 1).any() for scale in scales(run.model).values())
    assert all(torch.equal(run.model.state_dict()[key], value) for key, value in base_before.items())
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path / "checkpoint-6")
    assert_close(logits(loaded), logits(run.model.eval()), rtol=0, atol=1e-6)


class _LossByStep(tf.TrainerCallback):
    """Makes the second evaluation the best one, whatever the model does."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - 4)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    run = trainer(
        by_peft("llama", "head"),
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    run.add_callback(_LossByStep())
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = scales(tmp_path / "checkpoint-4"), scales(tmp_path / "checkpoint-6")
    for key, scale in scales(run.model).items():
        assert torch.equal(scale, best[key])
        assert not torch.equal(scale, last[key])


@pytest.mark.parametrize("prepare", [by_peft, by_transformers])
def test_the_trainer_saves_an_adapter_folder(prepare, tmp_path):
    run = trainer(prepare("llama", "head"), tmp_path)
    draw_scales(run.model)
    run.save_model(str(tmp_path / "adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {WEIGHTS, "adapter_config.json"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(run.model.eval()))
