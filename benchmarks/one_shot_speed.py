"""What calibrated pruning costs on a large model: a Llama of any size with random weights, 128 x 2048 tokens.

    python benchmarks/one_shot_speed.py --layers 4       # times are a block's; the whole model has 32 of them

Every phase is timed with the device synchronized around it, which costs little beside phases of seconds. A row is kept
in results/one_shot_speed.json as soon as it is there, in place of the one of the same method and number of layers.
"""

import argparse
import time
from collections import defaultdict

import torch
from common import conditions, merge
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse24 import Sparse24Config, prune_
from hf_sparse24.calibration import blocks, pruner, solve

SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
spent = defaultdict(float)


def timed(owner, name, phase):
    """Add the time of every call of a function to a phase."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = function(*args, **kwargs)
        torch.cuda.synchronize()
        spent[phase] += time.perf_counter() - started
        return result

    setattr(owner, name, call)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--methods", nargs="*", default=["alps", "sparsegpt", "alps + matching"])
    parser.add_argument("--offload", action="store_true", help="the model on the CPU, one block at a time on the GPU")
    parser.add_argument("--note", help="what else is to be known of this run, such as what shared the GPU")
    arguments = parser.parse_args()
    timed(blocks.Stream, "outputs", "outputs of blocks")
    timed(pruner, "group_statistics", "statistics")
    timed(pruner, "find_groups", "order of projections")
    timed(pruner, "match_block_", "block matching")
    timed(solve, "layer_objective", "factorize")
    timed(solve, "refit", "refit")
    for method in solve.RECONSTRUCTING:
        inner = solve.RECONSTRUCTING[method]
        timed_methods(method, inner)
    for method in arguments.methods:
        row = run(arguments, method)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        row["conditions"] = conditions() | ({"note": arguments.note} if arguments.note else {})
        merge("one_shot_speed", [row], ["method", "layers", "offload"])


def timed_methods(method, inner):
    def call(objective):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = inner(objective)
        torch.cuda.synchronize()
        spent["mask"] += time.perf_counter() - started
        return result

    solve.RECONSTRUCTING[method] = call


def run(arguments, method):
    """Prune a fresh model and return the row of it."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE_8B, num_hidden_layers=arguments.layers)).eval()
        torch.set_default_dtype(torch.float32)
    if arguments.offload:
        model.cpu()
    tokens = torch.randint(0, 128256, (arguments.samples, 2048))
    name, *options = method.split(" + ")
    config = Sparse24Config(
        method=name,
        match_blocks="matching" in options,
        calibration_device="cuda" if arguments.offload else None,
        num_samples=arguments.samples,
    )
    spent.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    prune_(model, config, [{"input_ids": batch} for batch in tokens.split(8)])
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "method": f"{method} + asymmetric refit",
        "layers": arguments.layers,
        **({"offload": True} if arguments.offload else {}),
        "tokens": tokens.numel(),
        "seconds_a_layer": round(seconds / arguments.layers, 2),
        "minutes_for_32_layers": round(seconds / arguments.layers * 32 / 60, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        **{phase: round(value / arguments.layers, 2) for phase, value in sorted(spent.items())},
    }


if __name__ == "__main__":
    main()
