"""The notebook runs from top to bottom in a kernel, on a tiny model; it is kept without outputs."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse24 import Sparse24Linear
from tests.test_examples import folder, text  # noqa: F401
from tests.training.test_examples import EXAMPLES

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(cell):
    """Return what a cell printed and showed, as text without colours."""
    shown = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return re.sub(r"\x1b\[[\d;]*m", "", shown)


def test_it_is_kept_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


def test_its_links_lead_somewhere(notebook):
    links = [link for cell in notebook.cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    assert links
    assert all((EXAMPLES / link).exists() for link in links)


def test_it_runs(notebook, folder, text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"^([A-Z, ]+) =", parameters.source, re.MULTILINE)
    assert names == ["MODEL", "TEXT", "OUT", "WINDOWS, TOKENS"]
    out = tmp_path / "out"
    parameters.source = f"MODEL, TEXT, OUT, WINDOWS, TOKENS = {str(folder)!r}, {str(text)!r}, {str(out)!r}, 8, 16"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=tmp_path)
    shown = [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert any("2:4: 14 of 15 matrices" in output for output in shown)
    assert any(output.endswith("True") for output in shown)  # the logits of the model and of the one that was loaded
    assert any("perplexity" in output and "INT8, packed" in output for output in shown)
    assert isinstance(AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj, Sparse24Linear)
