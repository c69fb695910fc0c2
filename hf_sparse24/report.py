"""What a model is made of: every matrix with its pattern, its bytes, and why it is dense where it is.

`sparsity_report` computes, for any model: pruned or not, packed or not. Printing is separate.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse24.identity import record_of
from hf_sparse24.nn import PackedModule
from hf_sparse24.nn.mixture import packable_experts
from hf_sparse24.packing import dtype_name
from hf_sparse24.pattern import Violations, check_present, density, find_violations
from hf_sparse24.roles import role_of
from hf_sparse24.selection import Skipped, Target, select
from hf_sparse24.shards import whole


@dataclass(frozen=True, slots=True)
class SparsityRow:
    """One matrix of a model.

    Attributes:
        name (`str`): path of the module, or of the parameter where a module holds several.
        role (`str`, *optional*): q, k, v, o, gate, up, down ...; None outside attention and feed-forward.
        shape (`tuple[int, ...]`): of the dense weight, (out, in); of experts (experts, out, in), or as a dense stack
            has it.
        dtype (`str`): of the stored values.
        state (`str`): `"packed"`, `"pruned"` (2:4, stored dense) or `"dense"`.
        density (`float`): share of nonzeros.
        violating_groups (`int`, *optional*): groups of four with more than two nonzeros; None where it was not asked.
        bytes_dense (`int`): of the dense weight in the dtype of the model.
        bytes_stored (`int`): of all tensors that hold it now.
        reason (`str`, *optional*): why it is dense, or stored dense.
    """

    name: str
    role: str | None
    shape: tuple[int, ...]
    dtype: str
    state: str
    density: float
    violating_groups: int | None
    bytes_dense: int
    bytes_stored: int
    reason: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class SparsityReport:
    """The rows of a model, in the order of its modules, their totals, and what is to be known of how it was pruned.

    Attributes:
        rows (`tuple[SparsityRow, ...]`): every matrix.
        notes (`tuple[str, ...]`): one sentence each: a damping that had to be raised, what training brought.
    """

    rows: tuple[SparsityRow, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the totals in one line; `print_sparsity_report` shows the rows."""
        totals = self.totals
        return (
            f"SparsityReport({totals['matrices_2to4']} of {totals['matrices']} matrices 2:4, "
            f"{_megabytes(totals['bytes_dense'])} -> {_megabytes(totals['bytes_stored'])}, "
            f"violating groups: {totals['violating_groups']})"
        )

    @property
    def sparse_rows(self) -> tuple[SparsityRow, ...]:
        """The rows that are 2:4, packed or not."""
        return tuple(row for row in self.rows if row.state != "dense")

    @property
    def totals(self) -> dict[str, Any]:
        """Counts and bytes over all rows, and over the rows that are 2:4 alone."""
        sparse = self.sparse_rows
        return {
            "matrices": len(self.rows),
            "matrices_2to4": len(sparse),
            "violating_groups": sum(row.violating_groups or 0 for row in self.rows),
            "bytes_dense": sum(row.bytes_dense for row in self.rows),
            "bytes_stored": sum(row.bytes_stored for row in self.rows),
            "bytes_dense_2to4": sum(row.bytes_dense for row in sparse),
            "bytes_stored_2to4": sum(row.bytes_stored for row in sparse),
        }

    @property
    def kept_dense(self) -> dict[str, int]:
        """How many matrices are dense, by reason."""
        return dict(Counter(row.reason or "not pruned" for row in self.rows if row.state == "dense"))

    def to_dict(self) -> dict[str, Any]:
        """Return rows, totals and notes as plain values."""
        return {"rows": [asdict(row) for row in self.rows], "totals": self.totals, "notes": list(self.notes)}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def sparsity_report(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
) -> SparsityReport:
    """Describe every matrix of a model. Of a sharded model every process has to call it.

    Args:
        model (`nn.Module`): any transformers model, pruned or not, packed or not.
        target_modules, modules_to_not_convert: as in `Sparse24Config`; what was asked when the model was made, so
            that the reasons are those. Default: what the model's own config says.
    """
    record = record_of(model)
    selection = select(
        model,
        target_modules or record.get("target_modules"),
        modules_to_not_convert or record.get("modules_to_not_convert"),
        strict=False,
    )
    rows, (_, left) = [], packable_experts(model, selection)
    for matrix in selection.matrices:
        module = model.get_submodule(matrix.module_name)
        if isinstance(module, PackedModule):
            rows.append(_packed_row(matrix.name, module))
        else:
            rows.append(_dense_row(matrix, module, left.get(matrix.name)))
    return SparsityReport(tuple(rows), calibration_notes(record.get("calibration", {})))


