"""Published and loaded by repository id, through the real client and a hub on the loopback interface."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sparse24.cli import main
from hf_sparse24.hub import files_to_push
from tests.hub_server import TOKEN, serving

LOAD = """
import sys, torch, transformers, hf_sparse24
from safetensors.torch import save_file
out, revision, *repositories = sys.argv[1:]
logits = {}
for name in repositories:
    model = transformers.AutoModelForCausalLM.from_pretrained(name, revision=revision)
    logits[name] = model(torch.arange(9)[None]).logits.detach()
    print(type(model.model.layers[0].mlp.up_proj).__name__)
save_file(logits, out)
"""

PUSH = """
import sys, transformers, hf_sparse24
for name, pack in (("user/packed", True), ("user/masked", False)):
    config = hf_sparse24.Sparse24Config(method="magnitude", pack=pack)
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config).push_to_hub(name)
"""


@pytest.fixture
def hub():
    with serving() as found:
        yield found


@pytest.fixture
def python(hub, tmp_path):
    """Run code in a process of its own, with the environment that a user would set."""

    def run(code, *arguments, token=TOKEN):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment = {**kept, **home, **paths, **({} if token is None else {"HF_TOKEN": token})}
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def load(python, tmp_path):
    """Load repositories and write their logits."""
    return lambda *names, revision="main", **kwargs: python(LOAD, tmp_path / "logits", revision, *names, **kwargs)


@pytest.fixture
def cli(hub, monkeypatch, capsys, tmp_path):
    """Run the command line in this process, with huggingface_hub's constants as its environment would set them."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-sparse24", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        output = capsys.readouterr()
        return stopped.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def pruned(tiny_llama_folder, tmp_path, magnitude):
    """Make the folder of a pruned model, with a card, and what must not be sent beside it."""

    def make(name="pruned", **request):
        folder = tmp_path / name
        AutoModelForCausalLM.from_pretrained(
            tiny_llama_folder, quantization_config=magnitude(**request)
        ).save_pretrained(folder)
        (folder / "README.md").write_text("---\ntags:\n- 2:4\n---\n# A card\n")
        for secret in ("training_args.bin", ".env", "checkpoint-10/model.safetensors", "runs/events.out"):
            (folder / secret).parent.mkdir(exist_ok=True)
            (folder / secret).write_text("secret")
        return folder

    return make


def logits_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits


def test_pushed_models_load_by_their_ids_bit_equal(hub, cli, load, pruned, tmp_path):
    requests = {"user/packed": {}, "user/int8": {"quantization": "int8"}, "user/masked": {"pack": False}}
    folders = {}
    for name, request in requests.items():
        hub.requests.clear()
        folder = folders[name] = pruned(name, **request)
        code, out, err = cli("push", folder, name)
        assert code == 0, err
        assert f"{hub.endpoint}/{name}/commit/" in out
        sent = hub.files(name)
        assert sorted(sent) == files_to_push(folder)
        assert all(content == (folder / path).read_bytes() for path, content in sent.items())
        assert ("PUT", "/lfs/") in {(command, path[:5]) for command, path in hub.requests}

    loaded = load(*requests)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == ["Sparse24Linear", "Sparse24Linear", "Linear"]
    logits = load_file(tmp_path / "logits")
    for name, folder in folders.items():
        assert torch.equal(logits[name], logits_of(folder)), name


def test_what_no_loader_reads_stays_here(pruned):
    assert files_to_push(pruned()) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def test_a_dry_run_prints_what_would_be_sent_and_sends_nothing(hub, cli, pruned):
    folder = pruned()
    code, out, err = cli("push", folder, "user/model", "--dry-run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["repo"] == "user/model"
    assert [file["path"] for file in found["files"]] == files_to_push(folder)
    assert sum(file["bytes"] for file in found["files"]) == found["bytes"]
    _, table, _ = cli("push", folder, "user/model", "--dry-run")
    assert "model.safetensors" in table
    assert "nothing was sent" in table
    assert hub.requests == []


def test_private_and_a_branch(hub, cli, load, pruned):
    code, _, err = cli("push", pruned(), "user/model", "--private", "--revision", "v1")
    assert code == 0, err
    assert hub.repositories["user/model"].private
    assert "model.safetensors" in hub.files("user/model", "v1")
    assert hub.files("user/model", "main") == {}
    # The stranger first: what is in the cache is read without asking.
    assert load("user/model", revision="v1", token="hf_another").returncode != 0
    assert load("user/model", revision="v1").returncode == 0


def test_pushing_again_sends_what_changed(hub, cli, pruned):
    folder = pruned()
    cli("push", folder, "user/model")
    hub.requests.clear()
    (folder / "README.md").write_text("---\ntags:\n- 2:4\n---\n# A better card\n")
    assert cli("push", folder, "user/model")[0] == 0
    assert b"better" in hub.files("user/model")["README.md"]
    assert not [path for command, path in hub.requests if command == "PUT"]


def test_a_busy_hub_is_tried_again(hub, cli, pruned):
    hub.failures = {"/preupload/": 1, "/lfs/objects/batch": 1}
    assert cli("push", pruned(), "user/model")[0] == 0
    assert hub.failures == {"/preupload/": 0, "/lfs/objects/batch": 0}
    assert "model.safetensors" in hub.files("user/model")


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_without_the_right_token_it_is_an_error_without_a_traceback(hub, cli, pruned, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = cli("push", pruned(), "user/model")
    assert code == 1
    assert "hf-sparse24: " in err
    assert "Traceback" not in err
    assert hub.repositories == {}


def test_a_name_that_no_repository_can_have_is_refused(hub, cli, pruned):
    code, _, err = cli("push", pruned(), "user/na me")
    assert code == 1
    assert "na me" in err
    assert hub.requests == []


def test_folders_that_nobody_could_load_are_refused(pruned, tiny_llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        files_to_push(tmp_path / "nothing")
    with pytest.raises(ValueError, match="does not say that hf_sparse24 pruned"):
        files_to_push(tiny_llama_folder)
    folder = pruned(quantization="int8")
    (folder / "README.md").rename(folder / "CARD.md")
    with pytest.raises(ValueError, match="hf-sparse24 card"):
        files_to_push(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quantization"] = "fp8"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="where format 1 has F8_E4M3"):
        files_to_push(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        files_to_push(folder)


def test_a_missing_shard_is_named(tiny_llama_folder, tmp_path, magnitude):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, quantization_config=magnitude())
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(ValueError, match=shards[0].name):
        files_to_push(tmp_path / "out")


def test_push_to_hub_of_a_model_in_memory_carries_the_tags(hub, python, load, tiny_llama_folder, tmp_path):
    done = python(PUSH, tiny_llama_folder)
    assert done.returncode == 0, done.stderr
    for name in ("user/packed", "user/masked"):
        assert {"2:4", "sparsity"} <= set(ModelCard(hub.files(name)["README.md"].decode()).data.tags)
    assert load("user/packed").stdout.strip() == "Sparse24Linear"
