"""What is reproduced: a table of the paper's experiments, each with the samples, adapters and tests that it takes.

The paper's models are of 7B and more and read 16K to 32K tokens. Here SmolLM2-135M reads 8K, and does not know the
form of an answer without training, so that a training has more contexts than the paper's 50, of mixed lengths and
with several questions each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft import LoraConfig, PeftConfig

LENGTHS = (1024, 2048, 4096, 6144, 8192)
NTK = {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}
SELF_EXTEND = {"self_extend": {"group_size": 8, "window": 1024}}
QUADRANTS = ("Q1=0.9", "Q3=0.9", "Q1=0.9,Q3=1.1")

# From the search of benchmarks/time_to_accuracy.py on lines, with four contexts a step, as far as it was when `lines`
# was measured; DoRA's is LoRA's. The paper's, for 7B models, are 1e-2, 2e-2 and 2e-4.
RATES = {"seal-h": 1.6e-1, "seal-c": 8e-2, "lora": 8e-3, "dora": 8e-3}
# Under an extension with one context a step (results/context-smollm2.json).
FAR_RATE = 4e-2
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Data:
    """Which samples are made.

    Attributes:
        tasks: Names of tasks.
        lengths: Lengths in tokens.
        samples: Number of each task, length and depth.
        questions: Questions about each context.
        depths: Depths of the asked fact; `None` for random ones.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    questions: int = 1
    depths: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """Name of its file; other samples have another one."""
        depths = "" if self.depths is None else f"-{len(self.depths)}depths"
        return f"{'-'.join((*self.tasks, *map(str, self.lengths)))}-{self.samples}x{self.questions}{depths}"

    def together(self, prompts: int) -> int:
        """Return how many of its longest prompts have as many tokens as `prompts` of the greatest of `LENGTHS`.

        Prompts are read apart, so that what a batch takes grows with its tokens.
        """
        return max(1, prompts * LENGTHS[-1] // max(self.lengths))


@dataclass(frozen=True)
class Training:
    """How an adapter comes about.

    Attributes:
        method: A key of `RATES`, or `none` for an extension without scales, which is not trained.
        data: Samples to train on.
        rate: Learning rate.
        recipe: A key of `seal_peft.train.RECIPES`.
        batch: Contexts for each optimiser step.
        epochs: Passes over the samples.
        warmup: Steps of warm-up of the recipe `default`; 10 are those with which `RATES` were searched.
        extension: Context extension that the adapter brings, as fields of `SealConfig`.
    """

    method: str
    data: Data
    rate: float
    recipe: str = "default"
    batch: int = 4
    epochs: int = 1
    warmup: int = 10
    extension: Mapping[str, Any] = field(default_factory=dict)

    def other_config(self) -> PeftConfig | None:
        """Settings of a method that is not SEAL: the paper's SEAL-L and SEAL-D."""
        if self.method not in ("lora", "dora"):
            return None
        return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=_PROJECTIONS, use_dora=self.method == "dora")


@dataclass(frozen=True)
class Part:
    """One experiment.

    Attributes:
        about: One line.
        paper: Where the paper has it.
        trainings: Adapters that are compared with the base model, by name.
        test: Samples that all of them answer.
        seeds: Trainings of each adapter, with other samples and orders.
        guard: Whether short contexts are measured, too.
        heads: Samples on which heads are scored; the adapters of the quadrant test then answer, too.
        matrix: What its systems form: a `grid` of rates and contexts, or the `transfer` between tasks.
    """

    about: str
    paper: str
    trainings: Mapping[str, Training]
    test: Data
    seeds: int = 1
    guard: bool = False
    heads: Data | None = None
    matrix: Literal["grid", "transfer"] | None = None


def mixed(task: str, questions: int = 1) -> Data:
    """Training samples of all lengths."""
    return Data((task,), LENGTHS, 120, questions)


# Sixteen questions with their answers leave too little of 1,024 tokens for a register.
_LINES = {
    method: Training(method, Data(("lines",), (1536, *LENGTHS[1:]), 120, 16), rate) for method, rate in RATES.items()
}
_FAR = Data(("lines",), (2048, 4096, 8192, 16384, 24576, 31744), 24, 16)
_RULER = ("ruler_niah_multikey_1", "ruler_vt", "ruler_cwe", "ruler_fwe")


def _at_full_length(samples: int) -> Data:
    return Data(("lines",), (8192,), samples, 8)


