"""What masks cost a training step: time and memory of frozen masks and of the policies, beside dense training.

    python benchmarks/retrain_cost.py [--models smollm2 1b] [--steps 20]      # results/retrain_cost.json; a GPU

Random weights in the shapes of SmolLM2-135M and of Llama-3.2-1B, the same random tokens for all, float32 weights with
bf16 products and fused AdamW. Every row is a training of its own; its time is the median of the steps after the first
five, synchronized, so that the row's order and the GPU's clock matter little.
"""

import argparse
import gc
import statistics
import tempfile
import time

import torch
from common import write
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, prune_

WINDOW = 1024
SHAPES = {
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": True},
}
BATCH = {"smollm2": 16, "1b": 8, "tiny": 2}
ROWS = {
    "dense": None,
    "frozen": {},
    "frozen, compact optimizer, bf16 weights": {"compact_optimizer": True},
    "srste": {"mask_policy": "srste"},
    "admm": {"mask_policy": "admm"},
    "learned": {"mask_policy": "learned"},
    "dense again": None,
}


class Clock(TrainerCallback):
    """Time every step, from its beginning to the end of all that the GPU has to do for it."""

    def __init__(self):
        self.seconds, self.started = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def measure(name, row, extra, steps):
    """Return the row of one training."""
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], max_position_embeddings=WINDOW))
    model.to("cuda" if gpu else "cpu")
    if extra is not None:
        prune_(model, Sparse24Config(method="magnitude"))
    if extra and "compact_optimizer" in extra:
        model.to(torch.bfloat16)
    tokens = torch.randint(0, SHAPES[name]["vocab_size"], (BATCH[name] * (steps + 5), WINDOW))
    data = [{"input_ids": window, "labels": window} for window in tokens]
    with tempfile.TemporaryDirectory() as folder:
        kwargs = {
            "per_device_train_batch_size": BATCH[name],
            "max_steps": steps + 5,
            "learning_rate": 1e-4,
            "bf16": gpu,
            "use_cpu": not gpu,
            "optim": "adamw_torch_fused",
            "save_strategy": "no",
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        clock = Clock()
        if extra is None:
            trainer = Trainer(model, TrainingArguments(folder, **kwargs), train_dataset=data, callbacks=[clock])
        else:
            args = Sparse24TrainingArguments(folder, **kwargs, **extra)
            trainer = Sparse24Trainer(model, args, train_dataset=data, callbacks=[clock])
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": name,
        "row": row,
        "parameters": weights,
        "tokens": BATCH[name] * WINDOW,
        "milliseconds": round(1e3 * statistics.median(clock.seconds[5:]), 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if gpu else None,
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["smollm2", "1b"], choices=tuple(SHAPES))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows = []
    for name in options.models:
        for row, extra in ROWS.items():
            rows.append(measure(name, row, extra, options.steps))
            dense = next(line for line in rows if line["model"] == name)
            rows[-1]["of_dense"] = round(rows[-1]["milliseconds"] / dense["milliseconds"], 3)
            write("retrain_cost", rows)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
