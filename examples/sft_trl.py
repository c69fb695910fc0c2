"""Fine-tune a pruned language model on instructions with TRL's SFTTrainer, and keep it 2:4.

    python examples/sft_trl.py --model_name_or_path PRUNED --train_file data.jsonl --output_dir out
    python examples/sft_trl.py --model_name_or_path PRUNED --train_file data.jsonl --output_dir out --lora_rank 16

`data.jsonl` has rows with "prompt" and "completion", or with "text". With a rank, masked adapters are trained and
merged into the saved model. Needs `pip install trl datasets`, and peft for adapters.
"""

from dataclasses import dataclass, field

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_sparse24 import print_sparsity_report
from hf_sparse24.training.arguments import Sparse24Arguments
from hf_sparse24.training.trainer import Sparse24TrainerMixin


@dataclass
class Sparse24SFTConfig(Sparse24Arguments, SFTConfig):
    """TRL's arguments, and those of a retraining at 2:4."""


class Sparse24SFTTrainer(Sparse24TrainerMixin, SFTTrainer):
    """TRL's trainer, with masks, distillation and checkpoints as in Sparse24Trainer."""


@dataclass
class ScriptArguments:
    """What this script takes beside the trainer's arguments."""

    model_name_or_path: str = field(metadata={"help": "A model that was pruned with pack=False."})
    train_file: str = field(metadata={"help": "JSON lines."})
    lora_rank: int = field(default=0, metadata={"help": "Train masked adapters of this rank; 0: all weights."})


def main():
    script, args = HfArgumentParser((ScriptArguments, Sparse24SFTConfig)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    data = datasets.load_dataset("json", data_files=script.train_file, split="train")
    if script.lora_rank:
        from peft import LoraConfig

        from hf_sparse24.training.lora import add_masked_lora

        model = add_masked_lora(model, LoraConfig(r=script.lora_rank, target_modules="all-linear"))
    trainer = Sparse24SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    if script.lora_rank:
        model = trainer.model.merge_and_unload()
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    else:
        trainer.save_model()
    print_sparsity_report(model)


if __name__ == "__main__":
    main()
