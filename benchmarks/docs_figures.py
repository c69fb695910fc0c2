"""What the docs take from `benchmarks/results`: tables and pictures, so that no page holds a figure itself.

mkdocs calls it (`hooks` in mkdocs.yml). A page says `<!-- figures: NAME -->` where the table of that name goes.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import performance_tables  # noqa: E402

PLACE = re.compile(r"<!-- figures: (\w+) -->")
PICTURE = re.compile(r"\(\.\./benchmarks/results/([\w.]+\.svg)\)")
TEXTS = {f"perplexity_{name.lower()}": name for name in ("BBC", "SOTU", "FOLDOC", "Austen")}


def methods():
    """Return the perplexity of SmolLM2-135M-Instruct by method, as measured."""
    found = json.loads((RESULTS / "one_shot_smollm2.json").read_text(encoding="utf8"))
    body = [
        [row["row"], *(f"{row[key]:.1f}" if key in row else "" for key in TEXTS)]
        for row in found["rows"]
        if "perplexity_bbc" in row
    ]
    machines = {run["gpu"] for run in found["conditions"]}
    dates = sorted({run["date"] for run in found["conditions"]})
    table = performance_tables.markdown(["", *TEXTS.values()], body)
    conditions = f"{', '.join(sorted(machines))}, {' and '.join(dates)}, `python benchmarks/one_shot.py smollm2`"
    return f"{table}\n\n{conditions}; rows, each with its conditions, in `benchmarks/results/one_shot_smollm2.json`."


def performance():
    """Return the tables of speed and memory that the README has."""
    return re.sub(r"\[rows\]\((benchmarks/results/[\w.]+)\)", r"rows in `\1`", performance_tables.render())


TABLES = {"methods": methods, "performance": performance}


def on_page_markdown(markdown, **kwargs):
    """Put tables where a page asks for them, and pictures where the site has them: the pages name the committed files.

    Raises:
        `KeyError`: there is no table of that name.
    """
    return PICTURE.sub(r"(figures/\1)", PLACE.sub(lambda found: TABLES[found[1]](), markdown))


def on_files(files, config):
    """Add the committed pictures, as figures/NAME.svg."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files
