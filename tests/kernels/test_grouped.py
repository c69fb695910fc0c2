"""`decode.cu` for stacks, on a GPU or an emulated one: each expert has what the kernel for one projection gives."""

import ctypes

import pytest
import torch

from hf_sparse24.kernels import grouped
from hf_sparse24.kernels.decode import Block, Problem, scaled_capability, tiles
from hf_sparse24.kernels.grouped import grouped_definitions, grouped_linear, most_tiles
from hf_sparse24.kernels.reference import quantize_per_token
from hf_sparse24.packing import QUANTIZED_DTYPES, pack_weight
from hf_sparse24.pattern import prune_2to4

from .emulation import address, emulator
from .test_decode import CLUSTERS, QUANTIZATIONS, SMALL, check, product

# Experts without tokens in front, between and last; with one; with a full tile; with more than two tiles.
MIXED = [0, 1, 1, 9, 17, 44, 44]
BLOCKS = [
    SMALL,
    SMALL._replace(row_tiles=2, token_tiles=2, teams=2, stages=3),
    Block(row_tiles=1, row_warps=3, teams=2, token_tiles=4, units=1, stages=3, cluster=2),
    Block(row_tiles=1, row_warps=2, teams=1, token_tiles=2, units=2, stages=4, cluster=4),
]


def run(x, packed, offsets, bias=None, block=SMALL, scale=None, out_dtype=None):
    """Run the grouped kernel with some block; on a CPU through the emulator."""
    out_dtype, (experts, outputs, _) = out_dtype or x.dtype, packed.weight.shape
    offsets = torch.tensor(offsets, dtype=torch.int32, device=x.device)
    if x.is_cuda:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouped, "tiles", lambda *arguments: block)
            grouped._compiled.cache_clear()
            result = grouped_linear(x, scale, offsets, packed, bias, out_dtype)
        grouped._compiled.cache_clear()
        return result
    kernel = emulator("decode", **grouped_definitions(x.dtype, packed.weight.dtype, out_dtype, block, 1)).run
    result = torch.full((len(x), outputs), torch.nan, dtype=out_dtype)
    grid = (most_tiles(len(x), experts, block.tokens), -(-outputs // block.rows) * block.cluster)
    scales = (None if part is None else grouped._padded(part) for part in (packed.weight_scale, bias))
    tensors = (x, scale, *packed[:2], *scales, result, offsets)
    pitch = ctypes.c_uint64(packed.weight.stride(0) * packed.weight.itemsize)
    shared_memory = block.shared_memory(packed.weight.dtype, x.dtype)
    kernel(*grid, shared_memory, *map(address, tensors), experts, pitch, *result.shape, x.shape[1])
    return result


def operands(rows, experts, outputs, units, dtype, quantization, device):
    weight = prune_2to4(torch.randn(experts, outputs, 64 * units, device=device).to(dtype))
    x = torch.randn(rows, 64 * units, device=device).to(dtype)
    return x, pack_weight(weight, quantization), torch.randn(experts, outputs, device=device).to(dtype)


def alone(x, packed, offsets, bias, block, scale=None, out_dtype=None):
    """Run the kernel for one projection on each expert's rows."""
    result, start = torch.zeros(len(x), packed.weight.shape[1], dtype=out_dtype or x.dtype, device=x.device), 0
    for expert, end in enumerate(offsets):
        if end > start:
            one = type(packed)(*(None if part is None else part.clone() for part in packed.of_expert(expert)))
            scale_of_rows = None if scale is None else scale[start:end].clone()
            of_expert = None if bias is None else bias[expert].clone()
            rows = x[start:end].clone()
            result[start:end] = product(rows, one, of_expert, block, scale_of_rows, out_dtype)
            start = end
    return result


def check_each(result, x, packed, offsets, bias, scale=None):
    """Compare with float64, and the rows of nobody with zeros."""
    start = 0
    for expert, end in enumerate(offsets):
        rows = slice(start, max(start, end))
        scale_of_rows, of_expert = (None if part is None else part for part in (scale, bias))
        check(
            result[rows],
            x[rows],
            packed.of_expert(expert),
            None if of_expert is None else of_expert[expert],
            None if scale_of_rows is None else scale_of_rows[rows],
        )
        start = rows.stop
    assert not result[start:].any()


@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.bfloat16, None), (torch.float16, "int8"), (torch.bfloat16, "fp8")]
)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_expert_has_what_it_has_alone(block, dtype, quantization, kernel_device):
    outputs = 40 if block.cluster == 1 else 100
    x, packed, bias = operands(50, len(MIXED), outputs, 4, dtype, quantization, kernel_device)  # six rows are nobody's
    for of_experts in (bias, None):
        result = run(x, packed, MIXED, of_experts, block)
        assert torch.equal(result, alone(x, packed, MIXED, of_experts, block))  # to the bit: the same sums
        check_each(result, x, packed, MIXED, of_experts)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        (torch.bfloat16, SMALL),
        (torch.float16, Block(1, 2, 2, token_tiles=4, units=2, stages=4, cluster=2)),
        (torch.bfloat16, Block(2, 2, 1, token_tiles=2, units=4, stages=2, cluster=1)),
    ],
    ids=str,
)
def test_quantized_activations(dtype, block, quantization, kernel_device):
    value_dtype = QUANTIZED_DTYPES[quantization]
    if (
        kernel_device == "cuda"
        and not scaled_capability(value_dtype, 64, dtype, torch.cuda.get_device_capability()).ok
    ):
        pytest.skip("this GPU has no sparse FP8 products of a warp")
    x, packed, bias = operands(50, len(MIXED), 40, 4, dtype, quantization, kernel_device)
    values, scale = quantize_per_token(x, value_dtype)
    for of_experts in (bias, None):
        result = run(values, packed, MIXED, of_experts, block, scale, dtype)
        assert torch.equal(result, alone(values, packed, MIXED, of_experts, block, scale, dtype))
        check_each(result, values, packed, MIXED, of_experts, scale)
    result = run(values, packed, MIXED, None, block, None, torch.bfloat16)  # scales are the caller's
    check_each(result, values, packed, MIXED, None, torch.ones_like(scale))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("outputs", [17, 20, 22])
