"""`decode.cu` against float64: on a GPU as NVRTC compiles it, else on an emulated one, as the C++ compiler does."""

import math

import pytest
import torch

from hf_sparse24.kernels import decode
from hf_sparse24.kernels.decode import (
    Block,
    Problem,
    decode_capability,
    definitions,
    few_tokens_linear,
    scaled_capability,
    scaled_linear,
    tiles,
)
from hf_sparse24.kernels.decode_blocks import nanoseconds
from hf_sparse24.kernels.nvrtc import clusters_at_once
from hf_sparse24.kernels.reference import quantize_per_token
from hf_sparse24.packing import QUANTIZED_DTYPES, pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

from .emulation import address, emulator

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(EPSILON)
QUANTIZATIONS = [None, "int8", "fp8"]
SHAPES = [(16, 64), (576, 576), (576, 1536), (1536, 576), (1024, 4096), (2048, 2048), (4096, 4096), (4096, 14336)]
SHAPES += [(11008, 4096), (14336, 4096), (28672, 4096), (8192, 28672), (53248, 16384)]
CLUSTERS = {1: 132, 2: 66, 4: 32, 8: 15}  # at once, as on an H100
SMALL = Block(row_tiles=1, row_warps=1, teams=1, token_tiles=1, units=1, stages=2, cluster=1)


