"""Draw results/one_shot_NAME.json: one bar a row, a panel a figure, the dense model as a line.

python benchmarks/plot_one_shot.py       # writes results/one_shot_NAME.svg; needs matplotlib
"""

import json
import math

from common import RESULTS

HIGHER_IS_BETTER = ("recall_at_1", "feature_cosine")


def main():
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "one-shot"  # the same data give the same file
    for file in sorted(RESULTS.glob("one_shot_*.json")):
        rows = json.loads(file.read_text())["rows"]
        if rows[0].get("row") != "dense":
            continue
        figures = [key for key in rows[0] if key not in ("row", "run")]
        rest = [row for row in rows[1:] if figures[0] in row and not row.get("seed")]
        rest.sort(key=lambda row: row[figures[0]], reverse=figures[0] not in HIGHER_IS_BETTER)
        height = 0.8 + 0.22 * len(rest)
        drawing, panels = pyplot.subplots(1, len(figures), figsize=(4.2 * len(figures), height), sharey=True)
        for panel, key in zip(panels if len(figures) > 1 else [panels], figures, strict=True):
            values = [row.get(key, math.nan) for row in rest]  # without a bar: not measured
            colors = ["tab:orange" if row["row"].startswith("default") else "tab:blue" for row in rest]
            bars = panel.barh([row["row"] for row in rest], values, color=colors)
            panel.bar_label(
                bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}", padding=2, fontsize=7
            )
            panel.axvline(rows[0][key], color="black", linewidth=1)
            panel.set_title(f"{key.replace('_', ' ')} (line: dense {rows[0][key]:.3g})", fontsize=9)
            if key not in HIGHER_IS_BETTER:
                panel.set_xscale("log")
            panel.margins(x=0.15)
            panel.tick_params(labelsize=7)
        drawing.tight_layout()
        drawing.savefig(file.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(drawing)


if __name__ == "__main__":
    main()
