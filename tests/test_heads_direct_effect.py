"""Direct effects sum to the logit, on every kind of residual stream, and are those of the definition."""

import pytest
import torch
import transformers as tf

import models
from head_samples import some_rows
from models import ARCHITECTURES, base_model
from seal_peft.heads import direct_effect, find_heads

ROWS = some_rows()


def biased(name: str) -> torch.nn.Module:
    """A tiny model all of whose biases and norms count."""
    model = base_model(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.5)
    return model


def raw_logits(model, ids: list[int]) -> torch.Tensor:
    """What the head module puts out at the last position, before the model scales or caps it."""
    found = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, output: found.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return found[0][0, -1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parts_sum_to_the_logit(name: str) -> None:
    model = biased(name)
    found = direct_effect(find_heads(model), ROWS)
    for number, row in enumerate(ROWS):
        logits = raw_logits(model, row.input_ids[: row.first + 1])
        right = row.input_ids[row.first + 1]
        best_other = max((logits[i].item(), i) for i in range(len(logits)) if i != right)[1]
        assert found.wrong[number] == best_other
        for effect, wanted in ((found.logit, logits[right]), (found.difference, logits[right] - logits[best_other])):
            parts = effect.heads.nansum((1, 2)) + effect.mlps.sum(1) + effect.biases + effect.embedding
            assert parts[number].item() == pytest.approx(wanted.item(), abs=2e-5)
            assert effect.total[number].item() == pytest.approx(wanted.item(), abs=2e-5)
            assert effect.rounding.abs().max() < 2e-5
    assert found.logit.heads.abs().mean() > 0.01
    assert found.logit.mlps.abs().mean() > 0.01


def test_shares_of_a_llama_are_those_of_the_definition() -> None:
    model, row = base_model("llama"), ROWS[2]
    streams, z = [], []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: z.append(args[0][0, -1]))
        layer.mlp.register_forward_hook(lambda m, args, output: streams.append(output[0, -1]))
    model.model.norm.register_forward_pre_hook(lambda m, args: streams.append(args[0][0, -1]))
    ids = row.input_ids[: row.first + 1]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    mlps, stream, first_layers = streams[:2], streams[2], z[:2]
    found = direct_effect(find_heads(model), [row], wrong=[5]).difference
    unembedding = model.lm_head.weight[row.input_ids[row.first + 1]] - model.lm_head.weight[5]
    frozen = model.model.norm.weight / (stream.square().mean() + model.config.rms_norm_eps).sqrt()
    for layer in range(2):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        for head in range(4):
            written = weight[:, head * 12 : head * 12 + 12] @ first_layers[layer][head * 12 : head * 12 + 12]
            share = (frozen * written) @ unembedding
            assert found.heads[0, layer, head].item() == pytest.approx(share.item(), abs=1e-5)
        assert found.mlps[0, layer].item() == pytest.approx(((frozen * mlps[layer]) @ unembedding).item(), abs=1e-5)
    embedding = (frozen * model.model.embed_tokens.weight[ids[-1]]) @ unembedding
    assert found.embedding[0].item() == pytest.approx(embedding.item(), abs=1e-5)


def test_post_norms_weigh_heads_as_they_weigh_their_sum() -> None:
    model, row = biased("gemma2"), ROWS[2]
    z = []
    block = model.model.layers[1]
    block.self_attn.o_proj.register_forward_pre_hook(lambda m, args: z.append(args[0][0, -1]))
    normed = []
    block.post_attention_layernorm.register_forward_hook(lambda m, args, output: normed.append((args[0], output)))
    last = []
    model.model.norm.register_forward_hook(lambda m, args, output: last.append((args[0][0, -1], output[0, -1])))
    with torch.no_grad():
        model(input_ids=torch.tensor([row.input_ids[: row.first + 1]]))
    found = direct_effect(find_heads(model), [row]).logit
    (into, out), (stream, read) = normed[0], last[0]
    post, final = out[0, -1] / into[0, -1], read / stream
    head = model.get_output_embeddings().weight[row.input_ids[row.first + 1]]
    for number in range(4):
        columns = slice(number * 12, number * 12 + 12)
        written = block.self_attn.o_proj.weight[:, columns] @ z[0][columns]
        assert found.heads[0, 1, number].item() == pytest.approx(((final * post * written) @ head).item(), abs=1e-4)


def test_multipliers_of_granite_count() -> None:
    config = {"head_dim": 12, "residual_multiplier": 0.22, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
    model = models.causal(tf.GraniteConfig, **config)
    found = direct_effect(find_heads(model), ROWS).logit
    for number, row in enumerate(ROWS):
        raw = raw_logits(model, row.input_ids[: row.first + 1])[row.input_ids[row.first + 1]]
        assert found.total[number].item() == pytest.approx(raw.item(), abs=1e-5)
    assert found.rounding.abs().max() < 1e-5


@pytest.mark.parametrize("merged", [False, True])
def test_with_an_adapter_heads_weigh_what_the_adapter_makes_of_them(merged: bool) -> None:
    model = models.adapted("llama", granularity="head")
    if merged:
        model.merge_adapter()
    after = direct_effect(find_heads(model), ROWS)
    with model.disable_adapter():
        before = direct_effect(find_heads(model), ROWS, wrong=after.wrong)
    assert after.logit.rounding.abs().max() < 1e-5
    # The first layer's heads read the same context before and after, so only their scale and the last norm differ.
    scales = next(iter(models.seal_layers(model).values())).offset("default") + 1
    ratio = after.logit.heads[:, 0] / before.logit.heads[:, 0] / scales.detach()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert (after.logit.heads - before.logit.heads).abs().max() > 0.05


def test_in_bf16_what_its_sums_round_away_is_a_part_of_its_own() -> None:
    found = direct_effect(find_heads(base_model("qwen3").bfloat16()), ROWS).logit
    parts = found.heads.nansum((1, 2)) + found.mlps.sum(1) + found.biases + found.embedding + found.rounding
    torch.testing.assert_close(parts, found.total)
    assert 1e-6 < found.rounding.abs().max() < 0.1


def test_streams_of_another_kind_are_refused_by_name() -> None:
    hybrid = models.causal(tf.Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    with pytest.raises(ValueError, match="no meaning for Lfm2ForCausalLM: 1 of its layers have no attention heads"):
        direct_effect(find_heads(hybrid), ROWS)
    post_norm = {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0, "do_layer_norm_before": False}
    with pytest.raises(ValueError, match="OPTForCausalLM: layer 0 adds something else"):
        direct_effect(find_heads(models.causal(tf.OPTConfig, **post_norm)), ROWS)


def test_a_layer_that_adds_what_no_module_puts_out_is_refused() -> None:
    model = base_model("llama")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.01)
    with pytest.raises(ValueError, match="LlamaForCausalLM: .*layer 1 adds something else"):
        direct_effect(find_heads(model), ROWS)
