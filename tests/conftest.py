"""Fixtures: devices with the reason a test is skipped, tiny models, and a quiet transformers."""

import os

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse24 import Sparse24Config


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers that each take every core wait for each other


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def kernel_device():
    """The device of the kernels under test: a GPU, or the CPU that stands in for one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            tie_word_embeddings=True,
        )
    ).eval()


@pytest.fixture
def tiny_llama_folder(tiny_llama, tmp_path):
    folder = tmp_path / "dense"
    tiny_llama.save_pretrained(folder)
    return folder


@pytest.fixture
def magnitude():
    """Make a config that asks for magnitude by name, so that no test depends on the warning of "auto"."""

    def make(**kwargs):
        return Sparse24Config(method="magnitude", **kwargs)

    return make


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, with what it keeps of files that it reads in the folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (2, 9))
