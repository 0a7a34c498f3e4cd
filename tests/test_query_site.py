"""The query site: every head's query is multiplied by a number of its own, wherever the query is in a model."""

import copy
import warnings

import pytest
import torch
import transformers as tf
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import seal_peft
from models import INPUT_IDS, adapted, base_model, causal, draw_scales, llama, logits, seal_layers
from query_models import MERGEABLE, NAMES, SHARED_NORM, plain, with_queries
from seal_peft import SealConfig, scales
from seal_peft.tuner.query import QueryLinear, QueryNorm

BOTH = ("output", "query")
few = pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2"])


def with_site(name, sites=("query",), seed=1, **kwargs):
    model = get_peft_model(plain(name), SealConfig(sites=sites, **kwargs)).eval()
    draw_scales(model, seed=seed)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_multiplies_the_query_as_attention_sees_it(name):
    model = with_site(name)
    oracle = with_queries(name, list(scales(model).values()))
    assert_close(logits(model), logits(oracle), rtol=0, atol=2e-5)
    assert (logits(model) - logits(plain(name))).abs().max() > 0.04, "the scales are too weak for this test to fail"
    as_many_tokens_as_heads = INPUT_IDS[:, :4]
    with torch.no_grad():
        found, expected = (m(input_ids=as_many_tokens_as_heads).logits for m in (model, oracle))
    assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_number_per_query_head_trains_and_nothing_else(name):
    model = with_site(name, BOTH)
    sizes = {key: tuple(value.shape) for key, value in scales(model).items()}
    queries = [layer for layer in seal_layers(model).values() if layer.site == "query"]
    assert len(queries) == len(sizes) / 2 == 2 and set(sizes.values()) == {(4,)}
    model(input_ids=INPUT_IDS).logits.square().mean().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"base_model.model.{key}.seal_delta.default.weight" for key in sizes}
    assert all((layer.offset("default").grad != 0).any() for layer in queries)


@pytest.mark.parametrize("name", MERGEABLE)
def test_query_scales_merge_into_rows_and_bias_and_come_out_bit_for_bit(name):
    model = with_site(name, BOTH)
    model.base_model.model.apply(_give_bias)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert_close(logits(model), before, rtol=0, atol=2e-5)
        for key, layer in seal_layers(model).items():
            assert not torch.equal(layer.get_base_layer().weight, weights[f"base_model.model.{key}.base_layer.weight"])
        model.unmerge_adapter()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert not seal_layers(merged)
    assert_close(logits(merged), before, rtol=0, atol=2e-5)


def _give_bias(module):
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Linear) and bias is not None:
        nn.init.normal_(bias, std=0.25, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_come_back_bit_for_bit_with_zero_and_negative_scales(dtype):
    model = with_site("gpt2", BOTH).to(dtype)
    with torch.no_grad():
        for layer in seal_layers(model).values():
            layer.offset("default")[:2] = torch.tensor([-1.0, -1.7])
    weights = copy.deepcopy(model.state_dict())
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SHARED_NORM)
def test_where_heads_share_a_norm_merging_is_refused_before_anything_changes(name):
    model = with_site(name, BOTH)
    weights = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(sites=["query"])):
        with pytest.raises(ValueError, match=r"Norm\w*: it has .* not one.*merge_adapter\(sites=\['output'\]\)"):
            merge()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(layer.merged for layer in seal_layers(model).values())


@pytest.mark.parametrize("name", ["olmo2", "cohere-norm"])
def test_a_norm_over_all_heads_that_accelerate_offloads_takes_its_scales(name):
    base = dispatch_model(plain(name), {"": "cpu"}, main_device="cpu", force_hooks=True)
    model = get_peft_model(base, SealConfig(sites=BOTH)).eval()
    draw_scales(model)
    before = logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in seal_layers(model).values())
    assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_norm_made_of_one_for_each_head_is_refused_for_what_it_is():
    model = with_site("stablelm-norm")
    with pytest.raises(ValueError, match="StableLmLayerNormPerHead: it has no weight of its own, not"):
        model.merge_adapter()


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_the_output_site_merges_alone_and_the_query_site_stays_an_adapter(name, tmp_path):
    model = with_site(name, BOTH)
    before = logits(model)
    seal_peft.save_adapter(model, tmp_path / "query", sites=["query"])
    model.merge_adapter(sites=["output"])
    assert {layer.site for layer in seal_layers(model).values() if layer.merged} == {"output"}
    assert_close(logits(model), before, rtol=0, atol=1e-5)
    folded = model.unload()
    assert (logits(folded) - before).abs().max() > 0.05
    again = PeftModel.from_pretrained(folded, tmp_path / "query")
    assert {layer.site for layer in seal_layers(again).values()} == {"query"}
    assert_close(logits(again), before, rtol=0, atol=1e-5)


