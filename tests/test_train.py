"""Training: what it writes, that it learns scales and only scales, and that no interrupt changes the outcome."""

import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import models
from faults import die, in_a_process_of_its_own
from processes import launch_two
from seal_peft import SealConfig, scales
from seal_peft.data import read_samples, trained_prompts, write_samples
from seal_peft.dataset import training_rows
from seal_peft.files import alone_in
from seal_peft.heads import find_heads, save_head_scales
from seal_peft.tokens import encode_training
from seal_peft.train import SealTrainingArguments, TrainArguments, train
from seal_peft.tuner.weights import take_settings
from stages import error_of, save_model, save_samples, seal, some_samples

SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "max_steps": 6, "save_steps": 2, "disable_tqdm": True}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    save_model(folder / "model")
    save_samples(folder / "train.jsonl", questions=2)
    return folder


def train_in(
    folder: Path,
    house: Path,
    granularity: str = "channel",
    memory: str | None = None,
    overwrite_output_dir: bool = False,
    **changes: Any,
) -> Path:
    files = (str(house / "model"), str(house / "train.jsonl"))
    own: dict[str, Any] = {"memory": memory, "overwrite_output_dir": overwrite_output_dir}
    arguments = TrainArguments(*files, granularity, dtype="float32", **own)
    return train(arguments, SealTrainingArguments(output_dir=str(folder), **{**SETTINGS, **changes}))


