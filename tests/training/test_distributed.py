"""Two processes: DDP and FSDP2 train what one process trains, and save an ordinary model."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sparse24 import Sparse24Config, Sparse24Trainer, prune_, sparsity_report
from tests.families import build
from tests.training.conftest import Rows
from tests.training.test_examples import save_tokenizer

ROOT = Path(__file__).parents[2]
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "adam_epsilon": 1e-3,  # so that rounding, which the order of a sum changes, does not grow to a step's size
}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
WHOLE = {**SHARDED, "fsdp_config": {**SHARDED["fsdp_config"], "state_dict_type": "FULL_STATE_DICT"}}
PARTS = {**SHARDED, "fsdp_config": {**SHARDED["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}
SAVING = {"save_strategy": "steps", "save_steps": 2}
SRSTE = {"mask_policy": "srste", "mask_policy_args": {"refresh_steps": 1, "decay": 0.1}}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all trainings in two processes; return what each said, and the folder."""
    folder = tmp_path_factory.mktemp("distributed")
    build("llama").save_pretrained(folder / "dense")
    jobs = {
        "ddp": {"arguments": COMMON, "distill": True},
        "ddp learned": {"arguments": {**COMMON, "mask_policy": "learned"}, "prune": False},
        "whole": {"arguments": {**COMMON, **WHOLE}, "distill": True},
        "parts": {"arguments": {**COMMON, **PARTS}, "distill": True},
        "moving": {"arguments": {**COMMON, **PARTS, **SAVING, **SRSTE}, "prune": False},
        "resumed": {
            "arguments": {**COMMON, **PARTS, **SRSTE},
            "resume": str(folder / "moving" / "checkpoint-2"),
            "prune": False,
        },
        "learned": {"arguments": {**COMMON, **PARTS, "mask_policy": "learned"}, "prune": False},
        "straddling": {
            "arguments": {**COMMON, "fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["GPT2Block"]}},
            "straddling": True,
        },
    }
    for name, job in jobs.items():
        job |= {"model": str(folder / "dense"), "output_dir": str(folder / name)}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": "2"}
    environment = {**os.environ, **group, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.training.processes", str(folder / "jobs.json")]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-6000:]
    return [json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in range(2)], folder


@pytest.fixture(scope="module")
def alone(results, tmp_path_factory):
    """The same training in one process, with the same batches."""
    from hf_sparse24 import Sparse24TrainingArguments

    _, folder = results
    teacher = AutoModelForCausalLM.from_pretrained(folder / "dense")
    model = copy.deepcopy(teacher)
    prune_(model, Sparse24Config(method="magnitude"))
    output = str(tmp_path_factory.mktemp("alone"))
    args = Sparse24TrainingArguments(output, **{**COMMON, "per_device_train_batch_size": 4})
    trainer = Sparse24Trainer(model, args, train_dataset=Rows(), teacher_model=teacher)
    trainer.train()
    return model, [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("way", ["ddp", "whole", "parts"])
def test_two_processes_train_what_one_does(way, results, alone):
    said, folder = results
    model, logs = alone
    saved = AutoModelForCausalLM.from_pretrained(folder / way)
    assert saved.config.sparse24["training"] == {"mask_policy": "frozen"}
    assert sparsity_report(saved).totals["violating_groups"] == 0
    assert sparsity_report(saved).totals["matrices_2to4"] == 14
    for (name, tensor), twin in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(tensor == 0, twin == 0), name
        torch.testing.assert_close(tensor, twin, rtol=1e-3, atol=1e-5, msg=name)  # sums in another order
    for entry, other in zip(logs, said[0][way]["logs"], strict=True):
        for key in ("loss", "distill_logit_loss", "distill_label_loss", "sparse24_density", "sparse24_violations"):
            assert other[key] == pytest.approx(entry[key], rel=1e-3), key


def test_the_model_is_sharded_and_masks_are_of_shards(results):
    (first, second), _ = results
    assert first["parts"]["kind"] == "DistributedType.FSDP"
    assert first["parts"]["classes"] == ["DTensor"]
    assert first["parts"]["shards"] == second["parts"]["shards"]
    assert [16, 32] in first["parts"]["shards"]  # of 32 x 32
    assert [32, 32] in first["ddp"]["shards"]


def test_a_moving_mask_on_shards_resumes_bit_equal(results):
    (first, _), folder = results
    assert any(entry["sparse24_flips"] for entry in first["moving"]["logs"])
    whole, resumed = weights(folder / "moving"), weights(folder / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    checkpoint = AutoModelForCausalLM.from_pretrained(folder / "moving" / "checkpoint-2")
    assert sparsity_report(checkpoint).totals["matrices_2to4"] == 14


def test_learned_masks_agree_between_processes_and_need_whole_weights(results):
    (first, second), folder = results
    assert first["ddp learned"]["logs"] == second["ddp learned"]["logs"]
    assert (
        sparsity_report(AutoModelForCausalLM.from_pretrained(folder / "ddp learned")).totals["violating_groups"] == 0
    )
    for said in (first, second):
        assert "'learned' cannot work on shards" in said["learned"]["error"]


def test_shards_that_cut_groups_of_four_are_refused_in_every_process(results):
    for said in results[0]:
        assert "needs shards of whole groups of 4" in said["straddling"]["error"]
        assert "has 20 inputs, and its shards 10" in said["straddling"]["error"]


def test_the_config_that_is_shipped_shards_the_example_by_accelerate_launch(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    prune_(model, Sparse24Config(method="magnitude"))
    model.save_pretrained(tmp_path / "pruned")
    save_tokenizer(tmp_path / "pruned")
    numbers = torch.randint(3, 96, (40, 20)).tolist()
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{number}" for number in line) for line in numbers))
    request = yaml.safe_load((ROOT / "examples/retrain_lm.yaml").read_text())
    request |= {"model_name_or_path": str(tmp_path / "pruned"), "teacher_model": str(tmp_path / "dense")}
    request |= {"train_file": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "out"), "sequence_length": 16}
    request |= {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2}
    request |= {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "no"}
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(request))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    launch += ["--config_file", str(ROOT / "examples/fsdp2.yaml"), str(ROOT / "tests/training/launched.py")]
    launch += [str(ROOT / "examples/retrain_lm.py"), str(tmp_path / "request.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["TMPDIR"] = str(tmp_path)  # the launcher leaves a folder there
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("DistributedType.FSDP") == 2  # processes
    assert "2:4: 14 of 16 matrices" in done.stdout
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sparsity_report(trained).totals["violating_groups"] == 0
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert "14 of 16 matrices hold at most two nonzeros" in (tmp_path / "out/README.md").read_text()
