"""Two processes that share the calibration batches: one result, the same as that of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sparse24 import processes
from hf_sparse24.calibration.recipe import Recipe
from hf_sparse24.calibration.sequential import _own_share, prune_sequentially_
from hf_sparse24.selection import select
from tests.calibration.test_sequential import assert_2to4
from tests.families import build

ROOT = Path(__file__).parents[2]

# What each process runs: everything that it is to do comes in a JSON file.
SCRIPT = """
import json, sys, torch, torch.distributed as dist, transformers
from safetensors.torch import load_file, save_file
from hf_sparse24.calibration.fitting import Schedule
from hf_sparse24.calibration.matching import Matching
from hf_sparse24.calibration.progress import Progress
from hf_sparse24.calibration.recipe import Recipe
from hf_sparse24.calibration.sequential import prune_sequentially_
from hf_sparse24.selection import select

job = json.load(open(sys.argv[1]))
torch.set_num_threads(1)
rank = 0
if job["processes"] > 1:
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method="file://" + job["meeting"], rank=rank, world_size=job["processes"])
model = getattr(transformers, job["class"]).from_pretrained(job["model"])
batches = {}
for key, tensor in load_file(job["batches"]).items():
    number, _, name = key.partition(".")
    batches.setdefault(int(number), {})[name] = tensor
batches = [batches[number] for number in sorted(batches)]
recipe = Recipe(
    method=job["method"],
    refit=None if job["matching"] else job["refit"],
    matching=Matching(steps=10, learning_rate=3e-3) if job["matching"] else None,
    distillation=Schedule(steps=10, learning_rate=3e-3) if job["distillation"] else None,
)
progress = Progress(job["progress"], {"a": 1}) if job["progress"] else None
walked = prune_sequentially_(model, select(model), batches, recipe, progress=progress)
save_file({key: value.clone() for key, value in model.state_dict().items()}, f"{job['out']}-{rank}.safetensors")
json.dump(walked.facts(), open(f"{job['out']}-{rank}.json", "w"))
if job["processes"] > 1:
    dist.destroy_process_group()
"""

# The same beginning; then things go wrong in the second process alone.
FAULTS = """
from hf_sparse24 import Sparse24Config, prune
from hf_sparse24.calibration import distillation

def why_not(*args):
    return "it takes 9 GB" if rank else None

def out_of_memory(*args, measure=distillation.kl_divergence):
    calls.append(args)
    if rank and len(calls) == 5:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return measure(*args)

calls, told = [], {}
config = Sparse24Config(method="wanda", distill=True, match_blocks=False, dataset=batches)
usual, prune._why_not_distilled = prune._why_not_distilled, why_not
try:
    prune.prune_(model, config)
except ValueError as error:
    told["refused"] = str(error)