def test_it_starts_from_the_scales_of_another_adapter(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = find_heads(AutoModelForCausalLM.from_pretrained(house / "model"))
    chosen = torch.linspace(0.8, 1.2, 8).view(2, 4)
    save_head_scales(heads, chosen, tmp_path / "chosen")
    (tmp_path / "chosen" / "run.json").write_text('{"prompt_hashes": ["learned before"]}')
    words = ["train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl", "--max_steps", 1]
    words += [
        "--init_adapter",
        tmp_path / "chosen",
        "--dtype",
        "float32",
        "--disable_tqdm",
        "true",
        "--warmup_steps",
        0,
    ]
    assert seal(*words, "--granularity", "head", "--learning_rate", 1e-4, "--output_dir", tmp_path / "out") == 0
    for own, wanted in zip(scales(tmp_path / "out").values(), chosen, strict=True):
        assert 0 < (own - wanted).abs().max() < 2e-4
    assert "learned before" in trained_prompts(tmp_path / "out")
    assert len(trained_prompts(tmp_path / "out")) == 7
    # What does not fit is refused before the model is loaded.
    save_model(tmp_path / "model", weights=False)
    words[2] = tmp_path / "model"
    assert seal(*words, "--granularity", "channel", "--output_dir", tmp_path / "no") == 1
    assert "granularity must be the same" in error_of(capsys)
    words[words.index(tmp_path / "chosen")] = tmp_path / "nowhere"
    assert seal(*words, "--output_dir", tmp_path / "no") == 1
    assert "There is no folder" in error_of(capsys)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("given", "asked"), [(["output", "query"], ["output"]), (["output"], ["output", "query"]), (["query"], ["output"])]
)
def test_an_adapter_with_other_sites_is_no_start_and_is_refused_before_the_model_is_loaded(
    given: list[str], asked: list[str], house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.adapted("llama", sites=tuple(given)).save_pretrained(tmp_path / "given")
    save_model(tmp_path / "model", weights=False)
    words = ["train", "--model_name_or_path", tmp_path / "model", "--train_file", house / "train.jsonl"]
    words += ["--granularity", "head", "--init_adapter", tmp_path / "given", "--output_dir", tmp_path / "out"]
    assert seal(*words, "--sites", *asked) == 1
    error = error_of(capsys)
    assert f"given has sites={tuple(given)}, but sites={tuple(asked)} are to be trained. Give --sites as" in error
    assert not (tmp_path / "out").exists()


YARN, SAME_YARN = '{"type": "yarn", "factor": 2}', '{"factor": 2.0, "rope_type": "yarn"}'


@pytest.mark.parametrize(
    ("given", "right", "wrong"),
    [
        (["--rope_parameters", YARN], ["--rope_parameters", SAME_YARN], []),
        ([], [], ["--rope_parameters", YARN]),
        (
            ["--rope_parameters", YARN, "--self_extend", '{"group_size": 2, "window": 64}'],
            ["--rope_parameters", SAME_YARN, "--self_extend", '{"window": 64, "group_size": 2}'],
            ["--rope_parameters", SAME_YARN],
        ),
    ],
    ids=["rope", "none", "both"],
)
def test_a_start_has_the_context_extension_that_is_asked_for_in_whatever_words(
    given: list[str],
    right: list[str],
    wrong: list[str],
    house: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl", "--max_steps", 1]
    words += ["--dtype", "float32", "--disable_tqdm", "true"]
    assert seal(*words, *given, "--output_dir", tmp_path / "given") == 0
    words += ["--init_adapter", tmp_path / "given", "--output_dir", tmp_path / "out"]
    capsys.readouterr()
    assert seal(*words, *wrong) == 1
    said = error_of(capsys).partition("(on the command line: ")[2].partition(")")[0]
    flags = shlex.split(said) if given else []
    assert given or said == "neither --rope_parameters nor --self_extend"
    assert seal(*words, *flags) == 0
    assert seal(*words, *right, "--overwrite_output_dir") == 0


@pytest.fixture(scope="module")
def uninterrupted(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("uninterrupted"), house)


def weights(folder: Path) -> dict[str, Tensor]:
    return take_settings(load_file(folder / "adapter_model.safetensors"))[0]


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_finished_training_is_an_adapter_folder_with_its_record(uninterrupted: Path) -> None:
    files = {path.name for path in uninterrupted.iterdir() if path.is_file()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json"}
    run = run_of(uninterrupted)
    assert run["arguments"]["granularity"] == "channel"
    assert run["training_arguments"]["learning_rate"] == 0.05
    assert (run["samples"], run["steps"], run["resumed_from"]) == (6, 6, None)
    assert [point["step"] for point in run["loss_curve"]] == [1, 2, 3, 4, 5, 6]
    assert run["trainable_parameters"] == models.LAYERS * models.HEADS * models.HEAD_DIM
    assert run["seconds"] > 0
    assert run["versions"]["torch"]
    assert 0.97 * 6 * 400 <= run["tokens"] <= 6 * 400


def test_an_adapter_is_not_scored_on_what_it_was_trained_on(
    house: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", house / "model", "--test_file", house / "train.jsonl", "--output_dir", tmp_path]
    assert seal("evaluate", *words, "--adapters", f"ours={uninterrupted}") == 1
    assert "6 of the 6 samples" in (error := error_of(capsys))
    assert "(lines 1, 2, 3, 4, 5, ...) were in the training data of 'ours'" in error
    assert not list(tmp_path.iterdir())


def test_the_loss_falls(house: Path, tmp_path: Path) -> None:
    losses = [point["loss"] for point in run_of(train_in(tmp_path, house, max_steps=24))["loss_curve"]]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_every_scale_moves_and_nothing_else_is_saved(uninterrupted: Path) -> None:
    saved = weights(uninterrupted)
    assert len(saved) == models.LAYERS
    for name, delta in saved.items():
        assert name.endswith("self_attn.o_proj.seal_delta.weight")
        assert delta.dtype == torch.float32
        assert (delta != 0).all()


def test_the_paper_trains_one_scale_a_head(house: Path, tmp_path: Path) -> None:
    learned = scales(train_in(tmp_path, house, granularity="head"))
    assert {tuple(scale.shape) for scale in learned.values()} == {(models.HEADS,)}


def test_queries_alone_have_one_scale_a_head_and_channels_of_them_are_refused(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl"]
    words += ["--sites", "query", "--output_dir", tmp_path / "out"]
    words += ["--max_steps", 1, "--dtype", "float32", "--disable_tqdm", "true"]
    assert seal(*words, "--granularity", "channel") == 1
    assert "granularity='channel' is of no use for sites=('query',)" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert seal(*words) == 0
    assert {tuple(scale.shape) for scale in scales(tmp_path / "out").values()} == {(models.HEADS,)}
    assert run_of(tmp_path / "out")["arguments"]["granularity"] == "head"


def test_the_base_is_recorded_by_a_path_that_holds_in_every_folder(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(house)
    arguments = TrainArguments("model", "train.jsonl", dtype="float32")
    train(arguments, SealTrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 1}))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((house / "model").resolve())


def test_a_plain_trainer_with_ordinary_labels_learns_the_same_scales(
    house: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(house / "model")
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    model = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity="channel"))
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        **{name: SETTINGS[name] for name in ("learning_rate", "max_steps", "disable_tqdm")},
    )
    rows = [encode_training(sample, tokenizer) for sample in read_samples(house / "train.jsonl")]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    ours, theirs = scales(uninterrupted), scales(model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_is_one_flag_in_every_version_of_transformers(tmp_path: Path) -> None:
    arguments = SealTrainingArguments(str(tmp_path), activation_checkpointing=True)
    assert arguments.activation_checkpointing is arguments.gradient_checkpointing is True
    assert not SealTrainingArguments(str(tmp_path)).gradient_checkpointing


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [({"activation_checkpointing": True}, None), ({"memory": "low"}, "low: all layers recompute")],
)
def test_saving_memory_changes_no_scales(
    house: Path, uninterrupted: Path, tmp_path: Path, settings: dict[str, Any], chosen: str | None
) -> None:
    ours = weights(train_in(tmp_path, house, **settings))
    for name, delta in weights(uninterrupted).items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-5, atol=1e-6)
    recorded = run_of(tmp_path)["memory"]
    assert recorded is chosen is None or recorded.startswith(chosen)
    assert run_of(uninterrupted)["memory"].startswith("auto: at ")


def test_two_settings_of_the_memory_are_refused(house: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--memory low and --activation_checkpointing .*give one"):
        train_in(tmp_path, house, memory="low", activation_checkpointing=True)


def test_two_processes_learn_what_one_learns_from_twice_the_batch(house: Path, tmp_path: Path) -> None:
    words = ["train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl"]
    words += ["--dtype", "float32", "--recipe", "paper", "--max_steps", "3", "--save_steps", "9"]
    words += ["--disable_tqdm", "true", "--output_dir"]
    launch_two("-m", "seal_peft", *words, tmp_path / "two")
    assert seal(*words, tmp_path / "one", "--per_device_train_batch_size", 2) == 0
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-4, atol=1e-6)
    assert run_of(tmp_path / "two")["steps"] == 3


# --- interrupts ----------------------------------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    """Ctrl-C at the end of a step, before its checkpoint is written."""

    at = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch):
    """Have every Trainer meet a Ctrl-C at some step; step 0 never comes."""

    def set_step(step: int) -> None:
        callback = type("InterruptAt", (Interrupt,), {"at": step})
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*defaults, callback])

    defaults = list(transformers.trainer.DEFAULT_CALLBACKS)
    return set_step


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(
    house: Path, uninterrupted: Path, tmp_path: Path, interrupt_at
) -> None:
    interrupt_at(5)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, house)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "unfinished.json"}
    # A kill while a checkpoint is written leaves one without the state that the Trainer writes last.
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-6")
    state = (tmp_path / "checkpoint-6" / "trainer_state.json").read_bytes()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_bytes(state[:-20])
    interrupt_at(0)
    train_in(tmp_path, house)
    assert_same_weights(tmp_path, uninterrupted)
    assert run_of(tmp_path)["resumed_from"] == str(tmp_path / "checkpoint-4")
    assert run_of(tmp_path)["loss_curve"] == run_of(uninterrupted)["loss_curve"]
    assert not (tmp_path / "unfinished.json").exists()


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    house: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        *("train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl"),
        *("--output_dir", tmp_path, "--dtype", "float32", "--recipe", "default"),
        *(f"--{name}={value}" for name, value in SETTINGS.items()),
    ]
    killing = type("Kill", (TrainerCallback,), {"on_save": die})
    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, killing])
        assert in_a_process_of_its_own(lambda: seal(*words)) == signal.SIGKILL
    assert not (tmp_path / "run.json").exists()
    assert seal(*words) == 0
    assert run_of(tmp_path)["resumed_from"] == str(tmp_path / "checkpoint-2")
    again = tmp_path / "again"
    assert seal(*[again if word == tmp_path else word for word in words]) == 0
    assert_same_weights(tmp_path, again)


