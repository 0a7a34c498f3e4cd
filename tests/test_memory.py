"""Memory policies: the same gradients from less memory, and as much memory as there is."""

import copy
import gc
import sys
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from custom_model import base as contract_base
from models import HEAD_DIM, HEADS, HIDDEN, INPUT_IDS, LAYERS, base_model, draw_scales, seeded
from seal_peft import SealConfig, add_beside
from seal_peft.memory import apply_memory_policy
from seal_peft.memory.keep import Keep, Products, find_layers, kind_of, run_layer, set_runners
from seal_peft.memory.measure import LayerCost, measure_layers
from seal_peft.memory.policy import AUTO, LADDER, Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rates  # noqa: E402

TOKENS = INPUT_IDS.shape[1]
MLP = 40


def trained(name="llama", **settings):
    model = get_peft_model(base_model(name), SealConfig(**settings)).train()
    draw_scales(model)
    return model


def with_lora():
    model = trained(granularity="channel")
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return add_beside(model, lora, "lora").train()


def gradients(model):
    torch.manual_seed(0)  # GPT-2 drops out
    model.zero_grad()
    model(input_ids=INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def keep_everywhere(model, keep):
    costs = measure_layers(model, 1, 4)  # another length than the one that is trained
    return set_runners(find_layers(model), [partial(run_layer, keep, cost.products) for cost in costs])


# GPT-OSS changes outputs of matrix products in place; Gemma 3 has a norm behind its last one; GPT-2 drops out.
MODELS = {
    **{name: partial(trained, name) for name in ("llama", "qwen3", "gemma3_text", "gpt_oss", "gpt2")},
    "query": partial(trained, granularity="channel", sites=("output", "query")),
    "self-extend": partial(trained, self_extend={"group_size": 2, "window": 3}),
    "lora": with_lora,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_rung_of_the_ladder_gives_the_same_gradients_bit_for_bit(name):
    model = MODELS[name]()
    expected = gradients(model)
    for keep in [*LADDER.values(), Keep(inputs=True), Keep(matmuls=True)]:
        restore = keep_everywhere(model, keep)
        found = gradients(model)
        restore()
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), keep


class Executed(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[kind_of(op)] += "backward" not in str(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rung", "attentions", "products"),
    [
        # Of the seven products of a layer the last is never run again: nothing reads it in the backward pass.
        ("recompute all, inputs in host memory", 2, 7 + 6),
        ("keep inputs and attention", 1, 7 + 6),
        ("keep inputs, attention and matrix products", 1, 7),
        ("keep all", 1, 7),
    ],
)
def test_what_is_kept_does_not_run_again(rung, attentions, products):
    model = trained()
    with Executed() as plain:
        gradients(model)
    keep_everywhere(model, LADDER[rung])
    with Executed() as executed:
        gradients(model)
    # Products of the backward pass, and the one of the logits, are the same under every policy.
    again = executed.counts["matmuls"] - plain.counts["matmuls"]
    assert again == LAYERS * (products - 7)
    assert executed.counts["attention"] - plain.counts["attention"] == LAYERS * (attentions - 1)


def test_the_bytes_of_a_layer_are_those_of_its_formula():
    model = trained(granularity="channel").bfloat16()
    # Tensors of one token, in units of 2 bytes; the norms work in fp32 and save a factor for each token.
    heads, keys = HEADS * HEAD_DIM, 2 * HEAD_DIM
    norm = 2 * HIDDEN + 2
    attention = heads + 2 * HEADS  # the output, and the logarithm of the sum in fp32
    queries = heads + 2 * keys
    everything = 2 * norm + queries + attention + 3 * MLP
    costs = measure_layers(model, 1, 32)
    assert costs[1].inputs == 2 * 32 * HIDDEN
    assert costs[1].attention == 2 * 32 * attention
    assert costs[1].matmuls == 2 * 32 * (heads + 2 * keys + HIDDEN + 2 * MLP)
    small = 4 * heads  # the scales in fp32
    # torch's attention on CPUs saves keys and values repeated for all query heads.
    assert costs[1].everything in (2 * 32 * (everything + extra) + small for extra in (0, 2 * (heads - keys)))


def test_a_batch_of_rows_keeps_what_its_rows_keep_alone():
    model = trained(granularity="channel")
    alone, together = (measure_layers(model, rows, 64)[1] for rows in (1, 3))
    assert together.everything == pytest.approx(3 * alone.everything, rel=0.01)
    assert together.products == alone.products


def test_layers_below_the_lowest_scale_keep_nothing():
    lower, upper = measure_layers(trained(layers_to_transform=[1]), 1, 8)
    assert lower == LayerCost()
    assert upper.everything > 0


def test_measuring_changes_neither_the_model_nor_the_random_numbers():
    model = trained("gpt2").eval()
    before = torch.get_rng_state()
    measure_layers(model, 2, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_measuring_leaves_no_tensor_behind(name):
    def tensors():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    model = MODELS[name]()
    measure_layers(model, 1, 8)  # rotary angles may be made at the first call
    before = tensors()
    measure_layers(model, 1, 8)
    assert tensors() == before


# --- choosing ------------------------------------------------------------------------------------------------------

COST = LayerCost(inputs=100, attention=110, matmuls=900, everything=1700, products=Products())
LEAST = 1.75 * 1700  # one layer that is recomputed, and its gradients


def layers(*parts):
    return [AUTO[part] for part in parts]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (LEAST, layers(0, 0, 0)),
        (LEAST + 3 * 100 + 2 * 110, layers(0, 1, 1)),
        (LEAST + 3 * 210 + 890, layers(1, 1, 1)),
        (LEAST + 3 * 210 + 900, layers(1, 1, 2)),
        (LEAST + 3 * 1110 + 590, layers(2, 2, 3)),
        (LEAST + 3 * 1700, layers(3, 3, 3)),
    ],
)
def test_memory_goes_to_what_saves_most_time_upper_layers_first(budget, expected):
    assert list(Plan((COST,) * 3, 10, round(budget)).choose(10)) == expected


_COSTS = st.builds(LayerCost, *[st.integers(0, 1000)] * 4)


@given(st.lists(_COSTS, min_size=1, max_size=5), st.integers(0, 20_000), st.integers(1, 64))
def test_a_plan_never_needs_more_than_there_is_if_anything_fits(costs, budget, tokens):
    plan = Plan(tuple(costs), 64, budget)
    least = plan.bytes_for((AUTO[0],) * len(costs), tokens)
    assert plan.bytes_for(plan.choose(tokens), tokens) <= max(least, budget) + len(costs)


@given(st.integers(1, 64))
def test_shorter_batches_keep_more(tokens):
    plan = Plan((COST,) * 3, 64, round(LEAST) + 800)
    ranks = [AUTO.index(keep) for keep in plan.choose(tokens)]
    longest = [AUTO.index(keep) for keep in plan.choose(64)]
    assert sum(ranks) >= sum(longest)
    assert list(Plan((COST,) * 3, 64, round(LEAST) + 5100).choose(tokens)) == layers(3, 3, 3)


# --- the three policies --------------------------------------------------------------------------------------------


def give_memory(monkeypatch, available):
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(available, 0))


