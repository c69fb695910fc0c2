"""Latency of Sparse24Linear on a CPU, where it unpacks once, beside the dense layer of the same dtype."""

import torch
from common import median_seconds, write
from torch import nn

from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.pattern import prune_2to4

SHAPES = [(576, 576), (1536, 576), (4096, 4096)]
TOKENS = [1, 16, 512]


def measure(call, tokens):
    repeats = 200 if tokens == 1 else 30
    with torch.inference_mode():
        return median_seconds(call, repeats) * 1e6


def main():
    rows = []
    for out_features, in_features in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            dense = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
            dense.weight.data = prune_2to4(dense.weight.data)
            layers = {q or "unquantized": Sparse24Linear.from_linear(dense, q) for q in (None, "int8", "fp8")}
            for tokens in TOKENS:
                x = torch.randn(tokens, in_features, dtype=dtype)
                baseline = measure(lambda dense=dense, x=x: dense(x), tokens)
                for name, layer in layers.items():
                    time = measure(lambda layer=layer, x=x: layer(x), tokens)
                    rows.append(
                        {
                            "shape": f"{out_features}x{in_features}",
                            "dtype": str(dtype).removeprefix("torch."),
                            "tokens": tokens,
                            "layer": name,
                            "dense_us": round(baseline, 1),
                            "packed_us": round(time, 1),
                            "of_dense": round(time / baseline, 2),
                        }
                    )
    write("linear_cpu", rows)


if __name__ == "__main__":
    main()
