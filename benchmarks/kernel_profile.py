"""Where the time of a model goes on a GPU, kernel by kernel: Llama-3-8B's shape, random weights, few layers, compiled.

    python benchmarks/kernel_profile.py --out benchmarks/results

Writes kernel_profile.json: for each variant and workload the microseconds a layer of every kind of kernel, and the
time of a CUDA graph of the same step, whose rest is launches and gaps. Time outside of the layers (head, embedding)
is what a model of half as many layers has too, and is left out.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from common import conditions
from gpu import llama
from torch.profiler import ProfilerActivity, profile

from hf_sparse24.benchmark.models import VARIANTS, Source, make_variant_
from hf_sparse24.benchmark.timing import capture, time_stream, warm_up
from hf_sparse24.benchmark.whole_model import Mode, Workload, _half_the_layers, running

WORKLOADS = [Workload("prefill", 1, 4096), Workload("decode", 1, 512), Workload("decode", 64, 512)]
CHOSEN = ["dense-bf16", "dense-fp8", "dense-fp8-tensor", "2:4-int8", "2:4-fp8", "2:4-bf16"]
KINDS = [  # of kernels, by their names; the first that matches
    ("attention", r"flash|fmha|attention|sdpa|cudnn"),
    ("2:4 product, few tokens", r"few_tokens_linear"),
    ("2:4 product, library", r"sparse|spmma|sm90_xmma_sp|_sp_|cutlass.*Sparse"),
    ("quantization", r"quantize_token"),
    ("token scales", r"scale_product"),
    ("dense product", r"gemm|cutlass|nvjet|xmma|cublas|matmul|gemv|splitK"),
    ("fused pointwise and reductions", r"triton"),
    ("other", r"."),
]
STEPS = 5


def kind(name):
    """Return what kind of kernel has such a name."""
    return next(label for label, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def kernels(step):
    """Return the microseconds of every kernel of a step by name."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found = defaultdict(float)
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in event.name:
            found[event.name] += event.device_time_total / STEPS
    return found


def graph_microseconds(step, device):
    """Return the microseconds of a CUDA graph of a step."""
    warm_up([step])
    return time_stream(capture([step]).replay, device, repeats=15)


@torch.no_grad()
def measure(model, workload, device):
    """Return a row: microseconds a layer of each kind of kernel, their sum and what a graph of it takes."""
    with running(model, workload, Mode(True, False), device) as step:
        names, graph = kernels(step), graph_microseconds(step, device)
        with _half_the_layers(model) as removed:
            fewer, shorter = kernels(step), graph_microseconds(step, device)
    largest, sums = {}, defaultdict(float)
    for name, us in names.items():
        of_a_layer = (us - fewer.get(name, 0)) / removed
        sums[kind(name)] += of_a_layer
        largest[name[:120]] = round(of_a_layer, 1)
    kept = dict(sorted(largest.items(), key=lambda item: -item[1])[:8])
    row = {"kernels_us": round(sum(sums.values()), 1), "graph_us": round((graph - shorter) / removed, 1)}
    return row | {"kinds": {label: round(us, 1) for label, us in sums.items() if us >= 0.05}, "largest": kept}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--variants", nargs="*", default=CHOSEN, choices=list(VARIANTS))
    arguments = parser.parse_args()
    device, rows = torch.device("cuda"), []
    folder = arguments.out / "profiled_model"
    llama(arguments.layers).save_pretrained(folder)
    for name in arguments.variants:
        model = Source(str(folder), random_weights=True).load(device)
        make_variant_(model, VARIANTS[name], "auto", lambda dense: None)
        for workload in WORKLOADS:
            row = {"variant": name, **workload._asdict()}
            try:
                row |= measure(model, workload, device)
            except Exception as error:
                row["status"] = f"cannot run: {error}"[:200]
            rows.append(row)
            print(json.dumps(row), flush=True)
            found = {"conditions": conditions(), "layers": arguments.layers, "rows": rows}
            (arguments.out / "kernel_profile.json").write_text(json.dumps(found, indent=1) + "\n")
        del model
        torch.cuda.empty_cache()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
