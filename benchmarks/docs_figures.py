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
TEXTS = {"perplexity_bbc": "BBC", "perplexity_sotu": "SOTU", "perplexity_foldoc": "FOLDOC"}


def methods():
    """Return the perplexity of SmolLM2-135M-Instruct by method, as measured."""
    found = json.loads((RESULTS / "one_shot_smollm2.json").read_text(encoding="utf8"))
    body = [
        [row["row"], *(f"{row[key]:.1f}" for key in TEXTS)]
        for row in found["rows"]
        if all(row.get(key) is not None for key in TEXTS)
    ]
    facts = found["conditions"]
    conditions = f"torch {facts['torch']}, transformers {facts['transformers']}, {facts['date']}, `{facts['command']}`"
    table = performance_tables.markdown(["", *TEXTS.values()], body)
    return f"{table}\n\n{conditions}; rows in `benchmarks/results/one_shot_smollm2.json`."


def performance():
    """Return the tables of speed and memory that the README has."""
    return re.sub(r"\[rows\]\((benchmarks/results/[\w.]+)\)", r"rows in `\1`", performance_tables.render())


TABLES = {"methods": methods, "performance": performance}


def on_page_markdown(markdown, **kwargs):
    """Put tables where a page asks for them.

    Raises:
        `KeyError`: there is no table of that name.
    """
    return PLACE.sub(lambda found: TABLES[found[1]](), markdown)


def on_files(files, config):
    """Add the committed pictures, as figures/NAME.svg."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files
