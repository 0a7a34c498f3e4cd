"""The benchmarks of sites and of steps run at a tiny size, share their jobs, stop in time, and fill their tables."""

import copy
import json
import os
import runpy
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pages import blocks, filled
from seal_peft.data import read_samples
from stages import save_model

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import jobs

    return jobs


def test_no_job_begins_when_the_time_is_up_and_finished_ones_stay(tmp_path: Path, jobs) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = {first: first.touch, second: second.touch}
    assert not jobs.do_jobs(done, until=time.time() - 1)
    assert not first.exists()
    assert jobs.do_jobs({first: first.touch})
    assert not jobs.do_jobs(done, until=time.time() - 1)
    assert jobs.do_jobs(done)


def test_a_job_that_fails_keeps_nobody_from_the_others_and_fails_the_call(
    tmp_path: Path, jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    with pytest.raises(SystemExit, match="1 jobs failed, .*bad first"):
        jobs.do_jobs({bad: lambda: 1 / 0, good: good.touch})
    assert good.is_file()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_workers_are_spread_over_the_gpus_that_may_be_seen_and_a_failing_one_fails_the_call(
    tmp_path: Path, jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "gpu = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "pathlib.Path(__file__).with_name(f'{gpu}-{os.getpid()}').touch()\n"
        "sys.exit(sys.argv[1] == gpu)\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    jobs.spread([str(script), "none"], 3)
    assert sorted(path.name[0] for path in tmp_path.glob("[0-9]-*")) == ["3", "3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs.spread([str(script), "none"], 1)
    assert len(list(tmp_path.glob("-*"))) == 1  # no GPU is not the first one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(SystemExit, match="1 of 2 workers failed; the same command goes on"):
        jobs.spread([str(script), "5"], 2)


def test_a_call_that_is_told_to_end_takes_its_workers_along(tmp_path: Path, jobs) -> None:
    worker, started = tmp_path / "worker.py", tmp_path / "started"
    worker.write_text(f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)\n")

    def end() -> None:
        while not started.is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end).start()
    with pytest.raises(SystemExit) as ended:
        jobs.spread([str(worker)], 1)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ChildProcessError):  # it is dead, and nobody has to wait for it
        os.waitpid(-1, os.WNOHANG)


def test_samples_of_one_length_that_were_made_in_several_parts_can_be_read_together(tmp_path: Path, jobs) -> None:
    jobs.make_lines(str(save_model(tmp_path / "model")), tmp_path, {"mixed": [(400, 2, 1, 0), (400, 2, 1, 50)]})
    samples = read_samples(tmp_path / "mixed.jsonl")
    assert len({sample.messages[0]["content"] for sample in samples}) == len(samples) == 4


def test_the_benchmark_of_sites_fills_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    sites = runpy.run_path(str(SCRIPTS / "sites.py"))
    small = replace(
        sites["SETTINGS"]["tiny"], systems=("output-head+query", sites["GROWING"]), train_lengths=(384,), contexts=1
    )
    monkeypatch.setitem(sites["SETTINGS"], "tiny", small)
    words = f"--model {save_model(tmp_path / 'model')} --work {tmp_path / 'work'} --settings tiny --seeds 0"
    words += f" --num_samples 1 --rates 0.1 --output {tmp_path / 'out.json'}"
    # As a worker does them; then the call that brings them together, whose workers would find nothing to do.
    monkeypatch.setitem(sites["run"].__globals__, "spread", lambda words, workers: None)
    for verb in ("data", "work", "run"):
        monkeypatch.setattr(sys, "argv", ["sites.py", verb, *shlex.split(words)])
        sites["main"]()
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["tiny"]["systems"]) == ["output-head+query", sites["GROWING"], "base"]
    assert result["device"] == result["tiny"]["systems"]["output-head+query"]["runs"][0]["device"]
    for name in ("long", "beyond", "ntk"):
        table, *_ = filled(f"results/sites-{name}.json", {**result, name: result["tiny"]})
        assert "| output-head+query | 16 | 0.1 | 0.00 (0.00 to 0.79) |" in table
    base = tmp_path / "work" / "tiny" / "base-0-0" / "scores.json"
    base.unlink()
    with pytest.raises(SystemExit, match="tiny: jobs are left; call this again to go on"):
        sites["main"]()
    # A killed test keeps the lengths that were answered.
    base.with_name("scores-begun.json").write_text(json.dumps({"512": [1.0]}))
    monkeypatch.setattr(sys, "argv", ["sites.py", "work", *shlex.split(words)])
    sites["main"]()
    assert json.loads(base.read_text()) == {"512": [1.0]}


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run benchmarks/step.py at a tiny size and return what it wrote."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import rates

    monkeypatch.setattr(rates, "SECONDS", 0.001)

    def run(*words: str) -> dict:
        output = tmp_path / "step.json"
        monkeypatch.setattr(
            sys, "argv", ["step.py", "--size", "tiny", "--tokens", "32", "--output", str(output), *words]
        )
        runpy.run_path(str(SCRIPTS / "step.py"), run_name="__main__")
        return json.loads(output.read_text())

    return run


