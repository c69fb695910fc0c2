"""Which kernel runs what, and the operators on a GPU against float64 over the shapes at which kernels change."""

import pytest
import torch

from hf_sparse24.capability import backend_capability, has_nvmath
from hf_sparse24.kernels import cusparselt_plans, dispatch
from hf_sparse24.kernels.autotune import Choices
from hf_sparse24.kernels.dispatch import (
    FEW_QUANTIZED_TOKENS,
    FEW_TOKENS,
    Prepared,
    choose,
    prepare,
    takes_quantized,
)
from hf_sparse24.kernels.reference import quantize_per_token
from hf_sparse24.packing import pack_weight, unpack_weight
from hf_sparse24.pattern import prune_2to4

ops = torch.ops.hf_sparse24
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
QUANTIZATIONS = [None, "int8", "fp8"]
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def its_own_choices(tmp_path, monkeypatch):
    monkeypatch.setattr(cusparselt_plans, "choices", Choices(tmp_path / "algorithms.json"))


def packed_weight(outputs, features, dtype, quantization, device="cuda"):
    weight = prune_2to4(torch.randn(outputs, features, device=device).to(dtype))
    weight[0, :16] = 0  # groups of zeros, and one value in a group
    weight[1, :4] = torch.tensor([0, 0, 0, 3.0])
    return pack_weight(weight, quantization)


def check(result, x, packed, bias, kernel):
    """Compare with float64 on the operands as the kernel sees them: activations in 8 bits where it quantizes them."""
    seen = x.double()
    tokens, dtype = x.shape[:-1].numel(), packed.weight.dtype
    own = kernel == "nvrtc" and (tokens <= FEW_TOKENS[dtype] or not takes_quantized(dtype, x.shape[-1]))
    if packed.weight_scale is not None and not own:
        values, scale = quantize_per_token(x, packed.weight.dtype)
        seen = values.double() * scale.double()
    exact = seen @ unpack_weight(packed).double().t() + (0 if bias is None else bias.double())
    # The result's rounding and a float32 sum; through cuSPARSELt 8-bit products are rounded to bfloat16 before the
    # token's scale and the bias, without nvmath 16-bit ones too: a rounding more, relative to the largest output.
    largest = exact.abs().max() if exact.numel() else torch.tensor(0.0)
    bound = EPSILON[x.dtype] * exact.abs() + x.shape[-1] * 2**-23 * largest
    if kernel == "cutlass":  # the kernel sums FP8 products with fewer bits than float32
        bound += 2.0**-8 * largest
    if kernel == "cusparselt" and packed.weight_scale is not None:
        bound += (EPSILON[x.dtype] + 2.0**-8) * largest
    elif kernel == "cusparselt" and bias is not None and not has_nvmath():
        bound += EPSILON[x.dtype] * largest
    assert result.dtype == x.dtype
    assert result.shape == (*x.shape[:-1], packed.weight.shape[0])
    assert ((result.double() - exact).abs() <= bound).all()


