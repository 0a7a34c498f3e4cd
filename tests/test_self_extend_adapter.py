"""Self-Extend, and RoPE without scales, in an adapter: in force exactly while it is in use, saved, loaded, merged."""

import copy
import json
import pickle
import re
import warnings

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

import models
import seal_peft
from models import draw_scales
from seal_peft import SealConfig
from seal_peft.context.rope import apply_rope, read_rope
from seal_peft.context.self_extend import apply_self_extend, read_self_extend
from seal_peft.loading import check_adapter
from seal_peft.merge import MergeArguments, merge
from seal_peft.report import ReportArguments, report

IDS = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))
SETTINGS = {"group_size": 3, "window": 7}
OTHER = {"group_size": 5, "window": 9}
YARN = {"rope_type": "yarn", "factor": 4.0}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def llama(**kwargs):
    return models.llama(**{"max_position_embeddings": 32, **kwargs})


def base(settings=SETTINGS, **kwargs):
    """A base under Self-Extend."""
    model = llama(**kwargs)
    apply_self_extend(model, **settings)
    return model


def adapted(model=None, **kwargs):
    """A model with an adapter with drawn scales."""
    model = get_peft_model(llama() if model is None else model, SealConfig(**kwargs))
    draw_scales(model)
    return model.eval()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return str(folder)


# -- Self-Extend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [None, YARN])
def test_an_adapter_brings_it_along(rope, tmp_path):
    model = adapted(self_extend=SETTINGS, rope_parameters=rope)
    under = llama()
    if rope:
        apply_rope(under, rope)
    apply_self_extend(under, **SETTINGS)
    expected = logits(adapted(under))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["self_extend"] == SETTINGS
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_disabling_unloading_and_deleting_give_the_base_back_bit_for_bit():
    plain = logits(llama())
    model = adapted(self_extend=SETTINGS, rope_parameters=YARN)
    expected = logits(model)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert (read_self_extend(unloaded), read_rope(unloaded)) == (None, read_rope(llama()))
    assert not hasattr(unloaded.config, "self_extend")
    model = adapted(self_extend=SETTINGS)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), plain)


def test_transformers_loads_and_switches_it(base_folder, tmp_path):
    model = adapted(tf.AutoModelForCausalLM.from_pretrained(base_folder), self_extend=SETTINGS)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    loaded = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    plain = logits(loaded)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), plain)
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), plain)


def switching():
    model = adapted(self_extend=SETTINGS)
    model.add_adapter("wide", SealConfig(self_extend=OTHER))
    model.add_adapter("both", SealConfig(self_extend=OTHER, rope_parameters=YARN))
    model.add_adapter("same", SealConfig(self_extend=dict(SETTINGS)))
    model.add_adapter("plain", SealConfig())
    for name in model.peft_config:
        draw_scales(model, name)
    return model


def test_switching_adapters_switches_it():
    model = switching()
    both = llama()
    apply_rope(both, YARN)
    apply_self_extend(both, **OTHER)
    expected = {"wide": base(OTHER), "plain": llama(), "both": both, "default": base(), "same": base()}
    for name, under in expected.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(adapted(under))), name
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_adapter("plain")
        assert torch.equal(logits(other), logits(adapted()))
    assert torch.equal(logits(model), logits(adapted(base())))


def test_mixing_different_ones_is_refused():
    model = switching()
    model.base_model.set_adapter(["default", "same"])
    for names in (["default", "wide"], ["wide", "both"], ["default", "plain"]):
        with pytest.raises(ValueError, match="one Self-Extend"):
            model.base_model.set_adapter(names)
        with pytest.raises(ValueError, match="one Self-Extend"):
            model.add_weighted_adapter(names, [0.5, 0.5], "sum")
        with pytest.raises(ValueError, match="one Self-Extend"):
            model(input_ids=IDS.repeat(2, 1), adapter_names=names)
    mixed = model(input_ids=IDS.repeat(2, 1), adapter_names=["wide", "wide"]).logits.detach()
    torch.testing.assert_close(mixed[:1], logits(adapted(base(OTHER))), atol=1e-4, rtol=1e-4)