def test_the_benchmark_of_steps_adds_rows_to_its_file_and_fills_its_table(step) -> None:
    step("--repeats", "1", "--parts", "rates", "systems", "--systems", "seal-c")
    step("--repeats", "1", "--parts", "rates", "policies", "--policies", "low")
    result = step("--repeats", "1", "--parts", "policies", "--policies", "auto")
    rates, systems, policies = result["results"]["32"]
    assert (rates, systems.split(", ")[0], policies.split(", ")[0]) == ("rates", "systems", "policies")
    rows = result["results"]["32"][policies]["rows"]
    assert list(rows) == ["frozen floor", "low", "auto"]
    first, second = rows["frozen floor"]["turns"]
    assert [own["run"] for own in (first, second)] == [1, 2]
    for name, floor in (("low", first), ("auto", second)):
        assert rows[name]["overhead_percent"] == pytest.approx(100 * (rows[name]["ms"] / floor["ms"] - 1))
    flop_floor = result["results"]["32"]["rates"]["rows"]["floor_ms"]  # of the second run, the last one with rates
    assert rows["low"]["flop_floors"] == pytest.approx(rows["low"]["ms"] / flop_floor)
    assert rows["auto"]["flop_floors"] is None
    for part in (systems, policies):
        for row in result["results"]["32"][part]["rows"].values():
            row |= {"resident_bytes": 1e9, "peak_bytes": 2e9}  # of a GPU
    *_, overview, aims, table = blocks("results/step-8b.json", result)
    assert f"| {rows['low']['ms'] / 1000:.2f} s | 2.0 GB |" in overview
    assert not aims.strip()  # none of its lengths is here
    assert "### 32 tokens a step" in table
    assert f"| {systems} |" in table
    assert f"{rows['auto']['chosen']}; the step took 0.9 GiB." in table
    del result["results"]["32"]["rates"], result["results"]["32"][systems]
    for row in rows.values():
        row |= {"overhead_percent": None, "flop_floors": None}
    *_, table = blocks("results/step-8b.json", result)
    assert "FLOP floor: " not in table


def test_a_killed_benchmark_of_steps_goes_on_with_the_turns_that_are_left(step, tmp_path: Path) -> None:
    words = ("--parts", "systems", "--systems", "seal-c")
    once = step("--repeats", "1", *words)
    (part,) = once["results"]["32"]
    del once["results"]["32"][part]["rows"]["seal-c"]  # killed before its turn
    (tmp_path / "step.json").write_text(json.dumps(once))
    twice = step("--repeats", "2", *words)
    before, after = (each["results"]["32"][part]["rows"] for each in (once, twice))
    assert after["frozen floor"]["turns"][:1] == before["frozen floor"]["turns"]
    assert [len(row["turns"]) for row in after.values()] == [3, 2]
    assert step("--repeats", "2", *words) == twice


