"""The RoPE of a merged model in its `config.json`: for transformers 5, and for 4, which knows another form."""

import json
import logging

import pytest
import torch
import transformers as tf
from peft import get_peft_model

import models
from rope_models import HERE, NTK, TYPES, YARN, gemma3, llama, logits, phi3, phi3_longrope
from seal_peft import SealConfig
from seal_peft.context.rope import apply_rope, read_rope
from seal_peft.merge import MergeArguments, merge
from seal_peft.rope_file import add_older_form
from stages import save_model

CASES = {
    **{kind: (llama, TYPES[kind]) for kind in HERE},
    "ntk": (llama, NTK),
    "plain": (llama, None),
    "partial": (phi3, NTK),
    "partial longrope": (phi3, phi3_longrope(4.0)),
    "gemma3": (gemma3, None),
    "gemma3 yarn": (gemma3, YARN),
    "text part": (models.ARCHITECTURES["gemma3"].build, YARN),
    "m-rope": (models.ARCHITECTURES["qwen2_5_vl"].build, NTK),
    "neox": (models.ARCHITECTURES["gpt_neox"].build, TYPES["linear"]),
}


def nemotron():
    return models.causal(tf.NemotronConfig, head_dim=None)


def olmo3():
    return models.causal(tf.Olmo3Config, layer_types=["sliding_attention", "full_attention"])


def saved(build, request, folder):
    """Save an extended model in both forms; return it and what its file says about the decoder."""
    model = build()
    if request:
        apply_rope(model, request)
    model.save_pretrained(folder)
    assert add_older_form(folder, model.config)
    config = json.loads((folder / "config.json").read_text())
    return model, config.get("text_config", config)


@pytest.mark.parametrize("name", CASES)
def test_a_file_with_both_forms_is_read_like_one_with_the_newer_alone(name, tmp_path):
    model, said = saved(*CASES[name], tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert read_rope(again) == read_rope(model)
    assert torch.equal(logits(again), logits(model))
    assert {"rope_parameters", "rope_theta"} <= said.keys()


def test_the_older_form_is_that_of_transformers_4(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 32}
    _, said = saved(llama, TYPES["yarn"], tmp_path)
    assert (said["rope_theta"], said["rope_scaling"]) == (10000.0, {**rope, "rope_theta": 10000.0})
    _, said = saved(llama, NTK, tmp_path)
    assert (said["rope_theta"], said["rope_scaling"]) == (10000.0 * 4 ** (12 / 10), None)
    _, said = saved(phi3, NTK, tmp_path)
    assert said["partial_rotary_factor"] == 0.5
    _, said = saved(llama, TYPES["longrope"], tmp_path)
    assert said["original_max_position_embeddings"] == 32
    _, said = saved(gemma3, YARN, tmp_path)
    assert (said["rope_theta"], said["rope_local_base_freq"]) == (1_000_000.0, 10000.0)
    assert said["rope_scaling"]["rope_type"] == "yarn"


def unchanged(model, folder):
    model.save_pretrained(folder)
    before = (folder / "config.json").read_text()
    return not add_older_form(folder, model.config) and (folder / "config.json").read_text() == before


def test_what_the_older_form_cannot_say_leaves_the_file_as_it_is(tmp_path):
    model = gemma3()
    apply_rope(model, {"full_attention": YARN, "sliding_attention": {"rope_type": "linear", "factor": 2.0}})
    assert unchanged(model, tmp_path)


BY_LAYER = "full_attention" in tf.Olmo3Config().rope_parameters
UNREAD = [("gpt_neox", {"rope_theta": 5e4}), ("nemotron", TYPES["linear"]), *([("olmo3", NTK)] if BY_LAYER else [])]


@pytest.mark.parametrize(("name", "request_"), UNREAD)
def test_models_that_transformers_4_would_run_otherwise_keep_the_newer_form_alone(name, request_, tmp_path):
    build = {"nemotron": nemotron, "olmo3": olmo3}.get(name) or models.ARCHITECTURES[name].build
    model = build()
    apply_rope(model, request_)
    assert unchanged(model, tmp_path)


@pytest.mark.skipif(not hasattr(tf, "Gemma4TextConfig"), reason="younger than the oldest transformers")
def test_a_model_whose_config_reads_the_older_form_otherwise_keeps_the_newer_alone(tmp_path):
    assert unchanged(models.gemma4_text(), tmp_path)


@pytest.mark.parametrize("request_", [YARN, NTK, None], ids=["yarn", "ntk", "plain"])
def test_the_merge_stage_writes_both_forms(request_, tmp_path, caplog):
    folder = save_model(tmp_path / "model")
    model = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(folder), SealConfig(rope_parameters=request_, task_type="CAUSAL_LM")
    )
    models.draw_scales(model)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        merged = merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "merged")))
    assert "transformers 4" not in caplog.text
    said = json.loads((merged / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == read_rope(model)["rope_theta"]
    assert said["rope_scaling"] == (said["rope_parameters"] if request_ is YARN else None)
    assert read_rope(tf.AutoModelForCausalLM.from_pretrained(merged)) == read_rope(model)