def test_experts_that_begin_anywhere_and_a_gap_between_them(outputs, quantization, kernel_device):
    x, packed, bias = operands(20, 3, outputs, 1, torch.bfloat16, quantization, kernel_device)
    size = packed.weight[0].nbytes
    buffer = torch.full((3, size + 48), 255, dtype=torch.uint8, device=kernel_device)
    buffer[:, :size] = packed.weight.view(torch.uint8).flatten(1)
    apart = packed._replace(weight=buffer[:, :size].view(packed.weight.dtype).unflatten(-1, packed.weight.shape[1:]))
    for offsets in ([7, 7, 20], [0, 1, 20], [0, 0, 0]):
        check_each(run(x, apart, offsets, bias), x, packed, offsets, bias)


@pytest.mark.parametrize("experts", [1, 31, 32, 33, 200])
def test_any_number_of_experts(experts, kernel_device):
    x, packed, bias = operands(70, experts, 16, 1, torch.bfloat16, None, kernel_device)
    generator = torch.Generator().manual_seed(experts)
    counts = torch.bincount(torch.randint(0, experts, (65,), generator=generator), minlength=experts)
    if experts > 1:
        counts[0] = counts[-1] = 0
    offsets = counts.cumsum(0).tolist()
    check_each(run(x, packed, offsets, bias), x, packed, offsets, bias)