@few
@pytest.mark.parametrize("sites", [("query",), BOTH])
def test_a_saved_adapter_gives_the_same_logits_and_scales(name, sites, tmp_path):
    model = with_site(name, sites)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].sites == sites
    assert {key: value.tolist() for key, value in scales(tmp_path).items()} == {
        key: value.tolist() for key, value in scales(model).items()
    }
    assert all(".seal_delta." in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_channels_of_outputs_and_one_number_per_query(tmp_path):
    model = with_site("qwen3", BOTH, granularity="channel")
    shapes = {layer.site: tuple(layer.offset("default").shape) for layer in seal_layers(model).values()}
    assert shapes == {"output": (4, 12), "query": (4,)}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(plain("qwen3"), tmp_path)), logits(model))


@few
def test_strength_stretches_the_distance_from_one(name):
    model = with_site(name)
    learned = list(scales(model).values())
    seal_peft.set_strength(model, -0.5)
    oracle = with_queries(name, [1 - 0.5 * (scale - 1) for scale in learned])
    assert_close(logits(model), logits(oracle), rtol=0, atol=2e-5)


@few
def test_rows_of_a_batch_have_temperatures_of_their_own(name):
    model = with_site(name, BOTH)
    model.add_adapter("other", SealConfig(sites=("query",)))
    draw_scales(model, "other", seed=5)
    with torch.no_grad():
        mixed = model(input_ids=INPUT_IDS, adapter_names=["other", "__base__"]).logits
        switched = model(input_ids=INPUT_IDS.flip(0), adapter_names=["default", "other"]).logits
    alone = logits(model)
    model.set_adapter("other")
    other = logits(model)
    assert_close(mixed[0], other[0], rtol=0, atol=1e-5)
    assert_close(mixed[1], logits(plain(name))[1], rtol=0, atol=1e-5)
    assert_close(switched[0], alone[1], rtol=0, atol=1e-5)
    assert_close(switched[1], other[0], rtol=0, atol=1e-5)


@few
def test_adapters_add_up_over_sites_with_any_weights(name):
    model = with_site(name, BOTH)
    model.add_adapter("other", SealConfig(sites=("query",)))
    draw_scales(model, "other", seed=5)
    one, two = scales(model), scales(model, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, -1.0], "sum")
    for key, value in scales(model, "sum").items():
        expected = 1 + 0.5 * (one[key] - 1) - (two[key] - 1 if key in two else 0)
        assert_close(value, expected, rtol=0, atol=1e-6)
    assert scales(model, "sum").keys() == one.keys()


@few
def test_hotswap_changes_temperatures_in_place(name, tmp_path):
    model, other = with_site(name, BOTH), with_site(name, BOTH, seed=5)
    other.save_pretrained(tmp_path)
    weights = [layer.offset("default") for layer in seal_layers(model).values()]
    seal_peft.hotswap_adapter(model, tmp_path)
    assert all(layer.offset("default") is old for layer, old in zip(seal_layers(model).values(), weights, strict=True))
    assert torch.equal(logits(model), logits(other))


