"""What the docs say is true: their examples run, their figures are the committed ones, their pages build."""

import csv
import doctest
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_EXAMPLES = [page for page in PAGES if ">>>" in page.read_text(encoding="utf8")]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "benchmarks" / "docs_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_run(page):
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_specification_and_the_criterion_are_examples():
    assert {page.stem for page in WITH_EXAMPLES} == {"format", "extending"}


def test_the_methods_are_those_of_the_rows(figures):
    table = figures.on_page_markdown("before <!-- figures: methods --> after")
    rows = json.loads((ROOT / "benchmarks/results/one_shot_smollm2.json").read_text())["rows"]
    for row in rows:
        if row.get("perplexity_bbc") is not None:
            assert f"| {row['row']} | {row['perplexity_bbc']:.1f} |" in table
    assert "before | " in table
    assert table.endswith("one_shot_smollm2.json`. after")


def test_the_speeds_are_those_of_the_rows(figures):
    table = figures.on_page_markdown("<!-- figures: performance -->")
    with (ROOT / "benchmarks/results/performance_gemm.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("# ")))
    found = next(
        row for row in rows if (row["candidate"], row["shape"], row["tokens"]) == ("2:4-bf16", "4096x14336", "128")
    )
    assert f"| 4096x14336 | 128 | {float(found['over_same_precision']):.2f} |" in table
    assert "](benchmarks/" not in table  # a link that the site would not have


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_are_committed_files_that_the_site_has_too(figures, page):
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf8"))
    assert all((page.parent / path).resolve().is_relative_to(ROOT / "benchmarks/results") for path in shown)
    assert all((page.parent / path).is_file() for path in shown)
    rendered = figures.on_page_markdown("".join(f"![]({path})" for path in shown))
    assert rendered == "".join(f"![](figures/{Path(path).name})" for path in shown)


def test_an_unknown_table_is_an_error(figures):
    with pytest.raises(KeyError):
        figures.on_page_markdown("<!-- figures: wishes -->")


def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "perplexity_bbc" not in (tmp_path / "site/choose/index.html").read_text()
    assert "<td>default</td>" in (tmp_path / "site/choose/index.html").read_text()
    assert 'src="../figures/one_shot_smollm2.svg"' in (tmp_path / "site/choose/index.html").read_text()
    assert (tmp_path / "site/figures/one_shot_smollm2.svg").stat().st_size > 1000
    assert 'id="hf_sparse24.hub.push_folder"' in (tmp_path / "site/api/index.html").read_text()
