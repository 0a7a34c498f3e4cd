"""SEAL beside LoRA, switched: any subset is active, and any order of verbs gives what the weights by hand do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

import seal_peft
from lora_pairs import (
    add_lora_to_seal,
    add_seal_to_lora,
    build,
    by_hand,
    lora_layers,
    merged_more_than_once,
    places,
    same,
    wrap_lora_then_inject_seal,
)
from models import base_model, logits, seal_layers
from seal_peft import SealConfig

pytestmark = merged_more_than_once


@pytest.mark.parametrize("order", [add_seal_to_lora, add_lora_to_seal])
@places
def test_any_subset_can_be_made_active(order, shared):
    model = build(order, shared=shared)
    for active in (["heads"], ["style"], [], ["style", "heads"]):
        seal_peft.activate(model, active)
        same(model, by_hand(model, active=active))
        assert sorted(model.active_adapters) == sorted(active)
    with pytest.raises(ValueError, match="no adapters named other. It has .*heads"):
        seal_peft.activate(model, ["heads", "other"])


@pytest.mark.parametrize("order", [add_seal_to_lora, add_lora_to_seal])
@pytest.mark.parametrize("chosen", ["heads", "style"])
def test_setting_an_adapter_leaves_the_other_method_alone(order, chosen):
    model = build(order)
    model.set_adapter(chosen)
    same(model, by_hand(model))
    assert sorted(model.active_adapters) == ["heads", "style"]
    assert model.get_model_status().enabled is True


@pytest.mark.parametrize("order", [add_seal_to_lora, add_lora_to_seal])
@pytest.mark.parametrize("deleted", ["heads", "style"])
@places
def test_deleting_one_adapter_leaves_the_other(order, deleted, shared):
    model = build(order, shared=shared)
    kept = {"heads": "style", "style": "heads"}[deleted]
    expected = by_hand(model, active=[kept])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter(deleted)
    model.unmerge_adapter()
    model.delete_adapter(deleted)
    same(model, expected)
    assert list(model.peft_config) == [kept] == model.active_adapters
    assert not any(f".{deleted}." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter(deleted)
    same(model.merge_and_unload(), expected)


def test_deleting_through_lora_alone_is_refused_when_seal_is_used():
    model = build(wrap_lora_then_inject_seal)
    model.delete_adapter("heads")
    with pytest.raises(ValueError, match="'heads' was deleted through the model of another method"):
        logits(model)


def test_a_frozen_copy_of_a_module_stays_frozen(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base_model("llama"), lora, "style").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path / "style", adapter_name="style")
    model = seal_peft.add_beside(model, SealConfig(), "heads")
    assert all("seal_delta" in key for key, p in model.named_parameters() if p.requires_grad)


def test_modules_to_save_of_both_stay_active():
    base = base_model("llama")
    model = get_peft_model(base, SealConfig(modules_to_save=["lm_head"]), "heads")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["heads"].weight.mul_(1.5)
    alone = logits(model)
    model = seal_peft.add_beside(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), "style")
    assert torch.equal(logits(model), alone)
    model.set_adapter("style")
    assert torch.equal(logits(model), alone)


class TestVerbs:
    """Random orders of verbs keep the logits at what the weights by hand give."""

    VERBS = ["merge style", "merge heads", "merge both", "unmerge", "unmerge style", "unmerge heads", "disable",
             "enable", "set heads", "set style", "only heads", "only style", "both", "save and reload"]  # fmt: skip

    @given(
        st.sampled_from([add_seal_to_lora, add_lora_to_seal]),
        st.sampled_from(["llama", "gpt2"]),
        st.booleans(),
        st.sampled_from(["head", "channel"]),
        st.lists(st.sampled_from(VERBS), max_size=10),
    )
    def test_verbs(self, tmp_path_factory, order, name, shared, granularity, verbs):
        model = build(order, name, shared, granularity)
        plain = {active: by_hand(model, name, active) for active in [(), ("heads",), ("style",), ("heads", "style")]}
        active, merged, enabled = {"heads", "style"}, set(), True
        for verb in verbs:
            model, active, merged, enabled = self.apply(verb, model, active, merged, enabled, name, tmp_path_factory)
            # PEFT: a layer with merged adapters ignores its active ones; a method's layers merge as one here.
            same(model, plain[tuple(sorted(active | merged)) if enabled else ()], 5e-5)
            if not enabled:
                merged = set()  # a disabled layer unmerges when it is used

    def apply(self, verb, model, active, merged, enabled, name, tmp_path_factory):
        word, _, which = verb.partition(" ")
        both = {"heads", "style"}
        if word == "merge":
            names_to_merge = both if which == "both" else {which}
            model.merge_adapter(adapter_names=sorted(names_to_merge))
            merged = merged | names_to_merge
        elif verb == "unmerge":
            model.unmerge_adapter()
            merged = set()
        elif word == "unmerge":
            for layer in (seal_layers if which == "heads" else lora_layers)(model).values():
                layer.unmerge()
            merged = merged - {which}
        elif verb in ("disable", "enable"):
            enabled = verb == "enable"
            getattr(model.base_model, f"{verb}_adapter_layers")()
        elif word == "set":
            model.set_adapter(which)
            active, merged = active | {which}, merged - {which}
        elif word in ("only", "both"):
            active, merged = {which} if which else both, set()
            seal_peft.activate(model, active)
        else:
            folder = tmp_path_factory.mktemp("pair")
            model.save_pretrained(folder)
            model = seal_peft.load_adapters(base_model(name), folder)
            active, merged, enabled = both, set(), True
        return model, active, merged, enabled
