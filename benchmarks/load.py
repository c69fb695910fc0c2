"""What pruning on load costs: seconds and peak memory of from_pretrained, each run in a fresh process.

Modes are interleaved, so that a slow moment of the machine hits all of them. The plain load is counted with one read
of every weight ("plain, read") as well: from_pretrained maps a file that needs no conversion and leaves the reading to
the first use, while pruning reads every weight. "warm" has the file in memory; "cold file" reads it from the disk.
Importing is not counted.
"""

import json
import os
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
    "read back packed": None,
    "read back packed int8": None,
}
REPEATS = 3
CONDITIONS = [("auto", "warm"), ("auto", "cold file"), ("float32", "warm")]


def measure_one(folder, dtype, mode, condition):
    """Run in a process of its own: load once, print seconds and peak memory."""
    if condition == "cold file":
        for file in Path(folder).glob("*.safetensors"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    import torch
    from transformers import LlamaForCausalLM

    from hf_sparse24 import Sparse24Config

    request = MODES[mode]
    kwargs = {} if request is None else {"quantization_config": Sparse24Config(method="magnitude", **request)}
    Path("/proc/self/clear_refs").write_text("5")  # restart the count of the peak
    before = resident_peak()
    started = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    if mode in ("plain, read", "read back packed", "read back packed int8"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(torch.uint8).max()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": resident_peak() - before}))


def resident_peak():
    """Return the peak of the resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main():
    from common import write
    from smollm2 import model_folder

    rows = []
    for dtype, condition in CONDITIONS:
        folders = {mode: model_folder() for mode in MODES}
        folders |= {f"read back packed{name}": packed_copy(dtype, name.strip() or None) for name in ("", " int8")}
        runs = {mode: [] for mode in MODES}
        for _ in range(REPEATS):
            for mode, results in runs.items():
                command = [sys.executable, __file__, str(folders[mode]), dtype, mode, condition]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
        rows += summarize(runs, dtype, condition)
    write("load", rows)


def packed_copy(dtype, quantization):
    """Prune and save once, for the modes that read it back."""
    from smollm2 import CACHE, model_folder
    from transformers import LlamaForCausalLM

    from hf_sparse24 import Sparse24Config

    folder = CACHE / f"bench-{dtype}-{quantization}"
    if not folder.exists():
        config = Sparse24Config(method="magnitude", quantization=quantization)
        LlamaForCausalLM.from_pretrained(model_folder(), dtype=dtype, quantization_config=config).save_pretrained(
            folder
        )
    return folder


def summarize(runs, dtype, condition):
    """Make one row a mode from the medians of its runs, with ratios to the plain load of the same conditions."""
    medians = {
        mode: {key: statistics.median(run[key] for run in results) for key in ("seconds", "peak_mb")}
        for mode, results in runs.items()
    }
    plain, read = medians["plain"], medians["plain, read"]
    return [
        {
            "model": "SmolLM2-135M-Instruct (stored in bfloat16)",
            "dtype": dtype,
            "condition": condition,
            "mode": mode,
            "seconds": round(median["seconds"], 3),
            "of_plain": round(median["seconds"] / plain["seconds"], 2),
            "of_plain_read": round(median["seconds"] / read["seconds"], 2),
            "peak_mb": round(median["peak_mb"], 1),
            "peak_mb_above_plain_read": round(median["peak_mb"] - read["peak_mb"], 1),
        }
        for mode, median in medians.items()
    ]


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measure_one(*sys.argv[1:])
    else:
        main()