def test_an_unfinished_training_is_not_continued_with_other_settings(
    house: Path, tmp_path: Path, interrupt_at
) -> None:
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, house)
    interrupt_at(0)
    with pytest.raises(ValueError, match=r"unfinished training .*learning_rate 0.05 -> 0.01.* same settings to go on"):
        train_in(tmp_path, house, learning_rate=0.01)
    other = tmp_path / "other.jsonl"
    save_samples(other, questions=1)
    with pytest.raises(ValueError, match="unfinished training .*train_file's bytes"):
        arguments = TrainArguments(str(house / "model"), str(other), dtype="float32")
        train(arguments, SealTrainingArguments(output_dir=str(tmp_path), **SETTINGS))
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    train_in(tmp_path, house, learning_rate=0.01, overwrite_output_dir=True)
    assert run_of(tmp_path)["resumed_from"] is None


def test_a_finished_adapter_is_replaced_only_if_asked_and_nothing_old_is_taken_for_new(
    house: Path, uninterrupted: Path, tmp_path: Path, interrupt_at
) -> None:
    train_in(tmp_path, house, learning_rate=0.01, max_steps=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for settings in ({}, {"learning_rate": 0.01, "max_steps": 4}):
        with pytest.raises(ValueError, match=r"holds a finished adapter .run.json.* or pass --overwrite_output_dir"):
            train_in(tmp_path, house, **settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    interrupt_at(1)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, house, overwrite_output_dir=True)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "unfinished.json"}
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, house)
    interrupt_at(0)
    train_in(tmp_path, house, overwrite_output_dir=True)  # the flag does not throw away what is this very training
    assert run_of(tmp_path)["resumed_from"] == str(tmp_path / "checkpoint-2")
    assert_same_weights(tmp_path, uninterrupted)


