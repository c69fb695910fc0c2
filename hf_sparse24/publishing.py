"""`hf-sparse24 card` and `push`: read options, call what publishes, print what was written and sent."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse24.benchmark.results import read_csv
from hf_sparse24.evaluation import read_evaluations
from hf_sparse24.folders import load_model
from hf_sparse24.hub import files_to_push, push_folder
from hf_sparse24.model_card import model_card

Folder = Annotated[Path, typer.Argument(help="The folder of a pruned model.")]
Repo = Annotated[str, typer.Argument(help="The repository on the Hub: user/name.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def card(
    folder: Folder,
    repo: Repo,
    base_model: Annotated[str | None, typer.Option(help="The Hub id of the dense model.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's identifier, such as apache-2.0.")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="What evaluate --json printed; repeat the option.")
    ] = None,
    benchmark: Annotated[Path | None, typer.Option(help="What bench --csv wrote, of this model.")] = None,
    force: Force = False,
) -> None:
    """Write the model card of FOLDER, its README.md, from the model and from what was measured.

    Example:

        hf-sparse24 card ./packed user/name --base-model org/dense --evaluation quality.json --benchmark speed.csv
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; name one that holds a pruned model.")
    path = folder / "README.md"
    if path.exists() and not force:
        raise ValueError(f"{path} exists; replace it with --force.")
    figures = [figure for file in evaluation or () for figure in read_evaluations(file.read_text("utf8"))]
    rows, conditions = read_csv(benchmark) if benchmark else ([], None)
    rendered = model_card(
        load_model(str(folder)),
        repo,
        base_model=base_model,
        license=license,
        evaluations=figures,
        benchmark=rows,
        conditions=conditions,
    )
    rendered.save(path)
    typer.echo(path)


def push(
    folder: Folder,
    repo: Repo,
    revision: Annotated[str | None, typer.Option(help="A branch; made where there is none.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository. Default: its owner's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload FOLDER, a pruned model with its card, to the Hub; log in with: hf auth login, or set HF_TOKEN.

    Examples:

        hf-sparse24 push ./packed user/name --dry-run

        hf-sparse24 push ./packed user/name --private --revision v1
    """
    files = [{"path": path, "bytes": (folder / path).stat().st_size} for path in files_to_push(folder)]
    found = {"repo": repo, "files": files, "bytes": sum(file["bytes"] for file in files)}
    if not dry_run:
        found["commit"] = push_folder(folder, repo, revision=revision, private=private).commit_url
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for file in files:
        typer.echo(f"{file['bytes'] / 1e6:10.3f} MB  {file['path']}")
    typer.echo(f"{found['bytes'] / 1e6:10.3f} MB  for {repo}; nothing was sent" if dry_run else found["commit"])
