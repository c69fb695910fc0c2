"""What each of two processes runs for test_data_parallel: walks, one after another, described in a JSON file."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from hf_sparse24 import Sparse24Config, prune
from hf_sparse24.calibration import distillation
from hf_sparse24.calibration.fitting import Schedule
from hf_sparse24.calibration.matching import Matching
from hf_sparse24.calibration.progress import Progress
from hf_sparse24.calibration.recipe import Recipe
from hf_sparse24.calibration.sequential import prune_sequentially_
from hf_sparse24.selection import select


def read_batches(file):
    batches = {}
    for key, tensor in load_file(file).items():
        number, _, name = key.partition(".")
        batches.setdefault(int(number), {})[name] = tensor
    return [batches[number] for number in sorted(batches)]


def walk(job, model, batches):
    """Prune a model as a job says, and return the facts of the walk."""
    recipe = Recipe(
        method=job["method"],
        refit=job["refit"],
        matching=Matching(steps=10, learning_rate=3e-3) if job["trains"] else None,
        distillation=Schedule(steps=10, learning_rate=3e-3) if job["trains"] else None,
    )
    progress = Progress(job["progress"], {"a": 1}) if job["progress"] else None
    return prune_sequentially_(model, select(model), batches, recipe, progress=progress).facts()


def walk_into_faults(model, batches):
    """Let things go wrong in the second process alone, and return what both say."""
    rank, calls, told = dist.get_rank(), [], {}

    def why_not(*args):
        return "it takes 9 GB" if rank else None

    def out_of_memory(*args, measure=distillation.kl_divergence):
        calls.append(args)
        if rank and len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(*args)

    config = Sparse24Config(method="wanda", distill=True, match_blocks=False, dataset=batches)
    usual, prune._why_not_distilled = prune._why_not_distilled, why_not
    try:
        prune.prune_(model, config)
    except ValueError as error:
        told["refused"] = str(error)
    prune._why_not_distilled = usual
    usual, distillation.kl_divergence = distillation.kl_divergence, out_of_memory
    prune.prune_(model, config)
    distillation.kl_divergence = usual
    return told | {"distilled": "distilled" in model.config.sparse24["calibration"], "calls": len(calls)}


def main():
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        model = getattr(transformers, job["class"]).from_pretrained(folder / job["model"])
        batches = read_batches(folder / f"{job['model']}.batches")
        facts = walk_into_faults(model, batches) if job["faults"] else walk(job, model, batches)
        save_file(
            {key: value.clone() for key, value in model.state_dict().items()}, folder / f"{name}-{rank}.safetensors"
        )
        (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