def test_adapters_and_checkpoints_of_another_program_are_neither_continued_nor_removed(
    house: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "a" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoints of another program.* pass --overwrite_output_dir"):
        train_in(tmp_path / "a", house)
    assert checkpoint.is_dir()
    foreign = shutil.copytree(uninterrupted, tmp_path / "b")
    (foreign / "run.json").unlink()
    with pytest.raises(ValueError, match="holds a finished adapter .adapter_config.json"):
        train_in(tmp_path / "b", house)


def test_a_checkpoint_that_is_named_is_whole_and_costs_no_finished_adapter(house: Path, tmp_path: Path) -> None:
    train_in(tmp_path / "one", house, max_steps=2)
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    with pytest.raises(ValueError, match="holds a finished adapter .run.json"):
        train_in(tmp_path / "one", house, resume_from_checkpoint=checkpoint)
    train_in(tmp_path / "two", house, resume_from_checkpoint=checkpoint)
    assert (run_of(tmp_path / "two")["resumed_from"], run_of(tmp_path / "two")["steps"]) == (checkpoint, 6)
    # As after a kill, when the folder holds checkpoints of its own; the same command goes on.
    for name in ("run.json", "adapter_config.json"):
        (tmp_path / "two" / name).unlink()
    train_in(tmp_path / "two", house, resume_from_checkpoint=checkpoint)
    assert run_of(tmp_path / "two")["steps"] == 6
    for name in ("nowhere", "one"):
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*{name} is no whole checkpoint"):
            train_in(tmp_path / "three", house, resume_from_checkpoint=str(tmp_path / name))
    assert not (tmp_path / "three").exists()


# --- bad input: the model has no weights, so that whoever would load it fails in another way -------------------------


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("weightless"), weights=False, max_position_embeddings=300)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert seal("train", *words) == 1
    return error_of(capsys)


def test_samples_beyond_the_window_are_refused_before_the_model_is_loaded(
    weightless: Path, house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(
        *(capsys, "--model_name_or_path", weightless, "--train_file", house / "train.jsonl"),
        *("--output_dir", tmp_path / "out"),
    )
    assert "window of this model is 300 tokens" in error
    assert "`seal-peft advise --length" in error
    assert not (tmp_path / "out").exists()


def test_two_gpus_for_one_process_are_refused_as_transformers_would_double_every_batch(
    weightless: Path, house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = [
        "--model_name_or_path",
        weightless,
        "--train_file",
        house / "train.jsonl",
        "--output_dir",
        tmp_path / "out",
    ]
    error = refusal(capsys, *words)
    assert "This process sees 2 GPUs" in error
    assert "`accelerate launch --multi_gpu --num_processes 2 -m seal_peft train ...`" in error
    assert not (tmp_path / "out").exists()
    assert "window of this model is 300 tokens" in refusal(capsys, *words, "--use_cpu")


def test_a_plain_trainers_rows_are_checked_against_what_the_model_reads_with_its_adapter(house: Path) -> None:
    samples, tokenizer = read_samples(house / "train.jsonl"), AutoTokenizer.from_pretrained(house / "model")
    model = get_peft_model(models.llama(max_position_embeddings=300), SealConfig())
    with pytest.raises(ValueError, match="window of this model is 300 tokens"):
        training_rows(samples, tokenizer, model)
    ntk = SealConfig(rope_parameters={"rope_type": "ntk", "factor": 2.0})
    rows = training_rows(samples, tokenizer, get_peft_model(models.llama(max_position_embeddings=300), ntk))
    assert rows == [encode_training(sample, tokenizer) for sample in samples]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("", "There are no samples"),
        ("{}\n", "line 1: Field 'messages' is missing"),
        (None, "There is no file .*train.jsonl. Give a JSONL file"),
        (some_samples("test"), "Sample .lines-test-.* is of the test split.* `seal-peft make-data --split train`"),
    ],
)
def test_bad_sample_files_are_refused_before_the_model_is_loaded(
    weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, complaint: str
) -> None:
    if isinstance(rows, str):
        (tmp_path / "train.jsonl").write_text(rows)
    elif rows:
        write_samples(tmp_path / "train.jsonl", rows)
    error = refusal(
        *(capsys, "--model_name_or_path", weightless, "--train_file", tmp_path / "train.jsonl"),
        *("--output_dir", tmp_path / "out"),
    )
    assert re.search(complaint, error)
    assert not (tmp_path / "out").exists()


