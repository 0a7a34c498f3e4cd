"""SEAL finds the heads of every architecture in its table, and says what to do about the others."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from models import (
    ARCHITECTURES,
    INPUT_IDS,
    adapted,
    base_model,
    draw_scales,
    llama,
    logits,
    multiply_by_hand,
    seal_layers,
    seeded,
)
from seal_peft import SealConfig, SealLayer, scales
from seal_peft.tuner.geometry import TARGET_MODULES, attention_of

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
both_granularities = pytest.mark.parametrize("granularity", ["head", "channel"])


@every_architecture
def test_exactly_the_attention_outputs_of_the_language_part_are_wrapped(name):
    model = adapted(name)
    layers = seal_layers(model)
    assert {full_name: tuple(layer.geometry) for full_name, layer in layers.items()} == ARCHITECTURES[name].projections
    for full_name in layers:
        attention, _, child = full_name.rpartition(".")
        parent = model.get_submodule("base_model.model." + attention)
        assert "Attention" in type(parent).__name__
        assert getattr(parent, child) is layers[full_name]


@every_architecture
@both_granularities
def test_only_scales_train_and_all_of_them_do(name, granularity):
    model = adapted(name, granularity)
    model(input_ids=INPUT_IDS).logits.square().mean().backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {
        f"base_model.model.{key}.seal_delta.default.weight" for key in ARCHITECTURES[name].projections
    }
    assert all((parameter.grad != 0).any() for parameter in trained.values())
    expected = sum(
        heads * (1 if granularity == "head" else dim) for heads, dim in ARCHITECTURES[name].projections.values()
    )
    assert sum(parameter.numel() for parameter in trained.values()) == expected


@every_architecture
def test_scales_read_back_have_a_number_per_head_or_per_channel(name):
    sizes = ARCHITECTURES[name].projections
    assert {key: tuple(value.shape) for key, value in scales(adapted(name, "head")).items()} == {
        key: (heads,) for key, (heads, _) in sizes.items()
    }
    assert {key: tuple(value.shape) for key, value in scales(adapted(name, "channel")).items()} == sizes


@every_architecture
@both_granularities
def test_scaling_heads_equals_multiplying_the_weights_by_hand(name, granularity):
    model = adapted(name, granularity)
    by_hand = logits(multiply_by_hand(base_model(name), scales(model)))
    assert_close(logits(model), by_hand, rtol=0, atol=1e-5)
    assert (logits(base_model(name)) - by_hand).abs().max() > 0.05, "the scales are too weak for this test to fail"


@every_architecture
def test_one_scale_per_head_equals_its_repetition_over_the_channels(name):
    per_head, per_channel = adapted(name, "head"), adapted(name, "channel")
    with torch.no_grad():
        for key, layer in seal_layers(per_channel).items():
            value = seal_layers(per_head)[key].seal_delta["default"].weight
            layer.seal_delta["default"].weight.copy_(value.unsqueeze(-1).expand(layer.geometry))
    assert torch.equal(logits(per_head), logits(per_channel))


@every_architecture
@both_granularities
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_base(name, granularity, tmp_path):
    model = adapted(name, granularity)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    from_folder = scales(tmp_path)
    assert from_folder.keys() == scales(model).keys()
    assert all(torch.equal(value, from_folder[key]) for key, value in scales(model).items())


@every_architecture
@both_granularities
def test_merging_keeps_the_logits_and_unmerging_restores_the_base(name, granularity):
    model = adapted(name, granularity)
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before, rtol=0, atol=1e-5)
    for key, layer in seal_layers(model).items():
        assert not torch.equal(layer.base_layer.weight, base_model(name).get_submodule(key).weight)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    fresh = base_model(name).state_dict()
    restored = model.unload().state_dict()
    assert restored.keys() == fresh.keys()
    assert all(torch.equal(value, fresh[key]) for key, value in restored.items())


def test_gradient_of_the_scales_equals_finite_differences():
    # GPT-2, because the norms of most others work in fp32 whatever the model's dtype.
    model = adapted("gpt2", "channel").double()

    def loss():
        return model(input_ids=INPUT_IDS).logits.square().mean()

    loss().backward()
    step = 1e-5
    for layer in seal_layers(model).values():
        weight = layer.seal_delta["default"].weight
        for index in [(0, 0), (1, 5), (3, 7)]:
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[index] += sign * step
                    values.append(loss().item())
                    weight[index] -= sign * step
            assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


_ENCODER_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_BART_SIZES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()
}
_BERT = [f"encoder.layer.{layer}.attention.output.dense" for layer in range(2)]
_SIDES = [f"{side}.layers.{{}}.self_attn.out_proj" for side in ("encoder", "decoder")]
# Model type -> settings of a tiny model, and its projections to 4 heads, by hand.
ENCODERS = {
    "bert": (_ENCODER_SIZES, _BERT),
    "deberta-v2": (_ENCODER_SIZES, _BERT),
    "roberta": (_ENCODER_SIZES, _BERT),
    "distilbert": (
        {"vocab_size": 64, "dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4},
        [f"transformer.layer.{layer}.attention.out_lin" for layer in range(2)],
    ),
    "modernbert": (
        {**_ENCODER_SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        [f"layers.{layer}.attn.Wo" for layer in range(2)],
    ),
    "bart": (
        {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64, **_BART_SIZES},
        [name.format(layer) for name in [*_SIDES, "decoder.layers.{}.encoder_attn.out_proj"] for layer in range(2)],
    ),
    "t5": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 4},
        [
            *(
                f"{side}.block.{layer}.layer.0.SelfAttention.o"
                for side in ("encoder", "decoder")
                for layer in range(2)
            ),
            *(f"decoder.block.{layer}.layer.1.EncDecAttention.o" for layer in range(2)),
        ],
    ),
}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_live_as_decoders_do(model_type, tmp_path):
    sizes, projections = ENCODERS[model_type]
    config = CONFIG_MAPPING[model_type](**sizes)
    plain = seeded(config, MODEL_MAPPING[type(config)])
    inputs = {"input_ids": INPUT_IDS}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = INPUT_IDS.flip(1)

    def states(model):
        with torch.no_grad():
            return model(**inputs).last_hidden_state

    model = get_peft_model(copy.deepcopy(plain), SealConfig(granularity="channel")).eval()
    draw_scales(model)
    assert {key: layer.geometry.num_heads for key, layer in seal_layers(model).items()} == dict.fromkeys(
        projections, 4
    )
    found = states(model)
    assert_close(found, states(multiply_by_hand(copy.deepcopy(plain), scales(model))), rtol=0, atol=1e-5)
    assert (found - states(plain)).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(states(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)), found)
    model.merge_adapter()
    assert_close(states(model), found, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(states(model.unload()), states(plain))
    chosen = SealConfig(target_heads=["L1H2"])
    if config.is_encoder_decoder:
        with pytest.raises(ValueError, match=r"cannot tell the heads of encoder\..* from those of decoder\..*L1H"):
            get_peft_model(plain, chosen)
    else:
        assert list(seal_layers(get_peft_model(plain, chosen))) == projections[1:]


# What some configs need before they can build a model from their defaults.
_TO_BUILD = {
    **dict.fromkeys(
        "bart blenderbot m2m_100 marian mbart pegasus plbart whisper".split(),
        {"encoder_layers": 4, "decoder_layers": 4},
    ),
    **dict.fromkeys(["mt5", "t5", "umt5"], {"num_decoder_layers": 4}),
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["attention"] * 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}
# Layers of these are partly state-space, linear or image attention, which SEAL leaves alone.
_HYBRID = {"lfm2", "minimax", "mllama_text_model", "olmo_hybrid", "qwen3_5_text", "qwen3_next"}


@pytest.mark.parametrize("model_type", TARGET_MODULES)
def test_every_entry_of_the_table_finds_the_heads_of_a_full_size_model(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = CONFIG_MAPPING[model_type](**{"num_hidden_layers": 4, **_TO_BUILD.get(model_type, {})})
    if model_type == "mllama_text_model":
        model_class = tf.MllamaForCausalLM
    else:
        is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
        model_class = (MODEL_FOR_CAUSAL_LM_MAPPING if is_decoder else MODEL_MAPPING)[type(config)]
    with torch.device("meta"):
        model = get_peft_model(model_class(config), SealConfig())
    parents = [type(attention_of(model, f"base_model.model.{key}")) for key in seal_layers(model)]
    assert all("Attention" in parent.__name__ or "MLA" in parent.__name__ for parent in parents)
    expected = 12 if config.is_encoder_decoder else 4  # a decoder attends to itself and to the encoder
    assert 1 <= len(parents) <= 4 if model_type in _HYBRID else len(parents) == expected


class CustomAttention(nn.Module):
    """An attention module that says nothing about its heads."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 72)
        self.mix = nn.Linear(24, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.mix(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class CustomModel(nn.Module):
    """A model that is not from transformers: 3 heads of 8 channels, hidden size 16."""

    def __init__(self):
        super().__init__()
        self.attention = CustomAttention()
        self.mlp = nn.Linear(16, 16)

    def forward(self, x):
        return self.mlp(self.attention(x))


def assert_untouched(model, before):
    assert not any(isinstance(module, SealLayer) for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_model_is_refused_with_what_was_found_and_the_field_that_helps():
    model = CustomModel()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"attention \(CustomAttention\) with qkv, mix") as error:
        get_peft_model(model, SealConfig())
    assert "target_modules" in str(error.value) and "num_attention_heads" in str(error.value)
    assert_untouched(model, before)


def test_an_unknown_transformers_architecture_is_named():
    model = tf.MPNetModel(
        tf.MPNetConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(
        ValueError, match=r"model type 'mpnet'.*attention \(MPNetAttention\) with .*attn\.o.*target_mod"
    ):
        get_peft_model(model, SealConfig())


def test_a_module_that_tells_no_heads_is_refused_with_the_field_that_helps():
    model = CustomModel()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"24 inputs of attention\.mix.*CustomAttention.*num_attention_heads=\.\.\."):
        get_peft_model(model, SealConfig(target_modules=["mix"]))
    assert_untouched(model, before)


@pytest.mark.parametrize("numbers", [{"num_attention_heads": 3}, {"head_dim": 8}])
def test_naming_the_projection_and_one_number_makes_a_custom_model_work(numbers):
    model = CustomModel()
    x = torch.randn(2, 5, 16)
    wrapped = get_peft_model(copy.deepcopy(model), SealConfig(target_modules=["mix"], **numbers))
    layer = wrapped.base_model.model.attention.mix
    assert tuple(layer.geometry) == (3, 8)
    with torch.no_grad():
        layer.seal_delta["default"].weight.copy_(torch.tensor([-1.0, 0.5, 1.0]))
    by_hand = multiply_by_hand(model, {"attention.mix": torch.tensor([0.0, 1.5, 2.0])})
    assert_close(wrapped(x), by_hand(x), rtol=0, atol=1e-6)


def test_the_value_head_size_counts_where_keys_have_another():
    model = CustomModel()
    model.attention.num_heads, model.attention.head_dim, model.attention.v_head_dim = 3, 4, 8
    layers = seal_layers(get_peft_model(model, SealConfig(target_modules=["mix"])))
    assert tuple(layers["attention.mix"].geometry) == (3, 8)


@pytest.mark.parametrize(
    "numbers", [{"num_attention_heads": 5}, {"head_dim": 7}, {"num_attention_heads": 4, "head_dim": 8}]
)
def test_heads_that_do_not_divide_the_projection_leave_the_model_untouched(numbers):
    model = base_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"48 inputs of model\.layers\.0\.self_attn\.o_proj.*product is 48"):
        get_peft_model(model, SealConfig(**numbers))
    assert_untouched(model, before)
    get_peft_model(model, SealConfig())  # the next try starts clean


def test_an_error_in_a_late_layer_leaves_the_early_ones_unwrapped():
    model = base_model("llama")
    model.model.layers[1].self_attn.head_dim = 11
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj"):
        get_peft_model(model, SealConfig())
    assert_untouched(model, before)


@pytest.mark.parametrize("target", ["q_proj", "gate_proj", "down_proj"])
def test_a_projection_that_reads_no_heads_is_refused(target):
    model = llama(head_dim=12)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=rf"{target} (into attention heads|does not read the outputs of heads)",
    ):
        get_peft_model(model, SealConfig(target_modules=[target]))
    assert_untouched(model, before)


def test_a_target_that_is_no_linear_layer_is_refused():
    model = base_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="embed_tokens is a Embedding.*target_modules"):
        get_peft_model(model, SealConfig(target_modules=["embed_tokens"]))
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "llava-clip"])
def test_layers_can_be_chosen_in_every_part_of_a_model(name):
    chosen = seal_layers(adapted(name, layers_to_transform=[1]))
    assert list(chosen) == [list(ARCHITECTURES[name].projections)[1]]
    with pytest.raises(ValueError, match="7"):
        adapted(name, layers_to_transform=[7])
