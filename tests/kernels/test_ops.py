"""The operators: the contract (opcheck), and the reference arithmetic against float64."""

import gc

import pytest
import torch

from hf_sparse24.kernels import reference
from hf_sparse24.kernels.reference import integer_matmul, quantize_per_token, unpacked_once
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

ops = torch.ops.hf_sparse24
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operands(rows=24, columns=40, quantization=None, dtype=torch.float32, device="cpu"):
    weight = prune_2to4(torch.randn(rows, columns, device=device).to(dtype))
    return pack_weight(weight, quantization)


def bfloat16_ulps(dtype):
    return 2.0 ** {torch.float32: -22, torch.float16: -10, torch.bfloat16: -7}[dtype]


def opchecks(quantization):
    # opcheck's schema test compares tensors with allclose, which torch lacks for float8.
    return OPCHECKS if quantization != "fp8" else OPCHECKS[1:]


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_keeps_the_contract_of_operators(quantization, shape, with_bias, device):
    packed = operands(quantization=quantization, device=device)
    bias = torch.randn(24, device=device) if with_bias else None
    for requires_grad in (False, True):
        x = torch.randn(shape, device=device, requires_grad=requires_grad)
        torch.library.opcheck(ops.linear.default, (x, *packed, bias), test_utils=opchecks(quantization))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_the_quantized_operators_keep_the_contract(quantization, device):
    packed = operands(quantization=quantization, device=device)
    dtype = packed.weight.dtype
    for x in (torch.randn(3, 40, device=device), torch.randn(3, 40, 5, device=device).transpose(1, 2)):
        torch.library.opcheck(ops.quantize_per_token.default, (x, dtype))
    values, scale = quantize_per_token(torch.randn(3, 40, device=device), dtype)
    arguments = (values, scale, *packed, None, torch.bfloat16)
    torch.library.opcheck(ops.scaled_linear.default, arguments, test_utils=opchecks(quantization))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_without_quantization_is_the_dense_product(dtype, device):
    packed = operands(dtype=dtype, device=device)
    x, bias = torch.randn(5, 40, device=device).to(dtype), torch.randn(24, device=device).to(dtype)
    dense = torch.nn.functional.linear(x, unpack_weight(packed), bias)
    # The same torch call on the same operands: equal to the last bit.
    assert torch.equal(ops.linear(x, *packed, bias), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantized_linear_is_the_product_of_the_quantized_operands(quantization, dtype, device):
    packed = operands(64, 2048, quantization, dtype, device)
    x, bias = torch.randn(7, 2048, device=device).to(dtype), torch.randn(64, device=device).to(dtype)
    values, scale = quantize_per_token(x, packed.weight.dtype)
    exact = (values.double() * scale.double()) @ unpack_weight(packed).double().t() + bias.double()
    result = ops.linear(x, *packed, bias, backend="reference")
    assert result.dtype == dtype
    # The sum in float64 against int32 (exact) or float32 (K = 2048 products), the float32 scales, and one rounding to
    # the output; FP8 with bfloat16 rounds the sum to bfloat16 as well. Bounds relative to the largest output.
    roundings = 2 if quantization == "fp8" and dtype == torch.bfloat16 else 1
    largest = exact.abs().max()
    assert (result.double() - exact).abs().max() <= largest * (roundings * bfloat16_ulps(dtype) / 2 + 2048 * 2**-24)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_quantization_error_is_that_of_its_format(quantization, bound):
    # Relative error of random normal operands: each side about 1 % in INT8 and 3 % in FP8 e4m3.
    weight = prune_2to4(torch.randn(64, 512))
    x = torch.randn(32, 512)
    exact = x @ weight.t()
    error = (ops.linear(x, *pack_weight(weight, quantization), None) - exact).norm() / exact.norm()
    assert 0 < error < bound


def test_integer_products_are_exact_where_float32_would_round():
    left = torch.full((3, 8192), 127, dtype=torch.int8)
    right = torch.full((2, 8192), 127, dtype=torch.int8)
    right[1, 0] = 126
    # 8192 * 127^2 = 132,128,768 > 2^24: the difference of the two columns would be lost in float32.
    assert integer_matmul(left, right).tolist() == [[132128768, 132128641]] * 3


def test_the_fallback_for_old_processors_gives_the_same_integers(monkeypatch):
    left, right = torch.randint(-127, 128, (5, 4096)).char(), torch.randint(-127, 128, (6, 4096)).char()
    fast = integer_matmul(left, right)
    monkeypatch.setattr(reference, "_cpu_sums_int8_exactly", lambda: False)
    assert torch.equal(integer_matmul(left, right).long(), fast.long())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_token_of_zeros_and_one_that_is_not_finite(dtype):
    x = torch.tensor([[0.0] * 40, [float("nan")] + [1.0] * 39, [float("inf")] + [1.0] * 39, [1.0] * 40])
    quantization = "int8" if dtype == torch.int8 else "fp8"
    result = ops.linear(x, *operands(quantization=quantization), None)
    assert (result[0] == 0).all()
    assert not result[1].isfinite().any()
    assert not result[2].isfinite().all()
    assert result[3].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_no_tokens_give_no_tokens(quantization, shape):
    result = ops.linear(torch.empty(shape), *operands(quantization=quantization), None)
    assert result.shape == (*shape[:-1], 24)


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_gradients_reach_the_input_through_the_dequantized_weight_and_the_bias(quantization):
    packed = operands(quantization=quantization)
    output_gradient = torch.randn(2, 3, 24)
    for needed in ((True, True), (True, False), (False, True)):
        x, bias = torch.randn(2, 3, 40, requires_grad=needed[0]), torch.randn(24, requires_grad=needed[1])
        (ops.linear(x, *packed, bias) * output_gradient).sum().backward()
        expected = (output_gradient @ unpack_weight(packed), output_gradient.sum((0, 1)))
        for tensor, gradient, is_needed in zip((x, bias), expected, needed, strict=True):
            # Two float32 products over N = 24 terms.
            if is_needed:
                torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-5)


