"""Files, lengths, tokens, labels and batches."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Trainer,
    TrainingArguments,
)

import models
import tokenizers_for_tests as tokenizers_
from seal_peft import data, tokens
from seal_peft.data import check_window, make_samples, read_samples, window_of, write_samples
from seal_peft.tasks import Sample, lines
from seal_peft.tokens import IGNORED, AnswerCollator, encode_prompt, encode_question, encode_training

TOKENIZERS = {
    "base": tokenizers_.bpe(),
    "base_metaspace": tokenizers_.metaspace(),
    "words": tokenizers_.words(tokenizers_.CHATML),
    **{name: tokenizers_.bpe(template) for name, template in tokenizers_.CHAT_TEMPLATES.items()},
    "metaspace_brackets": tokenizers_.metaspace(tokenizers_.BRACKETS),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def some_samples(**changes) -> list[Sample]:
    arguments = {"tokenizer": TOKENIZERS["chatml"], "split": "train", "lengths": [900], "num_samples": 2, **changes}
    return make_samples("lines", **arguments)


# --- lengths -------------------------------------------------------------------------------------------------------


@every_tokenizer
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(900, 4000), questions=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_every_length_is_filled_to_97_percent_and_never_exceeded(tokenizer, length, questions, seed) -> None:
    (sample,) = make_samples(
        "lines",
        tokenizer=tokenizer,
        split="test",
        lengths=[length],
        num_samples=1,
        questions_per_context=questions,
        seed=seed,
    )
    used = len(encode_training(sample, tokenizer)["input_ids"])
    assert 0.97 * length <= used <= length
    assert (sample.n_tokens, sample.length) == (used, length)
    assert [message["role"] for message in sample.messages].count("user") == questions


def test_a_search_of_a_long_context_tokenises_it_only_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def counting(sample: Sample, tokenizer) -> dict[str, list[int]]:
        encoded = encode_training(sample, tokenizer)
        counted.append(len(encoded["input_ids"]))
        return encoded

    monkeypatch.setattr(data, "encode_training", counting)
    some_samples(lengths=[16_000], num_samples=5)
    assert sum(counted) < 4 * 5 * 16_000


def test_depths_are_used_in_turn_or_drawn_at_random() -> None:
    given_depths = some_samples(num_samples=5, depths=[0, 0.5, 1])
    assert [sample.depth for sample in given_depths] == [0.0, 0.5, 1.0, 0.0, 0.5]
    drawn = [sample.depth for sample in some_samples(num_samples=40, lengths=[600])]
    assert len(set(drawn)) == 40
    assert min(drawn) < 0.2 < 0.8 < max(drawn)


def test_each_length_gets_its_samples_in_the_order_asked() -> None:
    samples = some_samples(lengths=[1200, 700], num_samples=3)
    assert [sample.length for sample in samples] == [1200] * 3 + [700] * 3
    assert len({sample.id for sample in samples}) == 6


def test_splits_share_no_seed_and_neither_do_samples() -> None:
    seeds = {
        split: {sample.seed for sample in some_samples(split=split, num_samples=20)} for split in ("train", "test")
    }
    assert len(seeds["train"] | seeds["test"]) == 40


def test_a_row_alone_is_enough_to_build_its_sample_again() -> None:
    sample = some_samples(questions_per_context=2)[1]
    again = lines.make(seed=sample.seed, depth=sample.depth, **sample.meta)
    assert (again.messages, again.target) == (sample.messages, sample.target)


@pytest.mark.parametrize(("length", "questions"), [(20, 1), (200, 4)])
def test_a_length_too_short_is_refused_and_the_one_named_works(length: int, questions: int) -> None:
    with pytest.raises(ValueError, match=f"length={length} tokens is too short .* Use a length of at least") as error:
        some_samples(lengths=[4000, length], questions_per_context=questions)
    named = int(str(error.value).split()[-1].rstrip("."))
    assert all(
        sample.n_tokens >= 0.97 * named for sample in some_samples(lengths=[named], questions_per_context=questions)
    )


def test_a_length_that_cannot_be_filled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = lambda sample, tokenizer: {"input_ids": [0] * 1000 * sample.meta["size"]}  # noqa: E731
    monkeypatch.setattr(data, "encode_training", coarse)
    with pytest.raises(ValueError, match=r"length=1500 tokens cannot be filled to 97%.* at least 20\d\d"):
        some_samples(lengths=[1500])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"split": "dev"}, "split='dev'"),
        ({"lengths": []}, r"lengths=\[\]"),
        ({"lengths": [900, 900]}, r"lengths=\[900, 900\]"),
        ({"lengths": [-5]}, r"lengths=\[-5\]"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"depths": []}, r"depths=\[\]"),
        ({"depths": [0.5, 2]}, r"depths=\[0.5, 2\]"),
        ({"questions_per_context": 0}, "questions_per_context=0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        some_samples(**arguments)


# --- files ---------------------------------------------------------------------------------------------------------


def test_samples_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    samples = some_samples(questions_per_context=2)
    samples.append(replace(samples[0], id="other", depth=None, target="naïve \u2028 日本\n", meta={"any": [1, None]}))
    write_samples(tmp_path / "new" / "train.jsonl", samples)
    assert read_samples(tmp_path / "new" / "train.jsonl") == samples
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train.jsonl"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_samples(tmp_path / name, some_samples(lengths=[900, 1300], seed=seed))
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    samples = some_samples()
    write_samples(path, samples)

    def interrupted():
        yield samples[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(path, interrupted())
    assert read_samples(path) == samples
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""),
        ("task", 3),
        ("length", "1024"),
        ("length", True),
        ("depth", 1.5),
        ("depth", math.nan),
        ("messages", []),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "assistant", "content": "last"}]),
        ("target", None),
        ("answers", "24169"),
        ("answers", []),
        ("seed", 1.0),
        ("n_tokens", -1),
        ("answer_prefix", None),
        ("answer_prefix", "not how the target begins"),
        ("meta", None),
        ("colour", "red"),
    ],
)
def test_a_malformed_row_is_refused_with_file_line_and_field(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "train.jsonl"
    write_samples(path, some_samples())
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[1][field] = value
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=f"train.jsonl, line 2: Field '{field}'"):
        read_samples(path)


@pytest.mark.parametrize("row", [b"{", b"", b"[]", b'"text"', b"\xff\xfe{}", b"{}"])
def test_a_row_that_is_no_sample_at_all_is_refused_with_file_and_line(tmp_path: Path, row: bytes) -> None:
    path = tmp_path / "train.jsonl"
    write_samples(path, some_samples())
    path.write_bytes(path.read_bytes() + row + b"\n")
    with pytest.raises(ValueError, match="train.jsonl, line 3: "):
        read_samples(path)


def test_rows_of_turns_may_have_other_fields_unless_they_would_change_the_prompt(tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "Which shelf?"}, {"role": "assistant", "content": "Shelf 7."}
    path = tmp_path / "mine.jsonl"

    def read(**row: object) -> Sample:
        path.write_text(json.dumps(row), encoding="utf-8")
        return read_samples(path)[0]

    assert read(messages=[question, answer], source="a blog", id=3) == read(messages=[question, answer])
    for row, complaint in (
        (
            {"prompt": [question], "completion": [answer]},
            "has 'prompt', 'completion'. Give .* turns of 'prompt', then those",
        ),
        ({"instruction": "Which?", "output": "7"}, "Field 'messages' is missing; the row has 'instruction', 'output'"),
        ({"messages": [question, answer], "tools": []}, "Field 'tools' would change the prompt"),
        ({"messages": [question]}, "last turn must be the answer, .* not {'role': 'user', 'content': 'Which shelf"),
        ({"messages": [question, {**answer, "tool_calls": []}]}, "and nothing else, not .*tool_calls"),
        ({"messages": [question, answer], "task": "lines"}, "Field 'id' is missing"),
    ):
        with pytest.raises(ValueError, match=f"mine.jsonl, line 1: .*{complaint}"):
            read(**row)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "train.jsonl", some_samples()[:1] * 2)
    with pytest.raises(ValueError, match="line 2: the id 'lines-train-900-0000' is already that of line 1"):
        read_samples(tmp_path / "train.jsonl")


# --- tokens and labels ---------------------------------------------------------------------------------------------


@every_tokenizer
@pytest.mark.parametrize("questions", [1, 3])
def test_training_tokens_begin_with_exactly_the_prompt_tokens(tokenizer, questions: int) -> None:
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1, questions_per_context=questions)
    prompt = encode_prompt(sample, tokenizer)
    encoded = encode_training(sample, tokenizer)
    assert encoded["input_ids"][: len(prompt)] == prompt
    answer = encoded["input_ids"][len(prompt) :]
    assert encoded["labels"][len(prompt) :] == answer
    assert answer[-1] == tokenizer.eos_token_id
    assert encode_question(sample, tokenizer) == (prompt, answer)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "words"])
def test_labels_are_the_answers_and_their_ends_of_turn_and_nothing_else(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1, questions_per_context=3)
    answers = [message["content"] for message in sample.messages if message["role"] == "assistant"] + [sample.target]
    encoded = encode_training(sample, tokenizer)
    spoken = [label for label in encoded["labels"] if label != IGNORED]
    text = tokenizer.decode(spoken)
    if name == "last_thought":
        answers[-1] = f"<think>\n\n</think>\n\n{answers[-1]}"
    if name.endswith("brackets"):
        answers = [f" {answer} " for answer in answers]
    expected = "".join(answer + tokenizer.eos_token for answer in answers)
    assert text.lstrip() == expected.lstrip()
    assert all(label in (IGNORED, token) for label, token in zip(encoded["labels"], encoded["input_ids"], strict=True))


@every_tokenizer
def test_pieces_together_are_the_tokens_of_the_whole_text(tokenizer) -> None:
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1, questions_per_context=3)
    if tokenizer.chat_template is None:
        pieces = tokens.cut_pieces(sample, tokenizer)[:-1]
        whole = tokenizer("".join(piece.text for piece in pieces)).input_ids
    else:
        text = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer(text, add_special_tokens=False).input_ids
    assert encode_prompt(sample, tokenizer) == whole


@pytest.mark.parametrize(("name", "count"), [("base", 1), ("base_metaspace", 1), ("chatml", 0), ("brackets", 1)])
def test_bos_is_never_doubled(name: str, count: int) -> None:
    tokenizer = TOKENIZERS[name]
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1)
    assert encode_training(sample, tokenizer)["input_ids"].count(tokenizer.bos_token_id) == count


def test_a_template_that_rewrites_earlier_turns_serves_one_question_and_refuses_several() -> None:
    tokenizer = tokenizers_.bpe(tokenizers_.THINKING)
    (sample,) = some_samples(tokenizer=tokenizer, num_samples=1)
    prompt = encode_prompt(sample, tokenizer)
    assert tokenizer.decode(prompt).endswith("<think>\n")
    answer = encode_training(sample, tokenizer)["input_ids"][len(prompt) :]
    assert tokenizer.decode(answer) == sample.target + tokenizer.eos_token
    with pytest.raises(ValueError, match="rewrites earlier turns.*questions_per_context=1"):
        some_samples(tokenizer=tokenizer, questions_per_context=2)


# --- the window ----------------------------------------------------------------------------------------------------


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 900,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    return LlamaConfig(**{**sizes, **changes})


def test_lengths_up_to_the_window_pass_and_longer_ones_name_it_and_what_extends_it() -> None:
    check_window(llama_config(), 2048)
    with pytest.raises(ValueError, match=r"2049 tokens .* window of this model is 2048 .*rope_parameters.*YaRN"):
        check_window(llama_config(), 2049)


# By the published configs, whose windows their authors state.
@pytest.mark.parametrize(
    ("rope", "max_positions", "window"),
    [
        pytest.param({"rope_type": "linear", "factor": 4.0}, 4096, 16384, id="vicuna-16k"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, 2048, 4096, id="dynamic-ntk"),
        pytest.param(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072, id="qwen3"
        ),
        pytest.param({"rope_type": "yarn", "factor": 4.0}, 32768, 131072, id="qwen2.5"),
        pytest.param(
            {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
            163840,
            163840,
            id="deepseek-v3",
        ),
        pytest.param(
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            131072,
            131072,
            id="llama-3.2",
        ),
        pytest.param(
            {
                "rope_type": "longrope",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            131072,
            131072,
            id="phi-3",
        ),
    ],
)
def test_rope_scaling_extends_the_window_as_its_kind_does(rope: dict, max_positions: int, window: int) -> None:
    config = llama_config(max_position_embeddings=max_positions, rope_parameters={"rope_theta": 10000.0, **rope})
    assert window_of(config) == window
    check_window(config, window)
    with pytest.raises(ValueError, match=f"window of this model is {window} tokens"):
        check_window(config, window + 1)


def test_a_scaling_by_kind_of_layer_is_in_the_published_window() -> None:
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    config = Gemma3TextConfig(
        max_position_embeddings=131072,
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    )
    assert window_of(config) == 131072


def test_the_factor_that_the_error_names_is_enough() -> None:
    with pytest.raises(ValueError, match="factor of at least 2.45") as error:
        check_window(llama_config(), 5000)
    factor = float(str(error.value).split()[-1].rstrip("."))
    rope = {"rope_type": "yarn", "factor": factor, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
    check_window(llama_config(rope_parameters=rope), 5000)


def test_learned_positions_cannot_be_extended_and_the_error_says_so() -> None:
    with pytest.raises(ValueError, match="window of this model is 64 .*learned table"):
        check_window(GPT2Config(n_positions=64), 65)


def test_a_multimodal_model_is_asked_for_the_window_of_its_text_part() -> None:
    config = Gemma3Config(text_config={"max_position_embeddings": 512})
    check_window(config, 512)
    with pytest.raises(ValueError, match="512"):
        check_window(config, 513)


def test_a_model_without_positions_has_no_window() -> None:
    check_window(MambaConfig(num_hidden_layers=1), 10**9)


# --- batches -------------------------------------------------------------------------------------------------------


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


@every_tokenizer
def test_an_answer_prefix_is_part_of_the_prompt_and_carries_no_label(tokenizer) -> None:
    plain = lines.make(seed=3, size=5, depth=0.5, split="train", questions=2)
    prefixed = replace(plain, answer_prefix="The <REGISTER_CONTENT>")
    bare, prompt = encode_prompt(plain, tokenizer), encode_prompt(prefixed, tokenizer)
    training = encode_training(prefixed, tokenizer)
    assert len(prompt) > len(bare) and training["input_ids"][: len(prompt)] == prompt
    assert set(training["labels"][len(bare) : len(prompt)]) == {IGNORED}
    assert IGNORED not in training["labels"][len(prompt) :]
