"""What each of two processes runs for test_distributed: trainings, one after another, described in a JSON file.

accelerate refuses FSDP on CPUs by the name that it gives to a group of them; here it is told that they are GPUs, and
everything else is as it is: `fully_shard` and gloo.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_sparse24 import Sparse24Config, Sparse24Trainer, Sparse24TrainingArguments, prune_
from tests.training.conftest import Rows


def train(job):
    """Run one training, and return what happened in this process."""
    arguments = Sparse24TrainingArguments(job["output_dir"], **job["arguments"])
    sharded = "fsdp" in job["arguments"]
    PartialState._shared_state["distributed_type"] = (
        DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU
    )
    torch.manual_seed(0)
    if job.get("straddling"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=20, n_head=2, n_layer=1, vocab_size=96))
    else:
        model = LlamaForCausalLM.from_pretrained(job["model"])
    teacher = copy.deepcopy(model)
    if job.get("prune", True):
        prune_(model, Sparse24Config(method="magnitude"))
    teacher = teacher if job.get("distill") else None
    trainer = Sparse24Trainer(model, arguments, train_dataset=Rows(), teacher_model=teacher)
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except ValueError as error:
        return {"error": str(error)}
    trainer.save_model()
    return {
        "kind": str(trainer.accelerator.distributed_type),
        "classes": sorted({type(parameter).__name__ for parameter in trainer.model.parameters()}),
        "shards": sorted({tuple(mask.shape) for mask in trainer.sparse24.masks.values()}),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def main():
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, job in jobs.items():
        results[name] = train(job)
        AcceleratorState._reset_state()
        GradientState._reset_state()
    with open(f"{sys.argv[1]}.{dist.get_rank()}", "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
