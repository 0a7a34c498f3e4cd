"""`seal-peft heads`: files, tables and pictures; restarts keep what is finished; bad input is found before loading."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, T5Config

import models
from seal_peft import SealConfig, save_adapter, scales
from seal_peft.data import read_samples, write_samples
from seal_peft.heads import encode_samples, find_heads, gradient_map, pruning_map
from seal_peft.heads.maps import as_tensor
from seal_peft.heads.pictures import draw_maps
from seal_peft.loading import load_model, load_tokenizer
from stages import error_of, save_model, save_samples, seal, some_samples

ALL = ["gradient", "pruning", "retrieval", "direct_effect"]
SCALES = ["scale", "scale_query"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, samples of two lengths, and one full run over them."""
    folder = tmp_path_factory.mktemp("house")
    save_model(folder / "model")
    made = [*some_samples("test", 400, 2), *some_samples("test", 500, 2)]
    write_samples(folder / "samples.jsonl", [dataclasses.replace(s, id=str(i)) for i, s in enumerate(made)])
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        SealConfig(granularity="channel", sites=("output", "query"), task_type="CAUSAL_LM"),
    )
    models.draw_scales(adapted)
    save_adapter(adapted, folder / "adapter")
    assert run(folder, "--adapter", folder / "adapter", *FULL) == 0
    return folder


FULL = ["--scores", "pruning", "gradient", "retrieval", "direct_effect"]  # in an order that is not the default
FULL += ["--ablations", "zero", "mean", "--channels_of", "L0H1", "--generate_heads", 1, "--quadrants", "Q1=0.9,Q3=1.1"]


def run(folder: Path, *words: object, out: str | Path = "out") -> int:
    base = ["--model_name_or_path", folder / "model", "--test_file", folder / "samples.jsonl"]
    return seal("heads", *base, "--dtype", "float32", "--output_dir", folder / out, *words)


