"""Masking of many tensors at once: on a GPU as compiled, else on an emulated one."""

import pytest
import torch

from hf_sparse24.kernels import zero_pruned
from hf_sparse24.training.masks import pack_bits

from .emulated_device import launch, load


@pytest.fixture(autouse=True)
def emulated_where_there_is_no_gpu(monkeypatch, kernel_device):
    if kernel_device == "cuda":
        yield
        return
    stand_ins = {"load": load, "launch": launch, "device_capability": lambda device: (9, 0)}
    stand_ins |= {"_can_run": lambda: True, "_on_device": lambda table, device: table}
    for name, function in stand_ins.items():
        monkeypatch.setattr(zero_pruned, name, function)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    zero_pruned._kernel.cache_clear()
    yield
    zero_pruned._kernel.cache_clear()


def masked(shape, dtype, device):
    tensor = torch.randn(shape, device=device).to(dtype)
    kept = torch.rand(shape, device=device) < 0.5
    return tensor, kept, tensor.masked_fill(~kept, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeroes_what_has_no_bit_and_nothing_else(dtype, kernel_device):
    shapes = [(1,), (7,), (8,), (3, 5), (4, 4096), (0,), (2, 3, 44), (130, 128)]
    cases = [masked(shape, dtype, kernel_device) for shape in shapes]
    zero_pruned.zero_pruned_((tensor, pack_bits(kept)) for tensor, kept, _ in cases)
    for tensor, _, expected in cases:
        assert torch.equal(tensor, expected)
        assert not tensor.signbit().logical_and(tensor == 0).any()


def test_dtypes_may_be_mixed_and_other_memory_is_left_alone(kernel_device):
    whole = torch.full((48,), -1.0, device=kernel_device)
    tensor, half = whole[16:27], torch.full((9,), -1.0, dtype=torch.bfloat16, device=kernel_device)
    kept = torch.tensor([True, False] * 5 + [False], device=kernel_device)
    zero_pruned.zero_pruned_([(tensor, pack_bits(kept)), (half, pack_bits(kept[:9]))])
    assert tensor.tolist() == [-1.0, 0.0] * 5 + [0.0]
    assert half.tolist() == [-1.0, 0.0] * 4 + [-1.0]
    assert whole[:16].eq(-1).all()
    assert whole[27:].eq(-1).all()


def test_is_seen_by_autograd(kernel_device):
    weight = torch.ones(8, device=kernel_device, requires_grad=True)
    loss = weight.square().sum()
    zero_pruned.zero_pruned_([(weight, torch.tensor([3], dtype=torch.uint8, device=kernel_device))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_takes_what_is_aligned_and_contiguous(kernel_device):
    tensor, bits = torch.zeros(4, 8, device=kernel_device), torch.zeros(4, dtype=torch.uint8, device=kernel_device)
    assert zero_pruned.takes(tensor, bits)
    assert not zero_pruned.takes(tensor.t(), bits)
    assert not zero_pruned.takes(tensor.flatten()[1:], bits)
    assert not zero_pruned.takes(tensor.double(), bits)