def test_offsets_beyond_the_rows_touch_nothing_else(kernel_device):
    x, packed, bias = operands(12, 3, 16, 1, torch.bfloat16, None, kernel_device)
    with_garbage = torch.full((32, x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    with_garbage[:12] = x
    result = run(with_garbage[:12], packed, [-4, 5, 2**31 - 1], bias)
    check_each(result, x, packed, [0, 5, 12], bias)


@pytest.mark.parametrize("tokens", [8, 64, 128])
def test_there_are_blocks_for_any_offsets(tokens):
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(200):
        experts = int(torch.randint(1, 40, (), generator=generator))
        counts = torch.randint(0, 4 * tokens, (experts + 1,), generator=generator)  # the last of nobody
        counts *= torch.rand(experts + 1, generator=generator) < 0.5
        needed = int((-(-counts // tokens)).sum())
        assert needed <= most_tiles(int(counts.sum()), experts, tokens)
    full = experts * [1]
    assert most_tiles(len(full), experts, tokens) == experts  # and no more where that can be known


def test_many_experts_get_blocks_without_clusters():
    for features, outputs in ((2048, 1536), (768, 2048), (4096, 28672), (14336, 4096)):
        for token_tiles in (1, 2, 4, 8):
            problem = Problem(outputs, features, torch.bfloat16, torch.bfloat16, (9, 0), CLUSTERS.__getitem__, 128)
            block = tiles(token_tiles, problem)
            assert (block.cluster, block.tokens) == (1, 8 * token_tiles)
            assert problem.memory(block) <= problem.room
            assert 1 <= problem.blocks_at_once(block) <= 2048 // block.threads


def test_what_it_does_not_take_is_refused(monkeypatch):
    x, packed, bias = operands(4, 3, 16, 1, torch.bfloat16, "int8", "cpu")
    offsets = torch.tensor([1, 2, 4], dtype=torch.int32)
    monkeypatch.setattr(grouped, "device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"takes torch\.int32 \(3,\) on cpu; got torch\.int64 \(3,\)"):
        grouped_linear(x, None, offsets.long(), packed, bias, torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes torch\.bfloat16 \(3, 16\) on cpu; got torch\.float16"):
        grouped_linear(x, None, offsets, packed, bias.half(), torch.bfloat16)
    with pytest.raises(ValueError, match="takes float16 and bfloat16 activations"):
        grouped_linear(x.float(), None, offsets, packed, bias, torch.float32)
    with pytest.raises(ValueError, match=r"takes torch\.float32 \(4, 1\)"):
        grouped_linear(x.char(), torch.ones(4), offsets, packed, bias, torch.bfloat16)
    with pytest.raises(ValueError, match="quantized as the weight is"):
        grouped_linear(x.to(torch.float8_e4m3fn), None, offsets, packed, bias, torch.bfloat16)
    _, packed, _ = operands(4, 3, 16, 1, torch.bfloat16, "fp8", "cpu")
    with pytest.raises(ValueError, match="needs sparse FP8 products of a warp"):
        grouped_linear(x.to(torch.float8_e4m3fn), None, offsets, packed, bias, torch.bfloat16)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("rows", [0, 2, 16, 100, 700, 5000])
    @pytest.mark.parametrize(("experts", "outputs", "features"), [(8, 4096, 1792), (128, 1536, 2048), (128, 100, 768)])
    def test_real_shapes(self, experts, outputs, features, rows, quantization):
        x, packed, bias = operands(rows, experts, outputs, features // 64, torch.bfloat16, quantization, "cuda")
        counts = torch.bincount(torch.randint(0, experts, (rows * 9 // 10,)), minlength=experts)
        offsets = counts.cumsum(0)
        on_device = offsets.int().cuda()
        result = grouped_linear(x, None, on_device, packed, bias, torch.bfloat16)
        check_each(result, x, packed, offsets.tolist(), bias)
        if quantization == "int8":
            values, scale = quantize_per_token(x, torch.int8)
            result = grouped_linear(values, scale, on_device, packed, bias, torch.bfloat16)
            check_each(result, values, packed, offsets.tolist(), bias, scale)

    def test_a_cuda_graph_runs_for_other_offsets(self):
        x, packed, bias = operands(40, 16, 256, 4, torch.bfloat16, "int8", "cuda")
        offsets = torch.full((16,), 40, dtype=torch.int32, device="cuda")
        grouped_linear(x, None, offsets, packed, bias, torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = grouped_linear(x, None, offsets, packed, bias, torch.bfloat16)
        for counts in (torch.arange(16) // 3, torch.zeros(16, dtype=torch.long)):
            offsets.copy_(counts.cumsum(0))
            graph.replay()
            check_each(result, x, packed, counts.cumsum(0).tolist(), bias)
