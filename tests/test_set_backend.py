"""Choosing another backend for a model that was loaded packed."""

import pytest
import torch

from hf_sparse24 import pack_, prune_, set_backend_
from hf_sparse24.nn import Sparse24Linear


@pytest.fixture
def packed(tiny_llama, magnitude):
    prune_(tiny_llama, magnitude())
    pack_(tiny_llama)
    return tiny_llama


def test_every_packed_layer_gets_it(packed, tokens):
    before = packed(tokens).logits
    set_backend_(packed, "reference")
    assert {module.backend for module in packed.modules() if isinstance(module, Sparse24Linear)} == {"reference"}
    assert torch.equal(packed(tokens).logits, before)


def test_what_cannot_run_is_refused_and_nothing_changes(packed):
    with pytest.raises(ValueError, match="backend must be one of"):
        set_backend_(packed, "triton")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend='cusparselt' cannot run here"):
            set_backend_(packed, "cusparselt")
    assert {module.backend for module in packed.modules() if isinstance(module, Sparse24Linear)} == {"auto"}


def test_a_model_without_packed_layers_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="has no packed 2:4 layer"):
        set_backend_(tiny_llama, "auto")


@pytest.mark.gpu
def test_a_layer_that_the_backend_does_not_take_is_named(packed):
    packed.bfloat16().cuda()
    with pytest.raises(ValueError, match=r"does not take model\.layers\.0\.self_attn\.q_proj: .* from 128 features"):
        set_backend_(packed, "cusparselt")
    assert {module.backend for module in packed.modules() if isinstance(module, Sparse24Linear)} == {"auto"}
