"""`hf-sparse24`: prune, evaluate, bench, card, push and their like. Parses, calls and prints; decides nothing."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors import SafetensorError

from hf_sparse24 import measuring, processes, publishing
from hf_sparse24.benchmark import commands as benchmark_commands
from hf_sparse24.benchmark.shapes import model_shapes, read_config, skeleton
from hf_sparse24.benchmark.tuning import MOST_TOKENS
from hf_sparse24.benchmark.tuning import tune as tune_shapes
from hf_sparse24.capability import environment
from hf_sparse24.config import Sparse24Config
from hf_sparse24.folders import chosen_device, load_model, new_folder, save_with_companions
from hf_sparse24.kernels.cusparselt_plans import choices
from hf_sparse24.kernels.dispatch import routes
from hf_sparse24.pack import unpack_
from hf_sparse24.packing import QUANTIZED_DTYPES
from hf_sparse24.report import SparsityReport, print_sparsity_report, sparsity_report

_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
_IN_ORDER, _BESIDE = "The way of a model, in this order", "On the way"
_WORKFLOW = """2:4 structured sparsity for transformers: prune, retrain, measure, publish.

1. hf-sparse24 prune ./model ./sparse --dataset text.txt --no-pack

2. accelerate launch examples/retrain_lm.py examples/retrain_lm.yaml

3. hf-sparse24 prune ./retrained ./packed --quantization int8

4. hf-sparse24 evaluate ./packed --text text.txt --dense ./model --json > q.json

5. hf-sparse24 bench model ./model --quantization int8 --csv speed.csv

6. hf-sparse24 card ./packed me/name --evaluation q.json --benchmark speed.csv

7. hf-sparse24 push ./packed me/name --private