@pytest.mark.parametrize("policy", ["auto", "fast", "low"])
def test_every_policy_gives_the_same_gradients_and_can_be_taken_back(policy, monkeypatch):
    model = trained(granularity="channel")
    with FlopCounterMode(display=False) as plain:
        expected = gradients(model)
    cost = measure_layers(model, 2, TOKENS)[1]
    # As much as one rung needs, and half a layer more: the layers then differ.
    give_memory(monkeypatch, round(1.75 * cost.everything + 2.5 * (cost.attention + cost.inputs) + cost.matmuls))
    applied = apply_memory_policy(model, policy, tokens=TOKENS, rows=2)
    assert applied.summary.startswith(f"{policy}: ")
    with FlopCounterMode(display=False) as counted:
        found = gradients(model)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    flops = {"auto": 1.1, "fast": 1.0, "low": 1.3}[policy]
    assert counted.get_total_flops() == pytest.approx(flops * plain.get_total_flops(), rel=0.15)
    applied.restore()
    assert not any(layer.gradient_checkpointing for layer in find_layers(model))


def test_auto_says_what_it_chose_and_why(monkeypatch):
    model = trained()
    give_memory(monkeypatch, 2**30)
    summary = apply_memory_policy(model, tokens=40).summary
    assert summary == "auto: at 40 tokens 2 of 2 layers keep all; takes 0.0 of 1.0 GiB"
    give_memory(monkeypatch, 0)
    summary = apply_memory_policy(model, tokens=40).summary
    assert "2 of 2 layers recompute all; " in summary  # and nothing goes to host memory unasked
    assert summary.endswith("so it may not fit")


def test_models_that_transformers_cannot_checkpoint_keep_all_and_auto_says_why():
    model = contract_base("custom")
    assert apply_memory_policy(model, tokens=8).summary.endswith("since transformers cannot checkpoint this model")
    with pytest.raises(ValueError, match="cannot checkpoint .* `fast`"):
        apply_memory_policy(model, "low")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"policy": "lwo"}, "'lwo' is not known. Use one of: auto, fast, low"),
        ({}, "tokens=0 .*needs the size of the largest batch"),
        ({"tokens": 8, "rows": 0}, "rows=0"),
    ],
)
def test_bad_arguments_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        apply_memory_policy(trained(), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has a host to go to")
def test_inputs_in_host_memory_give_the_same_gradients_and_leave_the_gpu():
    config = copy.deepcopy(base_model("llama").config)
    config.num_hidden_layers = 6
    model = get_peft_model(seeded(config, LlamaForCausalLM), SealConfig(granularity="channel")).train()
    draw_scales(model)
    model.to("cuda")
    ids = torch.randint(0, 60, (128, 100), device="cuda")  # inputs of more than a mebibyte

    def run(keep):
        restore = keep_everywhere(model, keep)
        for _ in range(3):  # a step follows the other without a pause; the first allocates what libraries work in
            model.zero_grad()
            before = torch.cuda.memory_allocated()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            held = torch.cuda.memory_allocated() - before
            loss.backward()
            del loss
        restore()
        return [p.grad for p in model.parameters() if p.requires_grad], held

    (expected, more), (found, less) = run(Keep(inputs=True)), run(Keep())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    # Of six inputs the lowest needs no gradient, and the uppermost stays for the backward pass that begins there.
    assert more - less > 3 * 4 * ids.numel() * HIDDEN


# --- the benchmark's floor -----------------------------------------------------------------------------------------


def test_the_floor_of_the_benchmark_counts_what_a_step_without_recomputing_runs():
    model = trained()
    with FlopCounterMode(display=False) as counted:
        labels = INPUT_IDS[:1, -3:]
        model(input_ids=INPUT_IDS[:1], labels=labels, shift_labels=labels, logits_to_keep=3).loss.backward()
    count = rates.flops(model.config, TOKENS, 3)
    by_op = counted.get_flop_counts()["Global"]
    products = sum(value for op, value in by_op.items() if "mm" in str(op))
    # Older versions of transformers compute the rotary angles as a product, too.
    assert products == pytest.approx(count["linear forward"] + count["linear backward"], rel=1e-3)
