"""`experts_linear`: the contract of an operator, and each expert's rows as `linear` has them."""

import pytest
import torch

import hf_sparse24.kernels.experts  # noqa: F401  (registers the operator for CUDA)
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

from .test_ops import opchecks

ops = torch.ops.hf_sparse24
QUANTIZATIONS = [None, "int8", "fp8"]
EXPERTS, OUT, IN = 5, 24, 40
# Expert 1 and the last have no rows; two rows at the end belong to nobody.
OFFSETS, ROWS = [3, 3, 4, 9, 9], 11


def operands(quantization=None, device="cpu", dtype=torch.float32):
    weight = prune_2to4(torch.randn(EXPERTS, OUT, IN, device=device).to(dtype))
    offsets = torch.tensor(OFFSETS, device=device)
    x, bias = (torch.randn(size, device=device).to(dtype) for size in ((ROWS, IN), (EXPERTS, OUT)))
    return x, offsets, pack_weight(weight, quantization), bias


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_keeps_the_contract_of_operators(quantization, with_bias, device):
    x, offsets, packed, bias = operands(quantization, device)
    for requires_grad in (False, True):
        bias = bias.detach().requires_grad_(requires_grad) if with_bias else None
        arguments = (x.requires_grad_(requires_grad), offsets, *packed, bias)
        torch.library.opcheck(ops.experts_linear.default, arguments, test_utils=opchecks(quantization))
    arguments = (torch.randn(ROWS, OUT, device=device), offsets, *packed)
    torch.library.opcheck(ops.experts_linear_backward.default, arguments, test_utils=opchecks(quantization))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_each_expert_has_its_own_rows(quantization, integer, device):
    x, offsets, packed, bias = operands(quantization, device)
    result = ops.experts_linear(x, offsets.to(integer), *packed, bias, backend="reference")
    expected, start = torch.zeros_like(result), 0
    for expert, end in enumerate(OFFSETS):
        expected[start:end] = ops.linear(x[start:end], *packed.of_expert(expert), bias[expert], backend="reference")
        start = end
    assert torch.equal(result, expected)  # the same arithmetic, row by row
    assert not result[9:].any()
    nobody = ops.experts_linear(x[:0], torch.zeros_like(offsets), *packed, bias)
    assert nobody.shape == (0, OUT)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_are_those_of_the_dequantized_weights(quantization):
    x, offsets, packed, bias = operands(quantization)
    dense, gradient = unpack_weight(packed), torch.randn(ROWS, OUT)
    for needed in ((True, True), (True, False), (False, True)):
        x, bias = x.detach().requires_grad_(needed[0]), bias.detach().requires_grad_(needed[1])
        (ops.experts_linear(x, offsets, *packed, bias) * gradient).sum().backward()
        expected_x, expected_bias, start = torch.zeros(ROWS, IN), torch.zeros(EXPERTS, OUT), 0
        for expert, end in enumerate(OFFSETS):
            expected_x[start:end] = gradient[start:end] @ dense[expert]
            expected_bias[expert] = gradient[start:end].sum(0)
            start = end
        for tensor, expected, is_needed in zip((x, bias), (expected_x, expected_bias), needed, strict=True):
            if is_needed:  # float32 sums of at most 24 terms
                torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-5)
        x.grad = bias.grad = None


def test_wrong_operands_are_refused():
    x, offsets, packed, _ = operands()
    with pytest.raises(RuntimeError, match="5 experts need as many integer offsets"):
        ops.experts_linear(x, offsets[:4], *packed, None)
    with pytest.raises(RuntimeError, match="5 experts need as many integer offsets"):
        ops.experts_linear(x, offsets.float(), *packed, None)
    with pytest.raises(RuntimeError, match=r"the input is torch\.float16, the weight torch\.float32"):
        ops.experts_linear(x.half(), offsets, *packed, None)
    with pytest.raises(RuntimeError, match="the input has 36 features, the weight 40"):
        ops.experts_linear(x[:, :36], offsets, *packed, None)
    with pytest.raises(RuntimeError, match="must be 3-D"):
        ops.experts_linear(x, offsets, *packed.of_expert(0), None)
