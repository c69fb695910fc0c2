"""The Triton kernel against the reference: on a GPU as compiled, else in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from hf_sparse24.kernels import reference
from hf_sparse24.kernels.quantize_activations import ROWS, quantize_per_token

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same(actual, expected):
    return all(
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits(left), bits(right))
        for left, right in zip(actual, expected, strict=True)
    )


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def skip_fp8_in_the_interpreter(quantized, kernel_device):
    if quantized == torch.float8_e4m3fn and kernel_device == "cpu":
        pytest.skip("Triton's interpreter loses the carry out of the mantissa when it rounds to FP8")


@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (7, 40), (2, 3, 132), (5, 4096), (2, 20000)])
def test_equals_the_reference_to_the_bit(shape, dtype, quantized, kernel_device):
    skip_fp8_in_the_interpreter(quantized, kernel_device)
    x = (torch.randn(shape, device=kernel_device) * torch.rand(*shape[:-1], 1, device=kernel_device).mul(8).exp2()).to(
        dtype
    )
    assert same(quantize_per_token(x, quantized), reference.quantize_per_token(x, quantized))


def test_halves_go_to_the_even_integer(kernel_device):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5, 127.0]], device=kernel_device)
    values, scale = quantize_per_token(x, torch.int8)
    assert scale.item() == 1
    assert values.tolist() == [[0, 2, 2, 0, -2, -126, 126, 127]]


def test_tokens_of_zeros_next_to_zero_and_not_finite(kernel_device):
    x = torch.ones(4, 40, device=kernel_device)
    x[0], x[1], x[2, 3], x[3, 39] = 0, 1e-38, float("nan"), float("inf")
    values, scale = quantize_per_token(x, torch.int8)
    assert scale[:2].tolist() == [[1], [1]]
    assert not values[:2].any()
    assert scale[2].isnan()
    assert scale[3].isinf()


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.t().contiguous().t(), lambda x: x[::2]])
def test_strided_inputs(make, kernel_device):
    x = make(torch.randn(6, 80, device=kernel_device))
    assert same(quantize_per_token(x, torch.int8), reference.quantize_per_token(x, torch.int8))


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_there_is_room_for_whole_tiles(tokens, kernel_device):
    values, scale = quantize_per_token(torch.randn(tokens, 40, device=kernel_device), torch.int8)
    assert values.shape == (tokens, 40)
    assert scale.shape == (tokens, 1)
    assert values.untyped_storage().nbytes() == -(-tokens // ROWS) * ROWS * 40
