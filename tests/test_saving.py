"""A crash or a full disk while an adapter is saved leaves the old adapter or the new one, never a mixture."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import safetensors.torch
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from torch import Tensor

from faults import die, in_a_process_of_its_own
from models import adapted, base_model, logits, seal_layers
from seal_peft import SealConfig, add_beside, hotswap_adapter, save_adapter, scales
from seal_peft.card import MARKER

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
# What one crash interrupts: the k-th of these calls does not return. `half` writes half of the weights file first.
STEPS = ["write", "half", "rename-1", "replace-1", "replace-2", "replace-3", "rmtree-1"]


def half(tensors: Any, path: str, **kwargs: Any) -> None:
    with open(path, "wb") as file:
        file.write(b"x" * 100)
    die()


def die_at(step: str) -> None:
    """Patch this process so that it is killed at a step of `save_adapter`."""
    if step in ("write", "half"):
        peft.peft_model.safe_save_file = die if step == "write" else half
        return
    name, count = step.split("-")
    owner: Any = shutil if name == "rmtree" else os
    real, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        # Only moves of the save itself: the config writes its own file by a rename, too.
        if ".saved" in str(args[0]) or (name == "rename" and ".saving-" in str(args[0])):
            calls.append(args)
        if len(calls) == int(count):
            die()
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def killed_save(folder: Path, step: str, granularity: str, save: Callable[..., Any] = save_adapter) -> None:
    model = adapted("llama", granularity, seed=2)

    def action() -> None:
        die_at(step)
        save(model, folder)

    assert in_a_process_of_its_own(action) == signal.SIGKILL


def reads_as(folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(base_model("llama"), folder))


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("step", STEPS)
def test_a_killed_save_leaves_the_old_or_the_new_adapter(step, granularity, tmp_path):
    old, new = adapted("llama", "head", seed=1), adapted("llama", granularity, seed=2)
    save_adapter(old, tmp_path)
    (tmp_path / "run.json").write_text("kept")
    killed_save(tmp_path, step, granularity)
    found = reads_as(tmp_path)
    assert torch.equal(found, logits(old)) or torch.equal(found, logits(new))
    assert step not in ("write", "half", "rename-1") or torch.equal(found, logits(old))
    assert "replace" not in step or torch.equal(found, logits(new))
    # The next save works and leaves nothing behind.
    save_adapter(new, tmp_path)
    assert torch.equal(reads_as(tmp_path), logits(new))
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, "run.json"])


def test_the_crash_test_would_save_if_nothing_killed_it(tmp_path):
    model = adapted("llama", seed=2)
    assert in_a_process_of_its_own(lambda: save_adapter(model, tmp_path)) == 0
    assert torch.equal(reads_as(tmp_path), logits(model))


@pytest.mark.parametrize("step", ["write", "half", "replace-1", "replace-2"])
def test_a_killed_save_into_a_new_folder_leaves_no_adapter(step, tmp_path):
    folder = tmp_path / "new"
    killed_save(folder, step, "head")
    assert not (folder / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        reads_as(folder)
    if step.startswith("replace"):  # all that was left is moving the files
        model = adapted("llama", seed=3)
        hotswap_adapter(model, folder)
        assert torch.equal(logits(model), reads_as(folder))


@pytest.mark.parametrize("step", STEPS)
def test_every_loader_reads_a_killed_save_of_the_same_settings(step, tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    old, new = adapted("llama", seed=1), adapted("llama", seed=2)
    old.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(old, tmp_path / "adapter")

    def save(model: PeftModel, folder: Path) -> None:
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        save_adapter(model, folder)

    killed_save(tmp_path / "adapter", step, "head", save)
    found = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    assert torch.equal(found, logits(old)) or torch.equal(found, logits(new))


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.filterwarnings("ignore:The config in .* is not the one that the weights beside it")
def test_peft_s_own_save_killed_before_its_config_is_the_new_adapter(granularity, tmp_path):
    adapted("llama", seed=1).save_pretrained(tmp_path)
    new = adapted("llama", granularity, seed=2)

    def save() -> None:
        SealConfig.save_pretrained = die
        new.save_pretrained(tmp_path)

    assert in_a_process_of_its_own(save) == signal.SIGKILL
    assert torch.equal(reads_as(tmp_path), logits(new))


def test_a_later_plain_save_wins_over_an_interrupted_one(tmp_path):
    save_adapter(adapted("llama", seed=1), tmp_path)
    killed_save(tmp_path, "replace-2", "channel")
    assert (tmp_path / ".saved").is_dir()
    last = adapted("llama", "head", seed=3)
    last.save_pretrained(tmp_path)
    assert torch.equal(reads_as(tmp_path), logits(last))


def test_an_interrupted_save_is_finished_for_readers_of_scales(tmp_path):
    save_adapter(adapted("llama", seed=1), tmp_path)
    killed_save(tmp_path, "replace-1", "head")
    found = scales(tmp_path)
    for name, layer in seal_layers(adapted("llama", seed=2)).items():
        assert torch.equal(found[name], 1 + layer.seal_delta["default"].weight)


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "config", "folder"])
def test_a_full_disk_is_named_and_changes_nothing(where, tmp_path, monkeypatch):
    old = adapted("llama", seed=1)
    save_adapter(old, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    target = {
        "weights": "peft.peft_model.safe_save_file",
        "config": "peft.config.PeftConfigMixin.save_pretrained",
        "folder": "seal_peft.tuner.saving.tempfile.mkdtemp",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, no_space)
        with pytest.raises(OSError, match="The disk is full: the adapter was not saved.*unchanged. Free some") as info:
            save_adapter(adapted("llama", "channel", seed=2), tmp_path)
    assert info.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == FILES
    assert before == {name: (tmp_path / name).read_bytes() for name in FILES}
    assert torch.equal(reads_as(tmp_path), logits(old))


@pytest.mark.parametrize("call", ["save_adapter", "save_pretrained"])
def test_a_disk_that_is_really_full_keeps_the_old_adapter(call, tiny_disk):
    folder, old = tiny_disk / "adapter", adapted("llama", seed=1)
    save_adapter(old, folder)
    free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
    (tiny_disk / "filler").write_bytes(b"x" * free)
    new = adapted("llama", seed=2)
    if call == "save_adapter":
        with pytest.raises(OSError, match="The disk is full: the adapter was not saved"):
            save_adapter(new, folder)
        assert sorted(os.listdir(folder)) == FILES
    else:
        if Version(safetensors.__version__) < Version("0.8"):
            pytest.skip("writes in place: `pip install 'safetensors>=0.8'`")
        with pytest.raises((OSError, safetensors.SafetensorError), match="No space left"):
            new.save_pretrained(folder)
    assert torch.equal(reads_as(folder), logits(old))
    (tiny_disk / "filler").unlink()
    save_adapter(new, folder)
    assert torch.equal(reads_as(folder), logits(new))


def test_other_errors_pass_through(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        save_adapter(adapted("llama"), tmp_path / "file")


def test_pickled_weights_that_no_loader_will_read_are_told(tmp_path):
    adapted("llama").save_pretrained(tmp_path, safe_serialization=False)
    adapted("llama", seed=2).save_pretrained(tmp_path)  # the new one counts
    assert torch.equal(reads_as(tmp_path), logits(adapted("llama", seed=2)))
    model = adapted("llama", seed=3)
    with pytest.warns(UserWarning, match="an older adapter_model.safetensors, too, which every loader takes"):
        model.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize("call", ["save_adapter", "save_pretrained"])
def test_whoever_the_umask_lets_read_the_config_may_read_the_weights(call, tmp_path):
    pair = add_beside(adapted("llama"), LoraConfig(target_modules=["o_proj"]), "style")
    before = os.umask(0o027)
    try:
        if call == "save_adapter":
            for name in ("default", "style"):
                save_adapter(pair, tmp_path / name, name)
        else:
            pair.save_pretrained(tmp_path, selected_adapters=["default"])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_named_adapter_is_saved_flat(tmp_path):
    model = adapted("llama")
    model.add_adapter("other", model.peft_config["default"])
    save_adapter(model, tmp_path, adapter_name="other")
    assert sorted(os.listdir(tmp_path)) == FILES
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SEAL"
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        save_adapter(model, tmp_path, adapter_name="unknown")
    assert sorted(os.listdir(tmp_path)) == FILES


def test_a_model_without_pefts_wrapper_is_refused_before_a_file_is_written(tmp_path):
    model = base_model("llama")
    model.add_adapter(SealConfig(), "default")
    for sites in (None, ["output"]):
        with pytest.raises(TypeError, match="needs a PeftModel, got a LlamaForCausalLM"):
            save_adapter(model, tmp_path / "adapter", sites=sites)
    assert not (tmp_path / "adapter").exists()


def test_text_that_a_user_wrote_into_the_card_stays_without_the_line_that_says_it_is_ours(tmp_path):
    save_adapter(adapted("llama"), tmp_path)
    card = tmp_path / "README.md"
    assert MARKER in card.read_text()
    card.write_text(card.read_text().replace(MARKER, "") + "\nMy notes.\n")
    save_adapter(adapted("llama", seed=2), tmp_path)
    assert "My notes." in card.read_text()
