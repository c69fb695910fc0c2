"""What masks cost a training step, and what sparse products save: time, memory, and where the time goes.

    python benchmarks/retrain_cost.py [--models smollm2 1b] [--rows NAME ...] [--compile] [--accumulate 4]   # a GPU
    python benchmarks/retrain_cost.py --products [--models ...]     # the products and the packing by themselves
    accelerate launch --config_file examples/fsdp2.yaml benchmarks/retrain_cost.py --models 1b --rows dense frozen

Random weights in the shapes of SmolLM2-135M and of Llama-3.2-1B, the same random tokens for all, float32 weights with
bf16 products and fused AdamW. Every row is a training of its own; its time is the median of the steps after the first
ten, from the beginning of one step to that of the next by CUDA events, so that the row's order and the GPU's clock
matter little. Three more steps are profiled: the time of the GPU's kernels, by kind.

Rows go to results/retrain_cost.json as soon as they are there, in place of those of the same name and size; those of
--products to results/retrain_products.json.
"""

import argparse
import gc
import itertools
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict

import torch
from common import conditions, merge
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, prune_
from hf_sparse24.training.masks import Mask, pack_bits
from hf_sparse24.training.policies.transposable import transposable_mask
from hf_sparse24.training.sparse_matmul import SparseLinear

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
SPARSE = {"mask_policy": "transposable", "sparse_matmul": True}
FEED_FORWARD = {**SPARSE, "sparse_matmul_modules": ["mlp"]}
ROWS = {
    "dense": None,
    "frozen": {},
    "transposable": {"mask_policy": "transposable"},
    "transposable, sparse products": SPARSE,
    "transposable, sparse products in feed-forward layers": FEED_FORWARD,
    "frozen, compact optimizer, bf16 weights": {"compact_optimizer": True},
    "dense, bf16 weights": None,
    "transposable, sparse products, bf16 weights": SPARSE,
    "srste": {"mask_policy": "srste"},
    "masked_decay": {"mask_policy": "masked_decay"},
    "admm": {"mask_policy": "admm"},
    "learned": {"mask_policy": "learned"},
    "dense again": None,
}
WARM_UP, PROFILED = 10, 3
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# Kernels by what their names say, the first that matches.
KINDS = {
    "sparse products": r"sparse|spgemm|spmma|cslt",
    "attention": r"flash|fmha|attention",
    "dense products": r"gemm|nvjet|xmma|cutlass|gemv|splitk",
    "packing": r"index_?select|index_?elementwise",
    "optimizer and clipping": r"adam|multi_tensor",
    "masks": r"zero_pruned|masked_fill|bitwise|MaskedFill|compare",
    "loss": r"softmax|nll|cross_entropy",
    "copies and casts": r"copy|memcpy|memset|cast",
}


class Clock(TrainerCallback):
    """Mark the beginning of every step; profile the last ones."""

    def __init__(self, steps):
        self.steps, self.marks, self.profile, self.kinds = steps, [], None, None

    def on_step_begin(self, args, state, control, **kwargs):
        """Mark, without waiting for the GPU."""
        if torch.cuda.is_available():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        if torch.cuda.is_available() and state.global_step == self.steps:
            torch.cuda.synchronize()
            self.profile = profile(activities=[ProfilerActivity.CUDA])
            self.profile.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        """Sum up what was profiled."""
        if self.profile is not None:
            torch.cuda.synchronize()
            self.profile.__exit__(None, None, None)
            self.kinds = by_kind(self.profile.events())

    def milliseconds(self):
        """Return the median step."""
        marks = self.marks[WARM_UP : self.steps + 1]
        pairs = list(itertools.pairwise(marks))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in pairs)
        return statistics.median(1e3 * (end - start) for start, end in pairs)


def by_kind(events):
    """Return milliseconds a step of kernels by kind, and the ten that take longest, as (name, milliseconds, calls)."""
    kinds, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA or "#" in event.name:  # "Optimizer.step#..." is a range
            continue
        took = event.time_range.elapsed_us() / 1e3 / PROFILED
        kinds[kind_of(event.name)] += took
        kernels[event.name][0] += took
        kernels[event.name][1] += 1
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:10]
    return {
        "kernels_milliseconds": {kind: round(took, 2) for kind, took in sorted(kinds.items(), key=lambda x: -x[1])},
        "longest_kernels": [[name[:120], round(took, 2), calls] for name, (took, calls) in longest],
    }


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")