def test_turns_are_compared_with_the_floor_of_their_own_round_only(step, tmp_path: Path) -> None:
    words = ("--parts", "rates", "systems", "--systems", "seal-c", "seal-h")
    once = step("--repeats", "1", *words)
    rates, part = once["results"]["32"]
    rows = once["results"]["32"][part]["rows"]
    del rows["seal-h"]  # killed before its turn, on a machine that was a thousand times slower
    slow = once["results"]["32"][rates]["rows"]["floor_ms"] * 1000
    for row in rows.values():
        (own,) = row["turns"]
        row["turns"] = [{name: value if name == "run" else 1000 * value for name, value in own.items()}]
    once["results"]["32"][rates]["rows"]["floor_ms"] = slow
    (tmp_path / "step.json").write_text(json.dumps(once))
    after = step("--repeats", "1", *words)["results"]["32"]
    floors = after[part]["rows"]["frozen floor"]["turns"]
    assert [own["run"] for own in floors] == [0, 1]
    (old,), (new,) = (after[part]["rows"][name]["turns"] for name in ("seal-c", "seal-h"))
    assert [own["floor_ms"] for own in (old, new)] == [own["ms"] for own in floors]
    assert [old["flop_floor_ms"], new["flop_floor_ms"]] == [slow, after[rates]["rows"]["floor_ms"]]
    assert after[part]["rows"]["seal-h"]["overhead_percent"] == pytest.approx(100 * (new["ms"] / floors[1]["ms"] - 1))


def test_an_error_of_one_row_is_kept_in_it_and_the_other_rows_go_on(step, tmp_path: Path, monkeypatch) -> None:
    import step_systems

    def fail(bench, length):
        raise RuntimeError("nothing to pin\nat this place")

    real = step_systems.POLICIES["low"]
    monkeypatch.setitem(step_systems.POLICIES, "low", fail)
    words = ("--repeats", "2", "--parts", "policies", "--policies", "low", "fast")
    with pytest.raises(SystemExit, match="error: low.* tries them again"):
        step(*words)
    (part,) = json.loads((tmp_path / "step.json").read_text())["results"]["32"].values()
    assert part["rows"]["low"]["error"] == "RuntimeError: nothing to pin"
    assert len(part["rows"]["fast"]["turns"]) == 2
    monkeypatch.setitem(step_systems.POLICIES, "low", real)
    (part,) = step(*words)["results"]["32"].values()
    assert "error" not in part["rows"]["low"]
    assert len(part["rows"]["low"]["turns"]) == 2


@pytest.mark.parametrize(
    ("error", "cell"),
    [
        (torch.OutOfMemoryError("no memory"), "does not fit"),
        (RuntimeError("a | b\nat this place"), r"RuntimeError: a \| b"),
    ],
)
def test_a_row_that_ends_before_its_policy_is_chosen_has_its_outcome_in_the_table(
    step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, cell: str
) -> None:
    import step_systems

    def fail(bench, length):
        raise error

    monkeypatch.setitem(step_systems.POLICIES, "low", fail)
    with suppress(SystemExit):
        step("--repeats", "1", "--parts", "policies", "--policies", "low")
    result = json.loads((tmp_path / "step.json").read_text())
    (part,) = result["results"]["32"].values()
    part["rows"]["frozen floor"]["peak_bytes"] = 2e9  # of a GPU
    *_, table = blocks("results/step-8b.json", result)
    assert f"| low | {cell} | | | | | |" in table


def test_a_step_is_warmed_up_by_two_layers_at_its_full_length(step, monkeypatch: pytest.MonkeyPatch) -> None:
    from shapes import SIZES
    from step_systems import Bench

    monkeypatch.setitem(SIZES, "tiny", copy.deepcopy(SIZES["tiny"]))
    SIZES["tiny"].num_hidden_layers = 3
    bench = Bench("tiny", "cpu")
    seen: list[tuple[int, ...]] = []
    for layer in bench.model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    bench.wear("seal-c")
    bench.warm_up("seal-c", bench.tokens(40))
    assert seen == [(1, 40, 64)] * 2
    bench.step("seal-c", bench.tokens(40))
    assert len(seen) == 2 + 3


def test_a_rate_is_that_of_calls_over_a_while_not_of_a_burst(step, monkeypatch: pytest.MonkeyPatch) -> None:
    import rates

    monkeypatch.setattr(rates, "SECONDS", 0.1)
    calls: list[float] = []

    def call() -> None:
        time.sleep(0.005)
        calls.append(time.perf_counter())

    assert rates.seconds_a_call(call, repeats=1) == pytest.approx(0.005, rel=0.5)
    assert calls[-1] - calls[1] > 0.05
