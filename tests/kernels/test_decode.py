"""The Triton kernel against float64: on a GPU as compiled, else in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from hf_sparse24.kernels.decode import few_tokens_linear
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def operands(tokens, outputs, features, dtype, quantization, triton_device):
    weight = prune_2to4(torch.randn(outputs, features, device=triton_device).to(dtype))
    x = torch.randn(tokens, features, device=triton_device).to(dtype)
    bias = torch.randn(outputs, device=triton_device).to(dtype)
    return x, pack_weight(weight, quantization), bias


def exact(x, packed, bias=None):
    product = x.double() @ unpack_weight(packed).double().t()
    return product if bias is None else product + bias.double()


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def dtype(request, triton_device):
    if request.param == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    return request.param


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "features"),
    [(1, 16, 4), (1, 48, 40), (2, 8, 132), (7, 40, 256), (16, 64, 516), (17, 33, 64), (64, 16, 128), (70, 24, 36)],
)
def test_equals_the_product_in_float64(tokens, outputs, features, dtype, quantization, triton_device):
    x, packed, bias = operands(tokens, outputs, features, dtype, quantization, triton_device)
    result = few_tokens_linear(x, *packed, bias)
    expected = exact(x, packed, bias)
    assert result.dtype == dtype
    # One rounding of the result, and a float32 sum of half as many products as there are features.
    bound = EPSILON[dtype] * expected.abs() + features * 2**-24 * expected.abs().max()
    assert ((result.double() - expected).abs() <= bound).all()


def test_leading_dimensions_and_no_bias(dtype, triton_device):
    x, packed, _ = operands(6, 32, 64, dtype, "int8", triton_device)
    result = few_tokens_linear(x.view(2, 3, 64), *packed, None)
    assert result.shape == (2, 3, 32)
    assert torch.equal(result.view(6, 32), few_tokens_linear(x, *packed, None))


def test_strided_tokens(dtype, triton_device):
    x, packed, bias = operands(8, 32, 64, dtype, None, triton_device)
    wide = torch.stack([x, x + 1], 1).flatten(1)[:, :64]
    assert not wide.is_contiguous()
    assert torch.equal(few_tokens_linear(wide, *packed, bias), few_tokens_linear(wide.contiguous(), *packed, bias))


def test_no_tokens(triton_device):
    x, packed, bias = operands(0, 32, 64, torch.float16, None, triton_device)
    assert few_tokens_linear(x, *packed, bias).shape == (0, 32)


def test_what_is_pruned_does_not_count_even_where_the_input_is_huge(dtype, triton_device):
    x, packed, _ = operands(1, 16, 64, dtype, None, triton_device)
    pruned = (unpack_weight(packed) == 0).all(0)
    x[:, pruned] = 1e4
    torch.testing.assert_close(few_tokens_linear(x, *packed, None).double(), exact(x, packed), rtol=0.01, atol=0.1)


@pytest.mark.parametrize(
    ("input_dtype", "weight_dtype"), [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_other_dtypes_are_refused(input_dtype, weight_dtype, triton_device):
    _, packed, _ = operands(1, 16, 64, weight_dtype, None, triton_device)
    with pytest.raises(ValueError, match="takes float16 or bfloat16"):
        few_tokens_linear(torch.randn(1, 64, device=triton_device).to(input_dtype), *packed, None)
