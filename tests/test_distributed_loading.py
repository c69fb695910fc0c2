"""Two processes that share a model's weights: tensor parallelism and FSDP2 give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse24 import Sparse24Config, pack_, prune_, sparsity_report
from tests.families import build
from tests.loading_processes import LOADED, WAYS
from tests.test_from_pretrained import digests

# float32, weights of 0.02, two layers: under tensor parallelism sums of o_proj and down_proj are split in two.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def results(tmp_path_factory, ids):
    """Run `tests.loading_processes`; return what each process said, and the folder."""
    folder = tmp_path_factory.mktemp("loading")
    model = build("llama")
    model.save_pretrained(folder / "dense")
    prune_(model, Sparse24Config(method="magnitude"))
    model.save_pretrained(folder / "masked")
    pack_(model)
    model.save_pretrained(folder / "packed")
    build("llama", intermediate_size=60).save_pretrained(folder / "odd")
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.loading_processes", str(folder)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"TMPDIR": str(folder)}  # torchrun leaves a folder there
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads((folder / f"said.{rank}.json").read_text()) for rank in range(2)], folder


@pytest.fixture(scope="module")
def expected(results, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(results[1] / "masked")(ids).logits


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("way", WAYS)
def test_dense_masked_models_are_those_of_one_process(way, name, results, expected):
    (first, second), folder = results
    for said in (first, second):
        found = said["loaded"][f"{way} {name}"]
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert (found["class"], found["local"], found["ordinary"]) == ("DTensor", [32, 32], True)  # of 64 x 32
    saved, masked = digests(folder / f"{way} {name}"), digests(folder / "masked")
    assert saved["model.safetensors"] == masked["model.safetensors"]
    config = json.loads((folder / f"{way} {name}" / "config.json").read_text())
    assert config["sparse24"]["method"] == "magnitude"
    assert "distributed_config" not in config


def test_a_model_that_is_sharded_already_is_pruned_where_it_is(results, expected):
    (first, second), folder = results
    for said in (first, second):
        found = said["in memory"]
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert found["totals"] == sparsity_report(AutoModelForCausalLM.from_pretrained(folder / "masked")).totals
        assert (
            "Calibrated methods take whole weights; model.layers.0.self_attn.q_proj" in found["refused"]["calibrate"]
        )
        assert "Packed layers are not sharded, and model.layers.0.self_attn.q_proj is" in found["refused"]["pack"]
    assert digests(folder / "in memory")["model.safetensors"] == digests(folder / "masked")["model.safetensors"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "message"),
    {
        "packed": "Packed 2:4 layers are not sharded over processes, which distributed_config asks for.",
        "pack": "Under distributed_config a model can be pruned by magnitude and stays unpacked",
        "calibrate": "Under distributed_config a model can be pruned by magnitude and stays unpacked",
    }.items(),
)
def test_what_needs_whole_weights_is_refused_in_every_process(way, name, message, results):
    for said in results[0]:
        assert message in said["refused"][f"{way} {name}"]


def test_shards_that_cut_groups_of_four_are_refused_in_every_process(results):
    for said in results[0]:
        assert "model.layers.0.mlp.down_proj has 60 inputs, and its shards 30." in said["refused"]["tp straddling"]


def test_packed_layers_that_something_else_has_sharded_are_not_saved(results):
    said, folder = results
    for one in said:
        assert "is packed and sharded over processes, and packed models are saved whole" in one["sharded later"]
    assert not list(folder.glob("sharded later/*.safetensors"))
