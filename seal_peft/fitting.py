"""Samples of a chosen length in tokens, for any task and any way of counting tokens. No torch, no tokenizer here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from tqdm.auto import tqdm

from .tasks import SPLITS, Sample, Task

MIN_FILL = 0.97
# A line is some 24 tokens, so a short length cannot be filled to 97% by the number of lines alone. Other seeds have
# lines a little longer or shorter; one of these many nearly always fits.
_ATTEMPTS = 64


def fit_samples(
    task: Task,
    *,
    count_tokens: Callable[[Sample], int],
    split: str,
    lengths: Sequence[int],
    num_samples: int,
    depths: Sequence[float] | None,
    questions_per_context: int,
    seed: int,
) -> list[Sample]:
    """Make samples that fill given lengths; `seal_peft.data.make_samples` with a task and a way of counting.

    Args:
        task: A row of the table of tasks.
        count_tokens: Tokens of a sample's whole conversation.
        split: As in `make_samples`, and so are all others.
        lengths: Lengths in tokens.
        num_samples: Samples for each length.
        depths: Places of the asked fact, used in turn, or `None` for random ones.
        questions_per_context: Questions about one context.
        seed: Decides everything random.

    Raises:
        ValueError: If an argument is out of range, or a length is too short or cannot be filled.
    """
    _check(split, lengths, num_samples, depths, questions_per_context)
    samples: dict[int, list[Sample]] = {}
    with tqdm(total=len(lengths) * num_samples, desc=f"{task.name} {split}", unit="sample", delay=1.0) as progress:
        # Short lengths first: they are the ones that can fail, and that should cost no time.
        for length in sorted(lengths):
            fitter = _Fitter(task, count_tokens, split, length, depths, questions_per_context, seed)
            samples[length] = []
            for index in range(num_samples):
                sample = fitter.fit(index)
                if sample is None:
                    raise ValueError(fitter.explain_failure(num_samples))
                samples[length].append(sample)
                progress.update()
    return [sample for length in lengths for sample in samples[length]]


def _check(
    split: str, lengths: Sequence[int], num_samples: int, depths: Sequence[float] | None, questions_per_context: int
) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} was given; use one of {', '.join(SPLITS)}.")
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise ValueError(
            f"lengths={list(lengths)} was given; use one or more different numbers of tokens, 1 or more each."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} was given; use at least 1.")
    if depths is not None and (not depths or not all(0.0 <= depth <= 1.0 for depth in depths)):
        raise ValueError(f"depths={list(depths)} was given; use numbers from 0.0 to 1.0, or None for random depths.")
    if questions_per_context < 1:
        raise ValueError(f"questions_per_context={questions_per_context} was given; use at least 1.")


def _derive_seed(*parts: object, split: str) -> int:
    """A seed from everything a sample depends on. Seeds of train are even, those of test odd: they never meet.

    It stays below 2**53, where every JSON reader keeps integers exact.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") * 2 + SPLITS.index(split)


@dataclass
class _Fitter:
    """Finds the number of units (lines, documents) that fills one length.

    It remembers where the last search ended, so that the next one starts there.
    """

    task: Task
    count_tokens: Callable[[Sample], int]
    split: str
    length: int
    depths: Sequence[float] | None
    questions: int
    seed: int
    tokens_per_unit: float = 0.0
    start: int = 0

    def fit(self, index: int) -> Sample | None:
        """The sample of one number, or `None` if no attempt fills the length."""
        for attempt in range(_ATTEMPTS):
            seed = _derive_seed(self.task.name, self.seed, self.length, index, attempt, split=self.split)
            if self.depths is None:
                # Independent of the attempt: being chosen for a good fit must not favour any depth.
                place = _derive_seed(self.task.name, self.seed, self.length, index, "depth", split=self.split)
                depth = round(Random(place).random(), 4)
            else:
                depth = float(self.depths[index % len(self.depths)])
            sample = self._search(seed, depth)
            if sample is not None and sample.n_tokens >= MIN_FILL * self.length:
                name = f"{self.task.name}-{self.split}-{self.length}-{index:04d}"
                return replace(sample, id=name, length=self.length)
        return None

    def explain_failure(self, num_samples: int) -> str:
        """Say which length works instead, found by making these very samples."""
        # The longest of some shortest samples, so that the length named here works for other seeds as well.
        seeds = [_derive_seed(index, split=self.split) for index in range(min(num_samples, 16))]
        shortest = max(self._build(self.smallest, seed, 0.5).n_tokens for seed in seeds)
        problem = (
            f"length={self.length} tokens is too short for a {self.task.name} sample with "
            f"questions_per_context={self.questions}, which takes up to {shortest} tokens with this tokenizer."
            if self.length < shortest
            else f"length={self.length} tokens cannot be filled to {MIN_FILL:.0%}: the parts of a {self.task.name} "
            "sample are too coarse for it with this tokenizer."
        )
        start = max(self.length + 1, shortest)
        for length in range(start, 2 * start, max(1, start // 50)):
            other = replace(self, length=length, tokens_per_unit=0.0, start=0)
            if all(other.fit(index) is not None for index in range(num_samples)):
                return f"{problem} Use a length of at least {length}."
        return f"{problem} Use a much longer one."

    @property
    def smallest(self) -> int:
        """Fewest units that a task can be asked for."""
        return max(1, self.questions)

    def _build(self, size: int, seed: int, depth: float) -> Sample:
        sample = self.task.make(seed=seed, size=size, depth=depth, split=self.split, questions=self.questions)
        return replace(sample, n_tokens=self.count_tokens(sample))

    def _search(self, seed: int, depth: float) -> Sample | None:
        """Largest sample of this seed within the length, to about half a percent; `None` if even the smallest is over.

        Tokens grow almost linearly with the size, so the next guess comes from a straight line. The bracket of a size
        that fits and one that does not makes sure that the search ends.
        """
        if not self.tokens_per_unit:
            self._calibrate(seed, depth)
        close = min(max(self.tokens_per_unit, 0.005 * self.length), (1 - MIN_FILL) * self.length)
        best: Sample | None = None
        fits, over = self.smallest - 1, 0  # 0: nothing over yet
        size = max(self.start, self.smallest)
        while True:
            sample = self._build(size, seed, depth)
            room = self.length - sample.n_tokens
            if room >= 0:
                best, fits = sample, size
            else:
                over = size
            if (best is not None and 0 <= room <= close) or over == fits + 1:
                break
            guess = size + int(room // self.tokens_per_unit)
            if over and not fits < guess < over:
                guess = (fits + over) // 2
            size = max(guess, fits + 1)
        if best is not None:
            self.start = fits
        return best

    def _calibrate(self, seed: int, depth: float) -> None:
        """Measure tokens per unit on two small samples, and guess the first size."""
        small, large = self.smallest, 2 * self.smallest + 16
        small_tokens = self._build(small, seed, depth).n_tokens
        large_tokens = self._build(large, seed, depth).n_tokens
        self.tokens_per_unit = max(1.0, (large_tokens - small_tokens) / (large - small))
        self.start = max(small, small + int((self.length - small_tokens) / self.tokens_per_unit))
