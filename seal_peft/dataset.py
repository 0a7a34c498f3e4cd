"""From samples to what a Trainer trains on, checked against the model that is to learn them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .context.rope import depends_on_length
from .data import check_window
from .reach import idle_extensions, reach
from .tasks import Sample
from .tokens import encode_training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def training_rows(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, model: Any
) -> list[dict[str, list[int]]]:
    """Tokenise samples for a Trainer with `AnswerCollator`.

    Samples so short that what the adapter brings to extend the window changes nothing are warned about.

    Args:
        samples: What `read_samples` or `make_samples` gave.
        tokenizer: The model's tokenizer.
        model: The model that is to be trained, with its adapter: what the adapter brings to extend the window counts.
            Nothing is computed with its weights.

    Returns:
        A row a sample, as `encode_training` makes it: `input_ids` and `labels`, equally long.

    Raises:
        TypeError: `samples` are not samples.
        ValueError: There are no samples, one is longer than the model's window, where positions give noise and no
            error, or one is of the test split.

    Example:
        ```python
        from seal_peft.data import read_samples
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("my/model")
        rows = training_rows(read_samples("my.jsonl"), tokenizer, model)  # for a Trainer, with AnswerCollator
        ```
    """
    if isinstance(samples, str) or not all(isinstance(sample, Sample) for sample in samples):
        raise TypeError(
            "training_rows needs samples, as `seal_peft.data.read_samples(file)` or `make_samples` returns them; got "
            f"{samples!r:.80}."
        )
    if not samples:
        raise ValueError("There are no samples to train on. Make some with `seal-peft make-data`.")
    for sample in samples:
        if sample.meta.get("split") == "test":
            raise ValueError(
                f"Sample {sample.id!r} is of the test split, and after training on it no score on that split would be "
                "worth anything. Make samples for training with `seal-peft make-data --split train`."
            )
    progress = tqdm(samples, desc="Tokenising", unit="sample", delay=1.0)
    rows = [encode_training(sample, tokenizer) for sample in progress]
    longest = max(len(row["input_ids"]) for row in rows)
    check_window(model.config, longest, reach(model))
    for reason in idle_extensions(model, longest):
        logger.warning("%s", reason)
    return rows


def check_batch_size(model: Any, batch_size: int, lengths: Sequence[int]) -> None:
    """Refuse batches with padding for models that do not compute a row of a batch as they do one alone.

    Args:
        model: The model that is to be trained, with its adapter.
        batch_size: Rows of a batch.
        lengths: Tokens of each row.

    Raises:
        ValueError: The rows are of different lengths, and padding enters a router loss or lengthens RoPE.
    """
    if batch_size == 1 or len(set(lengths)) == 1:
        return
    kind = depends_on_length(module for module in model.modules() if hasattr(module, "rope_type"))
    if kind is not None:
        why = f"its RoPE is of type {kind!r}, and a batch takes the frequencies of its longest row"
    elif getattr(model.config.get_text_config(), "output_router_logits", False):
        why = "its config asks for a router loss (output_router_logits), and padding would enter it"
    else:
        return
    raise ValueError(
        f"per_device_train_batch_size={batch_size} was given, and rows of {min(lengths)} to {max(lengths)} tokens, "
        f"which this model would not learn from as from each alone: {why}. Use per_device_train_batch_size=1, and "
        "more gradient_accumulation_steps for as many rows a step."
    )
