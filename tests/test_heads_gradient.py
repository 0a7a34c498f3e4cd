"""Gradient maps equal the gradients that adapters train with, and differences of the loss."""

import copy

import pytest
import torch
from peft import get_peft_model

import models
from head_samples import logprob, some_rows
from models import ARCHITECTURES, base_model
from seal_peft import SealConfig
from seal_peft.heads import find_heads, gradient_map
from seal_peft.heads.inputs import collate, score_logits
from seal_peft.heads.layers import scoring

ROWS = some_rows()


def gradients_of_an_adapter(model, sites: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What training would give the offsets of a fresh adapter, by the name of its module and for every row."""
    adapted = get_peft_model(
        model, SealConfig(granularity="channel" if "output" in sites else "head", sites=sites)
    ).eval()
    found: dict[str, list[torch.Tensor]] = {}
    for row in ROWS:
        adapted.zero_grad()
        batch, labels = collate([row], torch.device("cpu"))
        (-score_logits(adapted(**batch).logits, labels).logprob).sum().backward()
        for name, layer in models.seal_layers(adapted).items():
            found.setdefault(name, []).append(layer.offset("default").grad.clone())
    return {name: torch.stack(own) for name, own in found.items()}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "gpt2", "olmo2", "deepseek_v3", "falcon"])
def test_output_gradients_are_those_that_an_adapter_trains_with(name: str) -> None:
    expected = gradients_of_an_adapter(base_model(name), ("output",))
    found = gradient_map(find_heads(base_model(name)), ROWS)["output"]
    assert list(expected) == list(ARCHITECTURES[name].projections)
    for own, theirs in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)
        assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "deepseek_v3"])
def test_query_gradients_are_those_that_an_adapter_trains_with(name: str) -> None:
    expected = gradients_of_an_adapter(base_model(name), ("query",))
    alone = gradient_map(find_heads(base_model(name)), ROWS, ["query"])
    assert list(alone) == ["query"]
    for own, theirs in zip(alone["query"], expected.values(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)
        assert theirs.abs().max() > 1e-3


def test_both_sites_from_one_backward_pass_are_those_of_one_each() -> None:
    heads = find_heads(base_model("qwen3"))
    both = gradient_map(heads, ROWS, ["output", "query"])
    for site, found in both.items():
        for own, alone in zip(found, gradient_map(heads, ROWS, [site])[site], strict=True):
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-7)


def test_they_are_slopes_of_the_loss() -> None:
    model, step = base_model("llama").double(), 1e-2
    found = gradient_map(find_heads(model), ROWS[:1])["output"]
    (name, _), *_ = ARCHITECTURES["llama"].projections.items()
    for head, channel in ((0, 0), (1, 7), (3, 11)):
        sides = []
        for scale in (1 - step, 1 + step):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.get_submodule(name).weight[:, head * 12 + channel] *= scale
                ids = torch.tensor([ROWS[0].input_ids])
                logits = moved(input_ids=ids).logits[0].log_softmax(-1)
            places = [i for i, label in enumerate(ROWS[0].labels) if label != -100]
            sides.append(-sum(logits[i - 1, ROWS[0].labels[i]] for i in places) / len(places))
        slope = (sides[1] - sides[0]) / (2 * step)
        assert found[0][0, head, channel].item() == pytest.approx(slope.item(), rel=1e-2, abs=1e-4)


def test_of_an_adapted_model_it_is_the_slope_on_top_of_its_scales() -> None:
    model = models.adapted("llama", "head")
    found = gradient_map(find_heads(model), ROWS[:1])["output"]
    layer, step = next(iter(models.seal_layers(model).values())), 1e-2
    before = layer.offset("default").detach().clone()
    sides = []
    for factor in (1 - step, 1 + step):
        with torch.no_grad():
            layer.offset("default")[2] = (1 + before[2]) * factor - 1
        sides.append(-logprob(model, ROWS[0]))
    assert found[0][0, 2].sum().item() == pytest.approx((sides[1] - sides[0]) / (2 * step), rel=2e-2)


def test_checkpointing_changes_the_memory_and_nothing_else() -> None:
    model = base_model("gemma2")
    sites = ("output", "query")
    plain, less = (gradient_map(find_heads(model), ROWS, sites, checkpointed) for checkpointed in (False, True))
    for site in sites:
        for a, b in zip(plain[site], less[site], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_a_sample_takes_one_forward_pass_and_leaves_no_gradient() -> None:
    model = base_model("llama").train()
    calls = []
    handle = model.register_forward_hook(lambda module, args, output: calls.append(module.training))
    gradient_map(find_heads(model), ROWS, ["output", "query"])
    handle.remove()
    assert calls == [False] * len(ROWS)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_a_frozen_model_and_one_in_inference_have_gradients_too() -> None:
    model = base_model("llama").requires_grad_(False)
    with torch.no_grad(), torch.enable_grad(), scoring(find_heads(model)):
        found = gradient_map(find_heads(model), ROWS[:1])["output"]
    assert found[0].abs().max() > 0


def test_what_cannot_be_done_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="The site 'key' was given; use some of: output, query"):
        gradient_map(find_heads(base_model("llama")), ROWS, ["key"])
    with pytest.raises(ValueError, match="FalconAttention of FalconForCausalLM does not call its attention function"):
        gradient_map(find_heads(base_model("falcon")), ROWS, ["query"])