_SAMPLES = {
    f"{method} {samples}": Training(method, _at_full_length(samples), rate, "paper", 1, 50 // samples)
    for method, rate in (("seal-h", 3e-2), ("seal-c", 2e-2))
    for samples in (10, 25, 50)
}

PARTS: dict[str, Part] = {
    "lines": Part(
        "Line retrieval against length: base, SEAL-H, SEAL-C, LoRA and DoRA.",
        "table 1",
        _LINES,
        Data(("lines",), LENGTHS, 100),
        seeds=3,
    ),
    "needle": Part(
        "Needle in a haystack, by depth and length.",
        "figure 5",
        {method: Training(method, mixed("needle", 4), rate) for method, rate in RATES.items()},
        Data(("needle",), LENGTHS, 20, depths=(0.0, 0.25, 0.5, 0.75, 1.0)),
    ),
    "ruler": Part(
        "RULER: scales trained on one task, asked all of them.",
        "RULER, asked of Llama-3.1-8B",
        {
            "lines": _LINES["seal-c"],
            **{task: Training("seal-c", mixed(task, 4 if "niah" in task else 1), RATES["seal-c"]) for task in _RULER},
        },
        Data((*_RULER, "lines"), (1024, 2048, 4096, 8192), 25),
        matrix="transfer",
    ),
    "extension": Part(
        "Four times the window without training, alone and under SEAL-C.",
        "table 2",
        {
            "ntk": Training("none", _FAR, 0.0, extension=NTK),
            "ntk+seal-c": Training("seal-c", _FAR, FAR_RATE, batch=1, extension=NTK),
            "self-extend": Training("none", _FAR, 0.0, extension=SELF_EXTEND),
            "self-extend+seal-c": Training("seal-c", _FAR, FAR_RATE, batch=1, extension=SELF_EXTEND),
        },
        Data(("lines",), (4096, 8192, 16384, 24576, 31744), 50),
    ),
    "qa": Part(
        "Questions about documents: scales of the task itself, and of line retrieval.",
        "table 3",
        {
            "lines": _LINES["seal-c"],
            # Four questions with their documents take up to 1.5K tokens.
            **{
                task: Training("seal-c", Data((task,), LENGTHS[1:], 150, 4), RATES["seal-c"])
                for task in ("qa_single", "qa_multi")
            },
        },
        Data(("qa_single", "qa_multi"), (2048, 4096, 8192), 100),
    ),
    "guard": Part(
        "What scales of line retrieval do to short contexts: essays, questions, instructions; instead of MMLU.",
        "MMLU",
        # The paper's are scales of 50 contexts, those of `lines` of 600: harm may come with the amount of training.
        {**_LINES, "seal-c 50": _SAMPLES["seal-c 50"]},
        Data(("lines",), (1024,), 20),
        guard=True,
    ),
    "grid": Part(
        "Learning rate against number of contexts, constant rate; SEAL-C and 8 questions, for SmolLM2's sake.",
        "table 4",
        {
            f"{rate:g} x {samples}": Training("seal-c", _at_full_length(samples), rate, "paper", batch=1)
            for rate in (5e-3, 1e-2, 2e-2, 3e-2)
            for samples in (10, 30, 50, 70, 99)
        },
        Data(("lines",), (8192,), 100),
        matrix="grid",
    ),
    "samples": Part(
        "10, 25 and 50 contexts with as many steps: 5, 2 and 1 epochs.",
        "figure 7",
        _SAMPLES,
        Data(("lines",), (1024, 4096, 8192), 100),
    ),
    "heads": Part(
        "Head pruning, the quadrant test and direct effects, beside the scales that SEAL-H learned.",
        "the analysis of heads",
        {"seal-h": _LINES["seal-h"]},
        Data(("lines",), (1024, 4096), 100),
        heads=Data(("lines",), (1024, 4096), 16),
    ),
}


def shrunk(part: Part) -> Part:
    """Return a part with so few and short samples that a tiny model takes seconds; it shows that all steps run."""

    def small(data: Data) -> Data:
        depths = data.depths and (data.depths[0], data.depths[-1])
        return replace(
            data, lengths=(1536, 2048)[: len(data.lengths)], samples=2, questions=min(2, data.questions), depths=depths
        )

    few = dict(list(part.trainings.items())[:4])
    # One step of warm-up would be the only one, and leave the adapters what they are.
    trainings = {name: replace(training, data=small(training.data), warmup=0) for name, training in few.items()}
    heads = part.heads and small(part.heads)
    return replace(part, trainings=trainings, test=small(part.test), seeds=min(2, part.seeds), heads=heads)
