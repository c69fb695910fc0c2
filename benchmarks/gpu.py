"""Every performance figure of the README on one GPU, for Llama-3-8B's shape with random weights; and experts.

    python benchmarks/gpu.py --only gemm,layer,model,experts --out benchmarks/results
    python benchmarks/gpu.py --only kernels     # the package's own kernel beside the libraries, each by force

Writes performance_gemm.csv and so on for each part, with its environment, and prints a summary last. Experts are those
of a layer of Mixtral-8x7B and of Qwen3-30B-A3B, beside dense `grouped_mm`. A part that reaches its limit of seconds
writes the rows that it has. Tables: `performance_tables.py`. From performance_kernels.csv the numbers of tokens at
which kernels change are set (`kernels/dispatch.py`).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import LlamaConfig
from transformers.utils import logging

from hf_sparse24.benchmark.candidates import OURS, chosen
from hf_sparse24.benchmark.experts import MIXTURES, benchmark_experts
from hf_sparse24.benchmark.figures import describe
from hf_sparse24.benchmark.gemm import benchmark_projections
from hf_sparse24.benchmark.models import Source
from hf_sparse24.benchmark.results import OK, run_environment, write_csv
from hf_sparse24.benchmark.roofline import measure_machine
from hf_sparse24.benchmark.shapes import layer_groups, model_shapes, skeleton
from hf_sparse24.benchmark.whole_model import Workload, benchmark_model, with_model_ratios
from hf_sparse24.kernels import decode, dispatch
from hf_sparse24.packing import QUANTIZED_DTYPES

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384]
BASELINES = "dense-bf16,dense-fp8,dense-fp8-tensor,dense-int8"
VARIANTS = ["dense-bf16", "2:4-int8", "dense-fp8", "2:4-fp8", "dense-fp8-tensor", "2:4-bf16"]  # the claims first
WORKLOADS = [
    Workload("prefill", 1, 4096),
    Workload("decode", 1, 512),
    Workload("decode", 16, 512),
    Workload("decode", 64, 512),
]
LIMITS = {"gemm": 150, "layer": 90, "model": 240, "kernels": 120, "experts": 120}  # seconds
KERNEL_TOKENS = [16, 32, 64, 128, 256]
EXPERT_TOKENS = [1, 16, 64, 4096]
SUMMARIZED = (1, 16, 32, 64, 128, 256, 1024, 4096)  # tokens


def llama(layers):
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def gemm(arguments, device):
    """Each projection, and the two that siblings merge to, with the time of the host."""
    model = skeleton(llama(1))
    merged = [shape for group in layer_groups(model, merged=True) for shape in group if "+" in shape.label]
    candidates = chosen("none,int8,fp8", f"{BASELINES},torch-sparse,torch-sparse-int8")
    # The largest first: they are what the claims are about, should the time run out.
    for shape in sorted([*model_shapes(model), *merged], key=lambda shape: -shape.out_features * shape.in_features):
        yield from benchmark_projections([[shape]], arguments.tokens or TOKENS, candidates, device)


def own_kernel(kind, quantized):
    """Return a candidate that runs the package's own kernel, on quantized inputs or not, for any number of tokens."""

    class OwnKernel(kind):
        def multiply(self, prepared):
            """Run the kernel, with the quantization of its input."""
            if not quantized:
                return dispatch.few_tokens_linear(prepared.rows, *self.layer.packed, None)
            values, scale = dispatch.quantize_per_token(prepared.rows, self.layer.weight.dtype)
            return decode.scaled_linear(values, scale, *self.layer.packed, None, prepared.rows.dtype)

    return OwnKernel


def library(kind):
    """Return a candidate that runs the library, for any number of tokens."""

    class Library(kind):
        def __init__(self, weight, backend="auto"):
            dtype = QUANTIZED_DTYPES.get(self.precision, weight.dtype)
            takes = [
                name for name in ("cutlass", "cusparselt") if dispatch.takes_weight(dtype, *weight.shape, name).ok
            ]
            super().__init__(weight, takes[0] if takes else "cusparselt")

    return Library


