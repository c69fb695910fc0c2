import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse24.nn import SharedInput, Sparse24Linear
from hf_sparse24.pattern import prune_2to4

QUANTIZATIONS = [None, "int8", "fp8"]


def pruned_linear(in_features=40, out_features=24, bias=True, dtype=torch.float32, device="cpu"):
    linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
    linear.weight.data = prune_2to4(linear.weight.data)
    return linear


def state_bits(module):
    return {key: value.view(torch.uint8) for key, value in module.state_dict().items()}


def assert_same_state(left, right):
    left, right = state_bits(left), state_bits(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 5, 40), (2, 1, 3, 40)])
def test_packed_equals_dense_for_any_leading_dimensions(dtype, bias, shape, device):
    linear = pruned_linear(bias=bias, dtype=dtype, device=device)
    x = torch.randn(shape, device=device).to(dtype)
    # The reference runs the same torch call on the same weight.
    assert torch.equal(Sparse24Linear.from_linear(linear)(x), linear(x))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_output_has_the_dtype_of_the_input_and_is_close(quantization, dtype, device):
    linear = pruned_linear(512, 64, dtype=dtype, device=device)
    x = torch.randn(2, 7, 512, device=device).to(dtype)
    packed, dense = Sparse24Linear.from_linear(linear, quantization)(x), linear(x)
    assert packed.dtype == dtype
    # Quantization noise of random normal operands, see test_ops.
    assert (packed - dense).float().norm() / dense.float().norm() < {"int8": 0.02, "fp8": 0.06}[quantization]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_it_compiles_as_one_graph(quantization, device):
    layer = Sparse24Linear.from_linear(pruned_linear(device=device), quantization)
    x = torch.randn(3, 40, device=device)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_state_is_format_1_and_nothing_else(quantization):
    layer = Sparse24Linear.from_linear(pruned_linear(), quantization)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    scale = {"weight_scale": (24,)} if quantization else {}
    assert shapes == {"weight": (24, 20), "weight_indices": (24, 5), "bias": (24,), **scale}
    assert [key for key, value in layer.named_parameters() if value.requires_grad] == ["bias"]
    layer(torch.randn(1, 40))
    assert layer.state_dict().keys() == shapes.keys()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_state_dict_round_trip_also_after_a_forward(quantization):
    layer, other = (Sparse24Linear.from_linear(pruned_linear(), quantization) for _ in range(2))
    x = torch.randn(3, 40)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert_same_state(layer, other)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_deepcopy_is_independent(quantization):
    layer = Sparse24Linear.from_linear(pruned_linear(), quantization)
    x = torch.randn(3, 40)
    before = layer(x)
    clone = copy.deepcopy(layer)
    assert_same_state(layer, clone)
    with torch.no_grad():
        clone.weight.zero_()
    assert torch.equal(layer(x), before)
    assert torch.equal(clone(x), clone.bias.expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_cast_leaves_quantized_values_and_scales_alone(quantization, dtype):
    layer = Sparse24Linear.from_linear(pruned_linear(), quantization)
    before = state_bits(layer)
    layer.to(dtype)
    after = state_bits(layer)
    assert all(torch.equal(before[key], after[key]) for key in ("weight", "weight_indices", "weight_scale"))
    assert layer.bias.dtype == layer.dense_dtype == dtype
    assert not layer.weight.requires_grad


def test_a_cast_of_unquantized_values_is_a_cast():
    layer = Sparse24Linear.from_linear(pruned_linear()).to(torch.bfloat16)
    assert layer.weight.dtype == layer.dense_dtype == torch.bfloat16
    assert layer.weight_indices.dtype == torch.uint8


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_move_that_fails_leaves_the_layer_as_it_was(quantization):
    layer = Sparse24Linear.from_linear(pruned_linear(), quantization)
    before, x = state_bits(layer), torch.randn(3, 40)
    expected = layer(x)

    def fail(tensor):
        if tensor.numel() == layer.weight_indices.numel():
            raise RuntimeError("out of memory")
        return tensor.clone()

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fail)
    after = state_bits(layer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(layer(x), expected)


def test_a_cast_to_what_format_1_does_not_store_is_refused():
    with pytest.raises(ValueError, match="what this layer is cast to is float64"):
        Sparse24Linear.from_linear(pruned_linear()).to(torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_moving_to_a_gpu_and_back(quantization):
    layer = Sparse24Linear.from_linear(pruned_linear(), quantization)
    before = state_bits(layer)
    x = torch.randn(3, 40)
    expected = layer(x)
    moved = layer.to("cuda")
    # float32 sums of 40 products in another order.
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    after = state_bits(moved.to("cpu"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_meta_and_to_empty():
    layer = Sparse24Linear(40, 24, quantization="fp8", device="meta").to_empty(device="cpu")
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight.shape == (24, 20)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_to_linear_gives_the_dense_layer_back(quantization):
    linear = pruned_linear()
    dense = Sparse24Linear.from_linear(linear, quantization).to_linear()
    assert type(dense) is nn.Linear
    if quantization is None:
        assert torch.equal(dense.weight, linear.weight)
    assert torch.equal(dense.weight == 0, linear.weight == 0)
    assert torch.equal(dense.bias, linear.bias)
    assert dense.weight.requires_grad


def test_conv1d_keeps_its_orientation_outside_and_packs_along_its_input():
    conv = Conv1D(24, 40)
    conv.weight.data = prune_2to4(conv.weight.data, dim=0)
    layer = Sparse24Linear.from_linear(conv)
    x = torch.randn(2, 3, 40)
    assert (layer.in_features, layer.out_features) == (40, 24)
    # addmm on (in, out) against matmul on (out, in): float32 sums in another order.
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    back = layer.to_linear()
    assert isinstance(back, Conv1D)
    assert torch.equal(back.weight, conv.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_dtype_of_the_layer(dtype):
    layer = Sparse24Linear.from_linear(pruned_linear(dtype=dtype))
    x = torch.randn(3, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == dtype
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_layer_that_is_not_2to4_is_refused_by_name():
    with pytest.raises(ValueError, match=r"groups of mlp\.up_proj hold more than two nonzeros"):
        Sparse24Linear.from_linear(nn.Linear(40, 24), name="mlp.up_proj")


def test_nan_is_refused_by_name():
    linear = pruned_linear()
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mlp\.up_proj holds 1 NaN"):
        Sparse24Linear.from_linear(linear, name="mlp.up_proj")


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)])
def test_other_layers_are_refused(module):
    with pytest.raises(TypeError, match=f"got {type(module).__name__}"):
        Sparse24Linear.from_linear(module)


def test_packing_twice_is_refused():
    with pytest.raises(TypeError, match="got Sparse24Linear"):
        Sparse24Linear.from_linear(Sparse24Linear.from_linear(pruned_linear()))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="has 42"):
        Sparse24Linear(42, 8)
    with pytest.raises(ValueError, match="got 'int4'"):
        Sparse24Linear(40, 8, quantization="int4")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend='nvrtc' cannot run here"):
            Sparse24Linear(40, 8, backend="nvrtc")


def test_there_is_no_random_initialization():
    with pytest.raises(RuntimeError, match="no random initialization"):
        Sparse24Linear(40, 8).reset_parameters()


def test_float8_inputs_are_refused_with_the_way_out():
    layer = Sparse24Linear.from_linear(pruned_linear(), "fp8")
    with pytest.raises(TypeError, match="use quantization='int8'"):
        layer(torch.randn(3, 40).to(torch.float8_e4m3fn))


def test_repr_names_the_dense_shape():
    text = repr(Sparse24Linear(40, 24, quantization="int8"))
    assert text == "Sparse24Linear(in_features=40, out_features=24, bias=True, quantization=int8)"


@pytest.mark.gpu
class TestOnAGpu:
    """What the metadata beside the weight must not disturb, and what must not leave them stale."""

    @pytest.fixture(params=QUANTIZATIONS)
    def layer(self, request):
        linear = pruned_linear(512, 256, dtype=torch.bfloat16, device="cuda")
        return Sparse24Linear.from_linear(linear, request.param)

    @pytest.fixture(params=[1, 40, 300])
    def x(self, request):
        return torch.randn(request.param, 512, device="cuda").bfloat16()

    def exact(self, layer, x):
        return nn.functional.linear(x.float(), layer.to_linear().weight.float(), layer.bias.float())

    def assert_right(self, layer, x):
        # Activations in 8 bits, see test_ops; a stale weight would be off by its own size.
        exact = self.exact(layer, x)
        assert (layer(x).float() - exact).norm() / exact.norm() < {None: 0.01, "int8": 0.02, "fp8": 0.06}[
            layer.quantization
        ]

    def test_the_weight_is_a_view_of_what_the_library_reads(self, layer):
        assert layer.weight_metadata is not None
        assert "weight_metadata" not in layer.state_dict()
        per_weight = sum(t.untyped_storage().nbytes() for t in (layer.weight, layer.weight_indices)) / (512 * 256)
        if layer.weight_metadata.ndim == 2:
            per_weight += layer.weight_metadata.nbytes / (512 * 256)
        assert per_weight <= (1.30 if layer.quantization is None else 0.80)

    def test_saving_writes_the_view_alone(self, layer, tmp_path):
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        read = load_file(tmp_path / "layer.safetensors")
        assert read["weight"].shape == (256, 256)
        assert all(torch.equal(read[key].cuda().view(torch.uint8), value) for key, value in state_bits(layer).items())

    @torch.no_grad()
    def test_loading_moving_copying_and_writing(self, layer, x):
        other = Sparse24Linear.from_linear(
            pruned_linear(512, 256, dtype=torch.bfloat16, device="cuda"), layer.quantization
        )
        self.assert_right(layer, x)
        layer.load_state_dict(other.state_dict())
        self.assert_right(layer, x)
        clone = copy.deepcopy(layer)
        clone.weight_indices.copy_(layer.weight_indices.flip(0))
        self.assert_right(clone, x)
        self.assert_right(layer, x)
        self.assert_right(layer.cpu().cuda(), x)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.assert_right(layer, x)
        if layer.quantization is None:
            self.assert_right(layer.half(), x.half())

    def test_compiled_it_gives_what_it_gives_uncompiled(self, layer, x):
        compiled = torch.compile(layer, fullgraph=True)
        with torch.no_grad():
            expected, result = layer(x).float(), compiled(x).float()
        # The token's scale is applied before or after a rounding to bfloat16.
        assert (result - expected).norm() <= 2**-7 * expected.norm()

    def test_gradients_reach_the_input(self, layer, x):
        x.requires_grad_()
        layer(x).sum().backward()
        expected = layer.to_linear().weight.sum(0).expand_as(x)
        assert (x.grad - expected).norm() <= 0.01 * expected.norm()

    def test_siblings_get_what_they_would_get_alone(self, x):
        siblings = [
            Sparse24Linear.from_linear(pruned_linear(512, 256, dtype=torch.bfloat16, device="cuda"), "int8")
            for _ in range(3)
        ]
        with torch.no_grad():
            alone = [layer(x) for layer in siblings]
            shared = SharedInput(3)
            for number, layer in enumerate(siblings):
                layer.share_input(shared, number)
            graph = torch.cuda.CUDAGraph()
            siblings[0](x)  # leaves a result outside of the graph, which the graph must not take
            with torch.cuda.graph(graph):
                captured = [layer(x) for layer in siblings]
            assert all(torch.equal(layer(x), expected) for layer, expected in zip(siblings, alone, strict=True))
            x.copy_(x.flip(0) * 2)
            graph.replay()
            for layer, result in zip(siblings, captured, strict=True):
                assert torch.equal(result, layer(x))
