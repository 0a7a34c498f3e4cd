"""A tiny model, its tokenizer and some conversations, made in code: what `--tiny` of the other examples runs on."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny(folder: str | Path) -> tuple[str, str]:
    """Write a two-layer Llama with a byte tokenizer and a JSONL file of conversations, unless they are there.

    Args:
        folder: Where to.

    Returns:
        The model's folder and the JSONL file.
    """
    folder = Path(folder)
    model, rows = folder / "model", folder / "conversations.jsonl"
    if rows.is_file():  # another process was first
        return str(model), str(rows)
    specials = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *letters])}, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=specials[:1]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["head_dim"] = 64  # a multiple of the block size of 4-bit formats
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=1, pad_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(model)

    draw = random.Random(0)
    with rows.open("w", encoding="utf-8") as file:
        for _ in range(8):
            shelves = {draw.randrange(1000, 9999): draw.randrange(10, 99) for _ in range(5)}
            order = draw.choice(list(shelves))
            facts = "\n".join(f"Order {number} is on shelf {shelf}." for number, shelf in shelves.items())
            turns = [
                {"role": "user", "content": f"{facts}\n\nWhere is order {order}?"},
                {"role": "assistant", "content": f"On shelf {shelves[order]}."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(model), str(rows)
