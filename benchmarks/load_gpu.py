"""What pruning on load to a GPU costs, for a 3B Llama with random weights: seconds and peak device memory.

Each run is a fresh process, modes are interleaved, and the file cache is warm. The model is written to a temporary
folder first.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = {
    "plain": None,
    "2:4 dense-masked": {"pack": False},
    "2:4 packed": {},
    "2:4 packed int8": {"quantization": "int8"},
    "2:4 packed fp8": {"quantization": "fp8"},
}
REPEATS = 3


def measure_one(folder, mode):
    import torch
    from transformers import LlamaForCausalLM

    from hf_sparse24 import Sparse24Config

    kwargs = {} if MODES[mode] is None else {"quantization_config": Sparse24Config(method="magnitude", **MODES[mode])}
    torch.ones(1, device="cuda").sum().item()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype="bfloat16", device_map="cuda", **kwargs)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    allocated = torch.cuda.memory_allocated() / 1e6
    print(json.dumps({"seconds": seconds, "peak_mb": torch.cuda.max_memory_allocated() / 1e6, "model_mb": allocated}))
    del model


def make_model(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main():
    import torch
    from common import write

    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        torch.cuda.empty_cache()
        runs = {mode: [] for mode in MODES}
        for _ in range(REPEATS):
            for mode, results in runs.items():
                command = [sys.executable, __file__, folder, mode]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
    medians = {
        mode: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for mode, results in runs.items()
    }
    rows = [
        {
            "model": "Llama 3B shape, random weights, bfloat16",
            "gpu": torch.cuda.get_device_name(),
            "mode": mode,
            "seconds": round(median["seconds"], 3),
            "of_plain": round(median["seconds"] / medians["plain"]["seconds"], 2),
            "peak_mb": round(median["peak_mb"]),
            "peak_mb_above_plain": round(median["peak_mb"] - medians["plain"]["peak_mb"]),
            "model_mb": round(median["model_mb"]),
        }
        for mode, median in medians.items()
    ]
    write("load_gpu", rows)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if len(sys.argv) == 3:
        measure_one(*sys.argv[1:])
    else:
        main()
