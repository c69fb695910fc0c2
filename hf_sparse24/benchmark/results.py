"""Rows of a benchmark as data: what a row says, its ratios to the baselines, and the file that keeps it.

A CSV file begins with the environment, one `# key: value` a line, so that no row is ever without the GPU, versions and
command that it comes from. Everything else about it is plain: `csv.DictReader` or `pandas.read_csv(comment="#")` read
the rows.
"""

import csv
import datetime
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_sparse24.benchmark.roofline import Machine
from hf_sparse24.capability import environment

OK = "ok"
_ON_A_CPU = (
    "a CPU emulates the kernels: 2:4 rows are unpacked and run dense, and FP8 is emulated, in the dense rows too; no "
    "row says how fast anything is on a GPU"
)
_VERSIONS = ("hf_sparse24", "torch", "transformers", "torchao", "nvmath-python", "triton")
_BEST_DENSE_FP8 = ("dense-fp8", "dense-fp8-tensor")
_SAME_PRECISION = {"bf16": ("dense-bf16",), "int8": ("dense-int8",), "fp8": _BEST_DENSE_FP8}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every row has.

    Attributes:
        benchmark (`str`): gemm, layer, experts, prefill or decode.
        candidate (`str`): what was measured, e.g. 2:4-int8; `precision` (bf16, int8, fp8) is that of its products.
        status (`str`): "ok", or why there is no time: "wrong: ..." or "cannot run: ...".
        over_same_precision (`float`, *optional*): how many times as fast as the dense candidate of this precision; for
            FP8 the fastest of them.
        over_dense_fp8 (`float`, *optional*): ... as the fastest dense FP8 candidate.
        over_dense_bf16 (`float`, *optional*): ... as dense bf16.
    """

    benchmark: str
    candidate: str
    precision: str
    status: str
    over_same_precision: float | None = None
    over_dense_fp8: float | None = None
    over_dense_bf16: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProjectionRow(Row):
    """A projection, all projections of a layer, or the experts of a layer.

    Attributes:
        shape (`str`): NxK of each projection; those that read one input are joined by "+". Of experts ExNxK.
        label (`str`): their roles in the model, or "". Of experts whose they are, and how they ran.
        tokens (`int`): M.
        us, host_us (`float`, *optional*): see `timing.Timing`.
        error (`float`, *optional*): relative L2 error of the worst token against float64.
        bytes, flops (`int`): what has to be moved and done (`roofline`).
        floor_us, roofline (`float`): the least time by the roofline, and the share of it that was reached, 0 to 1.
    """

    shape: str
    label: str
    tokens: int
    us: float | None = None
    host_us: float | None = None
    error: float | None = None
    bytes: int
    flops: int
    floor_us: float
    roofline: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRow(Row):
    """A whole model.

    Attributes:
        model (`str`): its name; `layers`, how many it has.
        mode (`str`): eager or compiled; with "+graph" where a CUDA graph is replayed.
        batch (`int`): sequences.
        tokens (`int`): of each sequence: in prefill those that go in, in decode the context, the new one included.
        ms, tokens_s (`float`, *optional*): milliseconds of a step; tokens that go in (prefill) or come out a second.
        layer_us (`float`, *optional*): microseconds that a layer adds, by running half of them.
        error (`float`, *optional*): relative L2 error of the logits against dense bf16 with the same weights.
        weights_gb, peak_gb (`float`, *optional*): 10^9 bytes on the device: of the model as it stands, and at most
            during the run, caches included.
        weights_over_bf16 (`float`, *optional*): weights_gb over that of the dense bf16 model.
    """

    model: str
    layers: int
    mode: str
    batch: int
    tokens: int
    ms: float | None = None
    tokens_s: float | None = None
    layer_us: float | None = None
    error: float | None = None
    weights_gb: float | None = None
    peak_gb: float | None = None
    weights_over_bf16: float | None = None


AnyRow = TypeVar("AnyRow", bound=Row)

_CONVERTERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: lambda text: float(text) if text else None,
}


def with_ratios(rows: Sequence[AnyRow], time_of: Callable[[AnyRow], float | None]) -> list[AnyRow]:
    """Fill in the ratios of rows that did the same work.

    Args:
        rows (`Sequence[Row]`): one for each candidate.
        time_of (`Callable`): from a row to its time, None where it has none.
    """
    times = {row.candidate: time for row in rows if (time := time_of(row)) is not None}

    def ratio(row: AnyRow, baselines: Sequence[str]) -> float | None:
        time, found = time_of(row), [times[name] for name in baselines if name in times]
        return min(found) / time if time and found else None

    return [
        replace(
            row,
            over_same_precision=ratio(row, _SAME_PRECISION[row.precision]),
            over_dense_fp8=ratio(row, _BEST_DENSE_FP8),
            over_dense_bf16=ratio(row, ("dense-bf16",)),
        )
        for row in rows
    ]


def run_environment(device: torch.device, command: str, machine: Machine | None = None) -> dict[str, str]:
    """Return what has to stand beside the rows: date, command, device, driver, versions, the measured roofline."""
    facts = environment()
    kept = {
        name: facts[name] for name in ("hf_sparse24", "torch", "transformers", "torchao", "nvmath-python", "triton")
    }
    found = {"note": _ON_A_CPU} if device.type == "cpu" else {}  # first, in files too
    found |= {"date": datetime.date.today().isoformat(), "command": command, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["driver"] = _driver()
        found["cuda"] = str(torch.version.cuda)
        found["l2_cache_mb"] = f"{properties.L2_cache_size / 2**20:.0f}"
    if machine is not None:
        found["copy_gb_s"] = f"{machine.copy_gb_s:.4g}"
        found["dense_tflops"] = f"{machine.tflops_16:.3g} with 16 bits, {machine.tflops_8:.3g} with 8"
    return found | kept


def is_emulated(facts: Mapping[str, str]) -> bool:
    """Return whether rows with this environment come from a CPU, where kernels are emulated."""
    return facts.get("device") == "cpu"


def write_csv(path: Path, rows: Sequence[Row], facts: dict[str, str]) -> None:
    """Write rows of one kind and their environment.

    Raises:
        `ValueError`: there are none.
    """
    if not rows:
        raise ValueError(f"There is no row to write to {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8", newline="") as file:
        file.writelines(f"# {name}: {' '.join(value.split())}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in asdict(row).items()} for row in rows)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Return the rows and the environment of a file that `write_csv` wrote.

    Raises:
        `ValueError`: it is another file.
    """
    lines = path.read_text(encoding="utf8").splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    reader = csv.DictReader(line for line in lines if not line.startswith("# "))
    names = set(reader.fieldnames or ())
    kind = next((kind for kind in (ProjectionRow, ModelRow) if names == {field.name for field in fields(kind)}), None)
    if kind is None:
        raise ValueError(f"{path} does not have the columns of a benchmark of hf_sparse24.")
    converters = {field.name: _CONVERTERS[field.type] for field in fields(kind)}
    return [kind(**{name: converters[name](text) for name, text in row.items()}) for row in reader], facts


def to_json(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """Return rows and environment as JSON."""
    return json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}, indent=1)


def _plain(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.strip() or "unknown"
