"""Quantization and scaling of activations against the reference: on a GPU as compiled, else on an emulated one."""

import pytest
import torch

from hf_sparse24.kernels import quantize_activations, reference
from hf_sparse24.kernels.quantize_activations import ROWS, block, definitions, quantize_per_token, scale_product_

from .emulated_device import launch, load

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def emulated_where_there_is_no_gpu(monkeypatch):
    """Let a CPU stand in for a GPU: not a layer is involved, so that only the kernels need be."""
    if torch.cuda.is_available():
        yield
        return
    for name, function in (("load", load), ("launch", launch), ("device_capability", lambda device: (9, 0))):
        monkeypatch.setattr(quantize_activations, name, function)
    kernels = quantize_activations._quantize_token, quantize_activations._scale_product
    for kernel in kernels:
        kernel.cache_clear()
    yield
    for kernel in kernels:
        kernel.cache_clear()


def same(actual, expected):
    return all(
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits(left), bits(right))
        for left, right in zip(actual, expected, strict=True)
    )


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (7, 40), (2, 3, 132), (3, 4096), (1, 2, 20000)])
def test_equals_the_reference_to_the_bit(shape, dtype, quantized, kernel_device):
    spread = torch.rand(*shape[:-1], 1, device=kernel_device).mul(8).exp2()
    x = (torch.randn(shape, device=kernel_device) * spread).to(dtype)
    assert same(quantize_per_token(x, quantized), reference.quantize_per_token(x, quantized))


def test_halves_go_to_the_even_integer(kernel_device):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5, 127.0]], device=kernel_device)
    values, scale = quantize_per_token(x, torch.int8)
    assert scale.item() == 1
    assert values.tolist() == [[0, 2, 2, 0, -2, -126, 126, 127]]


def test_every_value_of_fp8_and_what_lies_half_way_between_two(kernel_device):
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, halves, -codes, -halves, codes[-1:]])[None, :-1].to(kernel_device)
    assert same(quantize_per_token(x, torch.float8_e4m3fn), reference.quantize_per_token(x, torch.float8_e4m3fn))


def test_tokens_of_zeros_next_to_zero_and_not_finite(kernel_device):
    x = torch.ones(4, 40, device=kernel_device)
    x[0], x[1], x[2, 3], x[3, 39] = 0, 1e-38, float("nan"), float("inf")
    values, scale = quantize_per_token(x, torch.int8)
    assert scale[:2].tolist() == [[1], [1]]
    assert not values[:2].any()
    assert scale[2].isnan()
    assert scale[3].isinf()


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.t().contiguous().t(), lambda x: x[::2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(make, dtype, kernel_device):
    x = make(torch.randn(6, 80, device=kernel_device).to(dtype))
    assert same(quantize_per_token(x, torch.int8), reference.quantize_per_token(x, torch.int8))


def test_a_view_that_is_not_aligned(kernel_device):
    x = torch.randn(3 * 64 + 1, device=kernel_device)[1:].view(3, 64)
    assert same(quantize_per_token(x, torch.int8), reference.quantize_per_token(x, torch.int8))


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_there_is_room_for_whole_tiles(tokens, kernel_device):
    values, scale = quantize_per_token(torch.randn(tokens, 40, device=kernel_device), torch.int8)
    assert values.shape == (tokens, 40)
    assert scale.shape == (tokens, 1)
    assert values.untyped_storage().nbytes() == -(-tokens // ROWS) * ROWS * 40


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight_scale", [False, True])
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 48), (3, 2056)])
def test_scales_and_bias_in_place(shape, dtype, with_weight_scale, with_bias, kernel_device):
    tokens, outputs = shape
    product = torch.randn(shape, device=kernel_device).bfloat16()
    token_scale = torch.rand(tokens, 1, device=kernel_device)
    weight_scale = torch.rand(outputs, device=kernel_device) if with_weight_scale else None
    bias = torch.randn(outputs, device=kernel_device).to(dtype) if with_bias else None
    exact = product.double() * token_scale.double()
    exact = exact if weight_scale is None else exact * weight_scale.double()
    exact = exact if bias is None else exact + bias.double()
    result = scale_product_(product, token_scale, weight_scale, bias, dtype)
    assert result.dtype == dtype
    assert result.data_ptr() == product.data_ptr()
    # One rounding to the dtype of the result, and three in float32 of terms that may cancel.
    bound = EPSILON[dtype] * exact.abs() + 3 * 2**-24 * (exact.abs() + 8) + 2**-25
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("features", [4, 40, 2048, 4096, 14336, 20000, 53248])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_a_block_holds_a_token(features, width):
    threads, vectors = block(features, width)
    assert threads * vectors * width >= features > threads * (vectors - 1) * width
    assert threads % 32 == 0
    assert definitions(torch.float16, torch.int8, width, vectors, threads)["THREADS"] == threads