class TestChoice:
    """By the backends that a machine has, which are told here."""

    @pytest.fixture(autouse=True)
    def every_backend(self, monkeypatch):
        monkeypatch.setattr(dispatch, "backend_capability", lambda backend: type("", (), {"ok": True}))
        monkeypatch.setattr(dispatch, "gpu_capability", lambda: (9, 0))

    @pytest.mark.parametrize(
        ("quantization", "tokens", "backend", "metadata", "expected"),
        [
            (None, 1, "auto", 1, "nvrtc"),
            (None, FEW_TOKENS[torch.bfloat16], "auto", 1, "nvrtc"),
            (None, FEW_TOKENS[torch.bfloat16] + 1, "auto", 1, "cusparselt"),
            (None, 4096, "auto", None, "nvrtc"),
            (None, 1, "cusparselt", 1, "cusparselt"),
            (None, 1, "reference", 1, "reference"),
            ("int8", FEW_TOKENS[torch.int8], "auto", 1, "nvrtc"),
            ("int8", FEW_QUANTIZED_TOKENS[torch.int8], "auto", 1, "nvrtc"),
            ("int8", FEW_QUANTIZED_TOKENS[torch.int8] + 1, "auto", 1, "cusparselt"),
            ("int8", FEW_QUANTIZED_TOKENS[torch.int8], "cusparselt", 1, "cusparselt"),
            ("int8", 4096, "nvrtc", 1, "nvrtc"),
            ("fp8", FEW_TOKENS[torch.float8_e4m3fn] + 1, "auto", 2, "cutlass"),
            ("fp8", FEW_TOKENS[torch.float8_e4m3fn] + 1, "auto", 1, "cusparselt"),
            ("fp8", 1, "cutlass", 2, "cutlass"),
        ],
    )
    def test_by_tokens_backend_and_what_was_prepared(self, quantization, tokens, backend, metadata, expected):
        packed = packed_weight(16, 128, torch.bfloat16, quantization, "cpu")
        metadata = None if metadata is None else torch.empty((1,) * metadata)
        # "nvrtc" by name has prepared nothing.
        metadata = None if backend == "nvrtc" else metadata
        assert choose(tokens, torch.bfloat16, packed.weight, metadata, backend) == expected

    def test_what_no_kernel_takes_runs_dense(self):
        weight = packed_weight(16, 40, torch.bfloat16, None, "cpu").weight
        assert choose(1, torch.bfloat16, weight, None) == "reference"  # 40 features are no multiple of 64
        assert choose(1, torch.float32, weight.float(), None) == "reference"


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("dtype", list(EPSILON))
    @pytest.mark.parametrize(("outputs", "features"), [(128, 128), (320, 576), (1024, 640), (4096, 4096)])
    def test_every_number_of_tokens(self, outputs, features, dtype, quantization, with_bias):
        packed = packed_weight(outputs, features, dtype, quantization)
        prepared = prepare(packed)
        assert torch.equal(prepared.weight.view(torch.uint8), packed.weight.view(torch.uint8))
        bias = torch.randn(outputs, device="cuda").to(dtype) if with_bias else None
        for tokens in (0, 1, 7, 16, 17, 33, 64, 65, 100, 513, 4097):
            x = torch.randn(tokens, features, device="cuda").to(dtype)
            kernel = choose(tokens, dtype, prepared.weight, prepared.metadata)
            poison()
            result = ops.linear(x, *packed._replace(weight=prepared.weight), bias, prepared.metadata)
            check(result, x, packed, bias, kernel)

    @pytest.mark.parametrize("backend", ["cusparselt", "cutlass", "nvrtc", "reference"])
    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    def test_every_backend_by_name(self, quantization, backend):
        packed = packed_weight(512, 512, torch.bfloat16, quantization)
        if backend == "cutlass" and (quantization != "fp8" or not backend_capability("cutlass").ok):
            with pytest.raises(ValueError, match="backend='cutlass' does not take a 512 x 512 weight"):
                prepare(packed, backend)
            return
        prepared = prepare(packed, backend)
        bias = torch.randn(512, device="cuda").bfloat16()
        for tokens in (1, 40, 100, 300):
            x = torch.randn(tokens, 512, device="cuda").bfloat16()
            assert choose(tokens, x.dtype, prepared.weight, prepared.metadata, backend) == backend
            result = ops.linear(x, *packed._replace(weight=prepared.weight), bias, prepared.metadata, backend)
            # The reference quantizes activations too, and rounds a sum in bfloat16 where the output is.
            kernel = "cusparselt" if backend == "reference" else backend
            check(result, x, packed, bias, kernel)

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("tokens", [4, 40, 300])
    def test_leading_dimensions_and_strides(self, tokens, quantization):
        packed = packed_weight(256, 256, torch.bfloat16, quantization)
        prepared = prepare(packed)
        packed = packed._replace(weight=prepared.weight)
        x = torch.randn(3, tokens, 512, device="cuda").bfloat16()[..., ::2]
        result = ops.linear(x, *packed, None, prepared.metadata)
        flat = ops.linear(x.reshape(-1, 256), *packed, None, prepared.metadata)
        assert torch.equal(result.flatten(0, 1), flat)

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("tokens", [4, 40, 300])
    def test_a_cuda_graph_and_two_streams(self, tokens, quantization):
        packed = packed_weight(256, 512, torch.bfloat16, quantization)
        prepared = prepare(packed)
        packed = packed._replace(weight=prepared.weight)
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        expected = ops.linear(x, *packed, None, prepared.metadata)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for _ in range(10):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(ops.linear(x, *packed, None, prepared.metadata))
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result in results)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.linear(x, *packed, None, prepared.metadata)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(result, ops.linear(x, *packed, None, prepared.metadata))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("tokens", [4, 40, 300])
    def test_two_devices_in_turn(self, tokens, quantization):
        packed = packed_weight(256, 512, torch.bfloat16, quantization)
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        results = []
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            there = type(packed)(*(None if tensor is None else tensor.to(device) for tensor in packed))
            prepared = prepare(there)
            operands = there._replace(weight=prepared.weight)
            results.append(ops.linear(x.to(device), *operands, None, prepared.metadata).to("cuda:0"))
        for result in results:
            check(result, x, packed, None, choose(tokens, x.dtype, *prepared[:2]))

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    def test_operators_keep_their_contract(self, quantization):
        packed = packed_weight(128, 128, torch.bfloat16, quantization)
        prepared = prepare(packed)
        packed = packed._replace(weight=prepared.weight)
        for tokens in (3, 40, 100):
            x = torch.randn(tokens, 128, device="cuda").bfloat16()
            arguments = (x, *packed, None, prepared.metadata)
            torch.library.opcheck(ops.linear.default, arguments, test_utils=OPCHECKS)
            if quantization is not None:
                values = ops.quantize_per_token(x, packed.weight.dtype)
                arguments = (*values, *packed, None, torch.bfloat16, prepared.metadata)
                torch.library.opcheck(ops.scaled_linear.default, arguments, test_utils=OPCHECKS)

    def test_zeros_that_the_library_would_drop_stay_where_format_1_has_them(self):
        packed = packed_weight(128, 128, torch.bfloat16, "int8")
        packed.weight[:] = packed.weight * (torch.rand_like(packed.weight, dtype=torch.float32) > 0.5)
        prepared = prepare(packed)
        assert torch.equal(prepared.weight, packed.weight)
        x = torch.randn(100, 128, device="cuda").bfloat16()
        operands = packed._replace(weight=prepared.weight)
        check(ops.linear(x, *operands, None, prepared.metadata), x, packed, None, "cusparselt")

    def test_a_gpu_that_is_no_hopper_runs_fp8_through_cusparselt(self):
        packed = packed_weight(256, 512, torch.bfloat16, "fp8")
        prepared = prepare(packed, "cusparselt")
        assert isinstance(prepared, Prepared)
        x = torch.randn(100, 512, device="cuda").bfloat16()
        operands = packed._replace(weight=prepared.weight)
        check(ops.linear(x, *operands, None, prepared.metadata), x, packed, None, "cusparselt")


def poison():
    """Leave NaN in the memory that the next results will get."""
    for size in (1 << 16, 1 << 20, 1 << 24, 1 << 26):
        torch.full((size,), torch.nan, device="cuda")