def test_attention_that_was_set_to_something_else_does_not_run():
    model = adapted(self_extend=SETTINGS)
    model.base_model.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="needs self_extend="):
        logits(model)


def test_a_request_that_the_model_does_not_take_leaves_it_as_it_was():
    model = llama()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="frequencies depend on the length"):
        get_peft_model(
            model, SealConfig(self_extend=SETTINGS, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
        )
    assert [type(module) for module in model.modules()] == before
    assert torch.equal(logits(model), logits(llama()))
    for settings in ({"group_size": 3}, {"group_size": 0, "window": 4}, {"group_size": 2.0, "window": 4}):
        with pytest.raises(ValueError, match="Use two positive whole numbers"):
            get_peft_model(llama(), SealConfig(self_extend=settings))
    for settings in (3, {}):
        with pytest.raises(ValueError, match=f"self_extend={settings} is not allowed"):
            SealConfig(self_extend=settings)
    for name in ("gpt2", "deepseek_v3", "gpt_oss", "qwen2_5_vl", "falcon"):
        model = models.base_model(name)
        with pytest.raises(ValueError, match="Self-Extend|self_extend"):
            get_peft_model(model, SealConfig(self_extend=SETTINGS))
        assert not any(isinstance(module, seal_peft.SealLayer) for module in model.modules())


def test_the_merged_model_keeps_it_in_memory_and_says_what_loading_needs(tmp_path):
    model = adapted(self_extend=SETTINGS, rope_parameters=YARN)
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"apply_self_extend\(model, \*\*model.config.self_extend\)"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_self_extend(plain) is None
    apply_self_extend(plain, **plain.config.self_extend)
    assert torch.equal(logits(plain), logits(merged))


def test_the_name_of_its_attention_alone_is_refused(tmp_path):
    base().save_pretrained(tmp_path)
    named = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="self_extend")
    built = tf.AutoModelForCausalLM.from_config(base().config)
    plain = llama()
    plain.set_attn_implementation("self_extend")
    for model in (named, built, plain):
        assert read_self_extend(model) is None
        with pytest.raises(ValueError, match=r"by its name alone, .*apply_self_extend\(model"):
            logits(model)
    applied = apply_self_extend(named, **named.config.self_extend)
    assert read_self_extend(named) == SETTINGS
    assert torch.equal(logits(named), logits(base()))
    applied.restore()
    assert read_self_extend(named) is None
    with pytest.raises(ValueError, match="by its name alone"):
        logits(named)


def test_the_merge_stage_refuses_it(base_folder, tmp_path):
    model = adapted(tf.AutoModelForCausalLM.from_pretrained(base_folder), self_extend=SETTINGS)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no setting of a plain checkpoint"):
        merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "merged")))


def test_a_base_that_was_extended_is_on_record(tmp_path):
    model = adapted(base())
    assert model.peft_config["default"].base_self_extend == SETTINGS
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        PeftModel.from_pretrained(llama(), tmp_path)
    (told,) = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert f"trained on a base with self_extend={SETTINGS}" in told
    config = SealConfig.from_pretrained(tmp_path)
    config.self_extend = config.base_self_extend
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path, config=config)), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


@pytest.mark.parametrize("settings", [{"group_size": 4, "window": 32}, {"group_size": 1, "window": 7}])
def test_settings_that_let_the_model_read_no_further_are_refused(settings):
    with pytest.raises(ValueError, match="extends nothing: the model reads 32 tokens without it.*a window.*, 4 say"):
        get_peft_model(llama(), SealConfig(self_extend=settings))
    get_peft_model(llama(), SealConfig(self_extend={"group_size": 2, "window": 30}))
    get_peft_model(llama(), SealConfig(self_extend={"group_size": 4, "window": 32}, rope_parameters=YARN))


