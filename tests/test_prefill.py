"""Prompts of different lengths are read apart, and get the answers that each of them gets alone."""

from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Lfm2Config, Qwen3NextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import models
from seal_peft import SealConfig
from seal_peft.generation import generate_answers
from seal_peft.prefill import can_prefill_apart, groups_of, prefill

PROMPTS = [torch.randint(3, models.VOCAB, (n,), generator=torch.manual_seed(n)).tolist() for n in (30, 41, 9, 1, 25)]
INVOCATION = [7, 11]
LIMIT = 10
EXTENSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}},
    "self-extend": {"self_extend": {"group_size": 3, "window": 8}},
}


class Ids:
    """A tokenizer whose texts are the ids themselves, and that has no end of text."""

    pad_token_id, eos_token_id = 0, None

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [str(row) for row in ids]


def answers(model: nn.Module, prompts: list[list[int]]) -> list[str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.generation_config.eos_token_id = None
    return generate_answers(model, Ids(), prompts, LIMIT)


def passes(model: nn.Module, prompts: list[list[int]]) -> int:
    """How often a model runs for the answers to a batch."""
    runs: list[int] = []
    hook = model.register_forward_hook(lambda *args: runs.append(1))
    answers(model, prompts)
    hook.remove()
    return len(runs)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_batch_gets_the_answers_of_its_prompts_alone(name: str) -> None:
    model = models.base_model(name)
    alone = [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    assert answers(model, PROMPTS) == alone
    assert can_prefill_apart(model) == (name != "qwen2_5_vl")  # whose positions have three dimensions


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_with_an_adapter_and_its_extension_it_does_too(extension: str) -> None:
    model = get_peft_model(models.llama(), SealConfig(task_type="CAUSAL_LM", **EXTENSIONS[extension])).eval()
    models.draw_scales(model)
    alone = [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert can_prefill_apart(model)
    assert answers(model, PROMPTS) == alone
    assert passes(model.get_base_model(), PROMPTS) == len(PROMPTS) - 1 + LIMIT  # nothing to read of the shortest


def test_no_mask_of_all_tokens_times_all_tokens_is_made() -> None:
    masks: list[tuple[int, Any]] = []

    def noting(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = args[2] if len(args) > 2 else kwargs["attention_mask"]
        masks.append((query.shape[2], mask))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    AttentionMaskInterface.register("noting", sdpa_mask)
    model = models.llama(attn_implementation="noting")
    answers(model, PROMPTS)
    assert {length for length, _ in masks} == {1, *(len(prompt) - 1 for prompt in PROMPTS if len(prompt) > 1)}
    assert all(mask is None for length, mask in masks if length > 1)


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in models.ARCHITECTURES if name != "qwen2_5_vl"])
def test_prompts_that_are_read_together_leave_the_cache_of_prompts_read_alone(name: str) -> None:
    _compare_groups(models.base_model(name))


@torch.inference_mode()
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_they_do_so_with_an_adapter_and_its_extension(extension: str) -> None:
    model = get_peft_model(models.llama(), SealConfig(task_type="CAUSAL_LM", **EXTENSIONS[extension])).eval()
    models.draw_scales(model)
    _compare_groups(model)


def _compare_groups(model: nn.Module) -> None:
    alone = prefill(model, PROMPTS, [[0], [1], [2], [4]], checked=6)
    together = prefill(model, PROMPTS, [[0, 4], [2, 1]], checked=6)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=40))
def test_a_gpu_reads_few_tokens_together_and_a_cpu_one_prompt_after_the_other(lengths: list[int]) -> None:
    prompts = [[3] * length for length in lengths]
    for device in ("cuda", "cpu"):
        groups = groups_of(prompts, torch.device(device))
        assert sorted(row for group in groups for row in group) == [i for i, n in enumerate(lengths) if n > 1]
        for number, group in enumerate(groups):
            longest = max(lengths[row] for row in group)
            assert len(group) == 1 or (device == "cuda" and len(group) * longest <= 8192)
            # A group that has room for one more is the last.
            assert device == "cpu" or number == len(groups) - 1 or (len(group) + 1) * longest > 8192


def _hybrid() -> nn.Module:
    return models.causal(
        Qwen3NextConfig, layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2
    )


def _convolution() -> nn.Module:
    return models.causal(Lfm2Config, layer_types=["conv", "full_attention"])


def _invoked() -> nn.Module:
    """An aLoRA adapter, in force from the tokens on with which the prompts end."""
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, alora_invocation_tokens=INVOCATION
    )
    return get_peft_model(models.llama(), config).eval()


def _dynamic() -> nn.Module:
    settings = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}
    return get_peft_model(models.llama(), SealConfig(task_type="CAUSAL_LM", **settings)).eval()


@pytest.mark.parametrize("build", [_hybrid, _convolution, _invoked, _dynamic])
def test_what_keys_and_values_do_not_say_all_about_is_read_as_a_batch(build: Any) -> None:
    model, prompts = build(), [prompt + INVOCATION for prompt in PROMPTS[:3]]
    assert not can_prefill_apart(model)
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]


@pytest.mark.skipif(not hasattr(tf, "Gemma4TextConfig"), reason="younger than the oldest transformers")
def test_layers_that_share_keys_and_values_of_others_are_no_hindrance() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = models.gemma4_text(
        num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2, hidden_size_per_layer_input=8
    )
    assert can_prefill_apart(model)
    assert answers(model, PROMPTS) == [answers(model, [prompt])[0] for prompt in PROMPTS]


def test_prompts_that_were_learned_stand_before_a_whole_batch() -> None:
    model = get_peft_model(models.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    assert not can_prefill_apart(model)
    assert can_prefill_apart(model.get_base_model())