Step 3 packs the mask that training kept. Without retraining: step 1 without --no-pack, then step 4. Each command has \
examples under --help.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=_WORKFLOW,
)
Model = Annotated[str, typer.Argument(help="A folder with a transformers model, or a Hub id.")]
Out = Annotated[Path, typer.Argument(help="The folder to write; must not exist or be empty.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Method = Annotated[
    str,
    typer.Option(
        help="alps, sparsegpt, ria, wanda, magnitude, or auto: the best recipe with --dataset, else magnitude."
    ),
]
Quantization = Annotated[str | None, typer.Option(help="int8 or fp8: weights and activations.")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="--no-pack writes dense weights with zeros.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE[=WEIGHT]",
        help="Calibration text: a file, the name of a dataset, or self (the model writes it). Repeat the option for a "
        "mixture; windows are shared out by weight.",
    ),
]
Tokenizer = Annotated[str | None, typer.Option(help="Of the text; default: the model's own.")]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
WindowLength = Annotated[
    int | None,
    typer.Option(help="Tokens per calibration window. Default: 1024, or the model's context if that is less."),
]
BatchSize = Annotated[int, typer.Option(help="Most windows per forward pass; fewer take less memory.")]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]
Refit = Annotated[
    bool | None,
    typer.Option("--refit/--no-refit", help="Refit the weights that stay. Default: with --dataset, after any method."),
]
MatchBlocks = Annotated[
    bool | None,
    typer.Option(
        "--match-blocks/--no-match-blocks", help="Train each block against the dense one. Default: on a GPU."
    ),
]
Distill = Annotated[
    bool | None,
    typer.Option(
        "--distill/--no-distill",
        help="Train the pruned model for a moment against the dense one. Default: with matching and method auto.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Dampening = Annotated[float, typer.Option(help="Added to a Hessian's diagonal, as a share of its mean.")]
CalibrationDevice = Annotated[
    str | None, typer.Option(help="Where blocks are pruned, one at a time, for a model that stays on --device cpu.")
]
ProgressFolder = Annotated[
    str | None, typer.Option(help="Keeps finished blocks, so that the same command goes on where it stopped.")
]
TargetModules = Annotated[list[str] | None, typer.Option(help="Prune only these, e.g. q_proj; repeat the option.")]
KeptDense = Annotated[list[str] | None, typer.Option(help="Keep these dense; repeat the option.")]


@app.command(rich_help_panel=_IN_ORDER)
def prune(
    model: Model,
    out: Out,
    method: Method = "auto",
    quantization: Quantization = None,
    pack: Pack = True,
    dtype: Dtype = "auto",
    dataset: Dataset = None,
    tokenizer: Tokenizer = None,
    num_samples: Windows = 128,
    sequence_length: WindowLength = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    refit: Refit = None,
    match_blocks: MatchBlocks = None,
    distill: Distill = None,
    device: Device = None,
    calibration_device: CalibrationDevice = None,
    dampening: Dampening = 0.01,
    progress_folder: ProgressFolder = None,
    target_modules: TargetModules = None,
    modules_to_not_convert: KeptDense = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Prune MODEL to 2:4 and write it to OUT, packed unless --no-pack.

    Examples:

        hf-sparse24 prune ./SmolLM2 ./SmolLM2-2of4 --dataset book.txt --quantization int8

        hf-sparse24 prune ./SmolLM2 ./SmolLM2-wanda --dataset book.txt --method wanda --no-refit --no-match-blocks

        hf-sparse24 prune ./SmolLM2 ./SmolLM2-2of4 --dataset news.txt=2 --dataset code.txt=1 --dataset self

        hf-sparse24 prune ./SmolLM2 ./SmolLM2-masked --no-pack --modules-to-not-convert down_proj

        torchrun --nproc-per-node 8 --no-python hf-sparse24 prune ./Llama ./Llama-2of4 --dataset book.txt
    """
    config = Sparse24Config(
        method=method,
        quantization=quantization,
        pack=pack,
        refit=refit,
        dataset=_mixture(dataset or []),
        tokenizer=tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        match_blocks=match_blocks,
        distill=distill,
        progress_folder=progress_folder,
        calibration_device=calibration_device,
        dampening=dampening,
        target_modules=target_modules or None,
        modules_to_not_convert=modules_to_not_convert or None,
    )
    _prune(model, out, config, dtype, device, force, as_json)


@app.command(rich_help_panel=_BESIDE)
def report(model: Model, as_json: AsJson = False) -> None:
    """Show every matrix of MODEL: its pattern, its bytes, and why it is dense where it is.

    Example:

        hf-sparse24 report ./SmolLM2-2of4
    """
    _print_report(sparsity_report(load_model(model, "auto")), as_json)


@app.command(rich_help_panel=_BESIDE)
def unpack(model: Model, out: Out, dtype: Dtype = "auto", force: Force = False, as_json: AsJson = False) -> None:
    """Write the packed MODEL as a dense checkpoint with zeros, which any server loads (and runs dense).

    Example:

        hf-sparse24 unpack ./SmolLM2-2of4 ./SmolLM2-dense
    """
    with new_folder(out, model, force) as folder:
        packed = load_model(model, dtype)
        unpacked = unpack_(packed)
        save_with_companions(packed, model, folder)
    _print_report(unpacked, as_json)


app.command(rich_help_panel=_IN_ORDER)(measuring.evaluate)
app.add_typer(
    benchmark_commands.app,
    name="bench",
    help="Measure packed layers and models beside dense ones.",
    rich_help_panel=_IN_ORDER,
)
app.command(rich_help_panel=_IN_ORDER)(publishing.card)
app.command(rich_help_panel=_IN_ORDER)(publishing.push)


@app.command(rich_help_panel=_BESIDE)
def tune(
    model: Model,
    quantization: Annotated[
        str, typer.Option(help="Of the packed layers: none, int8, fp8, separated by commas.")
    ] = "none,int8,fp8",
    tokens: Annotated[int, typer.Option(help="Up to how many tokens at once.")] = MOST_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Search the fastest algorithms for MODEL's projections on this GPU ahead of their first use.

    Example:

        hf-sparse24 tune ./SmolLM2-2of4 --quantization int8
    """
    precisions = [None if name.strip() == "none" else name.strip() for name in quantization.split(",")]
    unknown = set(precisions) - {None, *QUANTIZED_DTYPES}
    if unknown:
        raise ValueError(f"--quantization takes none, int8, fp8, separated by commas; got {unknown.pop()!r}.")
    shapes = model_shapes(skeleton(read_config(model)))
    found = list(tune_shapes(shapes, precisions, torch.device("cuda"), tokens))
    if as_json:
        typer.echo(json.dumps([choice._asdict() for choice in found], indent=2))
        return
    for choice in found:
        typer.echo(
            f"{choice.shape:>14} {choice.dtype:5} {choice.tokens:6} tokens: algorithm {choice.algorithm}, "
            f"split-k {choice.split_k}, {choice.microseconds:.1f} us"
        )
    typer.echo(f"{len(found)} choices in {choices.path}")


@app.command(rich_help_panel=_BESIDE)
def env(as_json: AsJson = False) -> None:
    """Show versions, devices and which backends can run here, and why not. Paste this into a bug report."""
    facts = environment() | {f"kernels for {kind}": route for kind, route in routes().items()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:20} {value}")


def main() -> None:
    """Run the command line; what the user can repair is one line on stderr, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        typer.echo(f"hf-sparse24: {error}", err=True)
        raise SystemExit(1) from None


def _prune(
    model: str, out: Path, config: Sparse24Config, dtype: str, device: str | None, force: bool, as_json: bool
) -> None:
    """Prune, alone or as one of several processes, of which the first writes and reports."""
    processes.join()
    try:
        with new_folder(out, model, force) if processes.is_first() else nullcontext() as folder:
            pruned = load_model(model, dtype, quantization_config=config, device_map=str(chosen_device(device)))
            if folder is not None:
                save_with_companions(pruned, model, folder)
    except KeyboardInterrupt:
        typer.echo(f"hf-sparse24: interrupted; nothing was written to {out}.", err=True)
        raise SystemExit(_INTERRUPTED) from None
    if processes.is_first():
        _print_report(sparsity_report(pruned), as_json)
    processes.leave()


def _mixture(sources: list[str]) -> str | list[tuple[str, float]] | None:
    """Return what `Sparse24Config` takes as a dataset: nothing, one source, or several with their weights."""
    weighted = [_weighted(source) for source in sources]
    return weighted[0][0] if len(weighted) == 1 else weighted or None


def _weighted(source: str) -> tuple[str, float]:
    """Read SOURCE or SOURCE=WEIGHT; a file may have an equals sign in its name."""
    name, found, weight = source.rpartition("=")
    if not found or Path(source).exists():
        return source, 1
    try:
        return name, float(weight)
    except ValueError:
        raise ValueError(f"--dataset takes SOURCE or SOURCE=WEIGHT, such as news.txt=2; got {source!r}.") from None


def _print_report(report: SparsityReport, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json())
    else:
        print_sparsity_report(report, Console(width=100))
