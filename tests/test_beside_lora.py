"""SEAL beside LoRA: one meaning, `y = W diag(s) x + B A x`, whoever came first and whatever is merged."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import seal_peft
from models import INPUT_IDS, adapted, base_model, draw_scales, logits, multiply_by_hand, seal_layers
from seal_peft import SealConfig, scales

# LoRA on the projection that SEAL scales, and on others.
SHARED = {"llama": ["o_proj", "q_proj"], "gpt2": ["attn.c_proj", "c_attn"]}
OTHER = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}

pytestmark = [
    # PEFT says on each further merge what is merged already, and on each unmerge that some layers have nothing to.
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged. Nothing to do:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning"),
]


def lora_config(name="llama", shared=True, **kwargs):
    targets = (SHARED if shared else OTHER)[name]
    return LoraConfig(r=3, lora_alpha=7, target_modules=targets, fan_in_fan_out=name == "gpt2", **kwargs)


def lora_layers(model):
    return {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for key, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def draw_lora(model, adapter_name="style", seed=3):
    """Give LoRA products about as large as the weights, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for part in (layer.lora_A, layer.lora_B):
                weight = part[adapter_name].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)


def second(function, *args):
    """Call what PEFT warns about: a second method on one model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        return function(*args)


def add_seal_to_lora(base, lora, seal):
    return seal_peft.add_beside(get_peft_model(base, lora, "style"), seal, "heads")


def add_lora_to_seal(base, lora, seal):
    return seal_peft.add_beside(get_peft_model(base, seal, "heads"), lora, "style")


def inject_seal_then_wrap_lora(base, lora, seal):
    return second(get_peft_model, inject_adapter_in_model(seal, base, "heads"), lora, "style")


def wrap_lora_then_inject_seal(base, lora, seal):
    model = get_peft_model(base, lora, "style")
    second(inject_adapter_in_model, seal, model.get_base_model(), "heads")
    return model


ORDERS = [add_seal_to_lora, add_lora_to_seal, inject_seal_then_wrap_lora, wrap_lora_then_inject_seal]


def build(order=add_seal_to_lora, name="llama", shared=True, granularity="head", base=None, **kwargs):
    """Return a model with LoRA "style" and SEAL "heads", both far from the identity."""
    base = base or base_model(name)
    model = order(base, lora_config(name, shared, **kwargs), SealConfig(granularity=granularity)).eval()
    draw_lora(model)
    draw_scales(model, "heads")
    return model


def by_hand(model, name="llama", active=("heads", "style")):
    """Write what the model must compute into the weights of a plain one: columns first, then the product added."""
    base = base_model(name)
    if "heads" in active:
        multiply_by_hand(base, scales(model, "heads"))
    if "style" in active:
        with torch.no_grad():
            for key, layer in lora_layers(model).items():
                target = base.get_submodule(key)
                a, b = layer.lora_A["style"].weight, layer.lora_B["style"].weight
                for out in range(b.shape[0]):
                    row = sum(b[out, rank] * a[rank] for rank in range(3)) * (7 / 3)
                    part = target.weight[:, out] if isinstance(target, Conv1D) else target.weight[out]
                    part.add_(row)
    return base


def same(model, plain, tolerance=2e-5):
    assert_close(logits(model), logits(plain), rtol=0, atol=tolerance)


orders = pytest.mark.parametrize("order", ORDERS)
names = pytest.mark.parametrize("name", ["llama", "gpt2"])
places = pytest.mark.parametrize("shared", [True, False], ids=["same-module", "other-modules"])
granularities = pytest.mark.parametrize("granularity", ["head", "channel"])


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


# -- merging ----------------------------------------------------------------------------------------------------------


@orders
@names
@places
@pytest.mark.parametrize(
    "steps",
    [
        [["style"]],
        [["heads"]],
        [["style", "heads"]],
        [["style"], ["heads"]],
        [["heads"], ["style"]],
        [None],
    ],
    ids=str,
)
def test_any_part_may_be_merged_in_any_order(order, name, shared, steps):
    model = build(order, name, shared, "channel" if steps else "head")
    expected = by_hand(model, name)
    before = logits(model)
    for names_to_merge in steps:
        model.merge_adapter(adapter_names=names_to_merge)
        same(model, expected)
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        same(twin, base_model(name))
    same(twin, expected)
    model.unmerge_adapter()
    assert_close(logits(model), before, rtol=0, atol=2e-5)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


@names
@pytest.mark.parametrize("first_in", ["seal", "lora"])
@pytest.mark.parametrize("first_out", ["seal", "lora"])
def test_layers_merge_and_unmerge_one_by_one_in_any_order(name, first_in, first_out):
    model = build(name=name)
    original = {key: layer.get_base_layer().weight.clone() for key, layer in seal_layers(model).items()}
    expected = by_hand(model, name)
    methods = {"seal": seal_layers(model), "lora": lora_layers(model)}
    for first, verb in ((first_in, "merge"), (first_out, "unmerge")):
        for method in (first, {"seal": "lora", "lora": "seal"}[first]):
            for layer in methods[method].values():
                getattr(layer, verb)()
            same(model, expected)
    for key, layer in seal_layers(model).items():
        assert_close(layer.get_base_layer().weight, original[key], rtol=0, atol=1e-6)


def test_without_merging_lora_the_original_comes_back_bit_for_bit():
    model = build()
    original = [layer.get_base_layer().weight.clone() for layer in seal_layers(model).values()]
    model.merge_adapter(adapter_names=["heads"])
    model.unmerge_adapter()
    for layer, weight in zip(seal_layers(model).values(), original, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_merging_seal_over_a_merged_lora_gives_the_merged_weight_back_bit_for_bit():
    model = build(base=base_model("llama").bfloat16())
    model.merge_adapter(adapter_names=["style"])
    merged = [layer.get_base_layer().weight.clone() for layer in seal_layers(model).values()]
    for layer in seal_layers(model).values():
        layer.merge()
        layer.unmerge()
    for layer, weight in zip(seal_layers(model).values(), merged, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


@orders
@names
@places
@pytest.mark.parametrize("merged_before", [[], ["style"], ["heads"], ["heads", "style"]], ids=str)
def test_merge_and_unload_keeps_both_without_a_forward_pass_before(order, name, shared, merged_before):
    model = build(order, name, shared)
    expected = by_hand(model, name)
    if merged_before:
        model.merge_adapter(adapter_names=merged_before)
    plain = model.merge_and_unload(safe_merge=name == "gpt2")
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert plain.state_dict().keys() == base_model(name).state_dict().keys()
    same(plain, expected)


@orders
@places
@pytest.mark.parametrize("kept", ["heads", "style"])
def test_merge_and_unload_of_one_adapter_leaves_the_other_out(order, shared, kept):
    model = build(order, shared=shared)
    expected = by_hand(model, active=[kept])
    same(model.merge_and_unload(adapter_names=[kept]), expected)


@orders
@names
@places
def test_unloading_gives_the_plain_base_back(order, name, shared):
    plain = build(order, name, shared).unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert torch.equal(logits(plain), logits(base_model(name)))


@places
def test_a_bias_of_lora_is_merged_once(shared):
    config = lora_config("gpt2", shared, lora_bias=True)
    model = add_seal_to_lora(base_model("gpt2"), config, SealConfig()).eval()
    draw_lora(model)
    draw_scales(model, "heads")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["style"].bias.normal_()
    before = logits(model)
    for names_to_merge in (["style"], ["heads"]):
        model.merge_adapter(adapter_names=names_to_merge)
        assert_close(logits(model), before, rtol=0, atol=2e-5)


def test_a_broken_scale_is_refused_with_lora_merged_and_changes_nothing():
    model = build()
    model.merge_adapter(adapter_names=["style"])
    before = logits(model)
    layer = next(iter(seal_layers(model).values()))
    kept = layer.seal_delta["heads"].weight.detach().clone()
    with torch.no_grad():
        layer.seal_delta["heads"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    with torch.no_grad():
        layer.seal_delta["heads"].weight.copy_(kept)
    assert torch.equal(logits(model), before)


def test_gradients_reach_the_scales_while_lora_is_merged():
    def gradients(merged):
        model = build()
        if merged:
            model.merge_adapter(adapter_names=["style"])
        model(input_ids=INPUT_IDS).logits.square().mean().backward()
        return [layer.seal_delta["heads"].weight.grad for layer in seal_layers(model).values()]

    for unmerged, merged in zip(gradients(False), gradients(True), strict=True):
        assert_close(merged, unmerged, rtol=1e-3, atol=1e-6)


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


def test_add_beside_says_what_it_cannot_add():
    model = get_peft_model(base_model("llama"), SealConfig(), "heads")
    with pytest.raises(ValueError, match="add_adapter"):
        seal_peft.add_beside(model, SealConfig(), "more")
    with pytest.raises(ValueError, match="Add SEAL first"):
        seal_peft.add_beside(get_peft_model(base_model("llama"), lora_config(), "style"), _ia3(), "third")


def _ia3():
    from peft import IA3Config

    return IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])


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


def test_several_adapters_of_seal_load_beside_lora(tmp_path):
    build().save_pretrained(tmp_path)
    adapted("llama", "channel", seed=7).save_pretrained(tmp_path / "fine")
    model = seal_peft.load_adapters(base_model("llama"), tmp_path)
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


# -- switching --------------------------------------------------------------------------------------------------------


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
