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

# Each walk that two processes make: see `walking_processes`.
DEFAULT = {"class": "LlamaForCausalLM", "model": "llama", "method": "wanda", "refit": "asymmetric"}
DEFAULT |= {"trains": False, "progress": None, "faults": False}
TRAINED = {"method": "magnitude", "refit": None, "trains": True}
JOBS = {
    "wanda": {},
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "trained": TRAINED,
    "trained again": TRAINED,
    "faults": {"faults": True},
    "switch": {"class": "SwitchTransformersForConditionalGeneration", "model": "switch", "refit": "symmetric"},
}


def made_llama():
    """A model whose layers matter, and batches."""
    torch.manual_seed(0)
    model = build("llama", tie_word_embeddings=False)
    for parameter in model.parameters():
        parameter.data.mul_(6 if parameter.ndim > 1 else 1)
    # Many tokens, so that scores are well apart; an odd number, so that the shares differ.
    return model, [{"input_ids": torch.randint(3, 96, (4, 24))} for _ in range(7)]


def made_switch():
    """A mixture of experts, and batches."""
    torch.manual_seed(0)
    model = build("switch")
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    keys = ("input_ids", "decoder_input_ids")
    # Three tokens: the first batch of each process reaches other experts.
    return model, [{key: torch.randint(3, 96, (1, 3)) for key in keys} for _ in range(60)]


MADE = {"llama": made_llama, "switch": made_switch}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Run all walks in two processes; return the weights and the facts that each process has of one."""
    folder = tmp_path_factory.mktemp("walks")
    for name, make in MADE.items():
        model, batches = make()
        model.save_pretrained(folder / name)
        tensors = {f"{number}.{key}": value for number, batch in enumerate(batches) for key, value in batch.items()}
        save_file(tensors, folder / f"{name}.batches")
    jobs = {name: DEFAULT | job for name, job in JOBS.items()}
    for name in ("trained", "trained again"):
        jobs[name]["progress"] = str(folder / "progress")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.calibration.walking_processes", str(folder)]
    started = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()

    def found(name):
        weights = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]
        return weights, [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]

    return found


def pruned_alone(name, **recipe):
    """Make the same walk in this process; return its weights and the names of those that were pruned."""
    model, batches = MADE[name]()
    selection = select(model)
    prune_sequentially_(model, selection, batches, Recipe(**recipe))
    return model.state_dict(), [f"{target.name}.weight" for target in selection.targets]


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize(("method", "same"), [("wanda", 1.0), ("sparsegpt", 0.999), ("alps", 0.95)])
def test_two_processes_prune_as_one(walked, method, same):
    both, _ = walked(method)
    assert_bit_equal(*both)
    alone, projections = pruned_alone("llama", method=method)
    for key in projections:
        # The Hessian is summed in another order. Scores of wanda and sparsegpt are well apart; in ALPS a near tie that
        # turns over moves its neighbours in the iterations to come.
        assert ((both[0][key] == 0) == (alone[key] == 0)).float().mean() >= same, key
        if method == "alps":
            continue
        error = (both[0][key] - alone[key]).norm() / alone[key].norm()
        assert error < 1e-3, key


def test_two_processes_match_and_distil_to_the_same_weights_and_share_a_folder(walked):
    both, facts = walked("trained")
    assert_bit_equal(*both)
    assert facts[0] == facts[1]
    assert facts[0]["matched"]["after"] < facts[0]["matched"]["before"]
    assert facts[0]["distilled"]["after"] < facts[0]["distilled"]["before"]
    model, _ = made_llama()
    model.load_state_dict(both[0])
    assert_2to4(model)
    again, _ = walked("trained again")
    assert_bit_equal(both[0], again[0])


def test_what_fails_in_one_process_is_given_up_in_all(walked):
    both, told = walked("faults")
    assert told[0] == told[1]
    assert "cannot distill LlamaForCausalLM: it takes 9 GB" in told[0]["refused"]
    assert not told[0]["distilled"]
    assert told[0]["calls"] == 5
    assert_bit_equal(*both)


def test_processes_whose_routers_call_experts_in_another_order_prune_as_one(walked):
    both, _ = walked("switch")
    assert_bit_equal(*both)
    alone, projections = pruned_alone("switch", method="wanda", refit="symmetric")
    for key in projections:
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
    environment["TMPDIR"] = str(tmp_path)  # torchrun leaves a folder there
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