@few
def test_disabling_and_deleting_leave_the_base(name):
    model = with_site(name, BOTH)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain(name)))
    model.add_adapter("other", SealConfig())
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(plain(name)))
    assert torch.equal(logits(model.unload()), logits(plain(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_a_compiled_model_is_one_graph_with_the_same_logits(name):
    model = with_site(name, BOTH)
    expected = logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
    torch.compiler.reset()


@few
def test_generating_with_a_cache_equals_generating_without(name):
    model = with_site(name, BOTH, task_type="CAUSAL_LM")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=INPUT_IDS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=INPUT_IDS, use_cache=False, **settings))


def test_gradients_equal_finite_differences():
    model = with_site("gpt2").double()
    loss = lambda: model(input_ids=INPUT_IDS).logits.square().mean()  # noqa: E731
    loss().backward()
    for layer in seal_layers(model).values():
        weight = layer.offset("default")
        for head in range(4):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    weight[head] += step
                    values.append(loss().item())
                    weight[head] -= step
            assert weight.grad[head].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("seal_first", [True, False])
@pytest.mark.parametrize("merged", [[], ["style"], ["heads"], ["style", "heads"], ["heads", "style"]])
def test_lora_on_the_same_projection_adds_to_the_scaled_query(seal_first, merged, tmp_path):
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    seal = SealConfig(sites=BOTH)
    torch.manual_seed(3)
    first, second = [(seal, "heads"), (lora, "style")] if seal_first else [(lora, "style"), (seal, "heads")]
    model = seal_peft.add_beside(get_peft_model(base_model("qwen2"), *first), *second).eval()
    draw_scales(model, "heads")
    by_hand = _by_hand(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already (following adapters were merged|unmerged)")
        for name in merged:
            model.merge_adapter([name])
        assert_close(logits(model), logits(by_hand), rtol=0, atol=2e-5)
        model.unmerge_adapter()
    assert_close(logits(model), logits(by_hand), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    folders = {name: tmp_path / name for name in ("style", "heads")}
    loaded = seal_peft.load_adapters(base_model("qwen2"), folders)
    assert_close(logits(loaded), logits(by_hand), rtol=0, atol=2e-5)
    assert_close(logits(loaded.merge_and_unload()), logits(by_hand), rtol=0, atol=2e-5)


@torch.no_grad()
def _by_hand(model):
    """Write `diag(s) (W x + b) + B A x` on queries and `W diag(s) x + B A x` on outputs into a plain model."""
    plain_model = base_model("qwen2")
    for key, scale in scales(model, "heads").items():
        projection = plain_model.get_submodule(key)
        per_channel = scale.repeat_interleave(12)
        if key.endswith("q_proj"):
            projection.weight.mul_(per_channel[:, None])
            projection.bias.mul_(per_channel)
        else:
            projection.weight.mul_(per_channel)
    for key, layer in model.named_modules():
        if "style" in getattr(layer, "lora_A", {}):
            product = layer.lora_B["style"].weight @ layer.lora_A["style"].weight * 7 / 3
            plain_model.get_submodule(key.removeprefix("base_model.model.")).weight.add_(product)
    return plain_model


def test_a_lora_that_trains_a_bias_on_the_query_is_not_merged_beside_seal():
    lora = LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    model = seal_peft.add_beside(get_peft_model(base_model("qwen2"), lora, "style"), SealConfig(sites=BOTH), "heads")
    with pytest.raises(ValueError, match="lora_bias"):
        model.merge_adapter()


def test_a_custom_attention_names_its_query_modules():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.ask, self.look, self.give = (nn.Linear(16, 24) for _ in range(3))
            self.mix = nn.Linear(24, 16)

        def forward(self, x):
            q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (self.ask, self.look, self.give))
            heads = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.mix(heads.transpose(1, 2).flatten(-2))

    torch.manual_seed(0)
    base = nn.Sequential(Attention(), Attention())
    settings = {"target_modules": ["mix"], "num_attention_heads": 3, "sites": BOTH}
    with pytest.raises(ValueError, match=r"children: ask, look, give, mix.*query_modules"):
        get_peft_model(copy.deepcopy(base), SealConfig(**settings))
    model = get_peft_model(copy.deepcopy(base), SealConfig(**settings, query_modules=["ask"]))
    draw_scales(model)
    assert {layer.site for layer in seal_layers(model).values()} == {"output", "query"}
    x = torch.randn(2, 5, 16)
    before = model(x)
    for index in range(2):
        scale = scales(model)[f"{index}.ask"].repeat_interleave(8)
        with torch.no_grad():
            base[index].ask.weight.mul_(scale[:, None])
            base[index].ask.bias.mul_(scale)
            base[index].mix.weight.mul_(scales(model)[f"{index}.mix"].repeat_interleave(8))
    assert_close(before, base(x), rtol=0, atol=1e-6)


def test_wrapped_modules_tell_their_site():
    found = {type(layer) for layer in seal_layers(with_site("qwen3")).values()}
    assert found == {QueryNorm}
    assert {type(layer) for layer in seal_layers(with_site("llama")).values()} == {QueryLinear}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ()}, "Use \\('output',\\)"),
        ({"sites": "query"}, "Use \\('output',\\).* takes \\(\\), too, for rope_parameters or self_extend"),
        ({"sites": ("key",)}, "Use \\('output',\\)"),
        ({"sites": ("query", "query")}, "Use \\('output',\\)"),
        ({"sites": ("query",), "granularity": "channel"}, "one scale per head"),
        ({"query_modules": ["q_proj"]}, "without 'query'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SealConfig(**settings)


@pytest.mark.parametrize("sites", [("query",), BOTH])
def test_query_modules_that_match_nothing_are_refused_before_anything_is_wrapped(sites):
    base = base_model("llama")
    with pytest.raises(ValueError, match=r"query_modules=.*nope.*or leave it at None"):
        get_peft_model(base, SealConfig(sites=sites, query_modules=["nope"]))
    assert not seal_layers(base)


@pytest.mark.parametrize("sites", [("output",), ("query",), BOTH])
@pytest.mark.parametrize(("name", "query"), [("llama", "q_proj"), ("qwen3", "q_proj"), ("qwen3", "q_norm")])
def test_target_modules_name_output_projections_whatever_the_sites(name, query, sites):
    # As wide as it is deep, so that the query projection of Qwen3 could be taken for its output projection.
    base = base_model("llama") if name == "llama" else causal(tf.Qwen3Config, head_dim=8)
    for targets in ([query], ["o_proj", query]):
        with pytest.raises(ValueError, match=rf"0\.self_attn\.{query} does not read .*`o_proj`.*`query_modules`"):
            get_peft_model(base, SealConfig(sites=sites, target_modules=targets))
        assert not seal_layers(base)


def test_a_projection_before_a_norm_of_each_head_is_no_place_for_query_scales():
    base = base_model("qwen3")
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj would do nothing: .* in q_norm.*Name 'q_norm'"
    ):
        get_peft_model(base, SealConfig(sites=("query",), query_modules=["q_proj"]))
    assert not seal_layers(base)
    get_peft_model(base, SealConfig(sites=("query",), query_modules=["q_norm"]))


