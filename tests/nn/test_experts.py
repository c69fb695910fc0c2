"""`Sparse24Experts` and the forward of a mixture of packed experts, beside the models' own."""

import copy
import io

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import CONFIG_MAPPING, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_sparse24.kernels import experts as kernels
from hf_sparse24.nn import Sparse24Experts
from hf_sparse24.nn.mixture import pack_experts_, stacks_of, unpack_experts_, why_not_packed
from hf_sparse24.packing import unpack_weight
from hf_sparse24.pattern import prune_2to4
from hf_sparse24.selection import select
from hf_sparse24.verification import check_packed
from tests import tiny
from tests.families import FAMILIES, build

from .test_linear import QUANTIZATIONS, assert_same_state

# Interleaved with biases (gpt_oss), without a gate (nemotron_h), with a norm behind each expert (muse_spark_text),
# with a clamp in the gate (deepseek_v4, minimax_m3_vl_text), the others as most are.
_ROUTED = """
mixtral qwen3_moe gpt_oss deepseek_v3 nemotron_h muse_spark_text deepseek_v4 minimax_m3_vl_text aria_text jamba
"""
ROUTED = _ROUTED.split()
# Relative error of a mixture in float32: weights and tokens of two projections in 8 bits, see test_ops.
ERROR = {None: 1e-6, "int8": 0.03, "fp8": 0.1}


def pruned_stack(experts=3, rows=24, columns=40, input_dim=-1, dtype=torch.float32, device="cpu"):
    stack = prune_2to4(torch.randn(experts, rows, columns, device=device).to(dtype))
    return stack.movedim(-1, input_dim).contiguous()


