"""What it brings that kernels for few tokens begin while the one before them ends: a layer of Llama-3-8B's shape.

    python benchmarks/overlap.py

The seven projections of four layers with two norms each, in a CUDA graph on one GPU, with and without overlap, in
turns. Outputs have to be equal to the bit. Rows go to results/overlap.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from common import write
from torch import nn

from hf_sparse24.benchmark.timing import capture, time_stream, warm_up
from hf_sparse24.kernels import nvrtc
from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.pattern import prune_2to4

HIDDEN, INTERMEDIATE, KEYS = 4096, 14336, 1024
SHAPES = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)]
SHAPES += [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
LAYERS = 4  # more bytes than a cache holds


def packed(outputs, features, quantization):
    """Return a packed projection with random weights."""
    linear = nn.Linear(features, outputs, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.data = prune_2to4(linear.weight.data)
    return Sparse24Linear.from_linear(linear, quantization)


def step(layers, x, wide):
    """Return a call that runs all projections."""

    def run():
        hidden = x
        for q, k, v, o, gate, up, down in layers:
            normed = F.rms_norm(hidden, (HIDDEN,))
            for projection in (q, k, v):
                projection(normed)
            normed = F.rms_norm(o(normed), (HIDDEN,))
            gate(normed), up(normed)
            hidden = down(wide)
        return hidden

    return run


def measure(run, overlaps):
    """Return the microseconds of a graph of a layer, and what it computes."""
    config = nvrtc._launch_config
    nvrtc._launch_config = lambda *launch: config(*launch[:-1], launch[-1] and overlaps)
    try:
        warm_up([run])
        result = run().clone()
        return time_stream(capture([run]).replay, torch.device("cuda"), repeats=15) / LAYERS, result
    finally:
        nvrtc._launch_config = config


@torch.no_grad()
def main():
    rows = []
    for quantization in ("int8", "fp8", None):
        layers = [[packed(*shape, quantization) for shape in SHAPES] for _ in range(LAYERS)]
        for tokens in (1, 16, 64):
            x, wide = (torch.randn(tokens, size, device="cuda").bfloat16() for size in (HIDDEN, INTERMEDIATE))
            run = step(layers, x, wide)
            timed = [measure(run, overlaps) for overlaps in (True, False, True)]
            equal = all(torch.equal(result, timed[0][1]) for _, result in timed)
            us = [round(us, 2) for us, _ in timed]
            row = {"quantization": quantization, "tokens": tokens, "us": us[0], "us_without": us[1], "us_again": us[2]}
            rows.append(row | {"equal": equal})
    write("overlap", rows)


if __name__ == "__main__":
    main()
