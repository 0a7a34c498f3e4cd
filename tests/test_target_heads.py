"""Adapters of chosen heads: only these are scaled and trained, through every verb; all others stay exactly 1."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import models
from models import INPUT_IDS, base_model, llama
from seal_peft import SealConfig, export_ia3, hotswap_adapter, save_adapter, scales
from seal_peft.heads import find_heads, save_head_scales
from stages import save_model, save_samples, seal

CHOSEN = ["L1H3", "L1H0"]
NAME = "model.layers.1.self_attn.o_proj"


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    """Take some steps with an optimizer that moves whatever has a gradient, and decays."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("sites", [("output",), ("output", "query")])
def test_only_chosen_heads_learn(granularity: str, sites: tuple[str, ...]) -> None:
    config = SealConfig(granularity=granularity, sites=sites, target_heads=CHOSEN)
    model = trained(get_peft_model(base_model("llama"), config))
    found = scales(model)
    assert {name.split(".")[2] for name in found} == {"1"}  # the other layer is left alone
    assert len(found) == len(sites)
    for own in found.values():
        assert (own[[0, 3]] != 1).all()
        assert (own[[1, 2]] == 1).all()


def test_they_start_where_others_start_and_random_ones_are_random_alone() -> None:
    model = get_peft_model(base_model("llama"), SealConfig(target_heads=CHOSEN))
    assert torch.equal(models.logits(model), models.logits(base_model("llama")))
    own = scales(get_peft_model(base_model("llama"), SealConfig(target_heads=CHOSEN, init_weights=False)))[NAME]
    assert (own[[0, 3]] != 1).all()
    assert (own[[1, 2]] == 1).all()


def test_saved_loaded_and_merged_they_are_what_was_trained(tmp_path: Path) -> None:
    model = trained(get_peft_model(base_model("llama"), SealConfig(target_heads=CHOSEN)))
    expected = models.logits(models.multiply_by_hand(base_model("llama"), scales(model)))
    torch.testing.assert_close(models.logits(model), expected, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(models.logits(loaded), models.logits(model))
    assert loaded.peft_config["default"].target_heads == CHOSEN
    assert (scales(trained(loaded))[NAME][[1, 2]] == 1).all()
    merged = PeftModel.from_pretrained(base_model("llama"), tmp_path).merge_and_unload()
    torch.testing.assert_close(models.logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_model_trains_the_same_heads() -> None:
    model = copy.deepcopy(get_peft_model(base_model("llama"), SealConfig(target_heads=CHOSEN)))
    assert (scales(trained(model))[NAME][[1, 2]] == 1).all()


def test_beside_an_adapter_of_all_heads_each_keeps_its_own() -> None:
    model = models.adapted("llama")
    before = scales(model)[NAME]
    model.add_adapter("few", SealConfig(target_heads=CHOSEN))
    model.set_adapter("few")
    own = scales(trained(model), "few")[NAME]
    assert (own[[1, 2]] == 1).all()
    assert torch.equal(scales(model)[NAME], before)
    model.add_weighted_adapter(["default", "few"], [1.0, 2.0], "sum")
    torch.testing.assert_close(scales(model, "sum")[NAME], before + 2 * (own - 1))
    assert model.peft_config["sum"].target_heads is None


def test_whoever_writes_to_all_heads_changes_those_that_were_chosen_and_all_readers_agree(tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), SealConfig(target_heads=CHOSEN))
    models.draw_scales(model)
    expected = models.logits(model)
    (found,) = scales(model).values()
    assert (found[[1, 2]] == 1).all() and (found[[0, 3]] != 1).all()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(scales(tmp_path / "saved")[NAME], found)
    ia3 = PeftModel.from_pretrained(base_model("llama"), export_ia3(model, tmp_path / "ia3"))
    torch.testing.assert_close(models.logits(ia3), expected, rtol=0, atol=1e-5)
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    assert torch.equal(models.logits(model), expected)


def test_scales_of_a_map_are_where_training_starts(tmp_path: Path) -> None:
    chosen = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.9, 1.0, 1.0, 1.2]])
    save_head_scales(find_heads(base_model("llama")), chosen, tmp_path)
    config = SealConfig.from_pretrained(tmp_path, inference_mode=False)
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path, config=config, is_trainable=True)
    torch.testing.assert_close(scales(model)[NAME], chosen[1])
    assert (scales(trained(model))[NAME] != chosen[1]).all()


