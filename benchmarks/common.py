"""What every benchmark shares: the machine it ran on, and where its rows are kept."""

import datetime
import json
import platform
import shlex
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
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def merge(name, rows, same, order=None):
    """Add rows to benchmarks/results/NAME.json, in place of those that agree with them in the keys `same`.

    All others stay as they are, what was measured twice too. Each row brings the conditions it was measured under. The
    file has the conditions of all runs, each once, and in its rows their numbers.
    """
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"conditions": [], "rows": []}
    runs = kept["conditions"] if isinstance(kept["conditions"], list) else [kept["conditions"]]
    old = [row | {"conditions": runs[row.get("run", 0)]} for row in kept["rows"]]
    new = {_key(row, same): row for row in rows}
    replaced = set(new)
    table = [new.pop(_key(row, same), None) if _key(row, same) in replaced else row for row in old]
    table = [row for row in [*table, *new.values()] if row is not None]
    rows, runs = sorted(table, key=order) if order else table, []
    for row in rows:
        run = row.pop("conditions")
        if run not in runs:
            runs.append(run)
        row["run"] = runs.index(run)
    path.write_text(json.dumps({"conditions": runs, "rows": rows}, indent=1) + "\n")


def _key(row, same):
    values = map(row.get, same)
    return tuple(json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for value in values)


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
