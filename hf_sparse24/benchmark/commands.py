"""`hf-sparse24 bench`: reads options, calls the benchmarks, prints and writes their rows."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers.utils import logging

from hf_sparse24.benchmark.candidates import chosen
from hf_sparse24.benchmark.figures import plot_rows, print_rows
from hf_sparse24.benchmark.gemm import benchmark_projections
from hf_sparse24.benchmark.models import VARIANTS, Source
from hf_sparse24.benchmark.results import Row, run_environment, to_json, write_csv
from hf_sparse24.benchmark.roofline import measure_machine
from hf_sparse24.benchmark.shapes import layer_groups, model_shapes, parse_shapes, read_config, skeleton
from hf_sparse24.benchmark.whole_model import Workload, benchmark_model, with_model_ratios

AGAINST = "dense-bf16,dense-fp8,dense-fp8-tensor,dense-int8"

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

Model = Annotated[str, typer.Argument(help="A folder with a model or a config.json, or a Hub id. No weight is read.")]
Tokens = Annotated[str, typer.Option(help="Rows of the inputs, separated by commas.")]
Quantization = Annotated[str, typer.Option(help="Of the packed layers: none, int8, fp8, separated by commas.")]
Against = Annotated[
    str, typer.Option(help="Baselines: dense-bf16, dense-fp8, dense-fp8-tensor, dense-int8, torch-sparse[-int8].")
]
Backend = Annotated[str, typer.Option(help="Of the packed layers, as in Sparse24Config.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows and the environment to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the rows into this .svg.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def gemm(
    model: Annotated[str | None, typer.Argument(help="Whose shapes: a folder, a config.json, or a Hub id.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Shapes instead of a model's: OUTxIN,OUTxIN,...")] = None,
    tokens: Tokens = "1,16,64,256,1024,4096",
    quantization: Quantization = "none,int8,fp8",
    against: Against = AGAINST,
    backend: Backend = "auto",
    device: Device = None,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Time packed projections beside dense ones, quantization of activations and all scales included.

    Examples:

        hf-sparse24 bench gemm meta-llama/Llama-3.1-8B --tokens 1,64,4096

        hf-sparse24 bench gemm --shapes 28672x4096,4096x14336 --quantization int8 --csv rows.csv
    """
    if (model is None) == (shapes is None):
        raise ValueError("bench gemm takes a model or --shapes, one of them.")
    found = parse_shapes(shapes) if shapes else model_shapes(skeleton(read_config(str(model))))
    place, candidates, counts = _device(device), chosen(quantization, against), _numbers(tokens)
    rows = [
        row
        for shape in logging.tqdm(found, desc="Shapes", leave=False)
        for alike in benchmark_projections([[shape]], counts, candidates, place, backend=backend)
        for row in alike
    ]
    _show(rows, place, csv, plot, as_json)


@app.command()
def layer(
    model: Model,
    tokens: Tokens = "1,16,64,256,1024,4096",
    merged: Annotated[bool, typer.Option("--merged", help="Siblings (q k v, gate up) as one projection.")] = False,
    quantization: Quantization = "none,int8,fp8",
    against: Against = AGAINST,
    backend: Backend = "auto",
    device: Device = None,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Time all projections of a layer together; baselines quantize the input of siblings once.

    Example:

        hf-sparse24 bench layer ./SmolLM2 --tokens 1,64,4096
    """
    groups = layer_groups(skeleton(read_config(model)), merged)
    place, candidates = _device(device), chosen(quantization, against)
    measured = benchmark_projections(groups, _numbers(tokens), candidates, place, "layer", backend)
    _show([row for alike in measured for row in alike], place, csv, plot, as_json)


@app.command()
def model(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, a config.json, or a Hub id.")],
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Read the config only.")] = False,
    layers: Annotated[int | None, typer.Option(help="With --random-weights: as many layers.")] = None,
    prefill: Annotated[str, typer.Option(help="Sequences x tokens, separated by commas, or none.")] = "1x4096",
    decode: Annotated[str, typer.Option(help="Sequences x context, separated by commas, or none.")] = "1x512,16x512",
    quantization: Quantization = "none,int8,fp8",
    against: Annotated[
        str, typer.Option(help="Baselines: dense-bf16; by torchao dense-fp8, dense-fp8-tensor, dense-int8.")
    ] = "dense-bf16,dense-fp8,dense-fp8-tensor",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Also compiled, layer by layer.")] = True,
    backend: Backend = "auto",
    device: Device = None,
    csv: Csv = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Time a whole model, pruned by magnitude and packed, beside dense ones: prefill, decode, memory.

    Examples:

        hf-sparse24 bench model ./SmolLM2 --prefill 1x1024 --decode 1x512,16x512

        hf-sparse24 bench model meta-llama/Llama-3.1-8B --random-weights --layers 8 --csv model.csv
    """
    place, source = _device(device), Source(model, random_weights, layers)
    workloads = [
        Workload(kind, *pair) for kind, text in (("prefill", prefill), ("decode", decode)) for pair in _pairs(text)
    ]
    rows = [
        row
        for variant in logging.tqdm(_variants(quantization, against), desc="Variants", leave=False)
        for row in benchmark_model(source, variant, workloads, place, compile, backend)
    ]
    _show(with_model_ratios(rows), place, csv, plot, as_json)


def _show(rows: Sequence[Row], device: torch.device, csv: Path | None, plot: Path | None, as_json: bool) -> None:
    """Print the rows, and write what was asked for."""
    facts = run_environment(device, " ".join(["hf-sparse24", *sys.argv[1:]]), measure_machine(device))
    if csv is not None:
        write_csv(csv, rows, facts)
    if plot is not None:
        plot_rows(rows, plot, facts.get("note", ""))
    if as_json:
        typer.echo(to_json(rows, facts))
    else:
        console = Console(width=120)
        if "note" in facts:
            console.print(f"Note: {facts.pop('note')}.\n", highlight=False)
        print_rows(rows, console)
        console.print(
            ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command"), highlight=False
        )


def _variants(quantization: str, against: str) -> list[str]:
    """Return names of model variants, baselines first."""
    packed = [f"2:4-{'bf16' if name == 'none' else name}" for name in _split(quantization)]
    names = list(dict.fromkeys(["dense-bf16", *_split(against), *packed]))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"bench model knows {', '.join(VARIANTS)}; it has no {unknown[0]}.")
    return names


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    """Read 1x4096,4x2048; "none" is nothing."""
    for part in [] if text == "none" else _split(text):
        batch, _, tokens = part.partition("x")
        if not (batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
            raise ValueError(f"--prefill and --decode take SEQUENCESxTOKENS, as in 16x512; got {part!r}.")
        yield int(batch), int(tokens)


def _numbers(text: str) -> list[int]:
    parts = _split(text)
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--tokens takes positive numbers separated by commas; got {text!r}.")
    return [int(part) for part in parts]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _device(name: str | None) -> torch.device:
    """Return the device that was asked for, or the GPU where torch sees one."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch sees no CUDA device; use --device cpu.")
    return device
