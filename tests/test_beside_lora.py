"""SEAL beside LoRA: one meaning, `y = W diag(s) x + B A x`, whoever came first and whatever is merged."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import seal_peft
from lora_pairs import (
    ORDERS,
    add_lora_to_seal,
    add_seal_to_lora,
    build,
    by_hand,
    draw_lora,
    granularities,
    lora_config,
    lora_layers,
    merged_more_than_once,
    names,
    orders,
    places,
    same,
    second,
)
from models import INPUT_IDS, adapted, base_model, draw_scales, logits, seal_layers
from rope_models import NTK
from seal_peft import SealConfig, scales

pytestmark = merged_more_than_once


# -- one meaning ------------------------------------------------------------------------------------------------------


@orders
@names
@places
@granularities
def test_both_compute_what_the_weights_by_hand_do(order, name, shared, granularity):
    model = build(order, name, shared, granularity)
    same(model, by_hand(model, name))
    assert (logits(model) - logits(by_hand(model, name, ["heads"]))).abs().max() > 0.05
    assert (logits(model) - logits(by_hand(model, name, ["style"]))).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(name)))
    same(model, by_hand(model, name))


@orders
def test_seal_is_the_innermost_layer_and_its_parameters_keep_their_names(order):
    model = build(order)
    shared = [layer for layer in lora_layers(model).values() if len(seal_layers(layer)) == 1]
    assert len(shared) == 2
    for layer in shared:
        assert type(layer).__module__ == "peft.tuners.lora.layer"
        assert type(layer.base_layer) is seal_peft.tuner.layer.Linear
        assert type(layer.base_layer.base_layer) is torch.nn.Linear
    alone = {key for key in adapted("llama").state_dict() if "seal" in key}
    assert {key.replace("heads", "default") for key in model.state_dict() if "seal" in key} == alone
    assert {key.replace("heads", "default") for key, _ in model.named_parameters() if "seal" in key} == alone


@names
@granularities
def test_a_second_adapter_of_seal_goes_into_the_same_layer(name, granularity):
    model = build(add_lora_to_seal, name, granularity=granularity)
    model.add_adapter("more", SealConfig())
    draw_scales(model, "more", seed=9)
    assert len(seal_layers(model)) == 2
    same(model, by_hand(model, name))
    model.set_adapter("more")
    assert model.active_adapters == ["style", "more"]
    expected = by_hand(model, name, ["style"])
    for key, scale in scales(model, "more").items():
        layer, target = lora_layers(model)[key], expected.get_submodule(key)
        delta = layer.get_delta_weight("style")
        vector = scale.unsqueeze(-1).expand(layer.base_layer.geometry).flatten()
        vector = vector.unsqueeze(-1) if isinstance(target, Conv1D) else vector
        target.weight.data = (target.weight.data - delta) * vector + delta
    same(model, expected)


@pytest.mark.parametrize("first", ["lora", "seal"])
def test_three_methods_on_one_module_keep_seal_innermost(first):
    from peft import LoHaConfig

    base = base_model("llama")
    methods = [(lora_config(), "style"), (LoHaConfig(target_modules=["o_proj"], r=2), "third")]
    seal = (SealConfig(), "heads")
    for config, name in [seal, *methods] if first == "seal" else [*methods, seal]:
        base = second(inject_adapter_in_model, config, base, name)
    seal_peft.activate(base, ["heads", "style"])
    draw_lora(base)
    draw_scales(base, "heads")
    assert len(seal_layers(base)) == 2
    assert all(len(layer.outer_layers) == 2 for layer in seal_layers(base).values())
    assert sum("seal_delta" in key for key in base.state_dict()) == 2
    same(base, by_hand(base))


# -- what cannot be told apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names_to_merge", [["style"], ["heads"], None], ids=str)
def test_dora_works_unmerged_and_is_refused_by_name_when_merging(order, names_to_merge):
    # A model that LoRA drives merges layer by layer, so that only SEAL's own can ask all of them first.
    targets = ["o_proj", "q_proj"] if order in (add_seal_to_lora, add_lora_to_seal) else ["o_proj"]
    config = LoraConfig(r=2, target_modules=targets, use_dora=True)
    model = order(base_model("llama"), config, SealConfig()).eval()
    draw_lora(model)
    draw_scales(model, "heads")
    before = logits(model)
    weights = [layer.get_base_layer().weight.clone() for layer in lora_layers(model).values()]
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'style' \(lora.variants.DoraLinearVariant\) and SEAL are on the same"):
            verb(adapter_names=names_to_merge)
        assert torch.equal(logits(model), before)
        for layer, weight in zip(lora_layers(model).values(), weights, strict=True):
            assert torch.equal(layer.get_base_layer().weight, weight)
    assert torch.equal(logits(model.unload()), logits(base_model("llama")))


def test_scales_and_lora_are_not_both_merged_into_quantised_weights():
    model = build()
    model.merge_adapter(adapter_names=["style"])
    layer = next(iter(seal_layers(model).values()))
    layer.quantization_backend = SimpleNamespace(backend_name="4-bit", supports_merge=True)
    with pytest.raises(ValueError, match="'style' is merged into 4-bit weights that SEAL scales, too"):
        layer.merge()


def test_another_method_around_is_refused_by_name_when_merging():
    from peft import IA3Config

    config = IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])
    model = seal_peft.add_beside(get_peft_model(base_model("llama"), SealConfig(), "heads"), config, "style")
    before = logits(model)
    with pytest.raises(ValueError, match=r"'style' \(ia3.layer.Linear\) and SEAL are on the same module"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


def test_lora_on_a_parameter_is_refused():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["self_attn.o_proj.weight"])
    model = get_peft_model(base_model("llama"), config, "style")
    before = logits(model)
    with pytest.raises(ValueError, match="target_parameters.*cannot be combined with SEAL"):
        seal_peft.add_beside(model, SealConfig(), "heads")
    assert not seal_layers(model) and torch.equal(logits(model), before)


def test_wrapping_a_merged_layer_is_refused():
    model = get_peft_model(base_model("llama"), SealConfig(), "heads")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"SEAL \(heads\) is merged .* Unmerge it, add the adapter"):
        seal_peft.add_beside(model, lora_config(), "style")


# -- names ------------------------------------------------------------------------------------------------------------


@places
def test_seal_does_not_take_the_name_of_a_lora(shared):
    model = get_peft_model(base_model("llama"), lora_config(shared=shared))
    draw_lora(model, "default")
    before = logits(model)
    with pytest.raises(ValueError, match="Both SEAL and Lora have an adapter named 'default'"):
        second(inject_adapter_in_model, SealConfig(), model.get_base_model(), "default")
    with pytest.raises(ValueError, match="already"):
        seal_peft.add_beside(model, SealConfig(), "default")
    assert isinstance(model.peft_config["default"], LoraConfig)
    assert torch.equal(logits(model), before)


@places
def test_a_lora_that_took_the_name_of_seal_is_refused_when_used_or_saved(shared, tmp_path):
    base = inject_adapter_in_model(SealConfig(), base_model("llama"), "default")
    model = second(get_peft_model, base, lora_config(shared=shared))
    for use in (logits, lambda model: model.save_pretrained(tmp_path), lambda model: model.merge_and_unload()):
        with pytest.raises(ValueError, match="Both SEAL and Lora have an adapter named 'default'"):
            use(model)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("where", [[3, 9], {"lm_head": [3, 9]}])
def test_tokens_that_a_lora_trains_merge_beside_scales_that_know_nothing_of_them(where):
    config = LoraConfig(target_modules=["v_proj"], trainable_token_indices=where, init_lora_weights=False)
    model = seal_peft.add_beside(get_peft_model(base_model("llama"), config, "style"), SealConfig(), "heads")
    draw_scales(model)
    before = logits(model)
    model.merge_adapter(["style", "heads"])
    assert_close(logits(model), before, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_add_beside_says_what_it_cannot_add():
    model = get_peft_model(base_model("llama"), SealConfig(), "heads")
    with pytest.raises(ValueError, match="add_adapter"):
        seal_peft.add_beside(model, SealConfig(), "more")
    with pytest.raises(ValueError, match="Add SEAL first"):
        seal_peft.add_beside(get_peft_model(base_model("llama"), lora_config(), "style"), _ia3(), "third")
    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(base_model("llama"), soft, "soft")
    with pytest.raises(ValueError, match="The model is made for PROMPT_TUNING"):
        seal_peft.add_beside(prompted, SealConfig(), "heads")
    assert prompted.active_adapters == ["soft"]


@pytest.mark.parametrize(
    ("first", "wrong", "right"),
    [
        (lora_config(), SealConfig(rope_parameters={"factor": 0.5}), SealConfig(rope_parameters=NTK)),
        (lora_config(), SealConfig(target_modules=["no"]), SealConfig()),
        (SealConfig(), LoraConfig(target_modules=["no"]), lora_config()),
        (SealConfig(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), lora_config()),
        # It is on q_proj already when o_proj refuses it.
        (SealConfig(), LoraConfig(target_modules=["q_proj"], target_parameters=["o_proj.weight"]), lora_config()),
    ],
    ids=["extension", "seal", "lora", "prompt", "half of a lora"],
)
def test_an_adapter_that_cannot_be_added_is_not_there_and_its_name_is_free(first, wrong, right, tmp_path):
    model = get_peft_model(base_model("llama"), first, "old")
    before = logits(model)
    with pytest.raises(ValueError):
        seal_peft.add_beside(model, wrong, "new")
    assert list(model.peft_config) == model.active_adapters == ["old"]
    assert torch.equal(logits(model), before)
    assert not any(".new." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="new"):
        model.set_adapter("new")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.rglob("adapter_config.json")] == ["adapter_config.json"]
    assert sorted(seal_peft.add_beside(model, right, "new").active_adapters) == ["new", "old"]


def test_one_name_where_a_list_is_wanted_is_said():
    with pytest.raises(TypeError, match=r"use a list of names: \['default'\]"):
        seal_peft.activate(adapted("llama"), "default")


def _ia3():
    from peft import IA3Config

    return IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])


# -- copying, pickling, compiling -------------------------------------------------------------------------------------


@orders
@places
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(order, shared, copied):
    model = build(order, shared=shared)
    before, expected = logits(model), by_hand(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    twin.merge_adapter(adapter_names=["style"])
    same(twin, expected)
    same(twin.merge_and_unload(), expected)
    assert torch.equal(logits(model), before)
    twin = copied(model)
    draw_scales(twin, "heads", seed=8)
    assert torch.equal(logits(model), before)
    same(twin, by_hand(twin))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("shared", "merged"), [(True, []), (True, ["style"]), (True, ["heads"]), (False, [])], ids=str
)
def test_a_compiled_model_is_one_graph(shared, merged):
    torch.compiler.reset()
    model = build(shared=shared)
    if merged:
        model.merge_adapter(adapter_names=merged)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
    model.train()
    compiled(input_ids=INPUT_IDS).logits.square().mean().backward()


@pytest.mark.parametrize("order", [add_seal_to_lora, add_lora_to_seal])
@places
def test_rows_have_adapters_of_their_own_only_while_no_lora_acts_on_all_of_them(order, shared):
    model = build(order, shared=shared)
    with pytest.raises(ValueError, match=r"act on every row: \['style'\].*activate"):
        model(input_ids=INPUT_IDS, adapter_names=["heads", "__base__"])
    seal_peft.activate(model, [])
    with torch.no_grad():
        rows = model(input_ids=INPUT_IDS, adapter_names=["heads", "__base__"]).logits
    assert_close(rows[0], logits(by_hand(model, active=["heads"]))[0], rtol=0, atol=2e-5)
    assert_close(rows[1], logits(base_model("llama"))[1], rtol=0, atol=2e-5)
