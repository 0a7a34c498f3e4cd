"""Train SEAL with the plain `Trainer` of transformers, on one process or several.

python examples/train_with_trainer.py --model_name_or_path my/model --train_file my.jsonl --output_dir runs/trainer
accelerate launch --multi_gpu --num_processes 2 examples/train_with_trainer.py ...  # the same flags
python examples/train_with_trainer.py --tiny     # a made-up model, seconds on a CPU
"""

import argparse

import torch
from accelerate import PartialState
from peft import get_peft_model
from tiny import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import seal_peft
from seal_peft.data import read_samples
from seal_peft.dataset import training_rows
from seal_peft.tokens import AnswerCollator


def main() -> None:
    """Train, save, and show what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="Hub id or folder")
    parser.add_argument("--train_file", help='JSONL, one {"messages": [...]} a row, the last turn the answer')
    parser.add_argument("--output_dir", default="runs/trainer")
    parser.add_argument("--batch_size", type=int, default=1, help="rows per process")
    parser.add_argument("--tiny", action="store_true", help="a made-up model and data")
    flags = parser.parse_args()
    if not flags.tiny and not (flags.model_name_or_path and flags.train_file):
        parser.error("give --model_name_or_path and --train_file, or --tiny")

    arguments = TrainingArguments(
        flags.output_dir,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=flags.batch_size,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),  # several processes on CPUs need to hear it
    )
    if flags.tiny:
        with arguments.main_process_first():
            flags.model_name_or_path, flags.train_file = make_tiny(flags.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(flags.model_name_or_path)
    model = get_peft_model(model, seal_peft.SealConfig(granularity="channel", task_type="CAUSAL_LM"))
    rows = training_rows(read_samples(flags.train_file), tokenizer, model)
    trainer = Trainer(model, arguments, AnswerCollator(tokenizer.pad_token_id), train_dataset=rows)
    trainer.train()
    trainer.save_model(flags.output_dir)  # the first process alone writes
    if trainer.is_world_process_zero():
        for name, scale in seal_peft.scales(flags.output_dir).items():
            print(f"{name}: {scale.min():.3f} to {scale.max():.3f}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # after the model that computed over it, whose end would wait for it