def product(x, packed, bias=None, block=None, scale=None, out_dtype=None):
    """Run the kernel with some block, by default a small one; on quantized `x` if there is an `out_dtype`."""
    block = block or SMALL._replace(token_tiles=min(8, -(-len(x) // 8)))
    if x.is_cuda:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "tiles", lambda *arguments: block)
            decode._compiled.cache_clear()
            if out_dtype is None:
                result = few_tokens_linear(x, *packed, bias)
            else:
                result = scaled_linear(x, scale, *packed, bias, out_dtype)
        decode._compiled.cache_clear()
        return result
    run = emulator("decode", **definitions(x.dtype, packed.weight.dtype, out_dtype or x.dtype, block)).run
    result = torch.full((len(x), packed.weight.shape[0]), torch.nan, dtype=out_dtype or x.dtype)
    grid = (-(-len(x) // block.tokens), -(-result.shape[1] // block.rows) * block.cluster)
    tensors = (x, scale, *packed, bias, result)
    shared_memory = block.shared_memory(packed.weight.dtype, x.dtype)
    run(*grid, shared_memory, *map(address, tensors), *result.shape, x.shape[1])
    return result


def operands(tokens, outputs, units, dtype, quantization, device):
    features = 64 * units
    weight = prune_2to4(torch.randn(outputs, features, device=device).to(dtype))
    weight[0, :16] = 0  # groups of zeros, and one value in a group
    weight[1, :4] = torch.tensor([0, 0, 0, 3.0])
    x = torch.randn(tokens, features, device=device).to(dtype)
    return x, pack_weight(weight, quantization), torch.randn(outputs, device=device).to(dtype)


def check(result, x, packed, bias=None, scale=None):
    seen = x.double() if scale is None else x.double() * scale.double()
    exact = seen @ unpack_weight(packed).double().t() + (0 if bias is None else bias.double())
    # One rounding of the result, and a float32 sum of half as many products as there are features.
    largest = exact.abs().max() if exact.numel() else 0
    bound = EPSILON[result.dtype] * exact.abs() + x.shape[1] * 2**-24 * largest
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


def quantized_operands(tokens, outputs, units, dtype, quantization, device):
    """Return what `operands` does with `x` quantized, and its scales."""
    value_dtype = QUANTIZED_DTYPES[quantization]
    if device == "cuda" and not scaled_capability(value_dtype, 64, dtype, torch.cuda.get_device_capability()).ok:
        pytest.skip("this GPU has no sparse FP8 products of a warp")
    x, packed, bias = operands(tokens, outputs, units, dtype, quantization, device)
    return *quantize_per_token(x, packed.weight.dtype), packed, bias


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "units", "dtype", "block"),
    [
        (1, 16, 1, torch.bfloat16, SMALL),
        (7, 20, 3, torch.float16, SMALL),
        (17, 40, 2, torch.bfloat16, SMALL._replace(units=2, stages=3, token_tiles=4)),
        (33, 36, 12, torch.float16, Block(1, 2, 2, token_tiles=8, units=2, stages=4, cluster=2)),
        (64, 100, 8, torch.bfloat16, Block(2, 2, 1, token_tiles=8, units=8, stages=2, cluster=1)),
        (65, 130, 4, torch.bfloat16, Block(4, 2, 1, token_tiles=8, units=1, stages=3, cluster=4)),
        (128, 66, 4, torch.float16, Block(2, 7, 1, token_tiles=16, units=2, stages=2, cluster=1)),
        (255, 48, 2, torch.bfloat16, Block(1, 3, 1, token_tiles=16, units=2, stages=2, cluster=1)),
        (256, 17, 3, torch.float16, Block(1, 1, 1, token_tiles=16, units=1, stages=4, cluster=3)),
    ],
    ids=str,
)
def test_quantized_activations_give_the_product_in_float64(
    tokens, outputs, units, dtype, block, quantization, kernel_device
):
    x, scale, packed, bias = quantized_operands(tokens, outputs, units, dtype, quantization, kernel_device)
    for with_bias in (bias, None):
        check(product(x, packed, with_bias, block, scale, dtype), x, packed, with_bias, scale)
    # Without the scales of the tokens, which are then for the caller to apply; in bfloat16, whose range is enough.
    result = product(x, packed, None, block, None, torch.bfloat16)
    check(result, x, packed, None, torch.ones_like(scale))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_random_shapes_of_quantized_activations_and_the_blocks_that_they_get(quantization, kernel_device):
    dtype, generator = QUANTIZED_DTYPES[quantization], torch.Generator().manual_seed(torch.seed() % 2**31)
    for _ in range(4):
        tokens, outputs, units = (int(torch.randint(2, most, (), generator=generator)) for most in (140, 150, 9))
        token_tiles = decode._TOKEN_TILES[min(tokens, decode.MOST_QUANTIZED_TOKENS)]
        problem = Problem(outputs, 64 * units, dtype, dtype, (9, 0), CLUSTERS.__getitem__)
        block = tiles(token_tiles, problem)
        x, scale, packed, bias = quantized_operands(
            tokens, outputs, units, torch.bfloat16, quantization, kernel_device
        )
        check(product(x, packed, bias, block, scale, torch.bfloat16), x, packed, bias, scale)


def test_sums_of_int8_are_exact_where_float32_would_round(kernel_device):
    weight = torch.zeros(16, 8192, device=kernel_device)
    weight[:, ::4] = weight[:, 1::4] = 127.0
    packed = pack_weight(weight)
    packed = packed._replace(weight=packed.weight.char(), weight_scale=torch.ones(16, device=kernel_device))
    packed.weight[1, 0] = 122
    x = torch.full((8, 8192), 127, dtype=torch.int8, device=kernel_device)
    x[:, 4096:] = -127
    # On the way the sum is 2048 * 127 * 127 > 2^24, and odd every other time; in the end it is 0, or what row 1 lacks.
    result = product(x, packed, None, SMALL, None, torch.float16)
    expected = torch.tensor([0, -5 * 127] + [0] * 14).half()
    assert torch.equal(result, expected.to(kernel_device).expand(8, 16))


def test_every_code_of_8_bits_is_multiplied_by_its_value(kernel_device):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0  # NaN of FP8
    for dtype in QUANTIZED_DTYPES.values():
        if (
            kernel_device == "cuda"
            and not scaled_capability(dtype, 64, torch.float16, torch.cuda.get_device_capability()).ok
        ):
            continue
        values = codes.view(dtype).to(kernel_device)
        weight = torch.zeros(16, 64, device=kernel_device)
        weight[:, 0] = 1
        packed = pack_weight(weight)
        packed = packed._replace(weight=packed.weight.to(dtype), weight_scale=torch.ones(16, device=kernel_device))
        x = torch.zeros(256, 64, device=kernel_device).to(dtype)
        x.view(torch.uint8)[:, 0] = values.view(torch.uint8)
        result = product(x, packed, None, SMALL._replace(token_tiles=16), None, torch.float16)
        assert torch.equal(result, values.half().view(-1, 1).expand(-1, 16))


def test_every_pattern_of_a_group_in_every_place_of_8_bits(kernel_device):
    patterns = torch.combinations(torch.arange(4)).tolist()
    weight = torch.zeros(16, 64)
    for row in range(16):
        for group in range(16):
            weight[row, [4 * group + place for place in patterns[(row + group) % 6]]] = torch.tensor([1.0, 2.0])
    packed = pack_weight(weight.to(kernel_device))
    packed = packed._replace(weight=packed.weight.char(), weight_scale=torch.ones(16, device=kernel_device))
    unit = torch.eye(64, dtype=torch.int8, device=kernel_device)
    result = product(unit, packed, None, SMALL._replace(token_tiles=8), None, torch.bfloat16)
    assert torch.equal(result.t().float(), weight.to(kernel_device))


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
@pytest.mark.parametrize(
    ("value_dtype", "input_dtype", "token_tiles"),
    [
        (torch.bfloat16, torch.bfloat16, (1, 2, 4, 8)),
        (torch.int8, torch.bfloat16, (1, 2, 4, 8)),
        (torch.int8, torch.int8, (1, 2, 4, 8, 16)),
    ],
)
def test_every_projection_gets_a_block_that_fits(value_dtype, input_dtype, token_tiles, capability, room):
    for tokens in token_tiles:
        for outputs, features in SHAPES:
            at_once = CLUSTERS.__getitem__
            block = tiles(tokens, Problem(outputs, features, value_dtype, input_dtype, capability, at_once))
            assert block.tokens == 8 * tokens
            assert features % (64 * block.units) == 0
            assert block.shared_memory(value_dtype, input_dtype) <= room * 1024
            assert block.stages >= 2
            assert block.cluster == 1 or capability >= (9, 0)
            pieces = 16 * block.units // value_dtype.itemsize if input_dtype.itemsize == 2 else 4 * block.units
            assert 32 * block.row_warps % pieces == 0  # of a token, as `fetch` copies them
            assert block.threads <= 512
            assert 4 * block.row_tiles * block.token_tiles <= 128  # sums of a thread: more do not fit in its registers


def test_a_cluster_that_does_not_fit_at_once_is_taken_to_double_up():
    problem = Problem(4096, 14336, torch.int8, torch.int8, (9, 0), CLUSTERS.__getitem__)
    fits = tiles(8, problem)
    assert fits.cluster > 1
    clusters = math.ceil(4096 / fits.rows)
    does_not = problem._replace(clusters_at_once={**CLUSTERS, fits.cluster: clusters - 1}.__getitem__)
    assert does_not.blocks_each(fits) == 2 * problem.blocks_each(fits) == 2
    assert nanoseconds(fits, does_not) > nanoseconds(fits, problem)


def test_a_part_of_a_gpu_that_holds_no_cluster_gets_blocks_without():
    few = Problem(1024, 4096, torch.int8, torch.int8, (9, 0), {1: 2, 2: 1, 4: 0, 8: 0}.__getitem__)
    for token_tiles in (1, 2, 4, 8, 16):
        assert tiles(token_tiles, few).cluster <= 2


def test_what_the_kernel_does_not_take_is_refused():
    _, packed, _ = operands(1, 16, 1, torch.bfloat16, None, "cpu")
    assert decode_capability(torch.bfloat16, torch.bfloat16, 64).ok
    assert decode_capability(torch.float16, torch.int8, 64).ok
    for arguments in ((torch.float32, torch.float32, 64), (torch.float16, torch.bfloat16, 64)):
        assert "takes float16 and bfloat16 activations" in decode_capability(*arguments).reason
    with pytest.raises(ValueError, match="takes in_features divisible by 64"):
        few_tokens_linear(torch.randn(1, 32).bfloat16(), packed.weight[:, :16], packed.weight_indices, None, None)


def test_what_the_kernel_does_not_take_quantized_is_refused(monkeypatch):
    assert scaled_capability(torch.int8, 64, torch.bfloat16, (8, 0)).ok
    assert scaled_capability(torch.float8_e4m3fn, 64, torch.float16, (8, 9)).ok
    for compute in ((8, 6), (9, 0), (10, 0)):
        assert not scaled_capability(torch.float8_e4m3fn, 64, torch.bfloat16, compute).ok
    assert "divisible by 64" in scaled_capability(torch.int8, 96, torch.bfloat16, (9, 0)).reason
    assert "16-bit result" in scaled_capability(torch.int8, 64, torch.float32, (9, 0)).reason
    monkeypatch.setattr(decode, "device_capability", lambda device: (9, 0))
    x, scale, packed, _ = quantized_operands(2, 16, 1, torch.bfloat16, "int8", "cpu")
    with pytest.raises(ValueError, match="takes activations quantized as the weight is"):
        scaled_linear(x.float(), scale, *packed, None, torch.bfloat16)
    with pytest.raises(ValueError, match="one for each token"):
        scaled_linear(x, scale[:1], *packed, None, torch.bfloat16)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("quantization", ["int8", "fp8"])
    @pytest.mark.parametrize("tokens", [0, 1, 17, 33, 64, 65, 128, 255, 256, 300])
    @pytest.mark.parametrize(("outputs", "features"), [(4096, 4096), (1024, 4096), (4096, 14336), (100, 192)])
    def test_real_shapes_of_quantized_activations(self, outputs, features, tokens, quantization):
        x, scale, packed, bias = quantized_operands(
            tokens, outputs, features // 64, torch.bfloat16, quantization, "cuda"
        )
        check(scaled_linear(x, scale, *packed, bias, torch.bfloat16), x, packed, bias, scale)

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_clusters_at_once_are_those_that_the_driver_counts(self, size):
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        if size > 1 and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("this GPU has no clusters")
        assert multiprocessors * 3 // 4 <= size * clusters_at_once(size, 0) <= multiprocessors

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