def test_padding_that_the_model_would_learn_from_is_refused_before_any_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    save_model(tmp_path / "model", weights=False, rope_parameters=rope)
    write_samples(tmp_path / "train.jsonl", [*some_samples("train", 200), *some_samples("train", 400)])
    words = ["--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "train.jsonl"]
    words += ["--output_dir", tmp_path / "out", "--per_device_train_batch_size"]
    assert "takes the frequencies of its longest row. Use per_device_train_batch_size=1" in refusal(capsys, *words, 2)
    assert "no file named model.safetensors" in refusal(capsys, *words, 1)
    assert not (tmp_path / "out").exists()


def test_a_bad_setting_costs_no_finished_adapter_and_blocks_no_second_try(house: Path, tmp_path: Path) -> None:
    train_in(tmp_path, house, max_steps=1)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="batch_size"):
        train_in(tmp_path, house, per_device_train_batch_size=0, overwrite_output_dir=True)
    with pytest.raises(ValueError, match="num_workers"):
        train_in(tmp_path, house, dataloader_num_workers=-1, overwrite_output_dir=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    train_in(tmp_path, house, max_steps=2, overwrite_output_dir=True)
    assert run_of(tmp_path)["steps"] == 2


def test_two_trainings_do_not_write_into_one_folder(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl"]
    words += ["--output_dir", tmp_path, "--max_steps", 1, "--disable_tqdm", "true"]
    with alone_in(tmp_path):  # as another process has it while it trains
        assert seal(*words) == 1
        assert f"Another process is writing to {tmp_path}. Wait" in error_of(capsys)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    assert seal(*words) == 0


def test_a_diverged_training_saves_nothing_and_says_what_to_lower(house: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diverged.*Lower --learning_rate"):
        train_in(tmp_path, house, learning_rate=1e38)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert run_of(train_in(tmp_path, house, max_steps=1))["resumed_from"] is None


def test_layers_that_do_not_exist_are_found_before_any_weights_are_read(house: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "weightless", weights=False)
    arguments = TrainArguments(
        str(tmp_path / "weightless"), str(house / "train.jsonl"), layers_to_transform=[99], dtype="float32"
    )
    with pytest.raises(ValueError, match="layers_to_transform.*99"):
        train(arguments, SealTrainingArguments(output_dir=str(tmp_path / "adapter"), **SETTINGS))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("rope_parameters", {"rope_type": "ntk", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("self_extend", {"group_size": 4, "window": 64}),
    ],
)
def test_an_extension_lets_it_train_beyond_the_window(
    flag: str, value: dict[str, Any], house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", max_position_embeddings=300)
    words = ["--model_name_or_path", tmp_path / "model", "--train_file", house / "train.jsonl"]
    words += ["--output_dir", tmp_path / "out", "--max_steps", 1, "--dtype", "float32", "--disable_tqdm", True]
    small = {**value, "factor": 1.1} if "factor" in value else {"group_size": 2, "window": 250}
    assert seal("train", *words, f"--{flag}", json.dumps(small)) == 1
    refused = error_of(capsys)
    assert "A length of" in refused
    assert (f"self_extend={small}" in refused) == (flag == "self_extend")
    assert seal("train", *words, f"--{flag}", json.dumps(value)) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[flag] == value
    assert run_of(tmp_path / "out")["arguments"][flag] == json.dumps(value)
    assert seal("train", *words, f"--{flag}", "{4") == 1
    assert f"--{flag} must be JSON" in error_of(capsys)
