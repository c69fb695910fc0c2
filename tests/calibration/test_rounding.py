import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse24 import Sparse24Config, pack_, prune_
from hf_sparse24.calibration.rounding import rounded
from hf_sparse24.nn import Sparse24Linear
from hf_sparse24.pattern import prune_2to4
from tests.families import build, inputs


def pruned_layer(kind):
    torch.manual_seed(0)
    layer = nn.Linear(32, 24) if kind == "linear" else Conv1D(24, 32)
    dim = -1 if kind == "linear" else -2
    layer.weight.data = prune_2to4(layer.weight.data.movedim(dim, -1)).movedim(-1, dim).contiguous()
    return layer, dim


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_writes_what_its_packed_form_will(kind, quantization):
    layer, dim = pruned_layer(kind)
    x = torch.randn(3, 5, 32)
    with rounded([(layer, dim)], quantization):
        written = layer(x)
    # The same rounded operands; float32 sums in another order.
    torch.testing.assert_close(written, Sparse24Linear.from_linear(layer, quantization)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_gradients_pass_the_rounding(quantization):
    layer, dim = pruned_layer("linear")
    x = torch.randn(7, 32, requires_grad=True)
    upstream = torch.randn(7, 24)
    with rounded([(layer, dim)], quantization):
        layer(x).backward(upstream)
        weight = layer.weight.detach()
    read = Sparse24Linear.from_linear(layer, quantization)
    torch.testing.assert_close(x.grad, upstream @ weight)
    quantized, scale = torch.ops.hf_sparse24.quantize_per_token(x.detach(), read.weight.dtype)
    torch.testing.assert_close(layer.weight.grad, upstream.t() @ (quantized.float() * scale))


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer(input=x)])
def test_inputs_are_rounded_by_position_and_by_name(call):
    layer, dim = pruned_layer("linear")
    x = torch.randn(2, 32)
    with rounded([(layer, dim)], "int8"):
        assert torch.equal(call(layer, x), layer(x))
        assert not torch.equal(call(layer, x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_layer_is_itself_again_even_after_an_error():
    layer, dim = pruned_layer("linear")
    weight, kind = layer.weight, type(layer)
    with pytest.raises(RuntimeError), rounded([(layer, dim)], "fp8"):
        layer(torch.zeros(2, 31))
    assert layer.weight is weight
    assert type(layer) is kind
    assert not layer._forward_pre_hooks
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_no_quantization_rounds_nothing():
    layer, dim = pruned_layer("linear")
    x = torch.randn(2, 32)
    expected = layer(x)
    with rounded([(layer, dim)], None):
        assert torch.equal(layer(x), expected)


BATCHES = [inputs("llama") for _ in range(4)]


def divergence_when_packed(quantization, asked, **request):
    """Return how far a packed model's hidden states are from the dense one's."""
    model, dense = build("llama"), build("llama")
    prune_(model, Sparse24Config(quantization=asked, smooth=False, **request), BATCHES)
    pack_(model, quantization)
    with torch.no_grad():
        pairs = [(model(**batch)[0], dense(**batch)[0]) for batch in BATCHES]
    return sum(float((packed - wanted).square().mean()) for packed, wanted in pairs)


@pytest.mark.parametrize("request_", [{"method": "alps"}, {"method": "alps", "match_blocks": True, "distill": True}])
def test_a_model_that_was_fitted_to_its_rounding_is_nearer_to_the_dense_one(request_):
    aware, unaware = (divergence_when_packed("fp8", asked, **request_) for asked in ("fp8", None))
    assert aware < unaware


def test_refitted_weights_are_fp8_values_already():
    model = build("llama")
    prune_(model, Sparse24Config(method="wanda", quantization="fp8"), BATCHES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    packed = pack_(model, "fp8") and model
    for name, module in packed.named_modules():
        if isinstance(module, Sparse24Linear):
            assert torch.equal(module.to_linear().weight, before[f"{name}.weight"])
    assert model.config.quantization_config.quantization == "fp8"