prune._why_not_distilled, distillation.kl_divergence = usual, out_of_memory
prune.prune_(model, config)
told["distilled"] = "distilled" in model.config.sparse24["calibration"]
told["calls"] = len(calls)
save_file({key: value.clone() for key, value in model.state_dict().items()}, f"{job['out']}-{rank}.safetensors")
json.dump(told, open(f"{job['out']}-{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.fixture
def source(tiny_llama, tmp_path):
    for parameter in tiny_llama.parameters():
        parameter.data.mul_(6 if parameter.ndim > 1 else 1)
    tiny_llama.config.tie_word_embeddings = False
    model = LlamaForCausalLM(tiny_llama.config)
    for name, parameter in tiny_llama.named_parameters():
        model.get_parameter(name).data = parameter.data
    model.save_pretrained(tmp_path / "dense")
    # Many tokens, so that scores are well apart; an odd number, so that the shares differ.
    return written(tmp_path, [{"input_ids": torch.randint(3, 96, (4, 24))} for _ in range(7)])


def written(folder, batches):
    """Write what the processes read beside the model."""
    tensors = {f"{number}.{key}": value for number, batch in enumerate(batches) for key, value in batch.items()}
    save_file(tensors, folder / "batches.safetensors")
    (folder / "process.py").write_text(SCRIPT)
    return folder


def run(folder, name, processes, method="wanda", matching=False, distillation=False, progress=None, **others):
    """Run the walk in so many processes and return the weights and the facts of each."""
    job = {"model": str(folder / "dense"), "batches": str(folder / "batches.safetensors"), "processes": processes}
    job |= {"meeting": str(folder / f"{name}-meeting"), "out": str(folder / name), "matching": matching}
    job |= {"distillation": distillation, "method": method, "progress": None if progress is None else str(progress)}
    job = {"class": "LlamaForCausalLM", "refit": "asymmetric"} | job | others
    (folder / f"{name}.json").write_text(json.dumps(job))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(folder / "process.py"), str(folder / f"{name}.json")]
    started = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    weights = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(processes)]
    return weights, [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def projections(folder):
    return [f"{target.name}.weight" for target in select(LlamaForCausalLM.from_pretrained(folder / "dense")).targets]


@pytest.mark.parametrize(("method", "same"), [("wanda", 1.0), ("sparsegpt", 0.999), ("alps", 0.95)])
def test_two_processes_prune_as_one(source, method, same):
    ((alone,), _), (both, _) = run(source, "one", 1, method), run(source, "two", 2, method)
    assert_bit_equal(*both)
    for key in projections(source):
        # The Hessian is summed in another order. Scores of wanda and sparsegpt are well apart; in ALPS a near tie that
        # turns over moves its neighbours in the iterations to come.
        assert ((both[0][key] == 0) == (alone[key] == 0)).float().mean() >= same, key
        if method == "alps":
            continue
        error = (both[0][key] - alone[key]).norm() / alone[key].norm()
        assert error < 1e-3, key


def test_two_processes_match_and_distil_to_the_same_weights_and_share_a_folder(source):
    both, facts = run(source, "two", 2, "magnitude", matching=True, distillation=True, progress=source / "progress")
    assert_bit_equal(*both)
    assert facts[0] == facts[1]
    assert facts[0]["matched"]["after"] < facts[0]["matched"]["before"]
    assert facts[0]["distilled"]["after"] < facts[0]["distilled"]["before"]
    model = LlamaForCausalLM.from_pretrained(source / "dense")
    model.load_state_dict(both[0])
    assert_2to4(model)
    again, _ = run(source, "again", 2, "magnitude", matching=True, distillation=True, progress=source / "progress")
    assert_bit_equal(both[0], again[0])


def test_what_fails_in_one_process_is_given_up_in_all(source):
    script = source / "process.py"
    script.write_text(script.read_text().partition("recipe = ")[0] + FAULTS)
    both, told = run(source, "two", 2)
    assert told[0] == told[1]
    assert "cannot distill LlamaForCausalLM: it takes 9 GB" in told[0]["refused"]
    assert not told[0]["distilled"]
    assert told[0]["calls"] == 5
    assert_bit_equal(*both)


def test_processes_whose_routers_call_experts_in_another_order_prune_as_one(tmp_path):
    model = build("switch")
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "dense")
    keys = ("input_ids", "decoder_input_ids")
    # Three tokens: the first batch of each process reaches other experts.
    batches = [{key: torch.randint(3, 96, (1, 3)) for key in keys} for _ in range(60)]
    both, _ = run(written(tmp_path, batches), "two", 2, **{"class": type(model).__name__, "refit": "symmetric"})
    assert_bit_equal(*both)
    prune_sequentially_(model, select(model), batches, Recipe(method="wanda", refit="symmetric"))
    alone = model.state_dict()
    for target in select(model).targets:
        key = f"{target.name}.weight"
        # Sums in another order; the mask of wanda is all but the same, and so are then the refitted values.
        assert ((both[0][key] == 0) == (alone[key] == 0)).float().mean() >= 0.99, key


# The console script, which also tells how many batches its process walks.
COMMAND = """
import sys
from hf_sparse24.calibration import sequential
from hf_sparse24.cli import main

def told(batches, deal=sequential._own_share):
    share = deal(batches)
    print(f"walks {len(share)} of {len(batches)}", file=sys.stderr)
    return share

sequential._own_share = told
main()
"""


def test_the_command_line_under_torchrun_shares_the_work_and_writes_once(tiny_llama_folder, tmp_path):
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(90)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tiny_llama_folder)
    (tmp_path / "text.txt").write_text(" ".join(f"w{number * number % 89}" for number in range(2000)))
    (tmp_path / "hf-sparse24").write_text(COMMAND)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    prune = [
        tmp_path / "hf-sparse24",
        "prune",
        tiny_llama_folder,
        tmp_path / "out",
        "--dataset",
        tmp_path / "text.txt",
    ]
    prune += ["--num-samples", "24", "--sequence-length", "16", "--device", "cpu", "--no-pack", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*torchrun, *prune], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall("walks . of .", done.stderr)) == ["walks 1 of 3", "walks 2 of 3"]
    assert json.loads(done.stdout)["totals"]["matrices_2to4"] == 14  # printed by one
    assert_2to4(LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    assert not [folder.name for folder in tmp_path.iterdir() if "partial" in folder.name]


def test_processes_that_nobody_launched_are_not_joined(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.join()
    assert not torch.distributed.is_initialized()


def test_a_single_process_takes_all_batches():
    batches = [{"number": number} for number in range(3)]
    assert _own_share(batches) == batches
    assert Recipe().follows_dense


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 2, 4]), (1, [1, 3])])
def test_batches_are_dealt_out_in_turn(monkeypatch, rank, expected):
    monkeypatch.setattr("hf_sparse24.processes.count", lambda: 2)
    monkeypatch.setattr("hf_sparse24.processes.rank", lambda: rank)
    assert _own_share(list(range(5))) == expected


def test_more_processes_than_batches_are_refused(monkeypatch):
    monkeypatch.setattr("hf_sparse24.processes.count", lambda: 4)
    with pytest.raises(ValueError, match="4 processes share 3 calibration batches; give at least one each"):
        _own_share(list(range(3)))
