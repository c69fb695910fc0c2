"""What pruning on load costs: seconds and peak memory of from_pretrained, each run in a fresh process.

Modes are interleaved, so that a slow moment of the machine hits all of them. The plain load is counted with one read
of every weight ("plain, read") as well: from_pretrained maps a file that needs no conversion and leaves the reading to
the first use, while pruning reads every weight.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

MODES = {
    "plain": None,
    "plain, read": None,
    "2:4 dense-masked": {"pack": False},
    "2:4 packed": {},
    "2:4 packed int8": {"quantization": "int8"},
    "2:4 packed fp8": {"quantization": "fp8"},
}
REPEATS = 5


def measure_one(folder, dtype, mode):
    """Run in a process of its own: load once, print seconds and peak memory."""
    import torch
    from transformers import LlamaForCausalLM

    from hf_sparse24 import Sparse24Config

    request = MODES[mode]
    kwargs = {} if request is None else {"quantization_config": Sparse24Config(method="magnitude", **request)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    if mode == "plain, read":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sum()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024}))


def main():
    from common import write
    from smollm2 import model_folder

    rows = []
    for dtype in ("auto", "float32"):
        runs = {mode: [] for mode in MODES}
        for _ in range(REPEATS):
            for mode, results in runs.items():
                command = [sys.executable, __file__, str(model_folder()), dtype, mode]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
        medians = {
            mode: {key: statistics.median(run[key] for run in results) for key in ("seconds", "peak_mb")}
            for mode, results in runs.items()
        }
        for mode, median in medians.items():
            rows.append(
                {
                    "model": "SmolLM2-135M-Instruct (stored in bfloat16)",
                    "dtype": dtype,
                    "mode": mode,
                    "seconds": round(median["seconds"], 3),
                    "of_plain": round(median["seconds"] / medians["plain"]["seconds"], 2),
                    "of_plain_read": round(median["seconds"] / medians["plain, read"]["seconds"], 2),
                    "peak_mb": round(median["peak_mb"], 1),
                    "peak_mb_above_plain_read": round(median["peak_mb"] - medians["plain, read"]["peak_mb"], 1),
                }
            )
    write("load", rows)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure_one(*sys.argv[1:])
    else:
        main()
