"""Packed layers on an emulated GPU: the way from a layer to every kernel, and back."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_sparse24 import pack_, prune_, set_backend_
from hf_sparse24.kernels import decode, dispatch, experts, grouped
from hf_sparse24.kernels.dispatch import FEW_QUANTIZED_TOKENS, FEW_TOKENS, choose
from hf_sparse24.nn import Sparse24Experts, Sparse24Linear
from hf_sparse24.nn.mixture import stacks_of
from hf_sparse24.packing import unpack_weight
from hf_sparse24.pattern import prune_2to4
from tests.kernels.emulated_device import emulated_device

from .test_experts import experts_of, pack_module_, routed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which needs no emulation")
# Relative error of a product: rounding to bfloat16; 8-bit activations of normal numbers on top, see test_ops.
ERROR = {None: 0.004, "int8": 0.015, "fp8": 0.05}
BACKENDS = {None: ["cusparselt", "nvrtc", "reference"], "int8": ["cusparselt", "nvrtc", "reference"]}
BACKENDS["fp8"] = [*BACKENDS["int8"], "cutlass"]


@pytest.fixture
def device(monkeypatch):
    with emulated_device(monkeypatch) as library:
        yield library


def pruned_linear(outputs, features, bias, dtype=torch.bfloat16):
    linear = nn.Linear(features, outputs, bias, dtype=dtype)
    linear.weight.data = prune_2to4(linear.weight.data)
    linear.weight.data[0, :16] = 0
    return linear.requires_grad_(False)


def assert_right(layer, x):
    """Compare with float64 on the weight as it was packed."""
    exact = nn.functional.linear(x.double(), unpack_weight(layer.packed).double())
    exact = exact if layer.bias is None else exact + layer.bias.double()
    result = layer(x)
    assert (result.dtype, result.shape) == (x.dtype, exact.shape)
    assert (result.double() - exact).norm() <= ERROR[layer.quantization] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantization", list(ERROR))
def test_every_number_of_tokens(quantization, bias, dtype, device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 192, bias, dtype), quantization)
    for tokens in (1, 9, 70):
        assert_right(layer, torch.randn(tokens, 192).to(dtype))
    assert_right(layer, torch.randn(2, 3, 192).to(dtype))
    assert layer(torch.empty(0, 192, dtype=dtype)).shape == (0, 128)
    assert bool(device.problems) == (quantization != "fp8")


@pytest.mark.parametrize("quantization", list(ERROR))
@pytest.mark.parametrize("tokens", [1, 70])
def test_every_backend(quantization, tokens, device):
    for backend in BACKENDS[quantization]:
        layer = Sparse24Linear.from_linear(pruned_linear(128, 128, True), quantization, backend)
        x = torch.randn(tokens, 128).bfloat16()
        assert choose(tokens, x.dtype, layer.weight, layer.weight_metadata, backend) == backend
        assert_right(layer, x)


# Of the feed-forward layers of vision towers: SigLIP-so400m has 4304 = 16 * 269 between its 1152 features and
# Qwen2.5-VL 3420 = 4 * 855 between 1280; here 16 * 17 and 4 * 33. cuSPARSELt takes features by 16 or, in 8 bits, by
# 32, the kernel for few tokens inputs by 64.
ODD_WIDTHS = {
    (16 * 17, 128): {None: "cusparselt", "int8": "nvrtc", "fp8": "nvrtc"},
    (128, 16 * 17): {None: "cusparselt", "int8": "reference", "fp8": "reference"},
    (4 * 33, 128): {None: "nvrtc", "int8": "nvrtc", "fp8": "nvrtc"},
    (128, 4 * 33): {None: "reference", "int8": "reference", "fp8": "reference"},
}


@pytest.mark.parametrize("quantization", list(ERROR))
@pytest.mark.parametrize("shape", ODD_WIDTHS, ids=str)
def test_widths_that_few_kernels_take(shape, quantization, device, caplog):
    dispatch.logger.warning_once.cache_clear()
    layer = Sparse24Linear.from_linear(pruned_linear(*shape, True), quantization)
    runs = ODD_WIDTHS[shape][quantization]
    assert choose(80, torch.bfloat16, layer.weight, layer.weight_metadata) == runs
    what = {"nvrtc": "the kernel for few tokens, which is slow for many", "reference": "a dense product"}.get(runs)
    said = f"2:4 weights of {shape[0]} x {shape[1]} in"
    assert (said in caplog.text) == (what is not None)
    assert what is None or f"run through {what}: cuSPARSELt takes features divisible by" in caplog.text
    assert_right(layer, torch.randn(2, shape[1]).bfloat16())


def test_the_kernel_changes_where_it_is_said_to(device, monkeypatch):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), "int8")
    ran = []
    for name in ("few_tokens_linear", "scaled_linear"):
        kernel = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *args, kernel=kernel, name=name: ran.append(name) or kernel(*args))
    few, most = FEW_TOKENS[torch.int8], FEW_QUANTIZED_TOKENS[torch.int8]
    for tokens in (few, few + 1, most):
        assert_right(layer, torch.randn(tokens, 128).bfloat16())
    assert ran == ["few_tokens_linear", "scaled_linear", "scaled_linear"]
    assert not device.problems
    layer(torch.randn(most + 1, 128).bfloat16())
    assert [problem.tokens for problem in device.problems] == [most + 16]  # in rows of 16


@pytest.mark.parametrize("compute", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_what_runs_between_few_tokens_and_many(quantization, compute, monkeypatch):
    with emulated_device(monkeypatch, compute) as library:
        layer = Sparse24Linear.from_linear(pruned_linear(128, 192, True), quantization)
        seen, kernel = [], decode.scaled_linear
        monkeypatch.setattr(decode, "scaled_linear", lambda *args: seen.append(len(args[0])) or kernel(*args))
        between = (max(FEW_TOKENS[layer.weight.dtype], 16), FEW_QUANTIZED_TOKENS[layer.weight.dtype])
        assert_right(layer, torch.randn(2, between[1] // 2, 192).bfloat16().view(between[1], 192))
        assert_right(layer, torch.randn(2, between[0] // 2 + 1, 192).bfloat16())
        # FP8 products of a warp are those of compute capability 8.9 (and 12): elsewhere nothing changes.
        assert bool(seen) == (quantization == "int8" or compute == (8, 9))
        assert not library.problems


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_the_kernel_by_name_quantizes_more_than_a_few_tokens_where_it_can(quantization, monkeypatch):
    for compute in ((8, 9), (9, 0)):
        with emulated_device(monkeypatch, compute) as library:
            layer = Sparse24Linear.from_linear(pruned_linear(100, 128, True), quantization, "nvrtc")
            for tokens in (1, 17, 150):
                assert_right(layer, torch.randn(tokens, 128).bfloat16())
            assert not library.problems


def test_a_shape_that_no_library_takes(device):
    layer = Sparse24Linear.from_linear(pruned_linear(24, 64, True), None)
    assert layer.weight_metadata is None
    for tokens in (1, 70):
        assert_right(layer, torch.randn(tokens, 64).bfloat16())
    layer = Sparse24Linear.from_linear(pruned_linear(24, 40, True), "int8")  # neither does the package's own kernel
    assert_right(layer, torch.randn(5, 40).bfloat16())


def test_an_ampere_gpu_runs_fp8_weights_with_16_bit_activations(monkeypatch):
    with emulated_device(monkeypatch, (8, 0)) as library:
        layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), "fp8")
        assert_right(layer, torch.randn(70, 128).bfloat16())
        assert not library.problems
        with pytest.raises(ValueError, match=r"need compute capability 8\.9 or newer; quantization='int8' runs here"):
            Sparse24Linear.from_linear(pruned_linear(128, 128, False), "fp8", "cusparselt")


def test_an_ada_gpu_runs_fp8_through_cusparselt(monkeypatch):
    with emulated_device(monkeypatch, (8, 9)) as library:
        layer = Sparse24Linear.from_linear(pruned_linear(128, 128, True), "fp8")
        assert_right(layer, torch.randn(70, 128).bfloat16())
        assert len(library.problems) == 1


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("quantization", list(ERROR))
def test_another_width_is_refused(quantization, tokens, device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), quantization)
    for width in (64, 256):
        with pytest.raises(ValueError, match=r"takes inputs \(\.\.\., 128\)"):
            layer(torch.randn(tokens, width).bfloat16())
        with pytest.raises(ValueError, match="the weight takes 128 features"):
            dispatch.linear(torch.randn(tokens, width).bfloat16(), *layer.packed, None, layer.weight_metadata)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_bias_of_another_dtype_or_place_is_read_right(quantization, tokens, device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, True), quantization)
    assert_right(layer, torch.randn(tokens, 128).half())
    layer.bias = nn.Parameter(torch.randn(129).bfloat16()[1:], requires_grad=False)
    assert_right(layer, torch.randn(tokens, 128).bfloat16())


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("quantization", list(ERROR))
def test_float32_inputs_run_as_the_reference(quantization, tokens, device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, True, torch.float32), quantization)
    assert_right(layer, torch.randn(tokens, 128))


def test_autocast_reaches_the_kernels_of_8_bit_weights(device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False, torch.float32), "int8")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for tokens in (1, 70):
            assert layer(torch.randn(tokens, 128)).dtype == torch.bfloat16
    assert len(device.problems) == 1


@pytest.mark.parametrize("tokens", [1, 70])
def test_modes_and_transforms_see_an_operator(tokens, device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), None)
    x = torch.randn(tokens, 128).bfloat16()
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    assert dispatch.nobody_traces(x)
    with Watching():
        layer(x)
    assert "hf_sparse24.linear.default" in seen
    with torch.autograd.forward_ad.dual_level():
        assert not dispatch.nobody_traces(x)


def test_a_copy_keeps_its_metadata_behind_its_weight(device):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), "int8")
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.weight_metadata.data_ptr() == clone.weight.data_ptr() + clone.weight.nbytes
        assert clone.weight.data_ptr() != layer.weight.data_ptr()
        assert_right(clone, torch.randn(70, 128).bfloat16())


class TestOffload:
    """accelerate brings the weights of a hooked layer for each call."""

    @pytest.fixture(params=["alone", "one of several"])
    def layer(self, request, device):
        layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), "int8")
        hook = AlignDevicesHook(execution_device="cpu", offload=True)
        layer._hf_hook = hook if request.param == "alone" else SequentialHook(ModelHook(), hook)
        return layer

    def test_no_library_form_is_made_or_kept(self, layer, device):
        assert_right(layer, torch.randn(70, 128).bfloat16())
        assert layer.weight_metadata is None
        assert not device.problems

    def test_a_library_that_was_asked_for_is_an_error(self, layer):
        layer.backend = "cusparselt"
        with pytest.raises(ValueError, match="needs weights that stay on the GPU"):
            layer(torch.randn(70, 128).bfloat16())


def test_a_replaced_weight_is_not_prepared_in_a_cuda_graph(device, monkeypatch):
    layer = Sparse24Linear.from_linear(pruned_linear(128, 128, False), "int8")
    layer.weight_indices.copy_(layer.weight_indices.clone())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Run the model once before"):
        layer(torch.randn(70, 128).bfloat16())


def test_a_model_packs_runs_and_changes_its_backend(device, monkeypatch, magnitude):

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    quantized, quantize = [], dispatch.quantize_per_token
    prune_(model, magnitude())
    ids = torch.randint(0, 64, (2, 40))
    with torch.no_grad():
        dense = model(ids).logits.float()
        pack_(model, "int8")
        monkeypatch.setattr(dispatch, "quantize_per_token", lambda *a: quantized.append(1) or quantize(*a))
        packed = model(ids).logits.float()
        # The input of q, k and v, that of o, that of gate and up, and that of down.
        assert len(quantized) == 4
        assert len(device.problems) == 7
        assert (packed - dense).norm() <= 0.1 * dense.norm()
        set_backend_(model, "nvrtc")
        assert (model(ids).logits.float() - dense).norm() <= 0.1 * dense.norm()
        assert len(device.problems) == 7
        with pytest.raises(ValueError, match=r"backend='cutlass' does not take model\.layers\.0\.self_attn\.q_proj"):
            set_backend_(model, "cutlass")


class TestExperts:
    """One launch runs a stack of experts; with much work for each, an expert takes the way of a layer."""

    OFFSETS = torch.tensor([1, 1, 74, 80])  # 1, 0, 73 and 6 rows

    def stack(self, quantization, backend="auto", rows=128, columns=192, dtype=torch.bfloat16):
        dense = prune_2to4(torch.randn(4, rows, columns).to(dtype))
        return Sparse24Experts.from_stack(dense, quantization=quantization, backend=backend)

    def assert_right(self, stack, x, bias=None, offsets=OFFSETS):
        exact, start = torch.zeros(len(x), stack.out_features, dtype=torch.float64), 0
        for expert, end in enumerate(offsets.tolist()):
            weight = unpack_weight(stack.packed.of_expert(expert)).double()
            exact[start:end] = nn.functional.linear(
                x[start:end].double(), weight, None if bias is None else bias[expert].double()
            )
            start = end
        result = stack(x, offsets, bias)
        assert (result.dtype, result.shape) == (x.dtype, exact.shape)
        assert (result.double() - exact).norm() <= ERROR[stack.quantization] * exact.norm()

    @pytest.fixture
    def one_by_one(self, monkeypatch):
        """Let experts have so much work that a library is faster."""
        monkeypatch.setattr(experts, "most_grouped_rows", lambda *arguments: 0)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("quantization", list(ERROR))
    def test_one_launch_for_all_experts(self, quantization, bias, device, monkeypatch):
        stack, seen, kernel = self.stack(quantization), [], grouped.grouped_linear
        monkeypatch.setattr(grouped, "grouped_linear", lambda *a: seen.append(a[0].dtype) or kernel(*a))
        x, of_experts = torch.randn(82, 192).bfloat16(), torch.randn(4, 128).bfloat16() if bias else None
        for dtype in (torch.int32, torch.int64):
            self.assert_right(stack, x, of_experts, self.OFFSETS.to(dtype))  # two rows are nobody's
        self.assert_right(stack, x[:6], of_experts, torch.tensor([1, 1, 4, 6]))
        self.assert_right(stack, x[:0], offsets=torch.zeros(4, dtype=torch.long))
        # 21 rows on average: INT8 is then quantized on both sides, FP8 on no Hopper GPU.
        assert seen == 2 * [torch.int8 if quantization == "int8" else torch.bfloat16] + 2 * [torch.bfloat16]
        assert not device.problems

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("quantization", list(ERROR))
    def test_each_expert_takes_the_kernel_for_its_tokens(self, quantization, bias, device, one_by_one):
        stack, x = self.stack(quantization), torch.randn(82, 192).bfloat16()  # two rows are nobody's
        self.assert_right(stack, x, torch.randn(4, 128).bfloat16() if bias else None)
        if quantization != "fp8":  # which is torchao's
            assert [problem.tokens for problem in device.problems] == [80]  # 73, in rows of 16
        self.assert_right(stack, x[:0], offsets=torch.zeros(4, dtype=torch.long))

    @pytest.mark.parametrize("quantization", list(ERROR))
    def test_every_backend(self, quantization, device):
        for backend in BACKENDS[quantization]:
            self.assert_right(self.stack(quantization, backend), torch.randn(80, 192).bfloat16())

    @pytest.mark.parametrize("quantization", [None, "int8"])
    def test_values_and_metadata_are_stored_once(self, quantization, device):
        packed = self.stack(quantization)
        for stack in (packed, copy.deepcopy(packed), copy.deepcopy(packed).to("cpu")):
            storage = stack.weight.untyped_storage()
            assert storage.data_ptr() == stack.weight_metadata.untyped_storage().data_ptr()
            assert storage.nbytes() == stack.weight.nbytes + stack.weight_metadata.nbytes  # 128 divides both here
            for weight, metadata in zip(stack.weight, stack.weight_metadata, strict=True):
                assert metadata.data_ptr() == weight.data_ptr() + weight.nbytes
            assert torch.equal(stack.weight, packed.weight)
        assert packed.state_dict().keys() <= {"weight", "weight_indices", "weight_scale"}

    def test_the_crossover_is_by_the_work_of_an_expert(self, device):
        of_one = experts.GROUPED_MULTIPLICATIONS[torch.bfloat16] // (128 * 192)
        stack = self.stack(None)
        assert stack.weight_metadata is not None
        assert experts.most_grouped_rows(stack.weight, stack.weight_metadata) == 4 * of_one
        assert [stack.reads_offsets_on_host(rows) for rows in (4 * of_one, 4 * of_one + 1)] == [False, True]
        large = torch.empty(8, 28672, 7168, dtype=torch.bfloat16, device="meta")  # more than a library's calls take
        few = dispatch.FEW_TOKENS[torch.bfloat16]
        assert experts.most_grouped_rows(large, stack.weight_metadata) == 8 * few
        assert not self.stack(None, "nvrtc").reads_offsets_on_host(2**30)
        for backend in ("cusparselt", "reference"):
            assert self.stack(None, backend).reads_offsets_on_host(1)

    def test_activations_are_quantized_together_and_only_where_needed(self, device, one_by_one, monkeypatch):
        stack, x = self.stack("int8"), torch.randn(200, 192).bfloat16()
        calls, quantize = [], dispatch.quantize_per_token
        monkeypatch.setattr(dispatch, "quantize_per_token", lambda *a: calls.append(len(a[0])) or quantize(*a))
        stack(x[:20], torch.tensor([5, 10, 15, 20]))
        assert not calls
        stack(x, torch.tensor([100, 100, 200, 200]))
        assert calls == [200]
        assert [problem.tokens for problem in device.problems] == [112, 112]

    @pytest.mark.parametrize("shape", [(24, 64), (24, 40), (21, 64)])
    @pytest.mark.parametrize("quantization", list(ERROR))
    def test_shapes_that_no_library_takes(self, quantization, shape, device):
        stack = self.stack(quantization, rows=shape[0], columns=shape[1])
        assert stack.weight_metadata is None
        # With 21 outputs an expert's scales and biases begin where the kernel cannot read.
        self.assert_right(stack, torch.randn(80, shape[1]).bfloat16(), torch.randn(4, shape[0]).bfloat16())

    @pytest.mark.parametrize("quantization", list(ERROR))
    def test_float32_runs_as_the_reference(self, quantization, device):
        self.assert_right(self.stack(quantization, dtype=torch.float32), torch.randn(80, 192))
        assert not device.problems

    @pytest.mark.parametrize("quantization", list(ERROR))
    def test_gradients_of_inputs(self, quantization, device):
        stack, x = self.stack(quantization), torch.randn(80, 192).bfloat16().requires_grad_()
        stack(x, self.OFFSETS).float().sum().backward()
        rows = unpack_weight(stack.packed).double().sum(1)  # a gradient of ones adds the rows of a weight
        exact = torch.cat([rows[:1], rows[2:3].expand(73, -1), rows[3:].expand(6, -1)])
        assert (x.grad.double() - exact).norm() <= ERROR[None] * exact.norm()

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
    def test_a_mixture(self, model_type, device, monkeypatch):
        module, input_dim = experts_of(model_type)
        module.bfloat16()
        arguments = (torch.randn(4 * 9, 32),) if model_type == "llama4_text" else routed(module)
        arguments = [part.bfloat16() if part.is_floating_point() else part for part in arguments]
        with torch.no_grad():
            expected = module(*arguments)
            pack_module_(module, input_dim)
            # Two products and the gate between them are rounded to bfloat16.
            assert (module(*arguments) - expected).norm() <= 5 * ERROR[None] * expected.norm()

    @pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
    def test_nothing_is_read_on_the_host_for_few_tokens(self, model_type, device, monkeypatch):
        module, arguments = self.wide_mixture(model_type)
        expected = module(*arguments)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

        class Watching(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                assert function.__name__ not in ("item", "tolist", "cpu", "__bool__", "__int__", "nonzero")
                return function(*args, **(kwargs or {}))

        with Watching():
            assert torch.equal(module(*arguments), expected)

    def test_a_cuda_graph_of_many_tokens_is_refused(self, device, monkeypatch, one_by_one):
        module, arguments = self.wide_mixture("mixtral")
        module(*arguments)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="Capture fewer tokens, with activations in 16 bits, or run without"):
            module(*arguments)

    def wide_mixture(self, model_type):
        """Return packed experts of a width that kernels take, and arguments."""
        config = {
            "mixtral": lambda: MixtralExperts(
                MixtralConfig(hidden_size=64, intermediate_size=128, num_local_experts=4)
            ),
            "llama4_text": lambda: Llama4TextExperts(
                Llama4TextConfig(hidden_size=64, intermediate_size=128, num_local_experts=4)
            ),
        }
        module = config[model_type]().bfloat16().requires_grad_(False)
        dim = -2 if model_type == "llama4_text" else -1
        for name in stacks_of(module):
            setattr(
                module, name, nn.Parameter(prune_2to4(torch.randn_like(getattr(module, name)) / 8, dim=dim), False)
            )
        arguments = (torch.randn(12, 64),) if model_type == "llama4_text" else routed(module, hidden=64)
        pack_module_(module, dim)
        return module, [part.bfloat16() if part.is_floating_point() else part for part in arguments]