def test_other_heads_are_not_swapped_in(tmp_path: Path) -> None:
    for name, heads in (("all", None), ("fewer", ["L1H0"])):
        save_adapter(trained(get_peft_model(base_model("llama"), SealConfig(target_heads=heads))), tmp_path / name)
    model = get_peft_model(base_model("llama"), SealConfig(target_heads=CHOSEN))
    with pytest.raises(ValueError, match="scales other heads"):
        hotswap_adapter(model, tmp_path / "all")
    hotswap_adapter(model, tmp_path / "fewer")
    torch.testing.assert_close(scales(model)[NAME], scales(tmp_path / "fewer")[NAME])


def test_a_config_that_was_given_fewer_heads_counts_for_every_reader(tmp_path: Path) -> None:
    save_adapter(models.adapted("llama"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_heads": ["L0H2", *CHOSEN]}))
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    expected = models.logits(models.multiply_by_hand(base_model("llama"), scales(loaded)))
    assert (scales(loaded)[NAME][[1, 2]] == 1).all()
    loaded.add_weighted_adapter(["default"], [1.0], "sum")
    loaded.set_adapter("sum")
    swapped, injected = models.adapted("llama", seed=2), base_model("llama")
    hotswap_adapter(swapped, tmp_path)
    injected.load_adapter(str(tmp_path))
    export_ia3(tmp_path, tmp_path / "ia3")
    for model in (loaded, swapped, injected, PeftModel.from_pretrained(base_model("llama"), tmp_path / "ia3")):
        torch.testing.assert_close(models.logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", ["L1H0", [], ["L1H0", "L1H0"], ["1.0"], ["L1"], ["L01H0"], [3]])
def test_names_of_another_form_are_refused(heads: object) -> None:
    with pytest.raises(ValueError, match="Use a list of different heads such as"):
        SealConfig(target_heads=heads)


@pytest.mark.parametrize("options", [{"target_heads": ["L1H0", "L1H4"]}, {"target_heads": ["L0H1", "L2H4"]}])
def test_heads_that_the_model_does_not_have_are_refused_before_it_changes(options: dict) -> None:
    model = base_model("llama")
    with pytest.raises(ValueError, match=f"does not have.*{options['target_heads'][1]}"):
        get_peft_model(model, SealConfig(**options))
    assert not models.seal_layers(model)


def test_a_head_of_a_layer_that_is_left_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"other settings leave out: L1H0. Heads to choose from: L0 with H0 to H3\."):
        get_peft_model(base_model("llama"), SealConfig(target_heads=["L0H0", "L1H0"], layers_to_transform=[0]))
    with pytest.raises(ValueError, match=r"leave out: L0H0\. Heads to choose from: none\."):
        get_peft_model(base_model("llama"), SealConfig(target_heads=["L0H0"], layers_to_transform=[9]))


@pytest.mark.parametrize("sites", [("output",), ("output", "query")])
def test_the_refusal_tells_the_heads_of_all_layers_also_of_those_where_none_was_chosen(sites: tuple[str, ...]) -> None:
    uneven = llama(num_hidden_layers=6)
    uneven.model.layers[4].self_attn = llama(num_attention_heads=8).model.layers[0].self_attn
    for model, told in (
        (base_model("llama"), "L0 to L1 with H0 to H3"),
        (uneven, "L0 to L3, L5 with H0 to H3; L4 with H0 to H7"),
    ):
        model = get_peft_model(model, SealConfig())
        for heads in (["L9H0"], ["L1H0", "L1H4"]):
            with pytest.raises(ValueError, match=rf"Heads to choose from: {told}\. They are named L14H7"):
                model.add_adapter("few", SealConfig(target_heads=heads, sites=sites))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gpt_neox"])
def test_they_are_found_wherever_the_layers_are(name: str) -> None:
    model = get_peft_model(base_model(name), SealConfig(target_heads=["L1H2"]))
    ((found, _),) = models.seal_layers(model).items()
    assert found == list(models.ARCHITECTURES[name].projections)[1]


def test_the_command_line_trains_them(tmp_path: Path) -> None:
    words = [
        "--model_name_or_path",
        save_model(tmp_path / "model"),
        "--train_file",
        save_samples(tmp_path / "t.jsonl"),
    ]
    flags = ["--target_heads", *CHOSEN, "--granularity", "head", "--dtype", "float32", "--use_cpu", "true"]
    assert seal("train", *words, "--output_dir", tmp_path / "adapter", *flags) == 0
    own = scales(tmp_path / "adapter")[NAME]
    assert [i for i in range(4) if own[i] != 1] == [0, 3]
