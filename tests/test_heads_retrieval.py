"""Retrieval scores equal what eager attention weights say, without building attention matrices of the context."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import models
from head_samples import MEASURED, sample, some_rows
from models import base_model
from seal_peft.heads import attention_rows, find_heads, retrieval_map
from versions import GEMMA2_HAS_ITS_SOFTCAP

# Few different tokens: heads hit the right one now and then.
ROWS = some_rows(highest=7)


def eager_weights(model, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """All attention weights, `(heads, tokens, tokens)` for each layer, from transformers itself."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return tuple(own[0] for own in model(torch.tensor([ids]), output_attentions=True).attentions)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3", "gpt2", "olmo2", "deepseek_v3"]
)
def test_weights_of_the_answers_rows_are_those_of_eager_attention(name: str, eager: bool) -> None:
    model = base_model(name)
    if eager:  # else the one that transformers picks, sdpa for most
        model.set_attn_implementation("eager")
    elif name == "gemma2" and not GEMMA2_HAS_ITS_SOFTCAP:
        with pytest.raises(ValueError, match="not the softmax of scaled products"):
            attention_rows(find_heads(model), ROWS[0])
        return
    found = attention_rows(find_heads(model), ROWS[0])
    expected = eager_weights(model, ROWS[0].input_ids)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs[:, -MEASURED - 1 : -1], rtol=1e-4, atol=1e-6)


def test_the_score_is_what_the_definition_says() -> None:
    model = base_model("llama")
    found = retrieval_map(find_heads(model), ROWS)
    for number, row in enumerate(ROWS):
        ids, needle = row.input_ids, row.needle
        for layer, weights in enumerate(eager_weights(base_model("llama"), ids)):
            for head in range(4):
                hits = possible = mass = 0.0
                for place in range(len(ids) - MEASURED, len(ids)):
                    attended = weights[head, place - 1].tolist()
                    top = attended.index(max(attended))
                    possible += ids[place] in [ids[i] for i in needle]
                    hits += top in needle and ids[top] == ids[place]
                    mass += sum(attended[i] for i in needle)
                assert found.copy[number, layer, head] == pytest.approx(hits / max(possible, 1))
                assert found.mass[number, layer, head] == pytest.approx(mass / MEASURED, rel=1e-4)
    assert found.copy.max() > 0


def test_no_attention_matrix_of_the_context_is_built() -> None:
    tokens = 600
    model = models.llama(max_position_embeddings=1024)
    ids = torch.randint(3, 60, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
            return output

    with Largest() as largest:
        retrieval_map(find_heads(model), [sample("long", ids)])
    assert largest.elements < tokens * tokens / 4


def test_attention_of_another_kind_is_refused() -> None:
    def flatter(module, query, key, value, mask, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query * 0.5, key, value, mask, **kwargs)

    tf.AttentionInterface.register("flatter", flatter)
    try:
        model = base_model("llama")
        model.config._attn_implementation = "flatter"
        with pytest.raises(ValueError, match="LlamaAttention in LlamaForCausalLM is not the softmax"):
            retrieval_map(find_heads(model), ROWS)
    finally:
        del tf.AttentionInterface._global_mapping["flatter"]


def test_the_attention_function_is_the_models_own_again_afterwards() -> None:
    before: Callable = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = base_model("llama")
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retrieval_map(find_heads(model), ROWS)
    handle.remove()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    other = base_model("qwen3")
    assert torch.isfinite(models.logits(other)).all()


def test_models_outside_the_attention_interface_and_samples_without_needle_are_refused() -> None:
    with pytest.raises(ValueError, match="FalconForCausalLM does not call its .*Leave retrieval out of --scores"):
        retrieval_map(find_heads(base_model("falcon")), ROWS)
    bare = sample("bare", ROWS[0].input_ids)
    bare.needle.clear()
    with pytest.raises(ValueError, match="Sample 'bare' has no needle"):
        retrieval_map(find_heads(base_model("llama")), [bare])
