"""RoPE in and out of force: it comes and goes with the adapter, and two that differ never act at once."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import models
import seal_peft
from models import draw_scales
from rope_models import (
    HERE,
    LONG,
    NTK,
    TYPES,
    YARN,
    adapted,
    alone,
    extended,
    gemma3,
    llama,
    logits,
    phi3,
    phi3_longrope,
    switching,
)
from seal_peft import SealConfig, activate, add_beside
from seal_peft.context.rope import read_rope
from seal_peft.loading import load_adapter


def test_disabling_gives_the_base_back_bit_for_bit():
    model, plain = extended(), logits(llama())
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert read_rope(model) == read_rope(llama())
    assert torch.equal(logits(model), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), plain)


def test_a_dynamic_type_that_was_switched_off_begins_anew():
    model, shorter = extended(TYPES["dynamic"]), LONG[:, :40]
    fresh = logits(model, shorter)
    logits(model)  # in younger transformers the frequencies of the longest text stay
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, shorter), fresh)


def test_unloading_and_deleting_give_the_base_back_bit_for_bit():
    plain = logits(llama())
    model = extended()
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert read_rope(unloaded) == read_rope(llama())
    assert "_position_switch" not in vars(unloaded)
    again = get_peft_model(unloaded, SealConfig())
    assert torch.equal(logits(again), plain)
    model = extended()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), plain)


EVERY = {
    **{kind: (llama, TYPES[kind]) for kind in HERE},
    "ntk": (llama, NTK),
    "each layer type": (gemma3, {"full_attention": YARN, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
    "part of the channels": (phi3, phi3_longrope(4.0)),
}
BARE = ("ntk", "longrope", "each layer type", "part of the channels")


@pytest.mark.parametrize(("name", "scales"), [*((name, True) for name in EVERY), *((name, False) for name in BARE)])
def test_every_type_is_loaded_and_undone_bit_for_bit_and_merged(name, scales, tmp_path):
    build, request_ = EVERY[name]
    plain = logits(build())
    model = get_peft_model(build(), SealConfig(sites=("output",) if scales else (), rope_parameters=request_))
    if scales:
        draw_scales(model)
    expected, rope = logits(model.eval()), read_rope(model)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert read_rope(loaded) == rope
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded.base_model.model), plain)
    base = build()
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base), expected)
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    base.delete_adapter("default")
    assert torch.equal(logits(base), plain)
    merged = PeftModel.from_pretrained(build(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read_rope(again) == rope
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert unloaded.config.to_dict() == build().config.to_dict()


def test_switching_adapters_switches_the_rope():
    model = switching()
    for name, request in {"yarn": YARN, "plain": None, "ntk": NTK, "yarn too": YARN}.items():
        expected = alone(model, name, request)
        for _ in range(2):
            model.set_adapter(name)
            assert torch.equal(logits(model), expected), name
            with model.disable_adapter():
                assert torch.equal(logits(model), logits(llama()))
    model.delete_adapter("yarn")
    assert torch.equal(logits(model), alone(model, "yarn too", YARN))
    assert model.peft_config["plain"].base_rope == read_rope(llama())


def test_two_with_the_same_rope_act_together_and_two_with_different_ones_are_refused():
    model = switching()
    model.base_model.set_adapter(["yarn", "yarn too"])
    both = logits(model)
    for names in (["yarn", "ntk"], ["ntk", "plain"]):
        with pytest.raises(ValueError, match="one RoPE at a time"):
            model.base_model.set_adapter(names)
        with pytest.raises(ValueError, match="one RoPE at a time"):
            seal_peft.activate(model, names)
        with pytest.raises(ValueError, match="one RoPE at a time"):
            model.add_weighted_adapter(names, [0.5, 0.5], "sum")
    assert model.base_model.active_adapters == ["yarn", "yarn too"]
    assert torch.equal(logits(model), both)
    with pytest.raises(ValueError, match="one RoPE at a time"):
        model.merge_adapter(["ntk"])
    assert torch.equal(logits(model), both)


def test_layers_that_disagree_do_not_run():
    model = switching()
    list(models.seal_layers(model).values())[-1].set_adapter("plain")
    with pytest.raises(RuntimeError, match="Layers of this model use adapters with different RoPE"):
        logits(model)
    model.set_adapter("ntk")
    assert torch.equal(logits(model), alone(model, "ntk", NTK))


def test_an_adapter_is_the_same_before_and_after_others_in_a_model_that_is_cast():
    model = switching()
    model.set_adapter("yarn")
    expected = logits(model.to(torch.bfloat16))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama().to(torch.bfloat16)))
    assert torch.equal(logits(model), expected)
    model.set_adapter("ntk")
    model.set_adapter("yarn")
    assert torch.equal(logits(model), expected)


def test_a_dynamic_model_that_read_a_long_text_and_then_a_short_one_switches():
    def dynamic():
        return llama(rope_parameters={**TYPES["dynamic"], "rope_theta": 10000.0})

    model, base = extended(YARN, dynamic), dynamic()
    expected = logits(model)
    with model.disable_adapter():
        for ids in (LONG, LONG[:, :8]):
            assert torch.equal(logits(model, ids), logits(base, ids))
    assert torch.equal(logits(model), expected)
    other = extended(TYPES["dynamic"])
    for ids in (LONG, LONG[:, :8]):
        logits(other, ids)
    other.add_adapter("ntk", SealConfig(rope_parameters=NTK))
    other.set_adapter("ntk")
    assert torch.equal(logits(other), alone(other, "ntk", NTK))


def test_a_switch_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = switching()
    model.add_adapter("linear", SealConfig(rope_parameters=TYPES["linear"]))
    model.set_adapter("yarn")
    expected, rope = logits(model), read_rope(model)
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "linear")
    with pytest.raises(ValueError, match="'linear' is not known"):
        model.base_model.set_adapter("linear")
    assert read_rope(model) == rope
    assert torch.equal(logits(model), expected)
    monkeypatch.undo()
    model.set_adapter("linear")
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "linear")
    with pytest.raises(ValueError, match="'linear' is not known"):
        with model.disable_adapter():
            pass
    assert torch.equal(logits(model), logits(llama()))


def test_a_switch_that_is_refused_changes_no_module_that_peft_switches_before_the_layers(monkeypatch):
    model = get_peft_model(llama(), SealConfig(init_weights=False, modules_to_save=["lm_head"]), "plain").eval()
    other = SealConfig(init_weights=False, modules_to_save=["lm_head"], rope_parameters=TYPES["linear"])
    model.add_adapter("linear", other)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["linear"].weight.mul_(2)
    expected = logits(model)
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "linear")
    with pytest.raises(ValueError, match="'linear' is not known"):
        model.set_adapter("linear")
    assert torch.equal(logits(model), expected)


def test_a_choice_that_is_refused_leaves_lora_as_it_was():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "style")
    model = add_beside(model, SealConfig(rope_parameters=YARN), "yarn")
    model.add_adapter("ntk", SealConfig(rope_parameters=NTK))
    activate(model, ["style", "yarn"])
    expected = logits(model)
    for names in (["yarn", "ntk"], ["ntk", "style", "yarn"]):
        with pytest.raises(ValueError, match="one RoPE at a time"):
            activate(model, names)
    with pytest.raises(ValueError, match="one RoPE at a time"):
        model.base_model.set_adapter(["yarn", "ntk"])
    assert torch.equal(logits(model), expected)


def test_a_batch_has_one_rope():
    model = switching()
    rows = LONG.repeat(2, 1)
    model.set_adapter("plain")
    plain = logits(model)
    mixed = model(input_ids=rows, adapter_names=["yarn", "yarn too"]).logits.detach()
    for row, name in enumerate(["yarn", "yarn too"]):
        torch.testing.assert_close(mixed[row : row + 1], alone(model, name, YARN), atol=1e-4, rtol=1e-4)
    for names in (["yarn", "ntk"], ["yarn", "__base__"], ["plain", "ntk"]):
        with pytest.raises(ValueError, match="one RoPE at a time"):
            model(input_ids=rows, adapter_names=names)
    model(input_ids=rows, adapter_names=["plain", "__base__"])
    assert torch.equal(logits(model), plain)
    generated = model.generate(input_ids=LONG, adapter_names=["yarn"], max_new_tokens=4, do_sample=False)
    model.set_adapter("yarn")
    assert torch.equal(generated, model.generate(input_ids=LONG, max_new_tokens=4, do_sample=False))


def test_a_weighted_sum_keeps_the_rope_of_its_parts():
    model = switching()
    model.add_weighted_adapter(["yarn", "yarn too"], [1.0, 0.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), alone(model, "yarn", YARN))


def test_hotswap_and_ia3_refuse_what_they_would_lose(tmp_path):
    extended().save_pretrained(tmp_path / "yarn")
    with pytest.raises(ValueError, match="asks for RoPE"):
        seal_peft.hotswap_adapter(adapted(llama()), tmp_path / "yarn")
    seal_peft.hotswap_adapter(extended(), tmp_path / "yarn")
    for source in (extended(), tmp_path / "yarn"):
        with pytest.raises(ValueError, match="an IA3 folder cannot carry"):
            seal_peft.export_ia3(source, tmp_path / "ia3")


def test_copies_and_pickles_switch_on_their_own():
    model = switching()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_adapter("plain")
        assert torch.equal(logits(other), alone(other, "plain", None))
        assert torch.equal(logits(model), expected)


def test_it_trains_under_its_rope_with_checkpointing():
    model = extended()
    model.train()
    ids = LONG
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    wanted = [layer.offset("default").grad.clone() for layer in models.seal_layers(model).values()]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for grad, layer in zip(wanted, models.seal_layers(model).values(), strict=True):
        torch.testing.assert_close(layer.offset("default").grad, grad)


def test_beside_lora_the_rope_is_that_of_seal():
    model = extended()
    expected = logits(model)
    model = seal_peft.add_beside(model, LoraConfig(target_modules=["q_proj", "o_proj"]), "style")
    assert torch.equal(logits(model), expected)
    seal_peft.activate(model, ["style"])
    assert torch.equal(logits(model), logits(llama()))
    seal_peft.activate(model, ["style", "default"])
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("first", ["yarn", "ntk", "plain"])
def test_adapters_of_several_ropes_load_again_and_those_of_the_first_are_active(first, tmp_path, caplog):
    model = seal_peft.add_beside(switching(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "style")
    model.save_pretrained(tmp_path)
    folders = {name: tmp_path / name for name in sorted(model.peft_config, key=lambda name: name != first)}
    loaded = seal_peft.load_adapters(llama(), folders)
    together = [first, "yarn too"] if first == "yarn" else [first]
    apart = [name for name in folders if name not in [*together, "style"]]
    assert sorted(loaded.active_adapters) == sorted([*together, "style"])
    assert f"Adapters {', '.join(apart)} are loaded but not active" in caplog.messages[0]
    assert ("Adapters yarn, yarn too are all active, so their scales" in caplog.text) == (first == "yarn")
    for name in ("yarn", "ntk", "plain"):
        for each in (model, loaded):
            seal_peft.activate(each, [name, "style"])
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="one RoPE at a time"):
        load_adapter(llama(), str(tmp_path / "yarn"), str(tmp_path / "ntk"))
