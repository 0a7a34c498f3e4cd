"""What is made of maps: ranks, tops, the table over all, quadrants, and adapters of chosen scales."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

import models
from models import base_model
from seal_peft import scales
from seal_peft.heads import find_heads, quadrant_scales, quadrants, rank_correlation, save_head_scales
from seal_peft.heads.maps import as_tensor, compare, scale_columns, summarise, top_heads
from seal_peft.heads.quadrants import parse_factors

numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30)


def ranks(values: list[float]) -> list[float]:
    """Rank of each value by counting: the mean place among its equals."""
    return [sum(v < own for v in values) + (sum(v == own for v in values) - 1) / 2 for own in values]


@given(numbers)
def test_the_rank_correlation_is_pearsons_of_the_ranks(pairs: list[tuple[int, int]]) -> None:
    xs, ys = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float32) for i in (0, 1))
    found = rank_correlation(xs, ys)
    a, b = torch.tensor(ranks(xs.tolist())), torch.tensor(ranks(ys.tolist()))
    if a.std() == 0 or b.std() == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item(), abs=1e-4)
        assert rank_correlation(xs, ys.exp()) == pytest.approx(found)
        assert rank_correlation(xs, -ys) == pytest.approx(-found)


def test_heads_that_a_layer_does_not_have_do_not_count() -> None:
    xs, ys = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, 9.0]]), torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 4.0]])
    assert rank_correlation(xs, ys) == pytest.approx(0.9)
    summary = summarise(torch.stack([xs, xs + 2]))
    assert json.loads(json.dumps(summary))["mean"] == [[2.0, 3.0, 4.0], [5.0, None, 10.0]]
    assert as_tensor(summary["mean"]).isnan().sum() == 1
    assert summary["standard_error"][0][0] == pytest.approx(1.0)
    assert summarise(xs[None])["standard_error"] == [[None] * 3] * 2


def test_tops_have_their_usual_names() -> None:
    heads = find_heads(base_model("llama"))
    values = torch.tensor([[0.1, 0.5, -0.2, 0.0], [0.3, math.nan, 0.2, -0.9]])
    top = [(name, round(value, 3)) for name, value in top_heads(values, heads, 3)]
    assert top == [("L0H1", 0.5), ("L1H0", 0.3), ("L1H2", 0.2)]
    assert len(top_heads(values, heads, 99)) == 7


def test_tied_heads_stand_in_the_order_of_layer_and_head() -> None:
    heads = find_heads(base_model("llama"))
    values = torch.randint(-2, 3, (2, 200), generator=torch.Generator().manual_seed(0)).float()
    by_place = [(f"L{layer}H{head}", values[layer, head].item()) for layer in range(2) for head in range(200)]
    for sign in (1, -1):
        expected = sorted(by_place, key=lambda own: -sign * own[1])  # keeps the order of equals
        assert [name for name, _ in top_heads(sign * values, heads, 400)] == [name for name, _ in expected]


def test_the_table_has_every_score_of_a_head_beside_its_scale() -> None:
    model = models.adapted("llama", granularity="channel", sites=("output", "query"))
    heads, learned = find_heads(model), scales(model)
    maps = {
        "gradient": {400: torch.arange(8.0).view(2, 4), 500: -torch.arange(8.0).view(2, 4)},
        "retrieval_copy": {400: torch.arange(8.0).view(2, 4) ** 2},
    }
    table = compare({**maps, **scale_columns(learned, heads)}, heads)
    row = table["heads"][5]
    assert (row["name"], row["gradient@400"], row["gradient@500"], row["retrieval_copy@400"]) == ("L1H1", 5, -5, 25)
    assert row["scale"] == pytest.approx(learned["model.layers.1.self_attn.o_proj"][1].mean().item())
    assert row["scale_query"] == pytest.approx(learned["model.layers.1.self_attn.q_proj"][1].item())
    assert table["rank_correlations"]["400"]["gradient"]["retrieval_copy"] == pytest.approx(1.0)
    assert table["across_lengths"]["gradient"]["400"]["500"] == pytest.approx(-1.0)
    scale, gradient = as_tensor([r["scale"] for r in table["heads"]]), maps["gradient"][400].flatten()
    assert table["rank_correlations"]["400"]["scale"]["gradient"] == pytest.approx(rank_correlation(scale, gradient))
    assert table["top"]["gradient@400"][0] == ("L1H3", 7.0)
    assert table["bottom"]["gradient@500"][0] == ("L1H3", -7.0)


# --- quadrants -----------------------------------------------------------------------------------------------------


def test_quadrants_go_by_the_signs_at_both_lengths() -> None:
    shorter = torch.tensor([[0.2, -0.1, -0.3, 0.4, 0.0, math.nan]])
    longer = torch.tensor([[0.1, 0.3, -0.2, -0.5, 0.3, 0.1]])
    found = quadrants(shorter, longer)
    assert found.tolist() == [[1, 2, 3, 4, 0, 0]]
    expected = torch.tensor([[0.9, 1.0, 1.1, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(quadrant_scales(found, parse_factors("Q1=0.9, Q3=1.1")), expected)


@pytest.mark.parametrize("text", ["", "Q5=1", "Q1", "Q1=x", "Q1=nan", "Q1=0.9,Q1=1.1", "1=0.9"])
def test_factors_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Write Q1=0.9,Q3=1.1"):
        parse_factors(text)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_chosen_scales_are_an_adapter_like_any_other(name: str, tmp_path: Path) -> None:
    model = base_model(name)
    before, trained = models.logits(model), [p.requires_grad for p in model.parameters()]
    chosen = torch.tensor([[0.9, 1.0, 1.1, 1.0], [1.0, 0.5, 1.0, 0.0]])
    heads = find_heads(model)
    save_head_scales(heads, chosen, tmp_path / "adapter")
    # The model is as it was, and can be wrapped again.
    assert torch.equal(models.logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not hasattr(model, "peft_config")
    by_name = {layer.name: own for layer, own in zip(heads.layers, chosen, strict=True)}
    for key, own in scales(tmp_path / "adapter").items():
        torch.testing.assert_close(own, by_name[key])
    expected = models.logits(models.multiply_by_hand(base_model(name), by_name))
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path / "adapter")
    torch.testing.assert_close(models.logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2


def test_scales_for_a_model_with_an_adapter_and_broken_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for a plain model"):
        save_head_scales(find_heads(models.adapted("llama")), torch.ones(2, 4), tmp_path / "a")
    model = base_model("llama")
    with pytest.raises(ValueError, match=r"o_proj are not finite"):
        save_head_scales(find_heads(model), torch.full((2, 4), math.nan), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert not hasattr(model, "peft_config")
    assert not models.seal_layers(model)