def test_a_base_under_it_takes_no_rope_that_depends_on_the_length():
    model = base()
    before = logits(model)
    with pytest.raises(ValueError, match="type 'dynamic', whose frequencies depend on the length"):
        get_peft_model(model, SealConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
    assert (read_rope(model), read_self_extend(model)) == (read_rope(llama()), SETTINGS)
    assert torch.equal(logits(model), before)
    assert read_rope(get_peft_model(model, SealConfig(rope_parameters=YARN)))["rope_type"] == "yarn"


def test_hotswap_and_ia3_refuse_what_they_would_lose(tmp_path):
    adapted(self_extend=SETTINGS).save_pretrained(tmp_path / "long")
    with pytest.raises(ValueError, match="asks for RoPE and Self-Extend"):
        seal_peft.hotswap_adapter(adapted(), tmp_path / "long")
    seal_peft.hotswap_adapter(adapted(self_extend=SETTINGS), tmp_path / "long")
    with pytest.raises(ValueError, match="an IA3 folder cannot carry"):
        seal_peft.export_ia3(tmp_path / "long", tmp_path / "ia3")


@pytest.mark.parametrize("sites", [("output",), ("output", "query")])
def test_it_trains_under_self_extend_with_checkpointing(sites):
    model = adapted(self_extend=SETTINGS, sites=sites).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = [layer.offset("default").grad.clone() for layer in models.seal_layers(model).values()]
    model.zero_grad()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for grad, layer in zip(wanted, models.seal_layers(model).values(), strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(layer.offset("default").grad, grad)


def test_without_weights_it_fits_or_not_but_does_not_run(base_folder, tmp_path):
    adapted(tf.AutoModelForCausalLM.from_pretrained(base_folder), self_extend=SETTINGS).save_pretrained(tmp_path)
    check_adapter(base_folder, str(tmp_path))
    with torch.device("meta"):
        model = get_peft_model(llama(), SealConfig(self_extend=SETTINGS))
    for name, words in (("deepseek_v3", "latent attention"), ("gpt_oss", "sinks")):
        with torch.device("meta"), pytest.raises(ValueError, match=words):
            get_peft_model(models.ARCHITECTURES[name].build(), SealConfig(self_extend=SETTINGS))
    with torch.device("meta"):
        asked = models.ARCHITECTURES["mixtral"].build()
    experts = asked.config._experts_implementation
    apply_self_extend(asked, **SETTINGS).restore()
    assert all(parameter.requires_grad for parameter in asked.parameters())
    assert asked.config._experts_implementation == experts
    assert not any(module._forward_hooks for module in asked.modules())
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match="Apply it again now"):
        logits(model)


# -- RoPE alone, beside LoRA ------------------------------------------------------------------------------------------


def positions_only(**kwargs):
    return SealConfig(sites=(), **kwargs)


def under_yarn():
    model = llama()
    apply_rope(model, YARN)
    return model


@pytest.mark.parametrize("kwargs", [{"rope_parameters": YARN}, {"self_extend": SETTINGS}])
def test_an_adapter_without_scales_holds_nothing_but_its_settings(kwargs, base_folder, tmp_path):
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base_folder), positions_only(**kwargs))
    expected = logits(under_yarn() if "rope_parameters" in kwargs else base())
    assert torch.equal(logits(model), expected)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100
    for loaded in (
        PeftModel.from_pretrained(llama(), tmp_path),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_its_rope_is_carried_into_the_merged_checkpoint(tmp_path):
    merged = get_peft_model(llama(), positions_only(rope_parameters=YARN)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(under_yarn()))


def lora():
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return config


def test_beside_lora_it_is_saved_loaded_and_switched(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(llama(), lora(), "style")
    plain = logits(model)
    torch.manual_seed(0)
    expected = logits(get_peft_model(under_yarn(), lora(), "style"))
    model = seal_peft.add_beside(model, positions_only(rope_parameters=YARN), "long")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = seal_peft.load_adapters(llama(), {"style": tmp_path / "style", "long": tmp_path / "long"})
    assert torch.equal(logits(loaded), expected)
    loaded.set_adapter("style")  # leaves the other method alone
    assert torch.equal(logits(loaded), expected)
    seal_peft.activate(loaded, ["style"])
    assert torch.equal(logits(loaded), plain)
    seal_peft.activate(loaded, ["style", "long"])
    loaded.delete_adapter("long")
    assert torch.equal(logits(loaded), plain)


@pytest.mark.parametrize("first", ["style", "long", "loaded"])
def test_beside_lora_it_is_merged_into_a_plain_checkpoint(first, tmp_path):
    torch.manual_seed(0)
    expected = logits(get_peft_model(under_yarn(), lora(), "style"))
    assert not torch.allclose(expected, logits(under_yarn()), atol=1e-2)
    configs = {"style": lora, "long": lambda: positions_only(rope_parameters=YARN)}
    begin, beside = ("long", "style") if first == "long" else ("style", "long")
    torch.manual_seed(0)
    model = get_peft_model(llama(), configs[begin](), begin)
    torch.manual_seed(0)
    model = seal_peft.add_beside(model, configs[beside](), beside)
    assert set(model.base_model.active_adapters) == {"style", "long"}
    if first == "loaded":
        model.save_pretrained(tmp_path)
        model = seal_peft.load_adapters(llama(), tmp_path)
    torch.testing.assert_close(logits(model), expected)
    rope, merged = read_rope(model), model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for plain in (merged, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        assert read_rope(plain) == rope != read_rope(llama())
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_rows_scales_and_sums_of_adapters_without_scales():
    model = get_peft_model(llama(), positions_only(rope_parameters=YARN), "long")
    model.add_adapter("scaled", SealConfig(rope_parameters=YARN))
    draw_scales(model, "scaled")
    model.eval()
    mixed = model(input_ids=IDS.repeat(2, 1), adapter_names=["long", "scaled"]).logits.detach()
    torch.testing.assert_close(mixed[:1], logits(under_yarn()), atol=1e-4, rtol=1e-4)
    model.set_adapter("scaled")
    torch.testing.assert_close(mixed[1:], logits(model), atol=1e-4, rtol=1e-4)
    model.add_weighted_adapter(["long", "scaled"], [1.0, 1.0], "sum")
    expected = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, folder: seal_peft.scales(model, "long"),
        lambda model, folder: seal_peft.scales(folder),
        lambda model, folder: seal_peft.set_strength(model, 0.5, "long"),
        lambda model, folder: seal_peft.hotswap_adapter(model, folder, "long"),
        lambda model, folder: seal_peft.export_ia3(model, folder / "ia3", "long"),
        lambda model, folder: report(ReportArguments(str(folder / "report"), adapter=str(folder))),
    ],
    ids=["scales", "scales of a folder", "set_strength", "hotswap_adapter", "export_ia3", "report"],
)
@pytest.mark.parametrize(("name", "value"), [("rope_parameters", YARN), ("self_extend", SETTINGS)])
def test_who_asks_an_extension_alone_for_scales_is_told_what_it_brings(name, value, use, tmp_path):
    value = dict(sorted(value.items()))  # as it is saved
    model = get_peft_model(llama(), positions_only(**{name: value}), "long")
    model.save_pretrained(tmp_path)
    message = f"is SEAL's but has no scales (sites=()): it brings {name}={value} and"
    with pytest.raises(ValueError, match=re.escape(message)):
        use(model, tmp_path / "long")


def test_no_site_and_nothing_to_bring_is_refused():
    with pytest.raises(ValueError, match="scales nothing"):
        SealConfig(sites=())
    with pytest.raises(ValueError, match="of no use for sites"):
        SealConfig(sites=[], granularity="channel", rope_parameters=YARN)