def read(path: Path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_every_score_has_a_file_and_a_picture(house: Path) -> None:
    for name in ALL:
        record = read(house / "out" / f"{name}.json")
        assert record["layers"] == [0, 1]
        assert record["versions"]["torch"]
        assert record["settings"]["measure"] == "answer"
        for by_length in record["maps"].values():
            assert list(by_length) == ["400", "500"]
            assert all(torch.isfinite(as_tensor(own["mean"])).all() and own["n"] == 2 for own in by_length.values())
    for name in [*ALL, "scales", "quadrants", "channels"]:
        assert (house / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_mlps_write_is_a_column_of_the_picture(tmp_path: Path) -> None:
    heads = find_heads(models.base_model("llama"))
    nothing = {"direct_logit": {8: torch.zeros(heads.shape)}}
    mlps = {"direct_logit": {8: torch.full((heads.shape[0],), 5.0)}}
    files = draw_maps(nothing, heads, tmp_path / "heads.png"), draw_maps(nothing, heads, tmp_path / "m.png", mlps=mlps)
    pixels = [torch.tensor(imread(file)) for file in files]  # both with the red of the colour bar
    without, red = (int(((own[..., 0] > 0.3) & (own[..., 1:3].amax(-1) < 0.2)).sum()) for own in pixels)
    assert red > without + 1000


def test_the_maps_are_what_the_functions_return(house: Path) -> None:
    samples = [sample for sample in read_samples(house / "samples.jsonl") if sample.length == 500]
    rows = encode_samples(samples, load_tokenizer(str(house / "model")))
    heads = find_heads(load_model(str(house / "model"), "float32"))
    pruned = pruning_map(heads, rows)
    record = read(house / "out" / "pruning.json")
    found = as_tensor(record["maps"]["pruning_zero"]["500"]["mean"])
    torch.testing.assert_close(found, pruned.logprob.mean(0), rtol=1e-4, atol=1e-5)
    assert record["base"]["500"]["logprob"]["mean"] == pytest.approx(pruned.base.logprob.mean().item(), abs=1e-4)
    gradients = gradient_map(heads, rows)["output"]
    channels = load_file(house / "out" / "gradient-channels.safetensors")
    name = heads.layers[1].name
    torch.testing.assert_close(channels[f"500.{name}"], gradients[1].mean(0), rtol=1e-4, atol=1e-6)
    found = as_tensor(read(house / "out" / "gradient.json")["maps"]["gradient"]["500"]["mean"])
    torch.testing.assert_close(found[1], gradients[1].sum(-1).mean(0), rtol=1e-4, atol=1e-6)


def test_the_table_has_all_scores_beside_the_learned_scales(house: Path) -> None:
    table = read(house / "out" / "heads.json")
    row = table["heads"][6]
    learned = scales(house / "adapter")["model.layers.1.self_attn.o_proj"][2].mean().item()
    assert (row["name"], row["scale"]) == ("L1H2", pytest.approx(learned))
    for name in ("gradient", "gradient_query", "pruning_zero", "pruning_mean", "retrieval_copy", "direct_difference"):
        assert isinstance(row[f"{name}@400"], float)
    assert row["direct_logit_adapter@500"] != row["direct_logit@500"]
    assert "scale" in table["rank_correlations"]["500"]["pruning_zero"]


def test_heads_at_both_ends_are_judged_by_generation_too(house: Path) -> None:
    generated = read(house / "out" / "pruning.json")["generated"]
    assert list(generated) == ["400", "500"]
    assert len(generated["400"]["heads"]) == 2
    assert 0 <= generated["400"]["base"]["low"] <= generated["400"]["base"]["mean"] <= 1


def test_the_quadrant_adapter_loads_and_holds_the_factors(house: Path) -> None:
    adapter = house / "out" / "quadrants" / "Q1x0.9-Q3x1.1"
    maps = read(house / "out" / "pruning.json")["maps"]["pruning_zero"]
    shorter, longer = (as_tensor(maps[length]["mean"]) for length in ("400", "500"))
    for position, own in enumerate(scales(adapter).values()):
        for head in range(4):
            signs = (shorter[position, head] > 0, longer[position, head] > 0)
            expected = {(True, True): 0.9, (False, False): 1.1}.get(tuple(map(bool, signs)), 1.0)
            assert own[head].item() == pytest.approx(expected)
    PeftModel.from_pretrained(load_model(str(house / "model"), "float32"), adapter)


def test_a_second_call_keeps_what_is_finished_and_computes_what_changed(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (house / "out").glob("*.json") if path.stem in ALL}
    assert run(house, "--adapter", house / "adapter", *FULL) == 0
    assert {path: path.read_bytes() for path in before} == before
    printed = capsys.readouterr().out
    assert "| pruning_zero |" in printed
    assert "Q1=0.9,Q3=1.1: " in printed
    assert run(house, "--adapter", house / "adapter", *FULL, "--sites", "output") == 0
    changed = {path.stem for path, own in before.items() if path.read_bytes() != own}
    assert changed == {"gradient"}
    assert list(read(house / "out" / "gradient.json")["maps"]) == ["gradient"]


def test_scores_of_earlier_calls_stay_in_the_table(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sites", "output"]
    assert run(house, "--scores", "gradient", *words, out="grown") == 0
    gradient = (house / "grown" / "gradient.json").read_bytes()
    assert run(house, "--scores", "retrieval", "--adapter", house / "adapter", out="grown") == 0
    table = read(house / "grown" / "heads.json")
    assert {"gradient@400", "gradient@500", "retrieval_copy@400", "scale"} <= set(table["heads"][0])
    assert table["rank_correlations"]["500"]["retrieval_mass"]["gradient"] is not None
    assert set(table["top"]) >= {"gradient@400", "retrieval_mass@400"}
    # A lost file does not take its columns out of the table in silence.
    channels = (house / "grown" / "gradient-channels.safetensors").rename(house / "kept")
    assert run(house, "--scores", "retrieval", "--adapter", house / "adapter", out="grown") == 1
    assert "holds gradient.json without its gradient-channels.safetensors" in error_of(capsys)
    channels.rename(house / "grown" / "gradient-channels.safetensors")
    # The base model's scores do not depend on what stands beside them.
    assert run(house, "--scores", "gradient", *words, "--adapter", house / "adapter", out="grown") == 0
    assert (house / "grown" / "gradient.json").read_bytes() == gradient
    assert set(read(house / "grown" / "heads.json")["heads"][0]) == set(table["heads"][0])


def test_scores_with_other_settings_do_not_get_into_the_table(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapted = tmp_path / "out", ["--adapter", house / "adapter"]
    assert run(house, "--scores", "direct_effect", *adapted, out=out) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    for words, changed in ((["--measure", "target", *adapted], "measure"), ([], "adapter")):
        assert run(house, "--scores", "retrieval", *words, out=out) == 1
        message = f"{out} holds direct_effect scores with other settings ({changed}). Give the same settings, add"
        assert message in error_of(capsys)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert run(house, "--scores", "retrieval", "direct_effect", out=out) == 0  # as the message says: computed anew
    assert "direct_logit_adapter@400" not in read(out / "heads.json")["heads"][0]


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"mine": 1}'])
def test_a_file_of_somebody_else_is_not_written_over(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "gradient.json"
    file.write_text(content)
    for scores in ("gradient", "retrieval"):
        assert run(house, "--scores", scores, out=tmp_path) == 1
        assert f"{file} is not a file of `seal-peft heads`. Remove it" in error_of(capsys)
    assert file.read_text() == content


def test_scores_do_not_mix_with_the_files_of_another_stage(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, held in (("adapter", "adapter_config.json"), ("model", "config.json, model.safetensors")):
        before = sorted((house / folder).iterdir())
        assert run(house, "--scores", "gradient", out=folder) == 1
        assert re.search(rf"/{folder} holds what `seal-peft \w+` writes \({held}\)", error_of(capsys))
        assert sorted((house / folder).iterdir()) == before
    base = ["--model_name_or_path", house / "model", "--output_dir", house / "out"]
    files = ["--train_file", save_samples(house / "train.jsonl"), "--test_file", house / "samples.jsonl"]
    for stage, words in (("train", files[:2]), ("evaluate", files[2:])):
        assert seal(stage, *base, *words) == 1
        assert f"{house / 'out'} holds what `seal-peft heads` writes (direct_effect.json, " in error_of(capsys)


def test_the_adapted_model_can_be_scored_in_place_of_the_base(house: Path) -> None:
    words = ["--scores", "gradient", "--sites", "output"]
    assert run(house, *words, "--adapter", house / "adapter", "--apply_adapter", out="adapted") == 0
    assert run(house, *words, out="bare") == 0
    adapted, bare = (
        as_tensor(read(house / out / "gradient.json")["maps"]["gradient"]["400"]["mean"])
        for out in ("adapted", "bare")
    )
    assert (adapted - bare).abs().max() > 1e-3
    assert "scale" not in read(house / "bare" / "heads.json")["heads"][0]


def test_gradients_at_queries_alone_have_no_channels_and_are_kept_too(house: Path) -> None:
    words = ["--scores", "gradient", "pruning", "--sites", "query", "--channels_of", "L0H1"]
    assert run(house, *words, out="query") == 0
    before = (house / "query" / "gradient.json").read_bytes()
    assert list(json.loads(before)["maps"]) == ["gradient_query"]
    assert not (house / "query" / "gradient-channels.safetensors").exists()
    assert run(house, *words, out="query") == 0
    assert (house / "query" / "gradient.json").read_bytes() == before


def test_every_progress_bar_has_a_name_of_its_own(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, start = [], tqdm.__init__

    def noted(bar: tqdm, *words: Any, **options: Any) -> None:
        names.append(options.get("desc"))
        start(bar, *words, **options)

    monkeypatch.setattr(tqdm, "__init__", noted)  # they show after a second only
    words = ["--adapter", house / "adapter", "--ablations", "zero", "mean", "--channels_of", "L0H1", "L1H2"]
    assert run(house, *words, out=tmp_path) == 0
    for length in (400, 500):
        for what in (
            "Gradients",
            "Pruning heads to zero",
            "Pruning heads to mean",
            "Pruning channels of L0H1 to zero",
            "Pruning channels of L1H2 to zero",
            "Retrieval",
            "Direct effect",
            "Direct effect (wrong tokens given)",
        ):
            assert names.count(f"{what}, {length} tokens") == 1


def test_samples_of_no_set_length_are_one_map(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [dataclasses.replace(sample, length=0) for sample in read_samples(house / "samples.jsonl")]
    save_model(tmp_path / "model")
    write_samples(tmp_path / "samples.jsonl", own)
    words = ["--adapter", house / "adapter", "--scores", "pruning", "gradient", "--channels_of", "L0H1"]
    assert run(tmp_path, *words) == 0
    assert "0 tokens" not in capsys.readouterr().out
    table = read(tmp_path / "out" / "heads.json")
    assert set(table["heads"][0]) >= {"pruning_zero@0", "gradient@0", "scale"}
    assert set(table["rank_correlations"]["0"]["pruning_zero"]) == {"gradient", "gradient_query", *SCALES}
    assert not table["across_lengths"]


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "entropy"], "argument --scores: invalid choice: 'entropy'"),
        (["--scores", "gradient", "gradient"], "scores=['gradient', 'gradient'] was given; use one or more"),
        (["--ablations", "mean", "mean"], "use one or more of: zero, mean, each once"),
        (["--sites", "query", "query"], "use one or more of: output, query, each once"),
        (["--scores", "gradient", "--quadrants", "Q1=0.9"], "--quadrants goes by pruning: add it to --scores"),
        (["--quadrants", "Q9=2"], "Write Q1=0.9,Q3=1.1"),
        (["--channels_of", "L7H0"], "The model has no head 'L7H0'"),
        (["--apply_adapter"], "--apply_adapter needs an --adapter"),
        (["--adapter", "nowhere"], "There is no folder 'nowhere', and the Hub"),
        (["--generate_heads", "-1"], "--generate_heads -1 --batch_tokens"),
        (["--dtype", "int8"], "dtype"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    save_model(tmp_path / "model", weights=False)
    write_samples(tmp_path / "samples.jsonl", read_samples(house / "samples.jsonl"))
    assert run(tmp_path, *words) in (1, 2)
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_samples_that_a_score_has_no_meaning_for_are_refused_before_a_model_is_loaded(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", weights=False)
    (sample,) = read_samples(house / "samples.jsonl")[:1]
    elsewhere = dataclasses.replace(sample, answers=["4711"], target="It is 4711.")
    write_samples(tmp_path / "samples.jsonl", [elsewhere])
    assert run(tmp_path) == 1
    assert "has no needle" in error_of(capsys)
    write_samples(tmp_path / "samples.jsonl", [dataclasses.replace(sample, target="I do not know.")])
    assert run(tmp_path) == 1
    assert "spells none of the accepted answers" in error_of(capsys)
    write_samples(tmp_path / "samples.jsonl", [sample])
    assert run(tmp_path, "--quadrants", "Q1=0.9") == 1
    assert "--quadrants compare two lengths" in error_of(capsys)
    (tmp_path / "samples.jsonl").write_text("")
    assert run(tmp_path) == 1
    assert "holds no samples" in error_of(capsys)


def test_encoder_decoders_are_refused_by_name(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", weights=False)
    T5Config().save_pretrained(tmp_path / "model")
    write_samples(tmp_path / "samples.jsonl", read_samples(house / "samples.jsonl"))
    assert run(tmp_path) == 1
    assert "is a t5 model, which transformers does not load as a language model" in error_of(capsys)


def test_an_adapter_of_another_method_has_no_scales_to_show(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(house / "model"), LoraConfig(r=2))
    lora.save_pretrained(tmp_path / "lora")
    assert run(house, "--adapter", tmp_path / "lora", out="lora") == 1
    assert "has no scales; give a SEAL adapter, or none" in error_of(capsys)


def test_an_adapter_that_extends_the_window_extends_it_where_it_is_applied(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", max_position_embeddings=450)
    write_samples(tmp_path / "samples.jsonl", read_samples(house / "samples.jsonl"))
    config = SealConfig(task_type="CAUSAL_LM", rope_parameters={"rope_type": "linear", "factor": 2.0})
    save_adapter(get_peft_model(load_model(str(tmp_path / "model"), "float32"), config), tmp_path / "long")
    words = ["--scores", "gradient", "--sites", "output", "--adapter", tmp_path / "long"]
    assert run(tmp_path, *words) == 1
    assert "the window of this model is 450 tokens" in error_of(capsys)
    assert run(tmp_path, *words, "--apply_adapter") == 0
