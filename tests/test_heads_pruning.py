"""Pruning maps equal full passes, on every architecture, while lower layers and shared contexts are computed once."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import models
from head_samples import logprob, prune_slowly, sample, some_rows
from models import ARCHITECTURES, base_model
from seal_peft import SealConfig, add_beside
from seal_peft.heads import find_heads, head_name, kernels, parse_head, prune_channels, pruning_map, without_head
from seal_peft.heads.inputs import collate, score_logits
from seal_peft.heads.layers import scoring
from seal_peft.heads.pruning import head_means
from seal_peft.heads.resume import group_by_beginning
from seal_peft.tuner.geometry import TARGET_MODULES

ROWS = some_rows()
LLAMA = ARCHITECTURES["llama"].projections


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.05  # heads are felt, or any map would do


# One of each kind: grouped queries, norms of queries, post-norms, softcaps, sinks, sliding windows, latent attention,
# fused and transposed projections, parallel branches, experts, learned positions, a part of a larger model.
KINDS = "llama qwen3 gemma2 gemma3_text gpt_oss olmo2 deepseek_v3 gpt2 opt falcon mixtral gemma4 qwen2_5_vl".split()


@pytest.mark.parametrize("name", [name for name in KINDS if name in ARCHITECTURES])
def test_the_map_equals_a_full_pass_for_every_head_and_sample(name: str) -> None:
    model = base_model(name)
    heads = find_heads(model)
    assert len(group_by_beginning(heads, ROWS)) == 2
    assert_close(pruning_map(heads, ROWS).logprob, prune_slowly(model, ROWS, ARCHITECTURES[name].projections))


def test_a_row_at_a_time_the_map_equals_the_full_passes_bit_for_bit() -> None:
    heads, row = find_heads(base_model("llama")), ROWS[2]
    batch, labels = collate([row], torch.device("cpu"))
    with torch.inference_mode():
        before = score_logits(heads.model(**batch).logits, labels).logprob
        for layer in range(2):
            for head in range(4):
                with without_head(heads, layer, head):
                    after = score_logits(heads.model(**batch).logits, labels).logprob
                assert pruning_map(heads, [row], batch_tokens=1).logprob[0, layer, head] == after - before


def test_heads_of_hybrid_models_stand_in_their_own_layers() -> None:
    model = models.causal(tf.Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    heads = find_heads(model)
    assert [layer.number for layer in heads.layers] == [1]
    assert len(group_by_beginning(heads, ROWS)) == len(ROWS)  # a convolution's state is no keys and values
    names = {"model.layers.1.self_attn.out_proj": (4, 8)}
    assert_close(pruning_map(heads, ROWS).logprob, prune_slowly(model, ROWS, names))


def test_contexts_are_not_shared_where_keys_turn_by_the_length_of_the_whole_input() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = models.llama(max_position_embeddings=16, rope_parameters=rope)
    heads, rows = find_heads(model), [row for row in ROWS if row.id != "alone"]
    assert len(group_by_beginning(heads, rows)) == 3
    for row in rows:  # one at a time: transformers keeps the frequencies of the longest input so far
        fresh = models.llama(max_position_embeddings=16, rope_parameters=rope)
        assert_close(pruning_map(find_heads(fresh), [row]).logprob, prune_slowly(model, [row], LLAMA))


def test_layers_below_are_computed_once_and_heads_are_rows_of_one_batch() -> None:
    model = models.causal(tf.LlamaConfig, head_dim=12, num_hidden_layers=4)
    rows_seen: dict[int, list[int]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, number=number: rows_seen.setdefault(number, []).append(len(output))
        )
    pruning_map(find_heads(model), [ROWS[2]])
    # The unchanged row, then the four heads of a layer at once, in the layers from their own on.
    assert rows_seen == {number: [1] + [4] * (number + 1) for number in range(4)}


def test_samples_with_one_context_read_it_once() -> None:
    model = base_model("llama")
    tokens = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: tokens.append(output.shape[:2]))
    pruning_map(find_heads(model), [row for row in ROWS if row.id != "alone"])
    assert [tuple(shape) for shape in tokens] == [(1, 14), (12, 6), (4, 14), (12, 6)]


def test_in_bf16_a_shared_context_changes_no_bit() -> None:
    # Eager attention, because torch's on CPUs rounds a row by how many rows stand beside it.
    model = models.llama(attn_implementation="eager").bfloat16()
    heads, rows = find_heads(model), [row for row in ROWS if row.id != "alone"]
    found = pruning_map(heads, rows).logprob
    for number, row in enumerate(rows):
        batch, labels = collate([row], torch.device("cpu"))
        with scoring(heads), torch.inference_mode():
            before = score_logits(heads.model(**batch).logits, labels).logprob
            for layer, head in ((0, 0), (0, 3), (1, 2)):
                with without_head(heads, layer, head):
                    after = score_logits(heads.model(**batch).logits, labels).logprob
                # The logits are in fp32, whose rounding is all that is left; a bit in bf16 is a thousand times more.
                assert found[number, layer, head].item() == pytest.approx((after - before).item(), abs=2e-6)
    assert found.abs().max() > 0.05


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_ends_are_padded_to_large_products_and_never_past_the_positions_of_the_model(name: str) -> None:
    model, rows = base_model(name), ROWS[:2]
    length = max(len(row.input_ids) for row in rows)
    widths = []
    for free in (100, 1, 0):
        model.config.max_position_embeddings = length + free
        seen = []
        handle = (
            find_heads(model).blocks[0].register_forward_hook(lambda m, args, out, s=seen: s.append(args[0].shape))
        )
        found = pruning_map(find_heads(model), rows, batch_tokens=1).logprob
        handle.remove()
        assert_close(found, prune_slowly(model, rows, ARCHITECTURES[name].projections))
        widths.append(min(shape[1] for shape in seen))
    assert widths == [length // 2, length - 14 + 1, length - 14]


def test_attention_takes_one_kernel_for_a_text_and_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.bias import CausalBias
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations import sdpa_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks, calls = [], []

    def watched(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def called(query, key, value, attn_mask, **kwargs):
        calls.append((type(attn_mask), query.shape[1], key.shape[1], kwargs["enable_gqa"]))
        return scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watched)
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", called)
    pruning_map(find_heads(base_model("llama")), ROWS[:2])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is watched
    assert set(masks) == {None}
    assert set(calls) == {(CausalBias, 4, 2, True)}  # two heads share keys and values, which nobody repeats
    assert torch.backends.cuda.cudnn_sdp_enabled()
    calls.clear()
    pruning_map(find_heads(base_model("deepseek_v3")), ROWS[:2])  # its keys are wider than its values
    assert not calls
    assert {type(mask) for mask in masks} == {type(None), CausalBias}


def test_the_result_does_not_depend_on_the_size_of_a_batch() -> None:
    found = [pruning_map(find_heads(base_model("qwen3")), ROWS, batch_tokens=n).logprob for n in (1, 50, 10**6)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_with_an_adapter_is_pruned_as_it_is(merged: bool) -> None:
    model = models.adapted("llama", granularity="channel", sites=("output", "query"))
    bare = pruning_map(find_heads(base_model("llama")), ROWS).logprob
    if merged:
        model.merge_adapter()
    found = pruning_map(find_heads(model), ROWS).logprob
    assert_close(found, prune_slowly(model, ROWS, LLAMA))
    assert (found - bare).abs().max() > 0.05
    with model.disable_adapter():
        assert_close(pruning_map(find_heads(model), ROWS).logprob, bare)


def test_a_model_with_lora_beside_seal_is_pruned_as_it_is() -> None:
    lora = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model = add_beside(models.adapted("llama"), lora, "lora")
    assert_close(pruning_map(find_heads(model), ROWS).logprob, prune_slowly(model, ROWS, LLAMA))


def test_mean_ablation_puts_the_mean_over_all_tokens_there() -> None:
    model = base_model("gemma2")
    seen: dict[str, list[torch.Tensor]] = {}
    names = ARCHITECTURES["gemma2"].projections
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
        )
        for name in names
    ]
    for row in ROWS:
        logprob(model, row)
    for handle in handles:
        handle.remove()
    means = [torch.cat(seen[name]).mean(0) for name in names]
    for own, mean in zip(head_means(find_heads(model), ROWS), means, strict=True):
        torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-6)
    expected = prune_slowly(model, ROWS, names, fill=means)
    assert_close(pruning_map(find_heads(model), ROWS, "mean").logprob, expected)


def test_channels_of_a_head_equal_full_passes() -> None:
    model = base_model("olmo2")
    heads = find_heads(model)
    position, head = parse_head("L1H2", heads)
    found = prune_channels(heads, ROWS[2:], position, head).logprob
    # A channel is a head of size 1: the slow way is told so.
    narrow = {name: (48, 1) for name in list(ARCHITECTURES["olmo2"].projections)[1:]}
    expected = prune_slowly(model, ROWS[2:], narrow)[:, 0, 24:36]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.01


def test_accuracies_say_what_greedy_decoding_would_write() -> None:
    model = base_model("llama")
    prompt = ROWS[2].input_ids[:12]
    with torch.no_grad():
        written = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0]
    right = sample("right", written.tolist())
    almost = sample("almost", [*written.tolist()[:-1], (int(written[-1]) + 1) % 64])
    base = pruning_map(find_heads(model), [right, almost]).base
    assert base.exact.tolist() == [1.0, 0.0]
    torch.testing.assert_close(base.tokens, torch.tensor([1.0, 2 / 3]))
    pruned = pruning_map(find_heads(model), [right])
    heads = find_heads(model)
    for layer in range(2):
        for head in range(4):
            with without_head(heads, layer, head), torch.no_grad():
                again = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert pruned.exact[0, layer, head] == float(torch.equal(again[0], written)) - 1


def test_bf16_values_stay_close_to_those_of_full_passes_in_bf16() -> None:
    model = base_model("llama").bfloat16()
    head = model.lm_head
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight.float())
    expected = prune_slowly(model, ROWS, LLAMA)
    del head.forward
    found = pruning_map(find_heads(model), ROWS).logprob
    assert (found - expected).mean(0).abs().max() < 1e-2  # tiny models round coarsely; benchmarks/heads.py measures
    alone = pruning_map(find_heads(model), ROWS[2:3], batch_tokens=1).logprob
    torch.testing.assert_close(alone, expected[2:3], rtol=0, atol=1e-3)


def test_nothing_is_left_behind_also_after_an_error() -> None:
    model = base_model("mistral")
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    before = models.logits(model)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 5:
            raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pruning_map(find_heads(model), ROWS)
    handle.remove()
    pruning_map(find_heads(model), ROWS)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__]
    assert torch.equal(models.logits(model), before)


def test_what_has_no_meaning_is_refused_by_name() -> None:
    heads = find_heads(base_model("llama"))
    with pytest.raises(ValueError, match="ablation='noise' was given; use 'zero' or 'mean'"):
        pruning_map(heads, ROWS, "noise")
    with pytest.raises(ValueError, match=r"no head 'L2H0'.*up to L1H3"):
        parse_head("L2H0", heads)
    t5 = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a decoder-only model"):
        find_heads(tf.T5ForConditionalGeneration(t5))
    bert = tf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="BertForMaskedLM is not a decoder-only model"):
        find_heads(tf.BertForMaskedLM(bert))


def test_an_unknown_model_is_found_by_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("llama")
    monkeypatch.delitem(TARGET_MODULES, "llama")
    with pytest.raises(ValueError, match="target_modules"):
        find_heads(model)
    heads = find_heads(model, SealConfig(target_modules=["o_proj"], head_dim=6))
    assert heads.shape == (2, 8)
    assert head_name(heads.layers[1].number, 7) == "L1H7"


def test_layers_that_hand_on_several_streams_are_refused() -> None:
    model = models.causal(
        tf.Gemma3nTextConfig,
        head_dim=12,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        activation_sparsity_pattern=[0.0, 0.0],
        laurel_rank=4,
        altup_num_inputs=2,
    )
    with pytest.raises(ValueError, match="hand on .*Use gradient in place of pruning in --scores"):
        pruning_map(find_heads(model), ROWS)


def test_prompt_tuning_is_refused() -> None:
    model = get_peft_model(base_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="not analysed under prompt tuning"):
        find_heads(model)