def test_a_norm_over_all_heads_leaves_scales_before_it_a_meaning():
    model = get_peft_model(base_model("olmo2"), SealConfig(sites=("query",), query_modules=["q_proj"])).eval()
    before = logits(model)
    draw_scales(model)
    assert (logits(model) - before).abs().max() > 1e-2


def test_a_norm_that_was_left_out_is_passed_over():
    config = tf.InternVLVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    for names in (None, ["q_proj"]):
        settings = {"target_modules": ["projection_layer"], "query_modules": names}
        model = get_peft_model(tf.InternVLVisionModel(config), SealConfig(sites=BOTH, **settings))
        assert [name.rpartition(".")[2] for name, _ in seal_layers(model).items()] == ["q_proj", "projection_layer"]


def test_a_refused_merge_names_the_norm_by_its_path():
    model = with_site("qwen3", BOTH)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_norm: Query scales cannot be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("sites", [["key"], "query", ["output", "key"]])
def test_only_sites_that_an_adapter_has_can_be_saved(sites, tmp_path):
    model = with_site("llama", BOTH)
    with pytest.raises(ValueError, match=r"is not allowed. Adapter 'default' has scales at \('output', 'query'\)"):
        seal_peft.save_adapter(model, tmp_path / "part", sites=sites)
    with pytest.raises(ValueError, match="no adapter named 'other'. The model has: default"):
        seal_peft.save_adapter(model, tmp_path / "part", "other", sites=["query"])
    assert not (tmp_path / "part").exists()


def test_a_model_that_clips_queries_clips_what_was_scaled_merged_or_not():
    model = get_peft_model(causal(tf.OlmoConfig, clip_qkv=0.5), SealConfig(sites=("query",))).eval()
    draw_scales(model)
    free = get_peft_model(causal(tf.OlmoConfig, clip_qkv=None), SealConfig(sites=("query",))).eval()
    draw_scales(free)
    before = logits(model)
    assert (before - logits(free)).abs().max() > 0.05, "nothing is clipped"
    model.merge_adapter()
    assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_norm_after_the_rotation_undoes_scales_and_is_refused():
    model = causal(
        tf.Llama4TextConfig,
        head_dim=12,
        use_qk_norm=True,
        num_local_experts=2,
        intermediate_size_mlp=40,
        no_rope_layers=[1, 1],
    )
    with pytest.raises(ValueError, match="qk_norm"):
        get_peft_model(model, SealConfig(sites=BOTH))


def test_a_scale_on_queries_is_another_thing_than_one_on_outputs(tmp_path):
    adapted("llama").save_pretrained(tmp_path / "output")
    with_site("llama").save_pretrained(tmp_path / "query")
    model = with_site("llama")
    with pytest.raises(ValueError, match="does not have"):
        seal_peft.hotswap_adapter(model, tmp_path / "output")
    model = PeftModel.from_pretrained(llama(), tmp_path / "output", adapter_name="output")
    model.load_adapter(tmp_path / "query", "query")
    model.base_model.set_adapter(["output", "query"])
    assert len(seal_layers(model)) == 4
