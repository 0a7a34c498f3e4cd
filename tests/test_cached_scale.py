"""The scale that inference keeps between calls is never one of before a change."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models import ARCHITECTURES, adapted, draw_scales, logits, seal_layers
from offsets import loss_of, offsets
from seal_peft import SealConfig, scales


def step_with(**settings):
    def change(model):
        trained = offsets(model)
        for offset in trained:
            offset.requires_grad_(True)
            offset.grad = torch.ones_like(offset)
        torch.optim.AdamW(trained, lr=0.3, **settings).step()

    return change


def train_between_frozen_calls(model):
    step = step_with(fused=True)
    for offset in offsets(model):
        offset.requires_grad_(True)
    loss_of(model).backward()
    step(model)
    for offset in offsets(model):
        offset.requires_grad_(False)


def load_state(model):
    model.load_state_dict(
        {key: value + 0.3 if "seal_delta" in key else value for key, value in model.state_dict().items()}
    )


def assign_state(model):
    state = {key: value + 0.3 for key, value in model.state_dict().items() if "seal_delta" in key}
    model.load_state_dict(state, strict=False, assign=True)


def switch(model):
    model.set_adapter("other")


def cast(model):
    model.to(torch.bfloat16)


def weaken(model):
    for layer in seal_layers(model).values():
        layer.seal_alpha["default"] = 0.5


def replace_parameter(model):
    for layer in seal_layers(model).values():
        shape = layer.seal_delta["default"].weight.shape
        layer.seal_delta["default"].weight = None  # frees the address for the new tensor
        layer.seal_delta["default"].weight = nn.Parameter(torch.full(shape, 0.7), requires_grad=False)


def replace_data(model):
    for offset in offsets(model):
        offset.data = torch.full_like(offset, 0.7)


def delete_and_add_again(model):
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", SealConfig())
    draw_scales(model, seed=8)
    model.set_adapter("default")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        step_with(foreach=False),
        step_with(foreach=True),
        step_with(fused=True),
        train_between_frozen_calls,
        load_state,
        assign_state,
        switch,
        cast,
        weaken,
        replace_parameter,
        replace_data,
        delete_and_add_again,
    ],
    ids=lambda change: change.__qualname__.partition(".")[0] if callable(change) else None,
)
def test_inference_never_uses_a_scale_of_before_the_change(change, frozen):
    model = adapted("llama")
    model.add_adapter("other", SealConfig())
    draw_scales(model, "other", seed=4)
    if frozen:
        model.requires_grad_(False)
    before = logits(model)
    assert torch.equal(logits(model), before)
    change(model)
    after = logits(model)
    # Merging reads the parameters themselves.
    expected = logits(copy.deepcopy(model).merge_and_unload())
    assert_close(after.float(), expected.float(), rtol=0, atol=1e-5 if after.dtype == torch.float32 else 0.25)
    assert (after - before).abs().max() > (0.05 if after.dtype == torch.float32 else 0)


def test_scales_have_the_same_names_whatever_is_wrapped_around_the_model():
    model = adapted("llama")
    names = set(scales(model))
    compiled = torch.compile(model, backend="eager")
    for outer in (model.base_model, model.get_base_model(), compiled):
        assert set(scales(outer)) == names
    assert names == set(ARCHITECTURES["llama"].projections)
