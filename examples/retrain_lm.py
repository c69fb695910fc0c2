"""Prune a language model to 2:4 if it is not, and train it to what it was, by distillation from the dense model.

    python examples/retrain_lm.py --model_name_or_path MODEL --train_file text.txt --output_dir out
    python examples/retrain_lm.py examples/retrain_lm.yaml
    accelerate launch --config_file examples/fsdp2.yaml examples/retrain_lm.py examples/retrain_lm.yaml

A run that was stopped goes on with the same command. Prune before (`hf-sparse24 prune MODEL OUT --no-pack`, or
`Sparse24Config(pack=False)`) where several processes are to train, and give the dense model as `teacher_model`.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_sparse24 import (
    Sparse24Config,
    Sparse24Trainer,
    Sparse24TrainingArguments,
    print_sparsity_report,
    prune_,
    sparsity_report,
)


@dataclass
class ScriptArguments:
    """What this script takes beside the trainer's arguments."""

    model_name_or_path: str = field(metadata={"help": "A dense model, or one that was pruned with pack=False."})
    train_file: str = field(metadata={"help": "A text file; its last part is for the evaluation."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens of a window."})
    evaluation_share: float = field(default=0.02, metadata={"help": "Of the text, at its end."})
    calibration_windows: int = field(default=128, metadata={"help": "On which a dense model is pruned."})
    method: str = field(default="auto", metadata={"help": "How a dense model is pruned; see Sparse24Config."})


class Windows(torch.utils.data.Dataset):
    """A text as windows of tokens, each its own labels."""

    def __init__(self, tokens, length):
        self.tokens = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self):
        """Return how many windows there are."""
        return len(self.tokens)

    def __getitem__(self, index):
        """Return one window."""
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def read(script, tokenizer):
    """Return the windows to train on and those to evaluate on."""
    with open(script.train_file, encoding="utf8") as file:
        text = file.read()
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    held_out = max(script.sequence_length, int(len(tokens) * script.evaluation_share))
    return Windows(tokens[:-held_out], script.sequence_length), Windows(tokens[-held_out:], script.sequence_length)


def prune(model, script, train):
    """Prune a dense model on the first windows of the training text."""
    windows = train.tokens[: script.calibration_windows]
    calibrated = script.method != "magnitude"
    calibration = [{"input_ids": part} for part in windows.split(8)] if calibrated else None
    prune_(model, Sparse24Config(method=script.method, num_samples=len(windows)), calibration)


def main():
    parser = HfArgumentParser((ScriptArguments, Sparse24TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        script, args = parser.parse_yaml_file(sys.argv[1])
    else:
        script, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    train, evaluation = read(script, tokenizer)
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    # float32 weights, and bf16=True for the products: most steps are smaller than a 16-bit weight's last bit.
    model = AutoModelForCausalLM.from_pretrained(checkpoint or script.model_name_or_path, dtype="float32")
    if not hasattr(AutoConfig.from_pretrained(script.model_name_or_path), "sparse24"):  # it is dense
        args.teacher_model = args.teacher_model or script.model_name_or_path
        if checkpoint is None:
            prune(model.to(args.device), script, train)

    trainer = Sparse24Trainer(model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset=script.train_file)
    loss = trainer.evaluate()["eval_loss"]
    report = sparsity_report(model)  # in every process, which may have a shard of each weight
    if trainer.is_world_process_zero():
        print(f"perplexity of the held-out text: {math.exp(loss):.2f}")
        print_sparsity_report(report)


if __name__ == "__main__":
    main()
