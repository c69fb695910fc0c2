"""What every benchmark shares: the machine it ran on, and where its rows are kept."""

import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def conditions():
    """Describe the machine, the versions and the command."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(name, rows):
    """Keep rows as benchmarks/results/NAME.json with their conditions, and print them."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"conditions": conditions(), "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


def median_seconds(function, repeats=7):
    """Return the median wall time of a call, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