def experts_of(model_type):
    """Return a module of experts with 2:4 weights of the size of 1, and its input dimension."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = build(model_type) if model_type in FAMILIES else tiny.build(model_type)
    target = next(target for target in select(model).targets if target.is_expert_stack)
    module = model.get_submodule(target.module_name)
    if model_type == "aria_text" and why_not_packed(module):
        pytest.skip(f"in transformers {transformers.__version__} its experts have a forward of their own")
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn_like(parameter)
        if name in stacks_of(module):
            parameter.data = prune_2to4(parameter.data, dim=target.dim)
    return module, target.dim


def routed(module, tokens=9, top_k=2, hidden=None):
    """Return arguments of its forward: expert 0 gets no token."""
    hidden = hidden or getattr(module, stacks_of(module)[1]).shape[-1 if module.is_transposed else -2]
    chosen = torch.stack([torch.randperm(module.num_experts - 1)[:top_k] + 1 for _ in range(tokens)])
    return torch.randn(tokens, hidden), chosen, torch.rand(tokens, top_k)


def pack_module_(module, input_dim, quantization=None):
    pack_experts_(module, lambda name: Sparse24Experts.from_stack(getattr(module, name), input_dim, quantization))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("input_dim", [-1, -2])
def test_a_stack_goes_in_and_comes_out(quantization, input_dim, device):
    stack = pruned_stack(input_dim=input_dim, dtype=torch.bfloat16, device=device)
    packed = Sparse24Experts.from_stack(stack, input_dim, quantization)
    assert packed.weight.shape == (3, 24, 20)
    assert packed.weight_indices.shape == (3, 24, 5)
    assert (packed.num_experts, packed.in_features, packed.out_features) == (3, 40, 24)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    dense = packed.to_stack()
    assert (dense.shape, dense.dtype) == (stack.shape, stack.dtype)
    assert dense.is_contiguous()
    expected = stack if quantization is None else unpack_weight(packed.packed, stack.dtype).movedim(-1, input_dim)
    assert torch.equal(dense, expected)


def test_a_stack_that_is_not_2to4_is_refused():
    stack = pruned_stack()
    stack[2, 5, :4] = 1
    with pytest.raises(ValueError, match=r"1 of the 240 groups of layer\.up\[2\] hold more than two"):
        Sparse24Experts.from_stack(stack, name="layer.up")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_copies_casts_and_files_keep_the_bits(quantization):
    packed = Sparse24Experts.from_stack(pruned_stack(), quantization=quantization)
    assert_same_state(copy.deepcopy(packed), packed)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    empty = Sparse24Experts(3, 40, 24, quantization)
    empty.load_state_dict(torch.load(file))
    assert_same_state(empty, packed)
    check_packed(empty.packed, empty.dense_shape, "experts")
    half = copy.deepcopy(packed).half()
    assert half.dense_dtype == torch.float16
    if quantization:
        assert_same_state(half, packed)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("model_type", ROUTED)
def test_a_mixture_computes_what_it_did(model_type, quantization):
    module, input_dim = experts_of(model_type)
    arguments = routed(module)
    with torch.no_grad():
        expected = module(*arguments)
        names = dict(module.named_parameters())
        pack_module_(module, input_dim, quantization)
        found = module(*arguments)
        assert (found - expected).norm() <= ERROR[quantization] * expected.norm()
        clone = copy.deepcopy(module)
        assert torch.equal(clone(*arguments), found)
        assert torch.equal(module(*(part[:0] for part in arguments)), expected[:0])
        unpack_experts_(module)
        assert dict(module.named_parameters()).keys() == names.keys()
        assert "forward" not in vars(module)
        if quantization is None:
            assert torch.equal(module(*arguments), expected)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_llama4_gives_every_expert_as_many_rows(quantization):
    module, input_dim = experts_of("llama4_text")
    x = torch.randn(module.num_experts * 3, module.hidden_size)
    x[:3] = 0  # the rows of an expert that no token chose
    with torch.no_grad():
        expected = module(x)
        pack_module_(module, input_dim, quantization)
        assert (module(x) - expected).norm() <= ERROR[quantization] * expected.norm()


def test_an_index_that_is_no_experts_counts_nothing():
    module, input_dim = experts_of("mixtral")
    x, chosen, weights = routed(module)
    pack_module_(module, input_dim)
    with torch.no_grad():
        alone = module(x, chosen[:, :1], weights[:, :1])
        chosen[:, 1] = module.num_experts
        torch.testing.assert_close(module(x, chosen, weights), alone)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_reach_tokens_routing_and_biases(quantization):
    module, input_dim = experts_of("gpt_oss")
    arguments = routed(module)
    gradients = []
    for _ in range(2):
        x, chosen, weights = (part.clone() for part in arguments)
        module.zero_grad()
        module(x.requires_grad_(), chosen, weights.requires_grad_()).square().sum().backward()
        gradients.append([x.grad, weights.grad, module.gate_up_proj_bias.grad, module.down_proj_bias.grad])
        if "forward" not in vars(module):
            pack_module_(module, input_dim, quantization)
    for expected, found in zip(*gradients, strict=True):
        # The error of the output, three times: in the square, in the gate's derivative and in the weights.
        assert (found - expected).norm() <= 3 * ERROR[quantization] * expected.norm()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_mixture_compiles_as_one_graph_for_any_routing(quantization, grad):
    module, input_dim = experts_of("gpt_oss")
    pack_module_(module, input_dim, quantization)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (9, 5, 9):
        arguments = routed(module, tokens, hidden=32)
        arguments[0].requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            expected, found = module(*arguments), compiled(*arguments)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # the compiler fuses the gate
            if grad:
                pair = [torch.autograd.grad(output.sum(), arguments[0])[0] for output in (expected, found)]
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_autocast_reaches_the_experts():
    module, input_dim = experts_of("mixtral")
    arguments = routed(module)
    pack_module_(module, input_dim, "int8")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = module.gate_up_proj(arguments[0], torch.tensor([2, 4, 6, 9]))
    assert first.dtype == torch.bfloat16


def test_a_hook_of_accelerate_stays_in_front():
    module, input_dim = experts_of("mixtral")
    arguments, calls = routed(module), []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    add_hook_to_module(module, Counting())
    with torch.no_grad():
        expected = module(*arguments)
        pack_module_(module, input_dim)
        torch.testing.assert_close(module(*arguments), expected)
        unpack_experts_(module)
        assert torch.equal(module(*arguments), expected)
    assert calls == ["MixtralExperts"] * 3


def test_a_whole_mixture_is_saved_and_read_by_torch():
    module, input_dim = experts_of("mixtral")
    arguments = routed(module)
    pack_module_(module, input_dim, "int8")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(read(*arguments), module(*arguments))


def test_what_cannot_be_packed_is_told():
    class MyExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))

    assert why_not_packed(MyExperts()) == "MyExperts has a forward of its own, which reads the weights of its experts"
    assert why_not_packed(experts_of("mixtral")[0]) is None
    assert why_not_packed(experts_of("llama4_text")[0]) is None


@pytest.mark.gpu
class TestOnAGpu:
    """Mixtures of a width that every kernel takes, in bfloat16."""

    def mixture(self, quantization, tokens):
        config = MixtralConfig(hidden_size=256, intermediate_size=512, num_local_experts=8)
        module = MixtralExperts(config).to("cuda", torch.bfloat16).requires_grad_(False)
        for name in stacks_of(module):
            stack = torch.randn_like(getattr(module, name)) / 16
            setattr(module, name, nn.Parameter(prune_2to4(stack), requires_grad=False))
        arguments = [part.cuda() for part in routed(module, tokens, hidden=256)]
        arguments = [part.bfloat16() if part.is_floating_point() else part for part in arguments]
        expected = module(*arguments)
        pack_module_(module, -1, quantization)
        return module, arguments, expected

    # Three roundings to bfloat16 on the way, and what the products of 8-bit operands add.
    def assert_near(self, found, expected, quantization):
        assert (found - expected).norm() <= (0.01 + ERROR[quantization]) * expected.norm()

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("tokens", [1, 16, 300])
    def test_a_cuda_graph_serves_other_routings(self, tokens, quantization):
        module, arguments, expected = self.mixture(quantization, tokens)
        self.assert_near(module(*arguments), expected, quantization)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = module(*arguments)
        for _ in range(2):
            graph.replay()
            self.assert_near(found, expected, quantization)
            assert torch.equal(found, module(*arguments))
            arguments[1].copy_(arguments[1].flip(0))
            arguments[0].copy_(arguments[0].roll(1, 0))
            expected = module(*arguments)

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    def test_it_compiles_as_one_graph_with_cuda_graphs(self, quantization):
        module, arguments, expected = self.mixture(quantization, 16)
        compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            self.assert_near(compiled(*arguments), expected, quantization)

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    def test_one_launch_and_a_product_each_agree(self, quantization, monkeypatch):
        module, arguments, expected = self.mixture(quantization, 300)
        monkeypatch.setattr(kernels, "most_grouped_rows", lambda *arguments: 0)
        module.gate_up_proj.prepare_()
        module.down_proj.prepare_()
        self.assert_near(module(*arguments), expected, quantization)
