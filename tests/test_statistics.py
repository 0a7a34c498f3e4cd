"""Intervals: against formulas and published numbers, and by the laws that hold for any scores."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_peft.statistics import MEAN_OF_TASKS, mean_interval, paired_difference, sign_test, summarise
from seal_peft.tasks import Sample

right_or_wrong = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)
graded = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60)


@given(scores=right_or_wrong | graded)
def test_an_interval_lies_in_the_unit_range_around_its_mean(scores: list[float]) -> None:
    mean, low, high = mean_interval(scores)
    assert mean == pytest.approx(math.fsum(scores) / len(scores))
    assert 0.0 <= low <= mean <= high <= 1.0


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Wilson's interval by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964.
    [(0, 40, 0.0, 0.08762), (40, 40, 0.91238, 1.0), (81, 263, 0.2553, 0.3662), (1, 1, 0.20655, 1.0)],
)
def test_right_or_wrong_scores_get_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    mean, *ends = mean_interval([1.0] * right + [0.0] * (n - right))
    assert mean == right / n
    assert ends == pytest.approx([low, high], abs=5e-5)


def test_graded_scores_get_an_interval_that_a_slow_bootstrap_gives_too() -> None:
    rng = random.Random(1)
    scores = [rng.random() ** 2 for _ in range(50)]
    means = sorted(sum(rng.choices(scores, k=50)) / 50 for _ in range(20_000))
    _, low, high = mean_interval(scores)
    assert (low, high) == pytest.approx((means[500], means[-500]), abs=0.01)


@given(scores=graded)
def test_the_interval_of_given_scores_is_always_the_same_one(scores: list[float]) -> None:
    first = mean_interval(scores)
    random.random()
    assert mean_interval(scores) == first


def pairs_of(both: int, ours: int, theirs: int, neither: int) -> tuple[list[float], list[float]]:
    """Scores of two systems, by how many samples which of them got right."""
    right, wrong = [1.0], [0.0]
    scores = right * (both + ours) + wrong * (theirs + neither)
    return scores, right * both + wrong * ours + right * theirs + wrong * neither


@pytest.mark.parametrize("counts", [(20, 14, 4, 12), (0, 3, 1, 46), (40, 0, 8, 2)])
def test_a_difference_gets_the_interval_of_a_slow_bootstrap_over_pairs(counts: tuple[int, int, int, int]) -> None:
    pairs = list(zip(*pairs_of(*counts), strict=True))
    rng = random.Random(1)
    draws = (rng.choices(pairs, k=len(pairs)) for _ in range(4000))
    means = sorted(sum(a - b for a, b in draw) / len(draw) for draw in draws)
    difference, low, high = paired_difference(*pairs_of(*counts))
    assert difference == pytest.approx((counts[1] - counts[2]) / 50)
    assert (low, high) == pytest.approx((means[100], means[-101]), abs=0.021)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # By hand: all 40 agree, so at most 1 - 0.025 ** (1 / 40) = 8.81% of all samples do not, up to -1 or +1 each.
    [((0, 40, 0, 0), 1 - 2 * 0.0881, 1.0), ((40, 0, 0, 0), -0.0881, 0.0881), ((0, 0, 0, 40), -0.0881, 0.0881)],
)
def test_a_difference_without_exception_is_still_not_certain(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    assert paired_difference(*pairs_of(*counts))[1:] == pytest.approx((low, high), abs=5e-5)


def test_equal_graded_scores_are_not_certain_either() -> None:
    assert mean_interval([0.5] * 40) == pytest.approx((0.5, 0.5 - 0.04405, 0.5 + 0.04405), abs=5e-5)


@pytest.mark.parametrize("ours", [0.02, 0.1, 0.4])
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(ours: float) -> None:
    rng = random.Random(2)
    held = 0
    for _ in range(300):
        scores = [float(rng.random() < ours) for _ in range(60)]
        _, low, high = paired_difference(scores, [0.0] * 60)
        held += low <= ours <= high
    assert held >= 0.88 * 300


@given(pairs=st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=1, max_size=40))
def test_a_difference_lies_in_its_interval_and_turns_around_with_its_sides(pairs: list) -> None:
    scores, base = map(list, zip(*pairs, strict=True))
    difference, low, high = paired_difference(scores, base)
    assert -1.0 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1.0
    assert difference == pytest.approx(sum(scores) / len(scores) - sum(base) / len(base))
    assert paired_difference(base, scores) == pytest.approx((-difference, -high, -low))


@pytest.mark.parametrize(("scores", "base"), [([], []), ([1.0], [1.0, 0.0])])
def test_scores_without_partners_are_refused(scores: list, base: list) -> None:
    with pytest.raises(ValueError, match="same length, at least 1"):
        paired_difference(scores, base)


@pytest.mark.parametrize(
    ("ours", "theirs", "p_value"),
    # By hand: twice the binomial tail of the smaller count, e.g. 2 * (1 + 6) / 2**6; never above 1.
    [(0, 0, 1.0), (6, 0, 2 / 64), (5, 1, 14 / 64), (1, 5, 14 / 64), (3, 3, 1.0), (12, 2, 2 * (1 + 14 + 91) / 2**14)],
)
def test_the_p_value_is_that_of_mcnemars_exact_test(ours: int, theirs: int, p_value: float) -> None:
    scores = [1.0] * ours + [0.0] * theirs + [1.0, 0.0]
    base = [0.0] * ours + [1.0] * theirs + [1.0, 0.0]
    assert sign_test(scores, base) == pytest.approx(p_value)


@given(pairs=st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=1, max_size=40))
def test_the_p_value_is_how_often_fair_coins_would_differ_as_much(pairs: list) -> None:
    scores, base = map(list, zip(*pairs, strict=True))
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    n = better + worse
    as_far = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(better - worse))
    assert sign_test(scores, base) == pytest.approx(as_far / 2**n)
    assert sign_test(base, scores) == sign_test(scores, base)


# --- the table of metrics.json -------------------------------------------------------------------------------------


def sample(length: int, depth: float | None, task: str = "lines") -> Sample:
    turns = [{"role": "user", "content": "?"}]
    return Sample("id", task, length, depth, turns, target="1", answers=["1"], seed=0)


SAMPLES = [sample(512, 0.0), sample(512, 0.0), sample(512, 1.0), sample(1024, 0.0), sample(1024, 1.0)]
SCORES = {"base": [0.0, 1.0, 0.0, 0.0, 0.0], "adapter": [1.0, 1.0, 0.0, 1.0, 0.0]}


def test_every_system_gets_its_mean_and_every_other_one_its_difference_to_the_base() -> None:
    systems = summarise(SAMPLES, SCORES, base="base")["systems"]
    assert [(name, system["accuracy"], system["n"]) for name, system in systems.items()] == [
        ("base", 0.2, 5),
        ("adapter", 0.6, 5),
    ]
    assert "difference_to_base" not in systems["base"]
    assert systems["adapter"]["difference_to_base"]["mean"] == pytest.approx(0.4)
    assert systems["adapter"]["difference_to_base"]["p_value"] == 0.5
    assert "difference_to_base" not in summarise(SAMPLES, {"adapter": SCORES["adapter"]}, "base")["systems"]["adapter"]


def cells_of(samples: list[Sample], scores: list[float]) -> dict[tuple[int, float | None], tuple[float, int]]:
    cells = summarise(samples, {"base": scores}, base="base")["cells"]
    return {(cell["length"], cell["depth"]): (cell["accuracy"], cell["n"]) for cell in cells}


def test_depths_that_recur_are_cells() -> None:
    assert cells_of(SAMPLES, SCORES["adapter"]) == {
        **{(512, None): (2 / 3, 3), (512, 0.0): (1.0, 2), (512, 1.0): (0.0, 1)},
        **{(1024, None): (0.5, 2), (1024, 0.0): (1.0, 1), (1024, 1.0): (0.0, 1)},
    }


def test_random_depths_are_grouped_into_fifths() -> None:
    samples = [sample(512, depth) for depth in (0.0, 0.19, 0.2, 0.55, 1.0)]
    found = cells_of(samples, [1.0, 0.0, 1.0, 1.0, 0.0])
    assert found == {
        (512, None): (0.6, 5),
        (512, 0.1): (0.5, 2),
        (512, 0.3): (1, 1),
        (512, 0.5): (1, 1),
        (512, 0.9): (0, 1),
    }


def test_samples_without_depth_have_no_depth_cells() -> None:
    assert cells_of([sample(512, None), sample(512, None)], [1.0, 0.0]) == {(512, None): (0.5, 2)}


def test_the_effective_length_is_the_last_one_that_reaches_the_threshold() -> None:
    samples = [sample(length, None, task) for task in ("lines", "needle") for length in (512, 1024, 2048)]
    scores = {"base": [1.0, 0.85, 0.0, 0.9, 1.0, 0.0], "lost": [0.0] * 6, "adapter": [0.0, 0.0, 0.9, 1.0, 1.0, 1.0]}
    found = summarise(samples, scores, "base")["effective_lengths"]
    assert found == {
        "threshold": 0.856,
        "systems": {
            "base": {"lines": 512, "needle": 1024, MEAN_OF_TASKS: 1024},
            "lost": {"lines": None, "needle": None, MEAN_OF_TASKS: None},
            "adapter": {"lines": 2048, "needle": 2048, MEAN_OF_TASKS: 2048},
        },
    }
    assert summarise(samples, scores, "base", 0.85)["effective_lengths"]["systems"]["base"]["lines"] == 1024


def test_the_mean_of_tasks_is_over_lengths_that_all_tasks_have() -> None:
    samples = [sample(512, None), sample(1024, None), sample(512, None, "needle")]
    found = summarise(samples, {"base": [1.0, 1.0, 1.0]}, "base")["effective_lengths"]["systems"]["base"]
    assert found == {"lines": 1024, "needle": 512, MEAN_OF_TASKS: 512}