def test_wrong_operands_are_refused():
    packed = operands()
    with pytest.raises(RuntimeError, match=r"the input is torch\.float16, the weight torch\.float32"):
        ops.linear(torch.randn(2, 40).half(), *packed, None)
    with pytest.raises(RuntimeError, match="the input has 36 features, the weight 40"):
        ops.linear(torch.randn(2, 36, device="meta"), *(t if t is None else t.to("meta") for t in packed), None)


class TestUnpackedOnce:
    def test_the_second_call_takes_the_first_ones_result(self):
        packed = operands()
        first = unpacked_once(packed.weight, packed.weight_indices, torch.float32)
        assert unpacked_once(packed.weight, packed.weight_indices, torch.float32) is first

    def test_writing_to_the_weight_or_the_indices_unpacks_again(self):
        packed, other = operands(), operands()
        ops.linear(torch.ones(1, 40), *packed, None)
        packed.weight.copy_(other.weight)
        packed.weight_indices.copy_(other.weight_indices)
        assert torch.equal(ops.linear(torch.ones(1, 40), *packed, None), ops.linear(torch.ones(1, 40), *other, None))

    def test_another_dtype_unpacks_again(self):
        packed = operands(quantization="fp8")
        assert unpacked_once(packed.weight, packed.weight_indices, torch.float32).dtype == torch.float32
        assert unpacked_once(packed.weight, packed.weight_indices, torch.bfloat16).dtype == torch.bfloat16

    def test_memory_is_given_back_with_the_packed_weight(self):
        packed = operands()
        unpacked_once(packed.weight, packed.weight_indices, torch.float32)
        before = len(reference._UNPACKED)
        del packed
        gc.collect()
        assert len(reference._UNPACKED) == before - 1

    def test_inference_tensors_are_never_stale(self):
        with torch.inference_mode():
            packed, other = operands(), operands()
            ops.linear(torch.ones(1, 40), *packed, None)
            packed.weight.copy_(other.weight)
            packed.weight_indices.copy_(other.weight_indices)
            assert torch.equal(
                ops.linear(torch.ones(1, 40), *packed, None), ops.linear(torch.ones(1, 40), *other, None)
            )

    def test_new_memory_at_an_old_address_is_not_mistaken_for_the_old(self):
        packed = operands()
        for _ in range(20):
            packed.weight.data = torch.randn_like(packed.weight)
            expected = torch.nn.functional.linear(torch.ones(1, 40), unpack_weight(packed))
            assert torch.equal(ops.linear(torch.ones(1, 40), *packed, None), expected)
