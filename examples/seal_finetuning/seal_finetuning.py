"""Fine-tune a model with SEAL on line retrieval, as one would with any method of PEFT.

python examples/seal_finetuning/seal_finetuning.py --base_model smollm2 --output_dir seal-smollm2
python examples/seal_finetuning/seal_finetuning.py --tiny  # seconds on a CPU: a random model built here
"""

from dataclasses import dataclass, field

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import seal_peft
from seal_peft.assets import resolve_model
from seal_peft.data import make_samples
from seal_peft.dataset import training_rows
from seal_peft.tasks import Sample
from seal_peft.tokens import AnswerCollator, encode_training


@dataclass
class Settings:
    """What this script trains, and on what."""

    base_model: str = field(default="smollm2", metadata={"help": "Hub id, folder, or the word smollm2."})
    output_dir: str = field(
        default="seal-adapter", metadata={"help": "Folder of the adapter and of the merged model."}
    )
    granularity: str = field(default="channel", metadata={"help": "One scale per 'head' or per 'channel'."})
    task: str = field(default="lines", metadata={"help": "A task of seal_peft.tasks.TASKS."})
    lengths: list[int] = field(default_factory=lambda: [512, 1024], metadata={"help": "Lengths in tokens."})
    num_samples: int = field(default=40, metadata={"help": "Samples for each length."})
    questions_per_context: int = field(default=4, metadata={"help": "Questions about one context."})
    learning_rate: float = field(default=2e-2, metadata={"help": "Learning rate."})
    num_epochs: int = field(default=1, metadata={"help": "Passes over the samples."})
    batch_size: int = field(default=1, metadata={"help": "Samples a step."})
    seed: int = field(default=0, metadata={"help": "Seed of samples and training."})
    tiny: bool = field(default=False, metadata={"help": "A random model and short samples, to try the script."})


def write_tiny_model(folder: str) -> str:
    """Write a random Llama that reads bytes into a folder; return the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(["</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def generate(settings: Settings, tokenizer: PreTrainedTokenizerBase, split: str) -> list[Sample]:
    """Generate samples for training or for testing."""
    return make_samples(
        settings.task,
        tokenizer=tokenizer,
        split=split,
        lengths=settings.lengths,
        num_samples=settings.num_samples,
        questions_per_context=settings.questions_per_context if split == "train" else 1,
        seed=settings.seed,
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, save, load again and merge; return the loss on held-out samples at each stage."""
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(arguments)
    torch.manual_seed(settings.seed)
    if settings.tiny:
        settings.base_model = write_tiny_model(f"{settings.output_dir}/base")
        settings.lengths, settings.num_samples, settings.questions_per_context = [512], 4, 1
    name = resolve_model(settings.base_model)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    base, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)

    model = get_peft_model(base, seal_peft.SealConfig(granularity=settings.granularity, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    test_rows = [encode_training(sample, tokenizer) for sample in generate(settings, tokenizer, "test")]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            settings.output_dir,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            num_train_epochs=settings.num_epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=training_rows(generate(settings, tokenizer, "train"), tokenizer, model),
        eval_dataset=test_rows,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
    )
    losses = {"before": trainer.evaluate()["eval_loss"]}
    trainer.train()
    losses["after"] = trainer.evaluate()["eval_loss"]
    model.save_pretrained(settings.output_dir)

    loaded = AutoPeftModelForCausalLM.from_pretrained(settings.output_dir, dtype=dtype)
    merged = loaded.merge_and_unload(safe_merge=True)
    merged.save_pretrained(f"{settings.output_dir}/merged")
    tokenizer.save_pretrained(f"{settings.output_dir}/merged")
    trainer.model = merged.to(trainer.args.device)
    losses["merged"] = trainer.evaluate()["eval_loss"]
    for stage, loss in losses.items():
        print(f"loss on held-out answers, {stage}: {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
