"""Tiny tokenizers built in code: byte-level BPE and word-level, with chat templates of several forms or none."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from seal_peft.tasks import lines

# The ChatML form.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As many models do: a system prompt of their own where the user gives none.
CHATML_WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a tiny model.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# Writes BOS itself, and gives the answer a space of its own, as the template of Llama 2 does.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As reasoning models do: the generation prompt opens a thought that the record of the conversation no longer shows.
THINKING = CHATML.replace("assistant\n", "assistant\n<think>\n")
# As Qwen 3 does: only the last answer of the conversation is shown with its (empty) thought.
LAST_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": CHATML,
    "chatml_with_system": CHATML_WITH_SYSTEM,
    "brackets": BRACKETS,
    "last_thought": LAST_THOUGHT,
}

_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [lines.make(seed=seed, size=60, depth=0.5, split="train").messages[0]["content"] for seed in range(2)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    # Like Llama's: a BOS in front of every text, unless asked not to.
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>" if chat_template in (None, BRACKETS) else "<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    wrapped.chat_template = chat_template
    return wrapped


def bpe(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, some 800 tokens; every text survives a round trip."""
    return _wrap(Tokenizer.from_str(_trained_bpe()), chat_template)


def metaspace(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Characters, with SentencePiece's habit of a space in front of every text."""
    characters = ["▁", *map(chr, range(33, 127)), "\n"]
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return _wrap(tokenizer, chat_template)


def words(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words, unknown ones included: one token for every word and every sign."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(_SPECIAL)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(tokenizer, chat_template)
