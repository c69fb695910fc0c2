"""Rows of a benchmark for people: a table on a console, and a plot."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_sparse24.benchmark.results import OK, ModelRow, ProjectionRow, Row

_RATIOS = {
    "over_same_precision": "x same\nprecision",
    "over_dense_fp8": "x dense\nFP8",
    "over_dense_bf16": "x dense\nbf16",
}
_PROJECTION_COLUMNS = _RATIOS | {"us": "us", "host_us": "host us", "roofline": "of the\nroofline"}
_MODEL_COLUMNS = _RATIOS | {
    "ms": "ms",
    "tokens_s": "tokens/s",
    "layer_us": "us a\nlayer",
    "weights_gb": "weights\nGB",
    "weights_over_bf16": "of\nbf16",
    "peak_gb": "peak\nGB",
}


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print rows of one kind: ratio at the same precision first, then to dense FP8 and dense bf16."""
    is_model = isinstance(rows[0], ModelRow)
    columns = _MODEL_COLUMNS if is_model else _PROJECTION_COLUMNS
    table = Table(box=None, header_style="", pad_edge=False)
    for title in ("what", "candidate"):
        table.add_column(title, overflow="fold")
    for title in columns.values():
        table.add_column(title, justify="right")
    previous = ""
    for row in rows:
        what = describe(row)
        if row.status == OK:
            cells = [_number(getattr(row, name)) for name in columns]
            table.add_row("" if what == previous else what, row.candidate, *cells)
        else:
            table.add_row("" if what == previous else what, row.candidate, *["-"] * len(columns))
        previous = what
    console.print(table)
    for reason in dict.fromkeys(f"{row.candidate} {row.status}" for row in rows if row.status != OK):
        console.print(reason, markup=False, highlight=False)


def describe(row: Row) -> str:
    """Return in a few words what a row is about, but for the candidate."""
    if isinstance(row, ProjectionRow):
        return f"{_panel(row)} M={row.tokens}"
    if isinstance(row, ModelRow):
        return f"{row.benchmark} {row.batch}x{row.tokens} {row.mode}"
    return row.benchmark


def plot_rows(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Draw how many times as fast as dense bf16 each candidate is, and write it.

    Args:
        rows (`Sequence[Row]`): of one kind.
        path (`Path`): the extension says the format; svg.
        note (`str`): what has to be known of the rows; stands above them.

    Raises:
        `ValueError`: matplotlib is missing, or no row has a ratio.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'hf_sparse24[bench]'.") from None
    timed = [row for row in rows if row.over_dense_bf16 is not None]
    if not timed:
        raise ValueError("There is nothing to plot: no row has a time beside that of dense bf16.")
    groups = list(dict.fromkeys(_panel(row) for row in timed))
    figure = Figure(figsize=(4.5 * min(len(groups), 3), 3.2 * -(-len(groups) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(groups) // 3), min(len(groups), 3), squeeze=False, sharey=True).flat
    for axis, group in zip(axes, groups, strict=False):
        mine = [row for row in timed if _panel(row) == group]
        for candidate in dict.fromkeys(row.candidate for row in mine):
            points = [(_x(row), row.over_dense_bf16) for row in mine if row.candidate == candidate]
            style = "-" if candidate.startswith("2:4") else "--"
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=candidate)
        axis.set(title=group, xlabel="tokens" if isinstance(mine[0], ProjectionRow) else "")
        axis.set_xscale("log", base=2) if isinstance(mine[0], ProjectionRow) else axis.tick_params(
            axis="x", rotation=30
        )
        axis.axhline(1, color="grey", linewidth=0.5)
    figure.suptitle("\n".join(textwrap.wrap(note, 60)), fontsize="small")
    figure.supylabel("times as fast as dense bf16")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(row: Row) -> str:
    if isinstance(row, ProjectionRow):
        if row.benchmark == "experts":
            return f"experts, {row.label}"
        merged = "+" in row.label and "+" not in row.shape
        return row.shape if row.benchmark == "gemm" else "layer, siblings merged" if merged else "layer"
    return f"{row.benchmark}, {row.mode}" if isinstance(row, ModelRow) else row.benchmark


def _x(row: Row) -> int | str:
    if isinstance(row, ModelRow):
        return f"{row.batch}x{row.tokens}"
    return row.tokens if isinstance(row, ProjectionRow) else row.candidate


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"