def model_of(name, row, extra, device):
    """Return a model with random weights, pruned where a mask is to be frozen."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], max_position_embeddings=WINDOW))
    if extra is not None and extra.get("mask_policy") != "transposable":
        prune_(model, Sparse24Config(method="magnitude"))
    return model.to(torch.bfloat16) if "bf16 weights" in row else model


def measure(name, row, extra, options):
    """Return the row of one training."""
    gpu = torch.cuda.is_available()
    model = model_of(name, row, extra, "cuda" if gpu else "cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    steps = options.steps + WARM_UP
    batch = BATCH[name] * options.accumulate * PROCESSES
    window = WINDOW if name != "tiny" else 32
    tokens = torch.randint(0, SHAPES[name]["vocab_size"], (batch * (steps + PROFILED), window))
    data = [{"input_ids": window, "labels": window} for window in tokens]
    with tempfile.TemporaryDirectory() as folder:
        kwargs = {
            "per_device_train_batch_size": BATCH[name],
            "gradient_accumulation_steps": options.accumulate,
            "max_steps": steps + PROFILED,
            "learning_rate": 1e-4,
            "bf16": True,
            "use_cpu": not gpu,
            "optim": "adamw_torch_fused",
            "save_strategy": "no",
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "disable_tqdm": True,
            "torch_compile": options.compile,
        }
        clock = Clock(steps)
        if extra is None:
            trainer = Trainer(model, TrainingArguments(folder, **kwargs), train_dataset=data, callbacks=[clock])
        else:
            args = Sparse24TrainingArguments(folder, **kwargs, **extra)
            trainer = Sparse24Trainer(model, args, train_dataset=data, callbacks=[clock])
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return {
        "model": name,
        "row": row + (", compiled" if options.compile else "") + (f", {PROCESSES} GPUs" if PROCESSES > 1 else ""),
        "parameters": parameters,
        "tokens": batch * window,
        "milliseconds": round(clock.milliseconds(), 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if gpu else None,
        **(clock.kinds or {}),
    }


def products(name):
    """Return a row for each shape of projection: microseconds of its three products, dense and sparse, and packing."""
    shape, tokens = SHAPES[name], BATCH[name] * WINDOW
    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    heads = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    rows = []
    for outputs, inputs in ((hidden, hidden), (heads, hidden), (width, hidden), (hidden, width)):
        linear = torch.nn.Linear(inputs, outputs, bias=False, device="cuda")
        kept = transposable_mask(linear.weight.detach().abs())
        linear.weight.data.masked_fill_(~kept, 0)
        sparse = SparseLinear(linear, Mask(linear, "weight", -1, kept.shape, pack_bits(kept)), torch.bfloat16)
        weight = linear.weight.detach().bfloat16()
        input, grad = (torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16) for size in (inputs, outputs))
        calls = {
            "forward, dense": lambda input=input, weight=weight: input @ weight.t(),
            "forward, sparse": lambda input=input, sparse=sparse: sparse.matrix.product(input),
            "gradient of the input, dense": lambda grad=grad, weight=weight: grad @ weight,
            "gradient of the input, sparse": lambda grad=grad, sparse=sparse: sparse.transposed.product(grad),
            "gradient of the weight, dense": lambda grad=grad, input=input: grad.t() @ input,
            "packing": sparse.repack_,
            "cast of the weight": lambda linear=linear: linear.weight.detach().bfloat16(),
        }
        took = {key: round(microseconds(call), 1) for key, call in calls.items()}
        facts = {"model": name, "shape": f"{outputs}x{inputs}", "tokens": tokens, "microseconds": took}
        rows.append(facts | {"conditions": conditions()})
        print(facts, flush=True)
    return rows


def microseconds(call, repeats=50):
    """Return the mean of a call on the GPU, in a CUDA graph where it can be in one: the host then costs nothing."""
    for _ in range(5):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["smollm2", "1b"], choices=tuple(SHAPES))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=tuple(ROWS), metavar="ROW")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model; rows end in 'compiled'")
    parser.add_argument("--products", action="store_true", help="time the products of a layer instead")
    options = parser.parse_args()
    logging.disable_progress_bar()
    first = int(os.environ.get("RANK", "0")) == 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    for name in options.models:
        if options.products:
            merge("retrain_products", products(name), ["model", "shape"])
            continue
        dense = {}
        for row in options.rows:
            facts = measure(name, row, ROWS[row], options)
            bits = "bf16 weights" in row and "compact" not in row
            dense.setdefault(bits, facts["milliseconds"] if ROWS[row] is None else None)
            if dense[bits]:
                facts["of_dense"] = round(facts["milliseconds"] / dense[bits], 3)
            if first:
                print({key: value for key, value in facts.items() if key != "longest_kernels"}, flush=True)
                merge("retrain_cost", [facts | {"conditions": conditions()}], ["model", "row", "tokens"])
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
