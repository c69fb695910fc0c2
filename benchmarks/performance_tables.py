"""Render the performance tables of the README from the committed CSV files of `gpu.py`.

python benchmarks/performance_tables.py          # writes them between the two markers
python benchmarks/performance_tables.py --check  # fails when the README says something else
python benchmarks/performance_tables.py --plot   # also draws performance_gemm.svg and performance_layer.svg
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_sparse24.benchmark.figures import plot_rows
from hf_sparse24.benchmark.results import OK, read_csv

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- performance tables: written by benchmarks/performance_tables.py -->", "<!-- /performance tables -->"
OURS = ("2:4-bf16", "2:4-int8", "2:4-fp8")
SHOWN_TOKENS = (1, 16, 64, 128, 256, 1024, 4096, 16384)
HOST_TOKENS = (1, 256)
SHOWN_MODES = ("compiled", "compiled+graph")  # the CSV has the others


def render(results=RESULTS, names=None):
    """Return the tables, or those of some names, as Markdown, or "" where no CSV is there."""
    parts = []
    for name in names or TABLES:
        part, table = TABLES[name]
        path = results / f"performance_{part}.csv"
        if path.exists():
            rows, facts = read_csv(path)
            parts.append(f"{table(rows)}\n\n{conditions(path, facts)}")
    return "\n\n".join(parts)


def conditions(path, facts):
    """Say on what a table was measured."""
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("driver", "torch", "transformers", "torchao") if name in facts
    )
    rows = f"[rows](benchmarks/results/{path.name})"
    return f"{facts['device']}, {versions}, {facts['date']}, `{facts['command']}` ({rows})."


def layer_table(rows):
    """Return the projections of a layer together: by tokens, siblings apart."""
    apart = [row for row in rows if any("+" in group for group in row.shape.split()) and row.tokens in SHOWN_TOKENS]
    return "**The projections of a Llama-3-8B layer**, times as fast as dense:\n\n" + ratio_table(apart)


def gemm_table(rows):
    """Return all projections at some numbers of tokens."""
    head, body = [], []
    for shape in dict.fromkeys(row.shape for row in rows):
        head, lines = ratios([row for row in rows if row.shape == shape and row.tokens in SHOWN_TOKENS])
        body += [[shape, *line] for line in lines]
    return "**One projection (out x in)**, times as fast as dense:\n\n" + markdown(["", *head], body)


def experts_table(rows):
    """Return the experts of a layer: times as fast as dense `grouped_mm`."""
    head = ["", "tokens", *(f"{candidate} / bf16" for candidate in OURS)]
    body = [
        [label, str(tokens), *(ratio(find(rows, name, label=label, tokens=tokens), "dense_bf16") for name in OURS)]
        for label, tokens in dict.fromkeys((row.label, row.tokens) for row in rows)
    ]
    return "**The experts of a layer**, times as fast as dense `grouped_mm`:\n\n" + markdown(head, body)


def ratio_table(rows):
    """Return a table of `ratios`."""
    return markdown(*ratios(rows))


def ratios(rows):
    """Return tokens by candidates: the ratio at the same precision first, then to dense FP8 and bf16."""
    head = ["tokens", "bf16 2:4 / bf16"]
    head += ["INT8 2:4 / INT8", "/ FP8", "/ bf16", "FP8 2:4 / FP8", "/ bf16"]
    body = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        bf16, int8, fp8 = (find(rows, candidate, tokens=tokens) for candidate in OURS)
        cells = [ratio(bf16, "same_precision")]
        cells += [ratio(int8, kind) for kind in ("same_precision", "dense_fp8", "dense_bf16")]
        cells += [ratio(fp8, kind) for kind in ("same_precision", "dense_bf16")]
        body.append([str(tokens), *cells])
    return head, body


def host_table(rows):
    """Return microseconds that a call costs the host in eager mode."""
    shape = rows[0].shape if rows else ""
    timed = {(row.candidate, row.tokens): row.host_us for row in rows if row.shape == shape and row.host_us}
    body = []
    for candidate in dict.fromkeys(candidate for candidate, tokens in timed if tokens in HOST_TOKENS):
        cells = [candidate]
        for tokens in HOST_TOKENS:
            us, dense = timed.get((candidate, tokens)), timed.get(("dense-bf16", tokens))
            cells += [f"{us:.1f}" if us else "", f"{us / dense:.1f}x" if us and dense else ""]
        body.append(cells)
    head = ["", *(part for tokens in HOST_TOKENS for part in (f"us, {tokens} tokens", "of `F.linear`"))]
    return f"**Host time of a call**, eager, {shape}:\n\n" + markdown(head, body)


def model_tables(rows):
    """Return prefill and decode of the whole model in the faster mode, and its memory."""
    shown = [row for row in rows if row.mode in SHOWN_MODES]
    head = ["", "batch x tokens", "", "/ same precision", "/ FP8", "/ bf16", "ms", "tokens/s"]
    body = [
        [
            f"{row.benchmark}, {row.mode}",
            f"{row.batch} x {row.tokens}",
            row.candidate,
            *(ratio(row, kind) for kind in ("same_precision", "dense_fp8", "dense_bf16")),
            f"{row.ms:.2f}" if row.ms else row.status.partition(":")[0],
            f"{row.tokens_s:.0f}" if row.tokens_s else "",
        ]
        for row in shown
    ]
    weights = {row.candidate: row for row in rows if row.weights_gb}
    memory = [
        [name, f"{row.weights_gb:.2f}", f"{row.weights_over_bf16:.2f}x" if row.weights_over_bf16 else ""]
        for name, row in weights.items()
    ]
    title = f"**{rows[0].model}**, {rows[0].layers} layers:\n\n" if rows else ""
    caption = "\n\n**Its memory on the device**, embeddings and head included:\n\n"
    return title + markdown(head, body) + caption + markdown(["", "GB", "of bf16"], memory)


def find(rows, candidate, **values):
    """Return the row of a candidate, or None."""
    for row in rows:
        if row.candidate == candidate and all(getattr(row, name) == value for name, value in values.items()):
            return row
    return None


def ratio(row, kind):
    if row is None:
        return ""
    value = getattr(row, f"over_{kind}")
    if value is None:
        return "" if row.status == OK else row.status.partition(":")[0]
    return f"{value:.2f}"


def markdown(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rendered_readme(text, tables):
    """Return the README with the tables between its markers.

    Raises:
        `ValueError`: it has no markers.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md lacks the markers {START!r} and {END!r}.")
    return f"{before}{START}\n{tables}\n{END}{after}" if tables else f"{before}{START}\n{END}{after}"


# What a table is called, the CSV that it is made from, and how.
TABLES = {
    "layer": ("layer", layer_table),
    "gemm": ("gemm", gemm_table),
    "host": ("gemm", host_table),
    "model": ("model", model_tables),
    "experts": ("experts", experts_table),
}
IN_README = ("layer", "model", "experts", "host")  # the docs have all


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    rendered = rendered_readme(text, render(names=IN_README))
    if arguments.plot:
        for part in ("gemm", "layer", "model"):
            path = RESULTS / f"performance_{part}.csv"
            if path.exists():
                plot_rows(read_csv(path)[0], path.with_suffix(".svg"))
    if arguments.check and rendered != text:
        raise SystemExit("README.md and benchmarks/results/performance_*.csv disagree; run performance_tables.py.")
    readme.write_text(rendered, encoding="utf8")


if __name__ == "__main__":
    main()
