"""Self-Extend on a loaded model: equal to its definition on unrotated heads, whatever the batch, cache and dtype."""

import copy

import pytest
import torch
import transformers as tf
from transformers.models.diffllama import modeling_diffllama

import models
from seal_peft.context import flash, grouped
from seal_peft.context.probe import rotary_layers
from seal_peft.context.rope import text_config
from seal_peft.context.self_extend import apply_self_extend, read_self_extend
from self_extend_oracle import oracle, turn

IDS = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def extended(model, group_size=4, window=8):
    apply_self_extend(model, group_size=group_size, window=window)
    return model


def stablelm():
    return models.causal(tf.StableLmConfig, partial_rotary_factor=0.5)


def mistral():
    return models.causal(tf.MistralConfig, head_dim=models.HEAD_DIM, sliding_window=None)


def yarn():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 32}
    return models.llama(rope_parameters=rope)


def in_pairs():
    return models.base_model("cohere")


BUILDS = {name: lambda name=name: models.base_model(name) for name in ("llama", "qwen3", "gemma3_text", "smollm3")}
BUILDS |= {name: lambda name=name: models.base_model(name) for name in ("phi3", "gpt_neox", "gemma3")}
BUILDS |= {"stablelm": stablelm, "mistral": mistral, "yarn": yarn, "cohere": in_pairs}


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "window"), [(4, 8), (3, 7), (5, 1), (1, 9), (50, 13), (2, 39)])
def test_it_is_the_definition_for_any_group_and_window(group_size, window):
    model = models.llama()
    expected = logits(oracle(model, group_size, window))
    torch.testing.assert_close(logits(extended(model, group_size, window)), expected, **TOLERANCE)


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_the_definition_on_every_kind_of_rotation(name):
    model = BUILDS[name]()
    expected, plain = logits(oracle(model, 3, 7, interleaved=name == "cohere")), logits(model)
    applied = apply_self_extend(model, group_size=3, window=7)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    assert (expected - plain).abs().max() > 0.1
    applied.restore()
    assert torch.equal(logits(model), plain)
    assert not hasattr(text_config(model), "self_extend")


