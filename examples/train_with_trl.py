"""Train SEAL with TRL's `SFTTrainer`: it takes any PEFT config, so SEAL's, too.

python examples/train_with_trl.py --model_name_or_path my/model --train_file my.jsonl --output_dir runs/trl
python examples/train_with_trl.py --tiny     # a made-up model, seconds on a CPU

Needs `pip install trl`.
"""

import argparse

import torch
from datasets import load_dataset
from tiny import make_tiny
from trl import SFTConfig, SFTTrainer

import seal_peft


def main() -> None:
    """Train, save, and show what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="Hub id or folder")
    parser.add_argument("--train_file", help='JSONL, one {"messages": [...]} a row, the last turn the answer')
    parser.add_argument("--output_dir", default="runs/trl")
    parser.add_argument("--tiny", action="store_true", help="a made-up model and data")
    flags = parser.parse_args()
    if flags.tiny:
        flags.model_name_or_path, flags.train_file = make_tiny(flags.output_dir)
    if not (flags.model_name_or_path and flags.train_file):
        parser.error("give --model_name_or_path and --train_file, or --tiny")

    # TRL knows which tokens are the answer when prompt and completion stand in columns of their own.
    rows = load_dataset("json", data_files=flags.train_file, split="train").map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
    )
    arguments = SFTConfig(
        flags.output_dir,
        completion_only_loss=True,
        max_length=None,  # TRL cuts at 1,024 tokens by itself, which would cut long contexts
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),  # else TRL insists on bf16
    )
    config = seal_peft.SealConfig(granularity="channel", task_type="CAUSAL_LM")
    trainer = SFTTrainer(flags.model_name_or_path, arguments, train_dataset=rows, peft_config=config)
    trainer.train()
    trainer.save_model(flags.output_dir)
    for name, scale in seal_peft.scales(flags.output_dir).items():
        print(f"{name}: {scale.min():.3f} to {scale.max():.3f}")


if __name__ == "__main__":
    main()
