"""Training and inference in every dtype, checkpointed, compiled and with a cache."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from models import INPUT_IDS, adapted, base_model, draw_scales, logits, seal_layers
from offsets import both_granularities, loss_of, offsets, some_models
from seal_peft import SealConfig, scales

# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both_granularities
def test_offsets_stay_fp32_on_a_base_of_any_dtype(dtype, granularity, tmp_path):
    base = base_model("llama").to(dtype)
    model = get_peft_model(copy.deepcopy(base), SealConfig(granularity=granularity))
    draw_scales(model)
    model.add_adapter("other", SealConfig())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.load_adapter(tmp_path, "third")
    for tensor in [*offsets(model), *offsets(model, "other"), *offsets(loaded), *offsets(loaded, "third")]:
        assert tensor.dtype == torch.float32
    assert logits(model).dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    loss_of(model).backward()
    assert all(offset.grad.dtype == torch.float32 for offset in offsets(model))


def test_offsets_take_the_dtype_of_the_base_where_that_is_asked_for():
    model = get_peft_model(base_model("llama").bfloat16(), SealConfig(), autocast_adapter_dtype=False)
    assert all(offset.dtype == torch.bfloat16 for offset in offsets(model))
    assert torch.equal(logits(model), logits(base_model("llama").bfloat16()))


def test_a_whole_model_can_be_cast():
    model = adapted("llama").to(torch.bfloat16)
    for layer in seal_layers(model).values():  # bf16 is coarser near 1 than near 0
        scale, offset = layer.seal_delta["default"](1.0), layer.seal_delta["default"].weight
        assert offset.dtype == torch.bfloat16 and torch.equal(scale.squeeze(-1), 1 + offset.float())
    assert logits(model).dtype == torch.bfloat16
    assert_close(logits(model).float(), logits(adapted("llama")), rtol=0, atol=0.3)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_works(base_dtype):
    model = adapted("llama")
    model.base_model.model.to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    assert all((offset.grad != 0).any() for offset in offsets(model))


# -- training ---------------------------------------------------------------------------------------------------------


@some_models
@both_granularities
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(name, granularity, use_reentrant):
    def gradients(checkpointed):
        model = adapted(name, granularity)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            # transformers is renaming it: the old name warns, the new one is missing in older versions.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        calls = []
        for layer in seal_layers(model).values():
            layer.register_forward_hook(lambda *_: calls.append(1))
        model(input_ids=INPUT_IDS, use_cache=False).logits.square().mean().backward()
        assert len(calls) == (4 if checkpointed else 2), "each of the two layers runs again only when checkpointed"
        return [offset.grad for offset in offsets(model)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert (plain != 0).all()
        assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_weight_decay_alone_leaves_every_scale_at_one(optimizer_class):
    model = get_peft_model(base_model("llama"), SealConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trained, lr=0.1, weight_decay=0.1)
    for _ in range(10):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all((scale == 1).all() for scale in scales(model).values())


def test_weight_decay_pulls_a_scale_towards_one():
    model = adapted("llama")
    distance = [offset.detach().abs().clone() for offset in offsets(model)]
    optimizer = torch.optim.AdamW(offsets(model), lr=0.1, weight_decay=0.1)
    for offset in offsets(model):
        offset.grad = torch.zeros_like(offset)
    optimizer.step()
    assert all((offset.abs() < before).all() for offset, before in zip(offsets(model), distance, strict=True))


def test_training_moves_the_scales_and_nothing_else():
    model = get_peft_model(base_model("llama"), SealConfig(granularity="channel"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(offsets(model), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "seal_delta" in key}


def test_a_frozen_adapter_passes_gradients_on_after_inference_mode(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    with torch.inference_mode():
        model(input_ids=INPUT_IDS)
    embedded = model.get_input_embeddings()(INPUT_IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert (embedded.grad != 0).any()


# -- compiling and generating -----------------------------------------------------------------------------------------


# torch 2.13's dynamo does this itself when it traces any `torch.autograd.Function`.
traced_by_dynamo = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@traced_by_dynamo
@both_granularities
def test_a_compiled_model_is_one_graph_with_the_same_results(granularity):
    torch.compiler.reset()
    model = adapted("llama", granularity)
    loss_of(model).backward()
    expected = [offset.grad.clone() for offset in offsets(model)]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled), logits(model), rtol=0, atol=1e-5)
    loss_of(compiled).backward()
    for offset, gradient in zip(offsets(model), expected, strict=True):
        assert_close(offset.grad, gradient, rtol=1e-4, atol=1e-6)


@traced_by_dynamo
def test_a_compiled_bf16_model_sees_new_scales():
    torch.compiler.reset()
    model = adapted("llama").to(torch.bfloat16).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = logits(compiled)
    draw_scales(model, seed=5)
    assert (logits(compiled) - before).abs().max() > 0.1
    assert_close(logits(compiled), logits(model), rtol=0, atol=0.05)


@some_models
@both_granularities
def test_generating_with_a_cache_equals_generating_without(name, granularity):
    model = adapted(name, granularity, seed=3)  # drawn so that greedy tokens differ from the base's
    settings = {
        "attention_mask": torch.ones_like(INPUT_IDS),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = model.generate(input_ids=INPUT_IDS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=INPUT_IDS, use_cache=False, **settings))
    assert cached.shape == (2, 14)
    assert not torch.equal(cached, base_model(name).generate(input_ids=INPUT_IDS, **settings))
    merged = model.merge_and_unload()
    assert torch.equal(cached, merged.generate(input_ids=INPUT_IDS, **settings))
