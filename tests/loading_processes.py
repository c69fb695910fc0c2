"""What each of two processes runs for test_distributed_loading: models loaded by parts, described in a JSON file."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_sparse24 import Sparse24Config, pack_, prune_, sparsity_report

WAYS = {"tp": {"tp_plan": "auto"}, "fsdp": {"fsdp_size": 2}}
DENSE_MASKED = {"quantization_config": Sparse24Config(method="magnitude", pack=False)}
# name: (folder, what from_pretrained is given); all under tensor parallelism, some under FSDP2.
LOADED = {"masked": ("masked", {}), "pruned": ("dense", DENSE_MASKED)}
REFUSED = {
    "packed": ("packed", {}),
    "pack": ("dense", {"quantization_config": Sparse24Config(method="magnitude")}),
    "calibrate": ("dense", {"quantization_config": Sparse24Config(dataset=["text"], pack=False)}),
    "straddling": ("odd", DENSE_MASKED),
}


def load(folder, name, way, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        folder / name, distributed_config=DistributedConfig(**WAYS[way]), **kwargs
    )


def sentence(call):
    """Return what a call says when it refuses."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def described(model, ids, folder):
    """Save a model, and return what its forward writes and what is to be seen of its parts."""
    weight = model.model.layers[0].mlp.up_proj.weight
    logits = model(ids).logits
    model.save_pretrained(folder)
    return {
        "logits": (logits.full_tensor() if hasattr(logits, "full_tensor") else logits).tolist(),
        "class": type(weight).__name__,
        "local": list(weight.to_local().shape),
        "ordinary": not hasattr(model.config, "quantization_config") and "hf_quantizer" not in vars(model),
    }


def in_memory(folder, ids):
    """Prune a model that is sharded already, and has run; and what cannot be done with it."""
    model = load(folder, "dense", "tp")
    model(ids)
    batches = [{"input_ids": ids}]
    refused = {"calibrate": sentence(lambda: prune_(model, Sparse24Config(method="wanda"), batches))}
    totals = prune_(model, Sparse24Config(method="magnitude")).totals
    refused["pack"] = sentence(lambda: pack_(model))
    again = prune_(model, Sparse24Config(method="auto")).totals
    assert again == totals == sparsity_report(model).totals
    return {"totals": totals, "refused": refused, **described(model, ids, folder / "in memory")}


def sharded_later(folder):
    """Shard a packed model without asking this package, and save it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    fully_shard(model)
    return sentence(lambda: model.save_pretrained(folder / "sharded later"))


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    said = {
        "loaded": {
            f"{way} {name}": described(load(folder, where, way, **kwargs), ids, folder / f"{way} {name}")
            for way in WAYS
            for name, (where, kwargs) in LOADED.items()
        },
        "refused": {
            f"{way} {name}": sentence(lambda way=way, where=where, kwargs=kwargs: load(folder, where, way, **kwargs))
            for way in WAYS
            for name, (where, kwargs) in REFUSED.items()
            if (way, name) != ("fsdp", "straddling")  # it cuts rows
        },
        "in memory": in_memory(folder, ids),
        "sharded later": sharded_later(folder),
    }
    (folder / f"said.{dist.get_rank()}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