def print_sparsity_report(report: SparsityReport | nn.Module, console: Console | None = None) -> None:
    """Print a report, or the report of a model, with the layers of one kind in one line; fits 100 columns."""
    if isinstance(report, nn.Module):
        report = sparsity_report(report)
    console = console or Console()
    if not console.is_terminal:
        console.width = 100
    console.print(report_table(report))
    totals = report.totals
    sparse, dense = totals["bytes_stored_2to4"], totals["bytes_dense_2to4"]
    ratio = f" ({sparse / dense:.3f}x)" if dense else ""
    console.print(
        f"2:4: {totals['matrices_2to4']} of {totals['matrices']} matrices, {_megabytes(dense)} dense -> "
        f"{_megabytes(sparse)} stored{ratio}; violating groups: {totals['violating_groups']}\n"
        f"whole model: {_megabytes(totals['bytes_dense'])} -> {_megabytes(totals['bytes_stored'])}"
    )
    for note in report.notes:
        console.print(note, highlight=False)


def report_table(report: SparsityReport) -> Table:
    """Build the rich table of a report."""
    table = Table(box=None, pad_edge=False)
    table.add_column("matrix", no_wrap=True, overflow="ellipsis")
    for title in ("n", "shape", "dtype", "state", "density", "MB"):
        table.add_column(title, justify="right" if title in ("n", "density", "MB") else "left", no_wrap=True)
    table.add_column("kept dense because", overflow="fold")
    groups: dict[tuple[Any, ...], list[SparsityRow]] = {}
    for row in report.rows:
        pattern = re.sub(r"\.\d+\.", ".*.", row.name)
        groups.setdefault((pattern, row.shape, row.dtype, row.state, row.reason), []).append(row)
    for (pattern, shape, dtype, state, reason), rows in groups.items():
        mean_density = sum(row.density for row in rows) / len(rows)
        size = sum(row.bytes_stored for row in rows)
        table.add_row(
            pattern,
            str(len(rows)),
            "x".join(map(str, shape)),
            dtype,
            state,
            f"{mean_density:.3f}",
            f"{size / 1e6:.1f}",
            reason or "",
        )
    return table


def calibration_notes(calibration: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what the record of a calibrated model holds beside the request."""
    notes = []
    if "sequence_length" in calibration:
        notes.append(f"Calibrated on {calibration['num_samples']} windows of {calibration['sequence_length']} tokens.")
    raised = calibration.get("raised_dampening")
    if raised:
        name, dampening = max(raised.items(), key=lambda item: item[1])
        notes.append(
            f"The Hessian of {len(raised)} projections was not positive definite as it came; the dampening was "
            f"raised, most for {name}, to {dampening:g}."
        )
    for key, what in (
        ("matched", "Block matching took the mean squared error of the blocks, relative and held out,"),
        ("distilled", "Distillation took the divergence from the dense model, held out,"),
    ):
        if calibration.get(key):
            notes.append(f"{what} from {calibration[key]['before']:.4g} to {calibration[key]['after']:.4g}.")
    if calibration.get("smoothed_norms"):
        notes.append(
            f"{calibration['smoothed_norms']} norms and the weights that read them were rescaled by powers of two, "
            "which changes no output and makes 8-bit activations finer."
        )
    return tuple(notes)


def _packed_row(name: str, module: PackedModule) -> SparsityRow:
    check_present(module.weight, name)
    tensors = [tensor for tensor in module.packed if tensor is not None]
    return SparsityRow(
        name=name,
        role=role_of(name),
        shape=module.dense_shape,
        dtype=dtype_name(module.weight.dtype),
        state="packed",
        density=density(module.weight) / 2,
        violating_groups=0,
        bytes_dense=math.prod(module.dense_shape) * module.dense_dtype.itemsize,
        bytes_stored=sum(tensor.nbytes for tensor in tensors),
    )


def _dense_row(matrix: Target | Skipped, module: nn.Module, never_packed: str | None) -> SparsityRow:
    check_present(getattr(module, matrix.parameter), matrix.name)
    weight = whole(getattr(module, matrix.parameter))
    violations = find_violations(weight, matrix.dim) if isinstance(matrix, Target) else None
    pruned = violations is not None and violations.count == 0
    return SparsityRow(
        name=matrix.name,
        role=role_of(matrix.name),
        shape=tuple(weight.t().shape if isinstance(module, Conv1D) else weight.shape),
        dtype=dtype_name(weight.dtype),
        state="pruned" if pruned else "dense",
        density=density(weight),
        violating_groups=None if violations is None else violations.count,
        bytes_dense=weight.nbytes,
        bytes_stored=weight.nbytes,
        reason=_reason(matrix, violations, never_packed),
    )


def _reason(matrix: Target | Skipped, violations: Violations | None, never_packed: str | None) -> str | None:
    if isinstance(matrix, Skipped):
        return matrix.reason
    if violations is not None and violations.count:
        return f"not 2:4 in {violations.count} of {violations.groups} groups"
    if matrix.read_by is not None:
        return f"read directly by {matrix.read_by}"
    return never_packed


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
