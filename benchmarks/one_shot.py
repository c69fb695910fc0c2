"""One-shot pruning on a real model: every method, with and without refit and block matching, and the default.

    python benchmarks/one_shot.py smollm2                # all rows of a model; a GPU is taken where there is one
    python benchmarks/one_shot.py smollm2 --rows default # some rows, by name
    python benchmarks/one_shot.py whisper --rows default --seed 1   # its row is "default, seed 1"
    python benchmarks/one_shot.py smollm2 --rows default --save FOLDER  # keep the model too, in FOLDER/default
    python benchmarks/one_shot.py --collect              # add the rows of all runs to results/one_shot_NAME.json

Each row is appended to results/one_shot_NAME.jsonl as soon as it is there, so that several processes can share the
work. Collected, it replaces the row of the same name, and others stay. The models and data come from
one_shot_bundles.py.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from common import RESULTS, conditions, merge
from one_shot_data import MODELS, load
from transformers.utils import logging

from hf_sparse24 import Sparse24Config, pack_, prune_

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
QUANTIZATIONS = ("int8", "fp8")
OFF = {"refit": False, "match_blocks": False, "distill": False, "smooth": False}


def requests(calibration):
    """Return the config of each row and the name of its calibration data."""
    first, *others = calibration
    rows = {}
    for method in METHODS:
        rows[method] = ({"method": method, **OFF}, first)
        rows[f"{method} + symmetric refit"] = ({"method": method, **OFF, "refit": "symmetric"}, first)
        rows[f"{method} + refit"] = ({"method": method, **OFF, "refit": True}, first)
        rows[f"{method} + refit + matching"] = ({"method": method, **OFF, "refit": True, "match_blocks": True}, first)
    rows["magnitude"] = ({"method": "magnitude"}, None)
    everything = {"method": "auto", "match_blocks": True, "distill": True}
    rows["default"] = (everything, first)
    for quantization in QUANTIZATIONS:
        rows[f"default, {quantization}"] = ({**everything, "quantization": quantization}, first)
    for name in others:
        rows[f"sparsegpt, {name}"] = ({"method": "sparsegpt", **OFF}, name)
        rows[f"default, {name}"] = (everything, name)
    return rows


def measure(name, row, request, data, seed, folder, note, save=None):
    """Prune, pack where that was asked for, and evaluate; append one line a model.

    The default is quantized afterwards too, which shows what it brings to know of it before.
    """
    bundle = load(name, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = bundle["model"]().to(device)
    started = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    samples = 128 if data == "self" else 4096  # of batches: all there are
    config = Sparse24Config(**request, num_samples=samples, seed=seed)
    calibration = "self" if data == "self" else bundle["calibration"].get(data)
    report = prune_(model, config, calibration)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    recipe = model.config.sparse24.get("calibration", {})
    if config.quantization:
        pack_(model, config.quantization, backend="reference")
    of_seed = f", seed {seed}" if seed else ""
    facts = {
        "row": row + of_seed,
        "calibration": data,
        "seed": seed,
        "seconds": round(seconds, 1),
        "peak_gb": peak and round(peak / 1e9, 2),
        "violating_groups": report.totals["violating_groups"],
        "recipe": recipe,
    }
    append(name, facts | scores(bundle, model), note)
    if save:
        model.save_pretrained(Path(save) / facts["row"].replace(", ", "_").replace(" ", "_"))
    if row == "default":
        for quantization in QUANTIZATIONS:
            packed = copy.deepcopy(model)
            pack_(packed, quantization=quantization, backend="reference")
            facts = {"row": f"default, then {quantization}{of_seed}", "calibration": data, "seed": seed}
            append(name, facts | scores(bundle, packed), note)
            del packed


def scores(bundle, model):
    return {key: round(float(evaluate(model)), 4) for key, evaluate in bundle["evaluations"].items()}


def append(name, facts, note):
    line = json.dumps(facts | {"conditions": conditions() | ({"note": note} if note else {})})
    print(line, flush=True)
    with (RESULTS / f"one_shot_{name}.jsonl").open("a") as file:
        file.write(line + "\n")


def collect():
    """Add the lines of all runs to one file a model: the dense model first, then in the order of `requests`."""
    order = ["dense", *requests(["", "bbc", "mix_512", "self"])]
    order += [f"default, then {quantization}" for quantization in QUANTIZATIONS]
    for file in sorted(RESULTS.glob("one_shot_*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        merge(file.stem, lines, ["row"], lambda row: (order.index(row["row"].split(", seed ")[0]), row.get("seed", 0)))
        file.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=("smollm2", "minilm", "whisper", "dinov2"))
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0, help="of the order of batches in training, and of 'self'")
    parser.add_argument("--note", help="what else is to be known of this run, such as what shared the GPU")
    parser.add_argument("--folder", default=MODELS)
    parser.add_argument("--save", help="folder for the pruned models")
    parser.add_argument("--collect", action="store_true")
    arguments = parser.parse_args()
    if arguments.collect:
        collect()
        return
    logging.disable_progress_bar()
    bundle = load(arguments.model, arguments.folder)
    wanted = requests([*bundle["calibration"], *(["self"] if arguments.model == "smollm2" else [])])
    if not arguments.rows or "dense" in arguments.rows:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        append(arguments.model, {"row": "dense"} | scores(bundle, bundle["model"]().to(device)), arguments.note)
    for row, (request, data) in wanted.items():
        if not arguments.rows or row in arguments.rows:
            where = arguments.folder, arguments.note, arguments.save
            measure(arguments.model, row, request, data, arguments.seed, *where)


if __name__ == "__main__":
    main()