def test_a_window_over_the_whole_input_is_ordinary_attention_bit_for_bit():
    model = models.llama()
    plain, mask = logits(model), torch.ones_like(IDS)
    mask[1, :9] = 0
    padded = logits(model, attention_mask=mask)
    extended(model, 6, 40)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model, attention_mask=mask)[mask.bool()], padded[mask.bool()])
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :20], use_cache=True).past_key_values
        later = model(input_ids=IDS[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(later, plain[:, 20:], **TOLERANCE)


def test_groups_of_one_are_ordinary_attention():
    plain = logits(models.llama())
    torch.testing.assert_close(logits(extended(models.llama(), 1, 5)), plain, **TOLERANCE)


def test_sliding_layers_stay_as_they_are():
    model = models.gemma3(layer_types=["sliding_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="its layers have sliding windows"):
        apply_self_extend(model, group_size=4, window=8)
    with pytest.raises(ValueError, match="its layers have sliding windows"):
        apply_self_extend(models.base_model("mistral"), group_size=4, window=8)
    # One full layer among sliding ones: the oracle gives the sliding ones ordinary attention.
    model = models.gemma3()
    mask = torch.ones_like(IDS)
    mask[0, :11] = 0
    together = logits(extended(copy.deepcopy(model), 3, 5), attention_mask=mask, position_ids=positions_of(mask))
    alone = logits(oracle(model, 3, 5), IDS[:1, 11:])
    torch.testing.assert_close(together[:1, 11:], alone, **TOLERANCE)


# -- batches and caches -----------------------------------------------------------------------------------------------


def positions_of(mask):
    """As `generate` makes them."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


PADS = (0, 1, 13, 39)


def padded(side):
    """Four rows, and of each the part that is no padding."""
    ids = torch.randint(3, 60, (4, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    parts = []
    for row, pads in enumerate(PADS):
        part = slice(pads, 40) if side == "left" else slice(0, 40 - pads)
        mask[row] = 0
        mask[row, part] = 1
        parts.append(part)
    return ids.where(mask.bool(), 0), mask, parts


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", ["whole", "chunks", "tokens", "static"])
def test_padding_and_caches_change_nothing(name, side, cached):
    model = models.base_model(name)
    ids, mask, parts = padded(side)
    positions = positions_of(mask)
    expected = [logits(oracle(model, 3, 7), ids[row : row + 1, part])[0] for row, part in enumerate(parts) if row != 1]
    extended(model, 3, 7)
    if cached == "whole":
        found = logits(model, ids, attention_mask=mask, position_ids=positions)
    else:
        steps = {"chunks": [17, 1, 9, 13], "tokens": [30] + 10 * [1], "static": [17, 14] + 9 * [1]}[cached]
        static = {"past_key_values": tf.StaticCache(model.config, max_cache_len=64)} if cached == "static" else {}
        found, kwargs, start = [], static, 0
        for step in steps:
            now = slice(start, start + step)
            with torch.no_grad():
                out = model(
                    input_ids=ids[:, now],
                    attention_mask=mask[:, : now.stop],
                    position_ids=positions[:, now],
                    use_cache=True,
                    **kwargs,
                )
            kwargs, start = {"past_key_values": out.past_key_values}, now.stop
            found.append(out.logits)
        found = torch.cat(found, dim=1)
    for row, wanted in zip((0, 2, 3), expected, strict=True):
        torch.testing.assert_close(found[row, parts[row]], wanted, **TOLERANCE)


def test_left_padding_without_position_ids_means_the_positions_that_the_model_gives():
    model = models.llama()
    ids, mask, _ = padded("left")
    expected = logits(oracle(model, 3, 7, start=13), ids[2:3, 13:], position_ids=torch.arange(13, 40).unsqueeze(0))
    found = logits(extended(model, 3, 7), ids, attention_mask=mask)
    torch.testing.assert_close(found[2:3, 13:], expected, **TOLERANCE)


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
def test_generation_is_what_the_definition_says(kwargs):
    model = models.llama()
    ids, mask, parts = padded("left")
    rows = [0, 2]
    reference = oracle(model, 3, 7)
    extended(model, 3, 7)
    settings = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True, **kwargs}
    out = model.generate(input_ids=ids[rows], attention_mask=mask[rows], **settings)[:, 40:]
    for found, row in zip(out, rows, strict=True):
        alone = reference.generate(
            input_ids=ids[row : row + 1, parts[row]],
            max_new_tokens=6,
            do_sample=False,
            use_cache=False,
            num_beams=kwargs.get("num_beams", 1),
        )
        assert found.tolist() == alone[0, -6:].tolist()


def test_reading_in_chunks_by_generate_is_the_same():
    model = extended(models.llama(), 3, 7)
    settings = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**settings), model.generate(**settings, prefill_chunk_size=11))


def read(model, mask, positions, steps):
    """Read in steps into one cache; `positions` says the `position_ids` of each, `None` to leave them to the model."""
    start, out = 0, tf.DynamicCache()
    for step, own in zip(steps, positions, strict=True):
        now, start = slice(start, start + step), start + step
        ids = IDS.repeat(1, 2)[:, now]
        found = logits(model, ids, attention_mask=mask[:, : now.stop], position_ids=own, past_key_values=out)
    return found


@pytest.mark.parametrize("step", [1, 2])
def test_cached_keys_whose_positions_cannot_be_told_are_refused(step):
    """The last call looks the same whichever way the first one counted."""
    model = extended(models.llama(), 3, 7)
    right = torch.ones(2, 40 + step, dtype=torch.int64)
    right[1, 30:40] = 0
    left, whole = right.roll(10, 1), torch.ones_like(right)
    left[1, 40:] = 1
    left[1, :10] = 0
    jump = torch.arange(60, 60 + step).unsqueeze(0)
    for mask, positions in (
        (right, [None, None]),
        (left, [positions_of(left)[:, :40], None]),
        (left, [None, None]),
        (whole, [None, jump]),
        (whole, [torch.arange(20, 60).unsqueeze(0), jump]),
    ):
        with pytest.raises(ValueError, match="count from 0 without padding in every call"):
            read(model, mask, positions, [40, step])
    with pytest.raises(ValueError, match=r"begin at \[9\]"):  # far away, among fewer tokens than the window
        read(model, whole, [None, torch.arange(9, 9 + step).unsqueeze(0)], [3, step])


@pytest.mark.parametrize("step", [1, 2])
def test_a_right_padded_cache_is_read_on_from_with_positions_as_generate_counts_them(step):
    model = models.llama()
    mask = torch.ones(2, 40 + step, dtype=torch.int64)
    mask[1, 30:40] = 0
    keep = mask[1].bool()
    expected = logits(oracle(model, 3, 7), IDS.repeat(1, 2)[1:, : 40 + step][:, keep])
    extended(model, 3, 7)
    for first in (None, positions_of(mask)[:, :40]):
        found = read(model, mask, [first, positions_of(mask)[:, 40:]], [40, step])
        torch.testing.assert_close(found[1:], expected[:, -step:], **TOLERANCE)


def test_a_compiled_decode_step_is_one_graph():
    model = extended(models.llama(num_hidden_layers=1), 3, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask, _ = padded("left")
    steps = []
    for reader in (model, compiled):
        cache = tf.StaticCache(model.config, max_cache_len=64)
        logits(model, ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
        now = {"past_key_values": cache, "position_ids": mask.sum(-1, keepdim=True)}
        steps.append(logits(reader, ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), **now))
    torch.testing.assert_close(steps[1], steps[0])


def test_what_it_cannot_read_is_refused():
    model = extended(models.llama(), 3, 7)
    packed = torch.cat([torch.arange(25), torch.arange(15)]).unsqueeze(0)
    with pytest.raises(ValueError, match="one text per row"):
        model(input_ids=IDS[:1], position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="follow each other within a row"):
        model(input_ids=IDS[:1], position_ids=packed, attention_mask=torch.ones_like(IDS[:1]))
    square = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="no attention mask of four dimensions"):
        model(input_ids=IDS[:1], attention_mask=square)
    dropped = extended(models.llama(attention_dropout=0.1), 3, 7).train()
    with pytest.raises(ValueError, match="takes no attention dropout"):
        dropped(input_ids=IDS)


@pytest.mark.skipif(
    hasattr(modeling_diffllama, "DiffLlamaSdpaAttention"), reason="older transformers do not ask the interface here"
)
def test_packed_texts_are_refused_where_each_module_attends_twice():
    model = extended(models.causal(tf.DiffLlamaConfig, head_dim=8), 3, 7)
    packed = torch.cat([torch.arange(25), torch.arange(15)]).unsqueeze(0)
    with pytest.raises(ValueError, match="follow each other within a row"):
        model(input_ids=IDS[:1], position_ids=packed, attention_mask=torch.ones_like(IDS[:1]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma2", "softcap"),
        ("gpt_oss", "s_aux"),
        ("deepseek_v3", "multi-head latent attention"),
        ("qwen2_5_vl", "M-RoPE"),
        ("falcon", "computes attention itself"),
        ("opt", "no rotary position embedding"),
    ],
)
def test_models_that_it_does_not_fit_are_refused_by_name(name, words):
    model = models.base_model(name)
    with pytest.raises(ValueError, match=rf"{type(model).__name__}.*{words}"):
        apply_self_extend(model, group_size=4, window=8)
    assert model.config.get_text_config()._attn_implementation != "self_extend"


@pytest.mark.parametrize("in_pairs", [False, True])
def test_biases_that_drown_the_rotation_in_bf16_hide_no_layer(in_pairs):
    """Qwen2's keys have some; on the slowest channels they hardly turn."""
    sizes = {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    pairs = {"attention_bias": True, "partial_rotary_factor": 1.0}
    model = models.causal(tf.GlmConfig, **sizes, **pairs) if in_pairs else models.causal(tf.Qwen2Config, **sizes)
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.k_proj):
            bias = projection.bias.zero_().view(-1, 64)
            bias[:, [62, 63] if in_pairs else [31, 63]] = 100.0
    found = rotary_layers(model.to(torch.bfloat16))
    assert [layer.interleaved for layer in found] == [in_pairs, in_pairs]


def test_rotations_that_do_not_compose_are_refused(monkeypatch):
    """The probe looks at what reaches attention: here, keys that were normalised after their rotation."""
    module = tf.models.llama.modeling_llama
    rotation = module.apply_rotary_pos_emb

    def with_norm(query, key, *args, **kwargs):
        query, key = rotation(query, key, *args, **kwargs)
        return query, key * torch.linspace(0.5, 1.5, key.shape[-1])

    monkeypatch.setattr(module, "apply_rotary_pos_emb", with_norm)
    with pytest.raises(ValueError, match="LlamaForCausalLM, layer 0 .*does not rotate"):
        apply_self_extend(models.llama(), group_size=4, window=8)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind):
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **factors}
    model = models.llama(rope_parameters=rope)
    with pytest.raises(ValueError, match=f"RoPE of the type '{kind}'"):
        apply_self_extend(model, group_size=4, window=8)


def test_it_can_be_applied_over_itself_and_taken_off_again():
    model = models.llama()
    model.config._attn_implementation = "eager"
    plain = logits(model)
    first = apply_self_extend(model, group_size=3, window=7)
    expected = logits(model)
    second = apply_self_extend(model, group_size=5, window=9)
    assert read_self_extend(model) == {"group_size": 5, "window": 9}
    assert not torch.equal(logits(model), expected)
    second.restore()
    assert torch.equal(logits(model), expected)
    first.restore()
    assert (read_self_extend(model), model.config._attn_implementation) == (None, "eager")
    assert torch.equal(logits(model), plain)


# -- gradients and dtypes ---------------------------------------------------------------------------------------------


def grads(model, ids=IDS[:1], labels=None, **kwargs):
    model.zero_grad()
    model(input_ids=ids, labels=ids if labels is None else labels, **kwargs).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_are_those_of_the_definition():
    model = models.llama()
    reference = oracle(model, 3, 7)
    wanted = grads(reference)
    extended(model, 3, 7)
    for found, grad in zip(grads(model), wanted, strict=True):
        torch.testing.assert_close(found, grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_blocks_are_the_same(checkpointing, monkeypatch):
    model = extended(models.llama(), 3, 7).train()
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    wanted = grads(model, IDS, attention_mask=mask)
    monkeypatch.setattr(grouped, "SCORES_PER_BLOCK", 2 * 4 * 40 * 7)
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    for found, grad in zip(grads(model, IDS, attention_mask=mask), wanted, strict=True):
        torch.testing.assert_close(found, grad, atol=1e-6, rtol=1e-5)
    for found, grad in zip(grads(model), grads(extended(models.llama(), 3, 7).train()), strict=True):
        torch.testing.assert_close(found, grad, atol=1e-6, rtol=1e-5)


def test_bf16_is_as_near_as_ordinary_attention_in_bf16():
    model = models.llama()
    wanted, plain = logits(oracle(model, 3, 7)), logits(model)
    model.to(torch.bfloat16)
    ordinary = (logits(model) - plain).float().abs().mean()
    error = (logits(extended(model, 3, 7)) - wanted).float().abs().mean()
    assert error < 1.5 * ordinary


def test_rotations_undo_those_of_the_model_far_away():
    frequencies = 10000.0 ** -(torch.arange(16) / 16)
    x = torch.randn(1, 2, 3, 40, generator=torch.Generator().manual_seed(2))
    old, new = torch.tensor([[32767, 31000, 12345]]), torch.tensor([[5461, 9000, 3]])
    for interleaved in (False, True):
        at = {
            name: turn(x[0], p[0], frequencies, interleaved, 1.0).float() for name, p in (("old", old), ("new", new))
        }
        found = grouped.rotate(at["old"].unsqueeze(0), old, new, frequencies, interleaved)[0]
        torch.testing.assert_close(found, at["new"], atol=2e-6, rtol=1e-5)


# -- the fast path ----------------------------------------------------------------------------------------------------


def cpu_flash_forward(query, key, value, scale, window):
    """torch's flash kernel for CPUs, with the mask that the GPU's kernel would make."""
    key, value, mask = _for_cpu(query, key, value, window)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.contiguous(), key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, log_sum, (torch.zeros(1), torch.zeros(1))


def cpu_flash_backward(grad, query, key, value, out, log_sum, state, scale, window):
    heads = value.shape[1]
    key, value, mask = _for_cpu(query, key, value, window)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.contiguous(), query.contiguous(), key, value, out, log_sum, 0.0, False, attn_mask=mask, scale=scale
    )
    dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _for_cpu(query, key, value, window):
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (distance >= 0) & (distance < (keys if window is None else window))
    return key, value, torch.zeros(1, 1, queries, keys).masked_fill(~seen, -torch.inf)


@pytest.fixture
def by_flash(monkeypatch):
    """The fast path, on torch's flash kernel for CPUs: its merging, its gradients and its rows are those of a GPU."""
    calls = []

    def counted(*args):
        calls.append(args[0].shape)
        return cpu_flash_forward(*args)

    monkeypatch.setattr(flash, "flash_forward", counted)
    monkeypatch.setattr(flash, "flash_backward", cpu_flash_backward)
    monkeypatch.setattr(grouped, "fits_flash", lambda query, key, value: query.shape[2] > 1)
    return calls


@pytest.mark.parametrize(("group_size", "window"), [(3, 7), (5, 1), (4, 39)])
def test_the_fast_path_is_the_definition(by_flash, group_size, window):
    model = models.llama()
    reference = oracle(model, group_size, window)
    extended(model, group_size, window)
    torch.testing.assert_close(logits(model), logits(reference), **TOLERANCE)
    assert len(by_flash) == 2 * models.LAYERS
    for found, grad in zip(grads(model), grads(reference), strict=True):
        torch.testing.assert_close(found, grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("static", [False, True])
def test_the_fast_path_takes_padded_rows_one_by_one(by_flash, side, static):
    model = extended(models.llama(), 3, 7)
    ids, mask, parts = padded(side)
    whole = {"attention_mask": mask, "position_ids": positions_of(mask)}
    kwargs = {"past_key_values": tf.StaticCache(model.config, max_cache_len=64)} if static else {}
    found = logits(model, ids, **whole, **kwargs)
    assert len(by_flash) == (3 * 2 + 1) * models.LAYERS  # the last row, of one token, has nothing far away
    # A label counts where the token before it, which predicts it, is no padding either.
    labels = ids.where(mask.bool() & mask.roll(1, -1).bool(), -100)
    found_grads = grads(model, ids, labels, **whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "fits_flash", lambda *_: False)
        wanted = logits(model, ids, **whole)
        wanted_grads = grads(model, ids, labels, **whole)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], **TOLERANCE)
    for grad, other in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)


def test_the_fast_path_reads_on_from_a_cache(by_flash):
    model = extended(models.llama(), 3, 7)
    whole = logits(model)
    for steps in ([17, 20, 3], [5, 35], [9, 31]):
        found, cache = [], None
        for start, step in zip([0, steps[0], sum(steps[:2])], steps, strict=False):
            with torch.no_grad():
                out = model(input_ids=IDS[:, start : start + step], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, **TOLERANCE)


def test_padding_in_the_middle_goes_in_blocks(by_flash):
    model = extended(models.llama(), 3, 7)
    mask = torch.ones_like(IDS)
    mask[0, 10:15] = 0
    positions = positions_of(mask)
    found = logits(model, attention_mask=mask, position_ids=positions)
    assert not by_flash
    keep = mask[0].bool()
    torch.testing.assert_close(found[:1, keep], logits(model, IDS[:1, keep]), **TOLERANCE)
