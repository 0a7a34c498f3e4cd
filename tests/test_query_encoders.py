"""The query site on encoders and on models of both, where `query_modules` names what no lookup finds."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from models import HEADS, INPUT_IDS, draw_scales, seal_layers, seeded
from seal_peft import SealConfig, scales

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 1, "attention_heads": HEADS, "ffn_dim": 40}.items()
}
# How a tiny model is built, what `query_modules` has to be, and how many attention modules there are.
MODELS = {
    "bert": (tf.BertConfig, tf.BertModel, _SIZES, ["query"], 2),
    "distilbert": (
        tf.DistilBertConfig,
        tf.DistilBertModel,
        {"vocab_size": 64, "dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": HEADS},
        ["q_lin"],
        2,
    ),
    "modernbert": (tf.ModernBertConfig, tf.ModernBertModel, _SIZES, None, 2),
    "bart": (tf.BartConfig, tf.BartModel, {"vocab_size": 64, "d_model": 32, **_SIDES}, None, 3),
    "t5": (
        tf.T5Config,
        tf.T5Model,
        {"vocab_size": 64, "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": HEADS},
        ["q"],
        3,
    ),
}


def _plain(name):
    config_class, model_class, sizes, _, _ = MODELS[name]
    return seeded(config_class(**sizes), model_class)


def _states(model):
    inputs = {"input_ids": INPUT_IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = INPUT_IDS.flip(1)
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@torch.no_grad()
def _multiplied(name, model):
    """Return a plain model whose first rows, those of the queries, are multiplied by hand."""
    plain = _plain(name)
    for key, scale in scales(model).items():
        projection = plain.get_submodule(key)
        bias = projection.bias
        dim = 12 if name == "t5" else 8
        for row in range(HEADS * dim):
            projection.weight[row] *= scale[row // dim]
            if bias is not None:
                bias[row] *= scale[row // dim]
    return plain


@pytest.mark.parametrize("name", MODELS)
def test_a_scale_multiplies_the_queries_of_a_head(name, tmp_path):
    names, modules = MODELS[name][3:]
    model = get_peft_model(_plain(name), SealConfig(sites=("query",), query_modules=names)).eval()
    draw_scales(model)
    assert len(seal_layers(model)) == modules
    found = _states(model)
    assert_close(found, _states(_multiplied(name, model)), rtol=0, atol=1e-5)
    assert (found - _states(_plain(name))).abs().max() > 0.05, "the scales are too weak for this test to fail"
    model.save_pretrained(tmp_path)
    assert torch.equal(_states(PeftModel.from_pretrained(_plain(name), tmp_path)), found)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert_close(_states(model), found, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row[3]])
def test_where_no_lookup_finds_the_query_the_field_that_names_it_is_in_the_error(name):
    with pytest.raises(ValueError, match=r"does not know where the query of .*query_modules=\[\.\.\.\]"):
        get_peft_model(_plain(name), SealConfig(sites=("query",)))
