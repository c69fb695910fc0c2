"""Rows in files, tables and plots; the command line; the README's tables."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hf_sparse24.benchmark import commands
from hf_sparse24.benchmark.figures import describe, plot_rows, print_rows
from hf_sparse24.benchmark.results import ModelRow, ProjectionRow, read_csv, run_environment, with_ratios, write_csv
from hf_sparse24.benchmark.roofline import Machine
from tests.test_cli import run

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "benchmarks" / "performance_tables.py"
GEMM = ProjectionRow(
    benchmark="gemm", candidate="dense-bf16", precision="bf16", status="ok", shape="28672x4096", label="", tokens=16,
    us=60.0, host_us=14.0, error=0.0016, bytes=1000, flops=2000, floor_us=50.0, roofline=50 / 60,
)  # fmt: skip
MODEL = ModelRow(
    benchmark="decode", candidate="dense-bf16", precision="bf16", status="ok", model="Llama", layers=32,
    mode="compiled+graph", batch=16, tokens=512, ms=4.5, tokens_s=3555.0, layer_us=131.0, error=0.0, weights_gb=16.06,
    weights_over_bf16=1.0,
)  # fmt: skip


@pytest.fixture
def rows():
    found = [
        GEMM,
        replace(GEMM, candidate="dense-fp8", precision="fp8", us=40.0, host_us=30.0),
        replace(GEMM, candidate="dense-int8", precision="int8", status="cannot run: x", us=None, host_us=None),
        replace(GEMM, candidate="2:4-int8", precision="int8", us=20.0, host_us=35.0, error=None),
    ]
    return with_ratios(found, lambda row: row.us)


@pytest.fixture
def model_rows():
    packed = replace(MODEL, candidate="2:4-int8", precision="int8", ms=3.0, weights_gb=6.4, weights_over_bf16=0.4)
    return with_ratios([MODEL, packed], lambda row: row.ms)


@pytest.fixture
def cli(monkeypatch, capsys):
    return lambda *arguments: run("bench", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_a_ratio_needs_a_time_on_both_sides(rows):
    packed = rows[-1]
    assert (packed.over_same_precision, packed.over_dense_fp8, packed.over_dense_bf16) == (None, 2.0, 3.0)
    assert rows[2].over_dense_bf16 is None


def test_a_csv_file_comes_back_as_it_was(rows, model_rows, tmp_path):
    facts = {"device": "some GPU", "command": "a b: c"}
    for name, kept in (("gemm", rows), ("model", model_rows)):
        write_csv(tmp_path / name / "rows.csv", kept, facts)
        found, environment = read_csv(tmp_path / name / "rows.csv")
        assert environment == facts
        for row, original in zip(found, kept, strict=True):
            for name, value in asdict(original).items():
                found_value = getattr(row, name)
                assert type(found_value) is type(value)
                assert found_value == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert found[0].weights_gb == 16.06
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="does not have the columns"):
        read_csv(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="no row to write"):
        write_csv(tmp_path / "empty.csv", [], facts)


def test_the_environment_says_where_and_how():
    facts = run_environment(torch.device("cpu"), "hf-sparse24 bench gemm", Machine(4000, 790, 1500))
    assert facts["command"] == "hf-sparse24 bench gemm"
    assert facts["copy_gb_s"] == "4000"
    assert next(iter(facts)) == "note"
    assert "a CPU emulates the kernels: 2:4 rows are unpacked and run dense, and FP8 is emulated" in facts["note"]
    assert {"date", "device", "torch", "transformers", "dense_tflops"} <= facts.keys()


def test_tables_have_the_ratio_of_the_same_precision_first(rows, model_rows):
    console = Console(width=120, record=True)
    print_rows(rows, console)
    print_rows(model_rows, console)
    text = console.export_text()
    assert text.index("x same") < text.index("x dense")
    assert "dense-int8 cannot run: x" in text
    assert "28672x4096 M=16" in text
    assert "decode 16x512 compiled+graph" in text
    assert describe(replace(GEMM, benchmark="layer", label="q+k", shape="8x4")) == "layer, siblings merged M=16"


def test_plots_are_written(rows, model_rows, tmp_path):
    pytest.importorskip("matplotlib")
    for name, kept in (("gemm", rows), ("model", model_rows)):
        plot_rows(kept, tmp_path / f"{name}.svg")
        assert "2:4-int8" in (tmp_path / f"{name}.svg").read_text() or (tmp_path / f"{name}.svg").stat().st_size > 5000
    plot_rows(rows, tmp_path / "noted.svg", note="said of them")
    sizes = [(tmp_path / f"{name}.svg").stat().st_size for name in ("gemm", "noted")]
    assert sizes[0] < sizes[1]
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_rows(rows[2:3], tmp_path / "none.svg")


def test_gemm_from_the_shell(cli, tmp_path):
    arguments = ("--shapes", "48x64", "--tokens", "1,5", "--quantization", "int8", "--against", "dense-int8")
    code, out, err = cli("gemm", *arguments, "--csv", tmp_path / "rows.csv", "--json", "--device", "cpu")
    assert code == 0, err
    found = json.loads(out)
    assert [(row["tokens"], row["candidate"]) for row in found["rows"]] == [
        (tokens, name) for tokens in (1, 5) for name in ("dense-bf16", "dense-int8", "2:4-int8")
    ]
    assert all(row["us"] > 0 and row["over_dense_bf16"] > 0 and row["roofline"] > 0 for row in found["rows"])
    written, facts = read_csv(tmp_path / "rows.csv")
    assert len(written) == 6
    assert facts["command"].startswith("hf-sparse24 bench gemm --shapes 48x64")
    assert (tmp_path / "rows.csv").read_text().startswith("# note: a CPU emulates the kernels")


def test_a_layer_of_a_model_from_the_shell(cli, tiny_llama_folder):
    code, out, err = cli(
        "layer", tiny_llama_folder, "--tokens", "3", "--quantization", "none", "--against", "", "--merged", "--device",
        "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "layer, siblings merged M=3" in out
    assert "2:4-bf16" in out
    assert out.startswith("Note: a CPU emulates the kernels")


def test_gemm_takes_the_shapes_of_a_model(cli, tiny_llama_folder):
    config = tiny_llama_folder / "config.json"
    options = ("--tokens", "2", "--quantization", "none", "--against", "", "--device", "cpu", "--json")
    code, out, err = cli("gemm", config, *options)
    assert code == 0, err
    assert {row["shape"] for row in json.loads(out)["rows"]} == {"32x32", "16x32", "64x32", "32x64"}


def test_a_model_from_the_shell(cli, tiny_llama_folder, tmp_path):
    options = ("--prefill", "2x4", "--decode", "2x6", "--quantization", "int8", "--against", "dense-bf16")
    options = (*options, "--no-compile", "--device", "cpu", "--csv", tmp_path / "model.csv")
    code, out, err = cli("model", tiny_llama_folder, *options)
    assert code == 0, err
    assert "prefill 2x4 eager" in out
    assert [row.candidate for row in read_csv(tmp_path / "model.csv")[0]] == ["dense-bf16", "2:4-int8"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gemm"], "takes a model or --shapes"),
        (["gemm", "--shapes", "5"], "--shapes takes"),
        (["gemm", "--shapes", "8x8", "--tokens", "0"], "--tokens takes positive numbers"),
        (["gemm", "--shapes", "8x8", "--against", "dense-int3"], "--against takes"),
        (["gemm", "--shapes", "8x8", "--device", "abacus"], "abacus"),
        (["layer", "./nothing"], "There is no ./nothing"),
        (["model", "./nothing", "--prefill", "8"], "take SEQUENCESxTOKENS"),
        (["model", "./nothing", "--against", "torch-sparse"], "it has no torch-sparse"),
    ],
)
def test_bad_input_is_one_line(cli, arguments, message):
    code, _, err = cli(*arguments)
    assert code == 1
    assert message in next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
    assert "Traceback" not in err


def test_help_has_examples(cli):
    for command in ("gemm", "layer", "model"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert f"hf-sparse24 bench {command}" in out
    assert commands.app.registered_commands


def tables():
    import importlib.util

    spec = importlib.util.spec_from_file_location("performance_tables", TABLES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_what_the_rows_say():
    if not list((ROOT / "benchmarks" / "results").glob("performance_*.csv")):
        pytest.skip("no performance_*.csv is committed yet")
    found = subprocess.run([sys.executable, TABLES, "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_readme_tables_are_rendered_from_rows(rows, model_rows, tmp_path):
    module = tables()
    module.HOST_TOKENS = (16, 256)
    assert module.render(tmp_path) == ""
    facts = {"device": "NVIDIA Test", "driver": "1.2", "torch": "2", "date": "2026-01-01", "command": "x"}
    write_csv(tmp_path / "performance_gemm.csv", rows, facts)
    write_csv(tmp_path / "performance_model.csv", model_rows, facts)
    rendered = module.render(tmp_path)
    assert "| 16 |  |  | 2.00 | 3.00 |  |  |" in rendered  # INT8 over dense FP8 and bf16; dense INT8 could not run
    assert "| 2:4-int8 | 35.0 | 2.5x |  |  |" in rendered
    assert "| decode, compiled+graph | 16 x 512 | 2:4-int8 |  |  | 1.50 | 3.00 |" in rendered
    assert "| 2:4-int8 | 6.40 | 0.40x |" in rendered
    assert "NVIDIA Test, driver 1.2, torch 2, 2026-01-01, `x`" in rendered
    readme = f"before\n{module.START}\nold\n{module.END}\nafter\n"
    assert module.rendered_readme(readme, "new") == f"before\n{module.START}\nnew\n{module.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the markers"):
        module.rendered_readme("nothing", "new")
    assert module.START in (ROOT / "README.md").read_text()
