"""`decode.cu` against float64: on a GPU as NVRTC compiles it, else on an emulated one, as the C++ compiler does."""

import pytest
import torch

from hf_sparse24.kernels import decode
from hf_sparse24.kernels.decode import Block, decode_capability, definitions, few_tokens_linear, tiles
from hf_sparse24.packing import QUANTIZED_DTYPES, pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

from .emulation import address, emulator

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(EPSILON)
QUANTIZATIONS = [None, "int8", "fp8"]
SMALL = Block(row_tiles=1, row_warps=1, teams=1, token_tiles=1, units=1, stages=2, cluster=1)


def product(x, packed, bias=None, block=None):
    """Run the kernel with some block, by default the one it would take."""
    block = block or SMALL._replace(token_tiles=min(8, -(-len(x) // 8)))
    if x.is_cuda:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "tiles", lambda *arguments: block)
            decode._compiled.cache_clear()
            result = few_tokens_linear(x, *packed, bias)
        decode._compiled.cache_clear()
        return result
    run = emulator("decode", **definitions(x.dtype, packed.weight.dtype, block)).run
    result = torch.full((len(x), packed.weight.shape[0]), torch.nan, dtype=x.dtype)
    grid = (-(-len(x) // block.tokens), -(-result.shape[1] // block.rows) * block.cluster)
    tensors = (x, *packed, bias, result)
    run(*grid, block.shared_memory(packed.weight.dtype), *map(address, tensors), *result.shape, x.shape[1])
    return result


def operands(tokens, outputs, units, dtype, quantization, device):
    features = 64 * units
    weight = prune_2to4(torch.randn(outputs, features, device=device).to(dtype))
    weight[0, :16] = 0  # groups of zeros, and one value in a group
    weight[1, :4] = torch.tensor([0, 0, 0, 3.0])
    x = torch.randn(tokens, features, device=device).to(dtype)
    return x, pack_weight(weight, quantization), torch.randn(outputs, device=device).to(dtype)


def check(result, x, packed, bias=None):
    exact = x.double() @ unpack_weight(packed).double().t() + (0 if bias is None else bias.double())
    # One rounding of the result, and a float32 sum of half as many products as there are features.
    largest = exact.abs().max() if exact.numel() else 0
    bound = EPSILON[x.dtype] * exact.abs() + x.shape[1] * 2**-24 * largest
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "units", "block"),
    [
        (1, 16, 1, SMALL),
        (7, 20, 3, SMALL),
        (17, 16, 2, SMALL._replace(units=2, stages=3)),
        (9, 40, 8, SMALL._replace(row_tiles=2, token_tiles=2, teams=2, stages=3)),
        (3, 100, 12, Block(row_tiles=2, row_warps=2, teams=1, token_tiles=1, units=4, stages=2, cluster=1)),
        (20, 70, 5, Block(row_tiles=1, row_warps=3, teams=2, token_tiles=4, units=1, stages=3, cluster=2)),
        (33, 36, 6, Block(row_tiles=1, row_warps=2, teams=1, token_tiles=8, units=2, stages=4, cluster=4)),
    ],
    ids=str,
)
def test_equals_the_product_in_float64(tokens, outputs, units, block, dtype, quantization, kernel_device):
    x, packed, bias = operands(tokens, outputs, units, dtype, quantization, kernel_device)
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
    result = product(unit, packed, block=SMALL._replace(token_tiles=8))
    assert torch.equal(result.t().float(), weight.to(kernel_device))


def test_every_pattern_of_a_group_in_every_place(kernel_device):
    patterns = torch.combinations(torch.arange(4)).tolist()
    weight = torch.zeros(16, 64)
    for row in range(16):
        for group in range(16):
            weight[row, [4 * group + place for place in patterns[(row + group) % 6]]] = torch.tensor([1.0, 2.0])
    packed = pack_weight(weight.half().to(kernel_device))
    unit = torch.eye(64, dtype=torch.float16, device=kernel_device)
    assert torch.equal(product(unit, packed, block=SMALL._replace(token_tiles=8)).t(), unpack_weight(packed))


def test_nothing_beyond_the_last_row_or_token_is_read_or_written(kernel_device):
    x, packed, bias = operands(3, 20, 2, torch.bfloat16, "int8", kernel_device)
    with_garbage = torch.full((16, x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    with_garbage[:3] = x
    check(product(with_garbage[:3], packed, bias, SMALL._replace(row_tiles=2, token_tiles=2)), x, packed, bias)


@pytest.mark.parametrize(("capability", "room"), [((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((12, 0), 99)])
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8])
def test_every_projection_gets_a_block_that_fits(value_dtype, capability, room):
    for token_tiles in (1, 2, 4, 8):
        for outputs, features in [(16, 64), (576, 1536), (1024, 4096), (28672, 4096), (4096, 14336)]:
            block = tiles(token_tiles, outputs, features, value_dtype, capability, 132)
            assert block.tokens == 8 * token_tiles
            assert features % (64 * block.units) == 0
            assert block.shared_memory(value_dtype) <= room * 1024
            assert block.stages >= 2
            assert block.cluster == 1 or capability >= (9, 0)


def test_what_the_kernel_does_not_take_is_refused():
    _, packed, _ = operands(1, 16, 1, torch.bfloat16, None, "cpu")
    assert decode_capability(torch.bfloat16, torch.bfloat16, 64).ok
    assert decode_capability(torch.float16, torch.int8, 64).ok
    for arguments in ((torch.float32, torch.float32, 64), (torch.float16, torch.bfloat16, 64)):
        assert "takes float16 and bfloat16 activations" in decode_capability(*arguments).reason
    with pytest.raises(ValueError, match="takes in_features divisible by 64"):
        few_tokens_linear(torch.randn(1, 32).bfloat16(), packed.weight[:, :16], packed.weight_indices, None, None)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("tokens", [0, 1, 8, 17, 64, 70])
    def test_real_shapes(self, tokens, quantization):
        x, packed, bias = operands(tokens, 4096, 64, torch.bfloat16, quantization, "cuda")
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
