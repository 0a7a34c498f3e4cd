"""Rows of one batch with adapters of their own, against running every adapter alone."""

import pytest
import torch

from models import INPUT_IDS, adapted, base_model, draw_scales, logits
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
        torch.testing.assert_close(mixed[row], alone(model, name)[row], atol=1e-5, rtol=1e-5)


def test_the_active_adapter_does_not_reach_rows_that_it_was_not_named_for(model):
    for names in (["wide"] * 5, ["__base__"] * 5):  # "wide" is on one layer, the active adapter on both
        with torch.no_grad():
            mixed = model(ROWS, adapter_names=names).logits
        torch.testing.assert_close(mixed, alone(model, names[0]), atol=1e-5, rtol=1e-5)


def test_the_rows_of_the_fixture_differ(model):
    results = [alone(model, name)[0] for name in ("default", "__base__", "other", "wide")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_generation_keeps_rows_apart_with_and_without_beams(num_beams, where):
    model = adapted("llama", "channel")
    model.add_adapter("other", SealConfig(granularity="channel", task_type="CAUSAL_LM"))
    draw_scales(model, "other", seed=7)
    model.eval()
    names = ["other", "default"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    if where == "generation_config":
        from transformers import GenerationConfig

        settings = {"generation_config": GenerationConfig(pad_token_id=0, **settings)}
    mixed = model.generate(input_ids=INPUT_IDS, adapter_names=names, **settings)
    for row, name in enumerate(names):
        expected = alone(model, name, run=lambda: model.generate(input_ids=INPUT_IDS, **settings))
        assert torch.equal(mixed[row], expected[row])


def test_a_thousand_adapters_fit_in_one_batch():
    model = adapted("llama", "head")
    names = [f"task{index}" for index in range(200)]
    for seed, name in enumerate(names):
        model.add_adapter(name, SealConfig(task_type="CAUSAL_LM"))
        draw_scales(model, name, seed=seed)
    rows = INPUT_IDS[:1].expand(len(names), -1)
    model.eval()
    with torch.no_grad():
        mixed = model(rows, adapter_names=names).logits
    for index in (0, 57, 199):
        torch.testing.assert_close(mixed[index], alone(model, names[index], rows[:1])[0], atol=1e-5, rtol=1e-5)


def test_strength_counts_in_a_mixed_batch(model):
    set_strength(model, 0.5, "other")
    with torch.no_grad():
        mixed = model(ROWS, adapter_names=["other"] * 5).logits
    torch.testing.assert_close(mixed, alone(model, "other"), atol=1e-5, rtol=1e-5)


def test_half_precision_rows_stay_half_precision():
    model = adapted("llama", "head").to(torch.bfloat16).eval()
    with torch.no_grad():
        mixed = model(INPUT_IDS, adapter_names=["default", "__base__"]).logits
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed[0], model(INPUT_IDS).logits[0], atol=5e-2, rtol=5e-2)


def test_modules_to_save_follow_the_row():
    model = adapted("llama", "head", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        model.eval()
        mixed = model(INPUT_IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], alone(model, "default", INPUT_IDS)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], logits(base_model("llama"))[1], atol=1e-5, rtol=1e-5)


def test_the_next_call_is_not_mixed_any_more(model):
    with torch.no_grad():
        model(ROWS, adapter_names=NAMES)
        torch.testing.assert_close(model(ROWS).logits, alone(model, "default"))


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


def test_a_single_name_is_not_a_list_of_names():
    model = adapted("llama", "head").eval()
    with pytest.raises(TypeError, match="one adapter name per row"):
        model(INPUT_IDS, adapter_names="default")
