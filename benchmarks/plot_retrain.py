"""Draw the trainings of results/retrain_NAME.json: losses by tokens seen, and what each row ends with.

python benchmarks/plot_retrain.py       # writes results/retrain_NAME.svg, prints a table; needs matplotlib
"""

import json

from common import RESULTS

PANELS = {
    "divergence from the dense model": ("distill_logit_loss", lambda row: "policy" not in row),
    "the same, mask policies": ("distill_logit_loss", lambda row: "policy" in row),
    "loss on labels, validation": ("eval_loss", lambda row: "labels" in row and "logits" not in row),
}
FEWEST_POINTS = 2


def curves(rows, key, chosen):
    """Return the name, the tokens and the values of each row that has a curve of a loss."""
    found = []
    for row in rows:
        points = [(entry["step"], entry[key]) for entry in row.get("curve", ()) if key in entry]
        if chosen(row["row"]) and len(points) >= FEWEST_POINTS:
            by_step = row["tokens"] / row["steps"]
            steps, values = zip(*points, strict=True)
            found.append((row["row"], [step * by_step for step in steps], values))
    return found


def table(rows):
    """Print what each row ends with, relative to the dense model."""
    dense = next(row for row in rows if row["row"] == "dense")
    figures = [key for key in dense if key not in ("row", "run", "seed")]
    for row in rows:
        parts = [f"{key} {row[key]:.4g} ({row[key] / dense[key]:.3f}x)" for key in figures if key in row]
        print(f"{row['row']}: {', '.join(parts)}")


def main():
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "retrain"  # the same data give the same file
    for name in ("smollm2", "minilm", "whisper", "dinov2"):
        file = RESULTS / f"retrain_{name}.json"
        if not file.exists():
            continue
        rows = json.loads(file.read_text())["rows"]
        table(rows)
        drawn = {title: curves(rows, *panel) for title, panel in PANELS.items()}
        drawn = {title: lines for title, lines in drawn.items() if lines}
        if not drawn:
            continue
        drawing, panels = pyplot.subplots(1, len(drawn), figsize=(6 * len(drawn), 4.5), squeeze=False)
        for panel, (title, lines) in zip(panels[0], drawn.items(), strict=True):
            for row, tokens, values in lines:
                panel.plot(tokens, values, label=row, linewidth=1)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xlabel("tokens")
            panel.set_title(title, fontsize=10)
            panel.legend(fontsize=6)
            panel.tick_params(labelsize=7)
        drawing.tight_layout()
        drawing.savefig(file.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(drawing)


if __name__ == "__main__":
    main()
