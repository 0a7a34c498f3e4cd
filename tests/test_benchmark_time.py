"""Time to accuracy, on a tiny model: every job once, what it writes is what happened, and nothing is done twice."""

import argparse
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages import blocks
from seal_peft.data import read_samples
from stages import save_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
POINTS, SYSTEMS, KNOBS = 2, ["seal-c"], ["nothing", "full length only, 32 questions"]
PHASES = ("knobs", "choice", "timing", "search", "finalists", "final")


def shown(result: dict[str, object]) -> list[str]:
    """What docs/results.md shows of a results file in tables: systems, aims and knobs."""
    return blocks("results/time-to-accuracy.json", result)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """The benchmark after all phases of one system, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import time_bench as script
        import time_summary

        folder = tmp_path_factory.mktemp("tta")
        options = {"model": str(save_model(folder / "model")), "work": str(folder / "work"), "size": "tiny"}
        numbers = {"points": POINTS, "batch_tokens": 5000, "until": float("inf")}
        patch.setitem(script.METHODS, "seal-c", (*script.METHODS["seal-c"][:2], (0.05, 0.1, 0.2, 0.3)))
        patch.setitem(script.SYSTEMS, "seal-c", script.KNOBS["nothing"])  # whatever ours is
        patch.setattr(script, "KNOBS", {name: script.KNOBS[name] for name in KNOBS})
        script.SIZES["tiny"] = replace(script.SIZES["tiny"], contexts=2, full=2, long=1, choice=1, test=2)
        made = script.Bench(argparse.Namespace(**options, **numbers, systems=SYSTEMS, output=folder / "out.json"))
        made.data()
        for phase in PHASES:
            made.work(phase)
        time_summary.merge(made)
        yield script, made


def test_tokens_and_points_are_those_of_the_training(bench):
    script, made = bench
    result = json.loads(made.options.output.read_text())
    rows = made.rows([script.first_questions(sample, 16) for sample in made.samples("mixed-0")])
    assert list(result["systems"]) == SYSTEMS
    for entry in result["systems"].values():
        (run,) = entry["runs"]
        assert [point["tokens"] for point in run["points"]][-1] == sum(len(row["input_ids"]) for row in rows)
        assert len(run["points"]) == POINTS  # 4 contexts, 2 a step
        assert len(entry["seconds_per_token"]) == made.size.seeds
        search, finalists = entry["search"], entry["finalists"]
        assert list(finalists) == sorted(search, key=search.__getitem__)[:3]
        assert len(search) == 4
        assert entry["rate"] == float(min(finalists, key=finalists.__getitem__))
    # Two contexts are one padded batch there; padding counts as nothing.
    timed = made.train(*made.jobs("timing")[0])["points"][-1]
    few = made.rows(made._training_samples("timing", made.systems["seal-c"], 0))
    assert (timed["step"], timed["tokens"]) == (1, sum(len(row["input_ids"]) for row in few))
    main, aims, knobs = shown(result)
    assert "| seal-c | 96 |" in main
    assert not aims.strip(), "there is nobody to compare with"
    rows = [line for line in knobs.splitlines() if line.startswith("| ")]
    assert set(KNOBS) == {row.split(" | ")[0].removeprefix("| ") for row in rows[2:]}
    assert "was chosen from this table" in knobs
    *_, without = shown({**result, "knobs": {}})
    assert without.strip() == "Not measured: our recipe was chosen without it."
    assert result["base"]["original"]["n"] == result["systems"]["seal-c"]["reworded"]["n"] == 2


def test_the_page_compares_ours_with_the_paper_and_with_lora_where_all_are_there(bench):
    result = json.loads(bench[1].options.output.read_text())
    own = {**result["systems"]["seal-c"], "to 0.95": {"reached": 0, "seconds": None, "tokens": None}}

    def aims(**seconds: float | None) -> str:
        tokens = {"paper": 4200, "lora": 1900, "seal_c": 1400}
        to = {name: {"reached": 1, "seconds": s, "tokens": tokens[name]} for name, s in seconds.items()}
        systems = {name.replace("_", "-"): {**own, "to 0.9": target} for name, target in to.items()}
        return shown({**result, "systems": systems})[1]

    text = aims(paper=96.0, lora=41.2, seal_c=16.0)
    assert "`0.95` within a minute: missed; 0 of 1 trainings get there." in text
    assert "recipe: to `0.90` reached by the medians, 6.0 times (3.0 times fewer tokens;" in text
    assert "at equal accuracy: reached, to `0.90` 16 s against 41 s." in text
    text = aims(paper=79.0, lora=15.2, seal_c=16.0)
    assert "recipe: to `0.90` missed by the medians, 4.9 times" in text
    assert "at equal accuracy: missed, to `0.90` 16 s against 15 s." in text
    assert not aims(paper=None, lora=None, seal_c=None).strip(), "without seconds nothing can be said"


@pytest.mark.parametrize(("seconds", "verdict"), [(59.0, "reached, 59 s"), (112.0, "missed, 112 s")])
def test_the_page_compares_seconds_with_the_minute_that_was_aimed_at(bench, seconds, verdict):
    result = json.loads(bench[1].options.output.read_text())
    to = {"to 0.9": {"reached": 1, "seconds": 10.0, "tokens": 100}}
    own = {**result["systems"]["seal-c"], **to, "to 0.95": {"reached": 1, "seconds": seconds, "tokens": 1000}}
    assert (
        f"`0.95` within a minute: {verdict}, the median"
        in shown({**result, "systems": dict.fromkeys(("seal-c", "paper", "lora"), own)})[1]
    )


def test_seconds_are_the_median_of_rounds_and_none_where_a_round_is_missing(bench, monkeypatch):
    import time_summary

    _, made = bench
    monkeypatch.setattr(made, "size", replace(made.size, seeds=3))
    jobs = made.jobs("timing")
    assert [seed for *_, seed in jobs] == [0, 1, 2]
    # The first point is still cold.
    slow = {0: 9.0, 1: 2.0, 2: 4.0}
    points = {
        n: [{"seconds_shared": 50.0, "tokens": 10}, {"seconds_shared": 50.0 + s, "tokens": 20}]
        for n, s in slow.items()
    }
    monkeypatch.setattr(made, "train", lambda *job: {"points": points[job[-1]]})
    assert time_summary._seconds_per_token(made, "seal-c") == []
    there = made.path(*jobs[0])
    monkeypatch.setattr(made, "path", lambda *job: there)
    assert time_summary._seconds_per_token(made, "seal-c") == [0.9, 0.2, 0.4]


def test_no_system_is_timed_at_the_same_place_of_every_round(bench, monkeypatch):
    _, made = bench
    monkeypatch.setattr(made, "size", replace(made.size, seeds=3))
    monkeypatch.setattr(made, "systems", dict.fromkeys(("paper", "seal-h", "seal-c", "lora")))
    jobs = made.jobs("timing")
    rounds = [[name for _, name, _, seed in jobs if seed == own] for own in range(3)]
    assert {tuple(sorted(names)) for names in rounds} == {("lora", "paper", "seal-c", "seal-h")}
    for places in zip(*rounds, strict=True):
        assert len(set(places)) == 3


def test_a_rate_that_answered_and_was_not_chosen_is_told(bench, monkeypatch):
    import time_summary

    _, made = bench
    chosen = made.best("seal-c")
    others = set(made.three_best("seal-c")) - {chosen}
    assert time_summary._not_chosen(made, "seal-c", chosen) == {}
    own = made.path("final", "seal-c", chosen, 0)
    monkeypatch.setattr(made, "path", lambda *job: own)
    told = time_summary._not_chosen(made, "seal-c", chosen)
    assert set(told) == {f"{other:g}" for other in others}
    (_, other) = told
    assert told[other]["last"]["n"] == 2
    result = json.loads(made.options.output.read_text())
    result["systems"]["seal-c"]["not_chosen"] = told
    assert f"; seal-c with {other} ends at 0.000." in shown(result)[0]


def test_half_of_the_contexts_have_the_search_of_all(bench, monkeypatch):
    script, made = bench
    name = "seal-c, half of the contexts"
    assert script.SYSTEMS[name].share == 0.5
    assert made.searched(name) == made.searched("seal-c")
    monkeypatch.setattr(made, "systems", {name: script.SYSTEMS[name]})
    assert {system for _, system, *_ in made.jobs("search")} == {"seal-c"}
    assert {system for _, system, *_ in made.jobs("finalists")} == {name}


def test_of_all_adapters_only_the_last_one_that_answered_is_kept(bench):
    _, made = bench
    for phase, names in (("final", SYSTEMS), ("knobs", KNOBS)):
        for name in names:
            (last,) = (made.folder / phase).glob(f"{name}-*-0/step-*")
            assert last == made.path(phase, name, made.best(name), 0) / last.name
            points = json.loads((last.parent / "run.json").read_text())["points"]
            assert last.name == f"step-{points[-1]['step']}"


def test_an_accuracy_counts_from_the_point_after_the_last_that_misses_it(bench, monkeypatch):
    import time_summary

    _, made = bench
    points = [{"step": n, "tokens": 100 * n, "seconds_shared": 1.0} for n in (1, 2, 3, 4)]
    monkeypatch.setattr(made, "train", lambda *job: {"points": points, "recipe": {}})
    right = {"1": 10, "2": 8, "3": 9, "4": 10}
    scores = {step: [1.0] * n + [0.0] * (10 - n) for step, n in right.items()} | {"reworded": [0.0] * 10}
    monkeypatch.setattr(made, "test", lambda *job: scores)
    outcome = time_summary._outcome(made, "final", "seal-c", 0.01, 0)
    assert outcome["to"]["0.9"]["tokens"] == 300
    assert outcome["to"]["0.95"]["tokens"] == 400
    scores["4"] = scores["2"]
    assert set(time_summary._outcome(made, "final", "seal-c", 0.01, 0)["to"].values()) == {None}


def test_a_bisection_asks_the_end_twice_and_then_only_what_decides(bench, monkeypatch, tmp_path):
    script, made = bench
    right = {"1": 2, "2": 5, "3": 9, "4": 9, "5": 10, "6": 10, "7": 10, "8": 10}
    worn = []
    load = script.PeftModel.from_pretrained
    monkeypatch.setattr(
        script.PeftModel, "from_pretrained", lambda model, path: worn.append(path.name[5:]) or load(model, path)
    )
    monkeypatch.setattr(script, "score_answers", lambda *given: (n := right[worn[-1]]) * [1.0] + (10 - n) * [0.0])
    monkeypatch.setattr(made, "samples", lambda name: read_samples(made.folder / "test.jsonl")[:1] * 10)
    job = made.jobs("final")[0]
    monkeypatch.setattr(made, "path", lambda *given: tmp_path)
    made.train(*job)
    run = json.loads((tmp_path / "run.json").read_text())
    run["points"] = [{**run["points"][0], "step": int(step)} for step in right]
    (tmp_path / "run.json").write_text(json.dumps(run))
    for step in right:
        if not (tmp_path / f"step-{step}").exists():
            shutil.copytree(next(tmp_path.glob("step-*")), tmp_path / f"step-{step}")
    scores = made.test(*job)
    assert worn == ["8", "8", "4", "2", "3", "6", "5"]
    assert {step: sum(own) for step, own in scores.items()} == {"reworded": 10, **{s: right[s] for s in worn}}


@given(accuracies=st.lists(st.sampled_from([0.5, 0.9, 0.92, 0.95, 1.0]), min_size=1, max_size=40))
def test_a_bisection_ends_at_a_point_that_reaches_what_the_one_before_does_not(accuracies):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import time_points as script
    for values in (accuracies, sorted(accuracies)):
        steps = [str(step) for step in range(len(values))]
        known: dict[str, list[float]] = {}
        while (name := script.asked_next(known, steps)) is not None:
            assert name not in known
            known[name] = [values[-1 if name == "reworded" else int(name)]]
        points = [{"step": i, "accuracy": values[i] if str(i) in known else None} for i in range(len(values))]
        for target in script.REACHED:
            point = script.reached(points, target)
            assert (point is None) == (values[-1] < target)
            if point is None:
                continue
            assert values[point["step"]] >= target
            assert all(later["accuracy"] is None or later["accuracy"] >= target for later in points[point["step"] :])
            assert point["step"] == 0 or values[point["step"] - 1] < target
            if values is not accuracies:
                assert point["step"] == next(i for i, value in enumerate(values) if value >= target)


def test_a_second_call_finds_everything_done(bench, monkeypatch):
    script, made = bench
    monkeypatch.setattr(script, "load_model", None)  # nothing may load one
    for phase in PHASES:
        assert not made.left(phase)
        assert made.work(phase)


def test_what_was_trained_with_another_recipe_is_refused_before_any_job(bench, monkeypatch):
    import time_to_accuracy

    script, made = bench
    made.check()
    with monkeypatch.context() as patch:
        patch.setitem(script.SYSTEMS, "seal-c", replace(script.SYSTEMS["seal-c"], batch=4))
        words = ["time_to_accuracy.py", "run", "--size", "tiny", "--work", made.options.work]
        patch.setattr(sys, "argv", [*words, "--model", made.options.model, "--systems", "seal-c"])
        patch.setattr(script, "spread", None)
        message = r"trained with .*'batch': 2.*, not Recipe\(.*batch=4.*remove all folders of 'seal-c' in .*--work"
        with pytest.raises(ValueError, match=message):
            time_to_accuracy.main()
    # What the knobs found stays when ours is chosen by it.
    monkeypatch.setitem(script.KNOBS, "nothing", replace(script.KNOBS["nothing"], batch=4))
    with pytest.raises(ValueError, match="remove all folders of 'nothing' in .*knobs"):
        made.check()


def test_a_phase_whose_learning_rates_are_not_searched_yet_names_the_phase_that_is_missing(
    bench, monkeypatch, tmp_path
):
    script, made = bench
    monkeypatch.setattr(made, "folder", tmp_path)
    for phase, first in {"choice": "knobs", "finalists": "search", "final": "search"}.items():
        with pytest.raises(
            ValueError, match=rf"{first}/.*run.json is not there yet: `run --phases {first}` comes first"
        ):
            made.left(phase)
    shutil.copytree(made.options.work + "/search", tmp_path / "search")
    with pytest.raises(ValueError, match=r"final/.*run.json is not there yet: `run --phases finalists` comes first"):
        made.left("final")


def test_the_file_names_the_devices_of_all_phases(bench, monkeypatch):
    import time_summary

    _, made = bench
    devices = {"timing": "H200", "search": "H100", "final": "A100", "knobs": "L40S"}
    real = made.train
    monkeypatch.setattr(made, "train", lambda phase, *job: {**real(phase, *job), "device": devices[phase]})
    time_summary.merge(made)
    assert json.loads(made.options.output.read_text())["device"] == "A100, H100, H200, L40S"


def test_a_killed_training_goes_on_from_its_last_point_with_its_clock(bench, monkeypatch, tmp_path):
    script, made = bench
    (job, *_) = made.jobs("final")
    whole = made.train(*job)
    save = script.Clock.on_save

    def killed(*given, **named):
        save(*given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "path", lambda *given: tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(script.Clock, "on_save", killed)
        with pytest.raises(KeyboardInterrupt):
            made.train(*job)
    (before,) = json.loads((tmp_path / "clock.json").read_text())["points"]
    run = made.train(*job)
    assert run["points"][0] == before
    assert run["points"][1]["seconds_shared"] > before["seconds_shared"]
    assert [(p["step"], p["tokens"]) for p in run["points"]] == [(p["step"], p["tokens"]) for p in whole["points"]]
    assert run["valid_loss"] == whole["valid_loss"]
    # Nothing stays that only an unfinished training needs.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "step-1", "step-2"]


def test_a_longer_training_has_more_points_not_a_coarser_grid(bench, monkeypatch):
    script, made = bench
    monkeypatch.setattr(made, "size", script.SIZES["full"])
    ours = [{"input_ids": [0] * length} for length in made.size.lengths] * made.size.contexts
    paper = [{"input_ids": [0] * made.size.lengths[-1]}] * made.size.full
    assert made.points(ours) == POINTS
    assert made.points(paper) == round(POINTS * 1200 * 8192 / (120 * 22016)) == 7
    assert made.points(ours[:5]) == 1


def test_the_other_wording_keeps_keys_and_numbers_and_nothing_else(bench):
    script, made = bench
    (sample, *_) = read_samples(made.folder / "test.jsonl")
    (old,), (new,) = sample.messages, script.reworded(sample).messages
    pairs = re.findall(r"line (\S+): REGISTER_CONTENT is <(\d+)>", old["content"])
    assert [f"{key} has the value {value}" for key, value in pairs] == new["content"].split("\n\n")[1].splitlines()
    assert "REGISTER" not in new["content"]
    asked = re.search(r"What is the value of (\S+)\?", new["content"])[1]
    assert dict(pairs)[asked] == script.reworded(sample).answers[0]


def test_fewer_questions_are_the_first_ones_of_the_same_context(bench):
    script, made = bench
    (sample, *_) = made.samples("mixed-0")
    one = script.first_questions(sample, 1)
    assert one.messages == sample.messages[:1]
    assert one.target == sample.messages[1]["content"]
    assert script.first_questions(sample, 16) == sample


def test_seeds_share_no_sample_and_none_with_validation(bench, monkeypatch):
    script, made = bench
    asked: dict[str, list] = {}
    monkeypatch.setattr(script, "make_lines", lambda model, folder, files: asked.update(files))
    monkeypatch.setattr(made, "size", script.SIZES["full"])
    made.data()
    seeds = {
        name: {(length, first + i) for length, contexts, _, first in parts for i in range(contexts)}
        for name, parts in asked.items()
        if name != "test"  # of the other split
    }
    assert all(len(seeds[f"{data}-{seed}"]) > 300 for data in ("mixed", "long", "full") for seed in range(3))
    for one, other in itertools.combinations(seeds, 2):
        if one[-2:] != other[-2:] or one in ("valid", "choice"):
            assert not seeds[one] & seeds[other], (one, other)


def test_a_short_training_has_its_number_of_contexts_under_a_recipe_that_leaves_out_lengths(bench, monkeypatch):
    script, made = bench
    lengths = [length for length in (1536, 2048, 4096, 6144, 8192) for _ in range(120)]
    (sample,) = made.samples("mixed-0")[:1]
    monkeypatch.setattr(made, "samples", lambda name: [replace(sample, length=length) for length in lengths])
    monkeypatch.setattr(made, "size", script.SIZES["full"])
    half = replace(script.KNOBS["nothing"], max_length=4096)
    for phase, contexts in {"search": 200, "timing": 40}.items():
        assert len(made._training_samples(phase, half, 0)) == pytest.approx(contexts, abs=2)
    assert len(made._training_samples("final", replace(half, share=0.5), 0)) == 180
