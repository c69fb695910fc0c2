"""`decode.cu` against float64: on a GPU as NVRTC compiles it, else on an emulated one, as the C++ compiler does."""

import pytest
import torch

from hf_sparse24.kernels import decode
from hf_sparse24.kernels.decode import columns_of_a_chunk, decode_capability, definitions, few_tokens_linear, tiles
from hf_sparse24.packing import QUANTIZED_DTYPES, pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

from .emulation import address, emulator

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(EPSILON)
QUANTIZATIONS = [None, "int8", "fp8"]


def product(x, packed, bias=None, block=None, warps=2):
    """Run the kernel with a block of (row tiles, token tiles), by default the one it would take."""
    block = block or tiles(len(x), packed.weight.shape[0])[:2]
    if x.is_cuda:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "tiles", lambda tokens, outputs: (*block, warps))
            return few_tokens_linear(x, *packed, bias)
    run = emulator("decode", **definitions(x.dtype, packed.weight.dtype, *block, warps)).run
    result = torch.full((len(x), packed.weight.shape[0]), torch.nan, dtype=x.dtype)
    tensors = (x, *packed, bias, result)
    run(
        -(-result.shape[1] // (16 * block[0])),
        -(-len(x) // (8 * block[1])),
        *map(address, tensors),
        *result.shape,
        x.shape[1],
    )
    return result


def operands(tokens, outputs, chunks, dtype, quantization, device):
    features = chunks * columns_of_a_chunk(QUANTIZED_DTYPES.get(quantization, dtype))
    weight = prune_2to4(torch.randn(outputs, features, device=device).to(dtype))
    weight[0, :16] = 0  # groups of zeros, and one value in a group
    weight[1, :4] = torch.tensor([0, 0, 0, 3.0])
    x = torch.randn(tokens, features, device=device).to(dtype)
    return x, pack_weight(weight, quantization), torch.randn(outputs, device=device).to(dtype)


def check(result, x, packed, bias=None):
    exact = x.double() @ unpack_weight(packed).double().t() + (0 if bias is None else bias.double())
    # One rounding of the result, and a float32 sum of half as many products as there are features.
    bound = EPSILON[x.dtype] * exact.abs() + x.shape[1] * 2**-24 * exact.abs().max()
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "chunks", "block"),
    [(1, 16, 1, (1, 1)), (7, 20, 3, (1, 1)), (9, 40, 2, (2, 2)), (17, 16, 2, (1, 1)), (20, 70, 1, (4, 4))],
)
def test_equals_the_product_in_float64(tokens, outputs, chunks, block, dtype, quantization, kernel_device):
    x, packed, bias = operands(tokens, outputs, chunks, dtype, quantization, kernel_device)
    check(product(x, packed, bias, block), x, packed, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_every_value_of_8_bits_is_widened_exactly(quantization, dtype, kernel_device):
    codes = torch.arange(256, dtype=torch.uint8)
    if quantization == "fp8":
        codes[(codes & 127) == 127] = 0  # NaN
    values = codes.view(QUANTIZED_DTYPES[quantization])
    # Rows of 64 values, each alone in its group but for a zero, read out one feature after the other.
    weight = torch.zeros(16, 128)
    weight[:, ::4] = values.float().view(8, 32).repeat(2, 1)
    packed = pack_weight(weight.to(kernel_device))
    packed = packed._replace(weight=packed.weight.to(values.dtype), weight_scale=torch.ones(16, device=kernel_device))
    unit = torch.eye(128, dtype=dtype, device=kernel_device)
    result = product(unit, packed, block=(1, 8))
    assert torch.equal(result.t().float(), weight.to(kernel_device))


def test_every_pattern_of_a_group_in_every_place(kernel_device):
    patterns = torch.combinations(torch.arange(4)).tolist()
    weight = torch.zeros(16, 64)
    for row in range(16):
        for group in range(16):
            weight[row, [4 * group + place for place in patterns[(row + group) % 6]]] = torch.tensor([1.0, 2.0])
    packed = pack_weight(weight.half().to(kernel_device))
    unit = torch.eye(64, dtype=torch.float16, device=kernel_device)
    assert torch.equal(product(unit, packed, block=(1, 8)).t(), unpack_weight(packed))


def test_nothing_beyond_the_last_row_or_token_is_read_or_written(kernel_device):
    x, packed, bias = operands(3, 20, 2, torch.bfloat16, "int8", kernel_device)
    with_garbage = torch.full((16, x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    with_garbage[:3] = x
    check(product(with_garbage[:3], packed, bias, (2, 2)), x, packed, bias)


@pytest.mark.parametrize("warps", [1, 3])
def test_the_warps_of_a_block_share_the_columns(warps):
    x, packed, bias = operands(2, 16, 4, torch.float16, None, "cpu")
    check(product(x, packed, bias, (1, 1), warps), x, packed, bias)


def test_what_the_kernel_does_not_take_is_refused():
    _, packed, _ = operands(1, 16, 1, torch.bfloat16, None, "cpu")
    assert decode_capability(torch.bfloat16, torch.bfloat16, 64).ok
    assert decode_capability(torch.float16, torch.int8, 128).ok
    for arguments in ((torch.float32, torch.float32, 64), (torch.float16, torch.bfloat16, 64)):
        assert "takes float16 and bfloat16 activations" in decode_capability(*arguments).reason
    assert "divisible by 128" in decode_capability(torch.float16, torch.int8, 64).reason
    with pytest.raises(ValueError, match="takes in_features divisible by 64"):
        few_tokens_linear(torch.randn(1, 32).bfloat16(), packed.weight[:, :16], packed.weight_indices, None, None)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("tokens", [0, 1, 8, 17, 64, 70])
    def test_real_shapes(self, tokens, quantization):
        x, packed, bias = operands(tokens, 4096, 4096 // 128, torch.bfloat16, quantization, "cuda")
        check(few_tokens_linear(x, *packed, bias), x, packed, bias)

    def test_leading_dimensions_and_strides(self):
        x, packed, bias = operands(6, 32, 2, torch.bfloat16, None, "cuda")
        wide = torch.stack([x, x + 1], 1).flatten(1)[:, : x.shape[1]].unflatten(0, (2, 3))
        assert torch.equal(few_tokens_linear(wide, *packed, bias).flatten(0, 1), few_tokens_linear(x, *packed, bias))

    def test_a_cuda_graph_and_another_stream(self):
        x, packed, bias = operands(4, 256, 8, torch.bfloat16, "int8", "cuda")
        expected = few_tokens_linear(x, *packed, bias)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(few_tokens_linear(x, *packed, bias), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = few_tokens_linear(x, *packed, bias)
        x.add_(1)
        graph.replay()
        check(result, x, packed, bias)