def kernels(arguments, device):
    """Each projection through each kernel, from 16 to 256 tokens."""
    candidates = chosen("none", "dense-fp8,dense-fp8-tensor")
    del candidates["2:4-bf16"]
    for precision, kind in OURS.items():
        name = f"2:4-{precision or 'bf16'}"
        candidates[f"{name}-own"] = own_kernel(kind, quantized=False)
        if precision is not None:
            candidates[f"{name}-own-quantized"] = own_kernel(kind, quantized=True)
        candidates[f"{name}-library"] = library(kind)
    model = skeleton(llama(1))
    merged = [shape for group in layer_groups(model, merged=True) for shape in group if "+" in shape.label]
    for shape in sorted([*model_shapes(model), *merged], key=lambda shape: -shape.out_features * shape.in_features):
        yield from benchmark_projections([[shape]], arguments.tokens or KERNEL_TOKENS, candidates, device)


def layer(arguments, device):
    """All projections of a layer, with siblings apart and merged."""
    candidates = chosen("none,int8,fp8", BASELINES)
    for merged in (False, True):
        groups = layer_groups(skeleton(llama(1)), merged)
        yield from benchmark_projections(groups, arguments.tokens or TOKENS, candidates, device, "layer")


def model(arguments, device):
    """Prefill, decode and memory of the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "Llama-3-8B"
        llama(arguments.layers).save_pretrained(path)
        for variant in arguments.variants:
            for row in benchmark_model(Source(str(path), random_weights=True), variant, WORKLOADS, device):
                yield [row]


def experts(arguments, device):
    """The experts of a layer of Mixtral-8x7B and of Qwen3-30B-A3B, routing included."""
    for mixture in MIXTURES:
        yield from benchmark_experts(mixture, EXPERT_TOKENS, device)


PARTS = {"gemm": gemm, "layer": layer, "model": model, "kernels": kernels, "experts": experts}


def run(part, arguments, device):
    """Run a part until its time is over, write its rows, and return them."""
    started, rows = time.perf_counter(), []
    limit = arguments.seconds or LIMITS[part]
    for more in PARTS[part](arguments, device):
        rows += more
        if time.perf_counter() - started > limit:
            print(f"{part}: stopped after {limit} s; rows are missing")
            break
    if part == "model":
        rows = with_model_ratios(rows)
    command = f"python benchmarks/gpu.py --only {part}" + ("" if part != "model" else f" --layers {arguments.layers}")
    path = arguments.out / f"performance_{part}.csv"
    write_csv(path, rows, run_environment(device, command, measure_machine(device)))
    print(f"{part}: {len(rows)} rows in {time.perf_counter() - started:.0f} s -> {path}", flush=True)
    return rows


def summarize(rows):
    """Print a line for each thing that was done: every candidate's time, and the ratio to dense bf16."""
    lines = {}
    for row in rows:
        us = row.us if hasattr(row, "us") else row.ms and row.ms * 1e3
        if row.status == OK and (hasattr(row, "ms") or row.tokens in SUMMARIZED):
            ratio = f"({row.over_dense_bf16:.2f})" if row.over_dense_bf16 else ""
            lines.setdefault(describe(row), []).append(f"{row.candidate} {us:.1f}{ratio}")
    for what, candidates in lines.items():
        print(f"{what} us(x bf16):", " ".join(candidates))
    for name, row in {row.candidate: row for row in rows if getattr(row, "weights_gb", None)}.items():
        print(f"memory {name}: {row.weights_gb:.2f} GB, {row.weights_over_bf16 or 0:.3f} of bf16")
    for reason in dict.fromkeys(f"{row.candidate}: {row.status}" for row in rows if row.status != OK):
        print(reason)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="gemm,layer,model", help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, help=f"limit of each part; default: {LIMITS}")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=VARIANTS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    results = [run(part, arguments, arguments.device) for part in arguments.only.split(",")]
    for rows in results:
        summarize(rows)


if __name__ == "__main__":
    main()
