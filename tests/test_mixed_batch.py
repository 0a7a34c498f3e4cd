"""Rows of one batch with adapters of their own, against running every adapter alone."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from models import INPUT_IDS, adapted, base_model, draw_scales, logits, seal_layers
from seal_peft import SealConfig, set_strength

ROWS = torch.cat([INPUT_IDS, INPUT_IDS, INPUT_IDS[:1]])
NAMES = ["default", "__base__", "other", "wide", "default"]


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def model(request):
    model = adapted(request.param, "head")
    for name, granularity, layers in (("other", "head", None), ("wide", "channel", [1])):
        model.add_adapter(name, SealConfig(granularity=granularity, layers_to_transform=layers, task_type="CAUSAL_LM"))
        draw_scales(model, name, seed=len(name))
    return model.eval()


def alone(model, name, rows=ROWS, run=None):
    run = run or (lambda: model(rows).logits)
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return run()
        model.set_adapter(name)
        result = run()
        model.set_adapter("default")
        return result


def test_every_row_gets_its_own_adapter(model):
    with torch.no_grad():
        mixed = model(ROWS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        assert_close(mixed[row], alone(model, name)[row], atol=1e-5, rtol=1e-5)


def test_the_active_adapter_does_not_reach_rows_that_it_was_not_named_for(model):
    for names in (["wide"] * 5, ["__base__"] * 5):  # "wide" is on one layer, the active adapter on both
        with torch.no_grad():
            mixed = model(ROWS, adapter_names=names).logits
        assert_close(mixed, alone(model, names[0]), atol=1e-5, rtol=1e-5)


def test_the_rows_of_the_fixture_differ(model):
    results = [alone(model, name)[0] for name in ("default", "__base__", "other", "wide")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


SAMPLED = {"num_return_sequences": 3, "do_sample": True, "top_k": 1}  # repeats rows without beams


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ("argument", {}),
        ("argument", {"num_beams": 3}),
        ("generation_config", {"num_beams": 3}),
        ("model", {"num_beams": 3}),
        ("model", {"num_beams": 4, "num_return_sequences": 2}),
        ("argument", SAMPLED),
    ],
)
def test_generation_keeps_rows_apart_however_it_repeats_them(where, settings):
    model = adapted("llama", "channel")
    model.add_adapter("other", SealConfig(granularity="channel", task_type="CAUSAL_LM"))
    draw_scales(model, "other", seed=7)
    model.eval()
    names = ["other", "default"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    if where == "generation_config":
        settings = {"generation_config": GenerationConfig(**settings)}
    elif where == "model":
        model.get_base_model().generation_config = GenerationConfig(**settings)
        settings = {}
    mixed = model.generate(input_ids=INPUT_IDS, adapter_names=names, **settings)
    for row, name in enumerate(names):
        expected = alone(model, name, run=lambda: model.generate(input_ids=INPUT_IDS, **settings))
        assert torch.equal(mixed.unflatten(0, (2, -1))[row], expected.unflatten(0, (2, -1))[row])
    with torch.no_grad():  # what generation repeated is forgotten
        assert_close(model(INPUT_IDS, adapter_names=names).logits[1], logits(model)[1], atol=1e-5, rtol=1e-5)


def test_beams_of_a_model_with_an_encoder_repeat_behind_it():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    config = SealConfig(target_modules=["SelfAttention.o"], num_attention_heads=4, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config)
    model.add_adapter("other", config)
    for seed, name in enumerate(("default", "other")):
        draw_scales(model, name, seed)
    model.eval()
    settings = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mixed = model.generate(input_ids=INPUT_IDS, adapter_names=["other", "__base__"], **settings)
    for row, name in enumerate(["other", "__base__"]):
        expected = alone(model, name, run=lambda: model.generate(input_ids=INPUT_IDS, **settings))
        assert torch.equal(mixed[row], expected[row])


def test_a_thousand_adapters_fit_in_one_batch():
    model = adapted("llama", "head").eval()
    layers, names = seal_layers(model).values(), [f"task{index}" for index in range(1000)]
    for seed, name in enumerate(names):
        # What add_adapter does to the layers; PEFT's own walks over all modules take minutes for so many.
        model.peft_config[name] = SealConfig(inference_mode=True)
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            layer.update_layer(name, model.peft_config[name])
            nn.init.uniform_(layer.offset(name), -0.8, 0.8, generator)
    with torch.no_grad():
        mixed = model(INPUT_IDS[:1].expand(1000, -1), adapter_names=names).logits
    for index in (0, 57, 999):
        assert_close(mixed[index], alone(model, names[index], INPUT_IDS[:1])[0], atol=1e-5, rtol=1e-5)


def write_through_data(model):
    for layer in seal_layers(model).values():
        layer.offset("other").data.mul_(-1)


def replace_values(model):
    for layer in seal_layers(model).values():
        layer.offset("other").data = torch.full_like(layer.offset("other"), 0.6)


def replace_parameters(model):
    for layer in seal_layers(model).values():
        layer.seal_delta["other"].weight = nn.Parameter(torch.full_like(layer.offset("other"), 0.6))


def train_fused(model):
    offsets = [layer.offset("other") for layer in seal_layers(model).values()]
    for offset in offsets:
        offset.requires_grad_(True).grad = torch.ones_like(offset)
    torch.optim.AdamW(offsets, lr=0.3, fused=True).step()


def delete_and_add_under_the_same_name(model):
    model.delete_adapter("other")
    model.add_adapter("other", SealConfig(granularity="channel"))
    draw_scales(model, "other", seed=9)


def weaken(model):
    set_strength(model, -0.5, "other")


def double_precision(model):
    model.double()


@pytest.mark.parametrize(
    "change",
    [
        write_through_data,
        replace_values,
        replace_parameters,
        train_fused,
        delete_and_add_under_the_same_name,
        weaken,
        double_precision,
    ],
    ids=lambda change: change.__name__,
)
def test_a_batch_after_a_change_has_the_new_scales(change):
    model = adapted("llama", "head").eval()
    model.add_adapter("other", SealConfig())
    draw_scales(model, "other", seed=5)
    names = ["default", "other"]
    with torch.no_grad():
        before = model(INPUT_IDS, adapter_names=names).logits
        change(model)
        after = model(INPUT_IDS, adapter_names=names).logits
    assert change is double_precision or (after - before).abs().max() > 1e-3
    for row, name in enumerate(names):  # merging reads the parameters themselves
        merged = logits(copy.deepcopy(model).merge_and_unload(adapter_names=[name]))
        assert_close(after[row], merged[row], atol=1e-5, rtol=1e-5)


def test_heads_that_were_not_chosen_stay_at_one():
    model = adapted("llama", "head").eval()
    model.add_adapter("some", SealConfig(target_heads=["L0H1", "L1H3"]))
    draw_scales(model, "some", seed=3)  # writes to all heads
    with torch.no_grad():
        mixed = model(INPUT_IDS, adapter_names=["some", "some"]).logits
    assert_close(mixed, alone(model, "some", INPUT_IDS), atol=1e-5, rtol=1e-5)


def test_strength_counts_in_a_mixed_batch(model):
    set_strength(model, 0.5, "other")
    with torch.no_grad():
        mixed = model(ROWS, adapter_names=["other"] * 5).logits
    assert_close(mixed, alone(model, "other"), atol=1e-5, rtol=1e-5)


def test_half_precision_rows_stay_half_precision():
    model = adapted("llama", "head").to(torch.bfloat16).eval()
    with torch.no_grad():
        mixed = model(INPUT_IDS, adapter_names=["default", "__base__"]).logits
        assert mixed.dtype == torch.bfloat16
        assert_close(mixed[0], model(INPUT_IDS).logits[0], atol=5e-2, rtol=5e-2)


def test_modules_to_save_follow_the_row():
    model = adapted("llama", "head", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        model.eval()
        mixed = model(INPUT_IDS, adapter_names=["default", "__base__"]).logits
    assert_close(mixed[0], alone(model, "default", INPUT_IDS)[0], atol=1e-5, rtol=1e-5)
    assert_close(mixed[1], logits(base_model("llama"))[1], atol=1e-5, rtol=1e-5)


def test_the_next_call_is_not_mixed_any_more(model):
    with torch.no_grad():
        model(ROWS, adapter_names=NAMES)
        assert_close(model(ROWS).logits, alone(model, "default"))


@pytest.mark.parametrize(
    ("prepare", "names", "message"),
    [
        (lambda m: m, ["default", "typo"], "non-existing adapter.*typo"),
        (lambda m: m.train(), ["default"] * 2, "training mode"),
        (lambda m: m.merge_adapter(), ["default"] * 2, "merged adapters"),
        (lambda m: m, ["default"], "Length of `adapter_names`"),
    ],
)
def test_what_cannot_be_mixed_is_refused_and_leaves_nothing_behind(prepare, names, message):
    model = adapted("llama", "head").eval()
    prepare(model)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model(INPUT_IDS, adapter_names=names)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "run", [lambda m, **kw: m(INPUT_IDS, **kw), lambda m, **kw: m.generate(INPUT_IDS, max_new_tokens=2, **kw)]
)
def test_no_names_at_all_are_too_few(run):
    with pytest.raises(ValueError, match="Length of `adapter_names`.* got 0 and"):
        run(adapted("llama", "head").eval(), adapter_names=[])


def test_a_single_name_is_not_a_list_of_names():
    model = adapted("llama", "head").eval()
    with pytest.raises(TypeError, match="one adapter name per row"):
        model(INPUT_IDS, adapter_names="default")


def test_names_that_skip_the_wrapper_are_refused_not_ignored():
    model = adapted("llama", "head").eval()
    for inner in (model.base_model, model.get_base_model()):
        with pytest.raises(ValueError, match="called without it"):
            inner(INPUT_IDS, adapter_names=["default", "__base__"])
    assert torch.equal(model.base_model(INPUT_IDS).logits, model(INPUT_IDS).logits)
