"""Prune an encoder to 2:4 and train it to write the dense encoder's hidden states; no labels are needed.

    python examples/retrain_encoder.py --model_name_or_path MODEL --train_file lines.txt --output_dir out

One text a line. For images and audio give `Sparse24Trainer` batches of what the model reads: it compares
`last_hidden_state`, or logits where there are any.
"""

import sys
from dataclasses import dataclass, field

import torch
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, set_seed

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, print_sparsity_report, prune_


@dataclass
class ScriptArguments:
    """What this script takes beside the trainer's arguments."""

    model_name_or_path: str = field(metadata={"help": "A dense encoder."})
    train_file: str = field(metadata={"help": "One text a line; the last twentieth is for the evaluation."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    calibration_texts: int = field(default=512, metadata={"help": "On which the encoder is pruned."})
    method: str = field(default="auto", metadata={"help": "How it is pruned; see Sparse24Config."})


def cosine(model, teacher, batches):
    """Return the mean cosine between the two models' averages over the tokens of a text."""
    found = []
    for batch in batches:
        batch = batch.to(model.device)
        with torch.no_grad():
            states = [encoder.eval()(**batch).last_hidden_state.float() for encoder in (model, teacher)]
        kept = batch["attention_mask"][..., None]
        own, other = ((state * kept).sum(1) for state in states)
        found.append(torch.cosine_similarity(own, other))
    return float(torch.cat(found).mean())


def main():
    parser = HfArgumentParser((ScriptArguments, Sparse24TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        script, args = parser.parse_yaml_file(sys.argv[1])
    else:
        script, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    args.label_weight = 0.0  # there are none
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    with open(script.train_file, encoding="utf8") as file:
        lines = [line.strip() for line in file if line.strip()]
    rows = [tokenizer(line, truncation=True, max_length=script.max_length) for line in lines]
    collate = DataCollatorWithPadding(tokenizer)
    cut = len(rows) - max(1, len(rows) // 20)
    train, held_out = rows[:cut], [collate(rows[start : start + 32]) for start in range(cut, len(rows), 32)]

    model = AutoModel.from_pretrained(script.model_name_or_path, dtype="float32").to(args.device)
    teacher = AutoModel.from_pretrained(script.model_name_or_path, dtype="float32").to(args.device)
    calibration = [dict(collate(train[start : start + 32])) for start in range(0, script.calibration_texts, 32)]
    calibrated = script.method != "magnitude"
    calibration = [batch for batch in calibration if batch] if calibrated else None
    prune_(model, Sparse24Config(method=script.method, num_samples=script.calibration_texts), calibration)
    before = cosine(model, teacher, held_out)
    for module in model.modules():  # the teacher writes without dropout; so shall the student
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    trainer = Sparse24Trainer(
        model,
        args,
        train_dataset=train,
        data_collator=collate,
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    trainer.train()
    trainer.save_model()
    print(
        f"cosine to the dense encoder, held out: {before:.4f} pruned, {cosine(model, teacher, held_out):.4f} trained"
    )
    print_sparsity_report(model)


if __name__ == "__main__":
    main()
