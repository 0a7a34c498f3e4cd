"""Train SEAL on a base model in 4 bits (NF4 of bitsandbytes), the way of QLoRA: less memory for the frozen weights.

python examples/train_4bit.py --model_name_or_path my/model --train_file my.jsonl --output_dir runs/4bit
python examples/train_4bit.py --tiny     # a made-up model, seconds on a CPU

Needs `pip install bitsandbytes`.
"""

import argparse

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tiny import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import seal_peft
from seal_peft.data import read_samples
from seal_peft.dataset import training_rows
from seal_peft.tokens import AnswerCollator


def main() -> None:
    """Train, save, and show what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="Hub id or folder")
    parser.add_argument("--train_file", help='JSONL, one {"messages": [...]} a row, the last turn the answer')
    parser.add_argument("--output_dir", default="runs/4bit")
    parser.add_argument("--tiny", action="store_true", help="a made-up model and data")
    flags = parser.parse_args()
    if flags.tiny:
        flags.model_name_or_path, flags.train_file = make_tiny(flags.output_dir)
    if not (flags.model_name_or_path and flags.train_file):
        parser.error("give --model_name_or_path and --train_file, or --tiny")

    tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(flags.model_name_or_path, quantization_config=four_bit)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, seal_peft.SealConfig(granularity="head", task_type="CAUSAL_LM"))
    rows = training_rows(read_samples(flags.train_file), tokenizer, model)
    arguments = TrainingArguments(
        flags.output_dir,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model, arguments, AnswerCollator(tokenizer.pad_token_id), train_dataset=rows).train()
    model.save_pretrained(flags.output_dir)
    for name, scale in seal_peft.scales(flags.output_dir).items():
        print(f"{name}: {scale.min():.3f} to {scale.max():.3f}")
    # Per-head scales go into the group scales of NF4: no second rounding. See docs/compatibility.md.
    model.merge_and_unload(safe_merge=True)


if __name__ == "__main__":
    main()
