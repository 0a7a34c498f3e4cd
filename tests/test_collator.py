"""Batches: logits and gradients where there are labels, as if all had been computed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import models
from data_samples import TOKENIZERS, llama_config, some_samples
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


def test_a_padded_batch_is_the_mean_over_its_answer_tokens(tiny_llama: LlamaForCausalLM, rows: list) -> None:
    batch = AnswerCollator(pad_token_id=0)(rows)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row["labels"]) for row in rows]
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert batch["position_ids"][:, -1].tolist() == [len(row["labels"]) - 1 for row in rows]

    counts = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    singles = [tiny_llama(**AnswerCollator()([row])).loss for row in rows]
    mean = sum(count * loss for count, loss in zip(counts, singles, strict=True)) / sum(counts)
    together = tiny_llama(**batch).loss
    torch.testing.assert_close(together, mean)
    ours, theirs = gradients(tiny_llama, together), gradients(tiny_llama, mean)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_rows_of_one_length_need_no_mask(rows: list) -> None:
    batch = AnswerCollator()([rows[0], rows[0]])
    assert batch["input_ids"].shape[0] == 2
    assert "attention_mask" not in batch
    assert "position_ids" not in batch


def test_a_row_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="no labels"):
        AnswerCollator()([{"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}])


def train(
    rows: list, collator: Callable | None, folder: Path, **settings: float
) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).float()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_plain_trainer_with_ordinary_labels_learns_the_same(rows: list, tmp_path: Path, smoothing: float) -> None:
    losses, weights = train(rows, AnswerCollator(), tmp_path, label_smoothing_factor=smoothing)
    plain_losses, plain_weights = train(rows, None, tmp_path, label_smoothing_factor=smoothing)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], plain_weights[name], rtol=1e-5, atol=1e-7)
