"""Batches: logits and gradients where there are labels, as if all had been computed, each row by itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import models
import query_models
from data_samples import TOKENIZERS, llama_config, some_samples
from rope_models import TYPES
from seal_peft import SealConfig
from seal_peft.dataset import check_batch_size
from seal_peft.memory import apply_memory_policy
from seal_peft.tokens import IGNORED, AnswerCollator, encode_training


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).float()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    """Four rows of two lengths and one or three answers each."""
    samples = [
        *some_samples(lengths=[500, 700], num_samples=1),
        *some_samples(lengths=[700, 900], num_samples=1, questions_per_context=3),
    ]
    return [encode_training(sample, TOKENIZERS["chatml"]) for sample in samples]


def gradients(model: LlamaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if "lm_head" not in name}


def full(row: dict[str, list[int]]) -> dict[str, Tensor]:
    """What a plain `Trainer` would give the model."""
    return {name: torch.tensor([values]) for name, values in row.items()}


def test_logits_are_built_only_from_the_first_answer_on(tiny_llama: LlamaForCausalLM, rows: list) -> None:
    for row in rows:
        batch = AnswerCollator()([row])
        first = next(index for index, label in enumerate(row["labels"]) if label != IGNORED)
        logits = tiny_llama(**batch).logits
        assert isinstance(batch["logits_to_keep"], int)
        assert batch["logits_to_keep"] == logits.shape[1] == len(row["labels"]) - first + 1
        assert batch["labels"].tolist() == [row["labels"][first - 1 :]]
        assert batch["shift_labels"].tolist() == [[*row["labels"][first:], IGNORED]]
        assert set(batch) == {"input_ids", "labels", "shift_labels", "logits_to_keep"}


def test_a_model_that_shifts_labels_itself_has_the_same_loss(tiny_llama: LlamaForCausalLM, rows: list) -> None:
    for batch_rows in ([rows[0]], rows):
        batch = AnswerCollator()(batch_rows)
        output = tiny_llama(**batch)
        by_itself = torch.nn.functional.cross_entropy(output.logits[:, :-1].mT, batch["labels"][:, 1:])
        torch.testing.assert_close(by_itself, output.loss)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("counted", [False, True], ids=["mean", "num_items_in_batch"])
def test_gradients_are_bit_equal_to_those_of_full_logits(
    tiny_llama: LlamaForCausalLM, rows: list, index: int, counted: bool
) -> None:
    row = rows[index]
    items = {"num_items_in_batch": torch.tensor(sum(label != IGNORED for label in row["labels"]))} if counted else {}
    kept = tiny_llama(**AnswerCollator()([row]), **items).loss
    expected = tiny_llama(**full(row), **items).loss
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=0)
    ours, theirs = gradients(tiny_llama, kept), gradients(tiny_llama, expected)
    for name in theirs:
        if "o_proj" in name:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_gradients_of_scales_are_bit_equal_to_those_of_full_logits(name: str, dtype: torch.dtype) -> None:
    model = models.adapted(name, "channel").to(dtype)
    ids = models.INPUT_IDS[0].tolist()
    row = {"input_ids": ids, "labels": [IGNORED] * 4 + ids[4:]}
    offsets = [layer.offset("default") for layer in models.seal_layers(model).values()]
    ours = torch.autograd.grad(model(**AnswerCollator()([row])).loss, offsets)
    theirs = torch.autograd.grad(model(**full(row)).loss, offsets)
    assert all(gradient.any() for gradient in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- several rows --------------------------------------------------------------------------------------------------


@st.composite
def row(draw: st.DrawFn, longest: int = 12) -> dict[str, list[int]]:
    """A row with labels anywhere behind its first token. Tokens from 60 on are those of images for some models."""
    input_ids = draw(st.lists(st.integers(3, 59), min_size=2, max_size=longest))
    places = draw(st.sets(st.integers(1, len(input_ids) - 1), min_size=1))
    return {
        "input_ids": input_ids,
        "labels": [token if place in places else IGNORED for place, token in enumerate(input_ids)],
    }


batches = st.lists(row(), min_size=2, max_size=4)


def count_labels(row: dict[str, list[int]]) -> int:
    return sum(label != IGNORED for label in row["labels"])


def learned(model: nn.Module, loss: Tensor) -> list[Tensor]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def summed(model: nn.Module, rows: list[dict[str, list[int]]]) -> tuple[Tensor, list[Tensor]]:
    """The loss summed over answer tokens and its gradients, from full logits, one row at a time."""
    losses = [count_labels(row) * model(**full(row)).loss for row in rows]
    each = [learned(model, loss) for loss in losses]
    return sum(losses), [sum(gradients) for gradients in zip(*each, strict=True)]


def assert_learns_as_from_each_row_alone(model: nn.Module, rows: list[dict[str, list[int]]]) -> None:
    expected, theirs = summed(model, rows)
    loss = sum(map(count_labels, rows)) * model(**AnswerCollator()(rows)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    tolerance = 1e-5 * max(float(gradient.abs().max()) for gradient in theirs)
    for ours, alone in zip(learned(model, loss), theirs, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=tolerance)


def two_sites(name: str) -> nn.Module:
    """A tiny model with scales of channels and queries, with the attention that transformers takes by itself."""
    model = query_models.plain(name)
    if name not in query_models.OWN_ATTENTION and model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    model = get_peft_model(model, SealConfig(granularity="channel", sites=("output", "query")))
    models.draw_scales(model)
    return model.eval()


@pytest.mark.parametrize("name", query_models.NAMES)
def test_every_architecture_learns_from_a_batch_what_it_learns_from_each_row_alone(name: str) -> None:
    model = two_sites(name)

    @settings(max_examples=8)
    @given(batches)
    def learns_the_same(rows: list[dict[str, list[int]]]) -> None:
        assert_learns_as_from_each_row_alone(model, rows)

    learns_the_same()


def extended(**extension: Any) -> nn.Module:
    model = get_peft_model(models.llama(), SealConfig(granularity="channel", **extension))
    models.draw_scales(model)
    return model


def recomputed() -> nn.Module:
    model = models.adapted("llama", "channel").train()
    apply_memory_policy(model, "low")
    return model


def prompt_tuned() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(models.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


@pytest.mark.parametrize(
    "build",
    [
        lambda: extended(self_extend={"group_size": 2, "window": 4}),
        lambda: extended(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        recomputed,
        prompt_tuned,
    ],
    ids=["Self-Extend", "YaRN", "memory low", "prompt tuning"],
)
def test_so_does_what_an_adapter_or_a_memory_policy_brings(build: Callable[[], nn.Module]) -> None:
    model = build()

    @given(batches)
    def learns_the_same(rows: list[dict[str, list[int]]]) -> None:
        assert_learns_as_from_each_row_alone(model, rows)

    learns_the_same()


def with_router_loss() -> nn.Module:
    model = models.adapted("mixtral", "channel")
    model.config.output_router_logits = True
    return model


def with_longrope() -> nn.Module:
    return get_peft_model(models.llama(max_position_embeddings=8), SealConfig(rope_parameters=TYPES["longrope"]))


@pytest.mark.parametrize(
    ("build", "why"), [(with_router_loss, "router loss"), (with_longrope, "RoPE is of type 'longrope'")]
)
def test_models_that_padding_would_change_are_refused_for_rows_of_different_lengths(
    build: Callable[[], nn.Module], why: str
) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"size=2 was given, and rows of 6 to 12 tokens, .*{why}.*Use .*size=1, and"):
        check_batch_size(model, 2, [12, 6])
    check_batch_size(model, 1, [12, 6])
    check_batch_size(model, 2, [12, 12])
    ids = [models.INPUT_IDS.flatten().tolist()[:length] for length in (12, 6)]
    rows = [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]
    assert_learns_as_from_each_row_alone(models.adapted("mixtral"), rows)
    with pytest.raises(AssertionError, match="not close"):
        assert_learns_as_from_each_row_alone(model, rows)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "opt"])
def test_what_stands_in_the_padding_changes_no_bit(name: str) -> None:
    model = two_sites(name)

    @settings(max_examples=10)
    @given(batches, st.integers(3, 59))
    def changes_nothing(rows: list[dict[str, list[int]]], filler: int) -> None:
        ours, theirs = (learned(model, model(**AnswerCollator(pad)(rows)).loss) for pad in (None, filler))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    changes_nothing()


@given(batches)
def test_logits_are_built_where_some_row_has_a_label_and_at_the_end(rows: list[dict[str, list[int]]]) -> None:
    batch = AnswerCollator()(rows)
    keep, places = batch["logits_to_keep"], torch.arange(batch["input_ids"].shape[1])
    kept = places[-keep:] if isinstance(keep, int) else places[keep]
    wanted = {place - 1 for row in rows for place, label in enumerate(row["labels"]) if label != IGNORED}
    assert kept.tolist() == sorted(wanted | {len(places) - 1})


@given(batches)
def test_a_model_that_shifts_labels_itself_sees_the_same_ones(rows: list[dict[str, list[int]]]) -> None:
    batch = AnswerCollator()(rows)
    assert torch.equal(batch["labels"][:, 1:], batch["shift_labels"][:, :-1])
    assert (batch["shift_labels"][:, -1] == IGNORED).all()
    assert (batch["labels"][:, 0] == IGNORED).all()


def test_a_batch_has_neither_mask_nor_positions(rows: list) -> None:
    for several in (rows, [rows[0], rows[0]]):
        assert set(AnswerCollator()(several)) == {"input_ids", "labels", "shift_labels", "logits_to_keep"}


def test_rows_whose_answers_end_a_batch_of_one_length_keep_the_last_logits(rows: list) -> None:
    alone, together = AnswerCollator()([rows[0]]), AnswerCollator()([rows[0], rows[0]])
    assert together["logits_to_keep"] == alone["logits_to_keep"]
    assert isinstance(together["logits_to_keep"], int)


def test_a_row_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="no labels"):
        AnswerCollator()([{"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}])


# --- in the Trainer ------------------------------------------------------------------------------------------------


def train(
    rows: list, collator: Callable, folder: Path, batch_size: int, batches: int, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Train three steps, each of so many batches."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).float()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=batches,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: weight for name, weight in model.state_dict().items() if "o_proj" in name}


def ordinary(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """What other collators give: all labels, and a mask."""
    fillers = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    length = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])
        for name, filler in fillers.items()
    }


def assert_same_training(ours: tuple, theirs: tuple) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name in theirs[1]:
        torch.testing.assert_close(ours[1][name], theirs[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_plain_trainer_with_ordinary_labels_learns_the_same(
    rows: list, tmp_path: Path, smoothing: float, batch_size: int
) -> None:
    ours, theirs = (
        train(rows, collator, tmp_path, batch_size, batches=2, label_smoothing_factor=smoothing)
        for collator in (AnswerCollator(), ordinary)
    )
    assert_same_training(ours, theirs)


@pytest.mark.parametrize(("batch_size", "batches"), [(4, 1), (2, 2)])
def test_a_step_on_rows_together_is_one_on_rows_apart(
    rows: list, tmp_path: Path, batch_size: int, batches: int
) -> None:
    assert len({count_labels(row) for row in rows}) > 1  # so that a mean over rows would not pass
    together = train(rows, AnswerCollator(), tmp_path, batch_size, batches)
    assert_same_training(together, train(rows, ordinary, tmp_path, 1, 4))


@pytest.mark.parametrize("labels", [{}, {"labels": [5]}, {"labels": [IGNORED, 5, 6, 7]}])
def test_a_row_without_a_label_for_each_token_is_refused(labels: dict[str, list[int]]) -> None:
    number = len(labels.get("labels", ()))
    with pytest.raises(ValueError, match=rf"A row has 3 input_ids and {number} labels. Each token needs one, -100"):
        AnswerCollator()([{"input_ids": [4, 5, 6], **labels}])


class Stream(IterableDataset):
    """Rows one after another, as streaming datasets come."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(self.rows)


def test_a_stream_of_rows_trains_as_a_list_does(rows: list, tmp_path: Path) -> None:
    # accelerate cuts the tensors of a stream's batches to the number of rows.
    streamed, listed = (
        train(given, AnswerCollator(), tmp_path, 2, 1, train_sampling_strategy="sequential")
        for given in (Stream(rows * 2), rows * 2)
    )
    assert_same_training(streamed, listed)


def test_batches_grouped_by_length_hold_less_padding(rows: list, tmp_path: Path) -> None:
    def padding(strategy: str) -> int:
        pads = []

        def collate(features: list[dict[str, list[int]]]) -> dict[str, Any]:
            batch = AnswerCollator()(features)
            pads.append(batch["input_ids"].numel() - sum(len(row["input_ids"]) for row in features))
            return batch

        train(rows * 16, collate, tmp_path, 2, 2, train_sampling_strategy=strategy)
        return sum(pads)

    assert padding("group_by_length") < padding("random") / 2
