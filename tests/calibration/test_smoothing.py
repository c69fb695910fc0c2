import pytest
import torch

from hf_sparse24 import Sparse24Config, prune_
from hf_sparse24.calibration.blocks import record
from hf_sparse24.calibration.inputs import Group, producers
from hf_sparse24.calibration.smoothing import power_of_two_scale
from hf_sparse24.kernels.reference import integer_matmul
from hf_sparse24.packing import quantize_rows
from hf_sparse24.prune import recipe_of
from hf_sparse24.selection import Target
from tests.families import FAMILIES, build, inputs

WITH_OUTLIERS = 40.0


def with_outliers(family, dtype=torch.float32):
    """Build a tiny model in which some features of every norm are many times as large as the rest."""
    model = build(family)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1:
            weight.data[::7] *= WITH_OUTLIERS
    return model.to(dtype)


def pruned(family, dtype=torch.float32, **kwargs):
    model = with_outliers(family, dtype)
    prune_(model, Sparse24Config(method="wanda", refit=False, **kwargs), [inputs(family) for _ in range(2)])
    return model


def smoothed_norms(model):
    return model.config.sparse24["calibration"].get("smoothed_norms", 0)


def first_output(model, family):
    batch = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs(family).items()}
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
def test_no_bit_of_the_output_changes(family, dtype):
    plain, smoothed = pruned(family, dtype, smooth=False), pruned(family, dtype, smooth=True)
    assert smoothed_norms(plain) == 0
    assert torch.equal(first_output(plain, family), first_output(smoothed, family))


@pytest.mark.parametrize(
    ("family", "norms"),
    {"llama": 4, "gpt2": 4, "opt": 4, "whisper": 10, "vit": 4, "mixtral": 2, "bert": 0, "falcon": 2}.items(),
)
def test_norms_that_only_projections_read_are_rescaled(family, norms):
    # Whisper's decoder has three norms a layer. A router reads Mixtral's second norm, a residual both of BERT's.
    assert smoothed_norms(pruned(family, smooth=True)) == norms


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eight_bit_activations_become_finer(family):
    def rounding_error(model):
        block = model.get_submodule("model.layers.0" if family == "llama" else "transformer.h.0")
        linear = block.get_submodule("self_attn.q_proj" if family == "llama" else "attn.c_attn")
        seen = []
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        first_output(model, family)
        weight = linear.weight.detach() if family == "llama" else linear.weight.detach().t()
        values, scale = quantize_rows(weight, "int8")
        x_scale = seen[0].abs().amax(-1, keepdim=True) / 127
        exact = seen[0] @ weight.t()
        rounded = integer_matmul((seen[0] / x_scale).round().to(torch.int8), values).float() * x_scale * scale
        return float((rounded - exact).norm() / exact.norm())

    # 1.6x at the least over these two: what is gained depends on the outliers, which are 40x here.
    assert rounding_error(pruned(family, smooth=True)) < rounding_error(pruned(family, smooth=False)) / 1.6


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_it_is_on_by_default(quantization):
    assert recipe_of(Sparse24Config(quantization=quantization), "alps", "cpu").smooth
    assert not recipe_of(Sparse24Config(quantization=quantization, smooth=False), "alps", "cpu").smooth


def test_a_scale_is_a_power_of_two_and_leaves_the_geometric_mean():
    norms, weights = torch.rand(64).exp2() * 100, [torch.randn(5, 64), torch.randn(3, 64)]
    scale = power_of_two_scale(norms, weights)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert abs(float(scale.log2().mean())) < 0.5  # rounding of each by at most a half
    dead = power_of_two_scale(torch.zeros(8), [torch.zeros(4, 8)])
    assert dead.isfinite().all()


def test_the_norm_that_writes_an_input_is_found_by_the_tensor():
    model = build("llama")
    names = ["model.layers.0", "model.layers.1"]
    (stream,) = record(model, [inputs("llama")], [names])
    groups = [
        Group([Target(f"model.layers.0.{path}", f"model.layers.0.{path}", "weight", "q", -1)], False)
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")
    ]
    block = model.model.layers[0]
    found = producers(block, "model.layers.0", groups, stream)
    assert found == [block.input_layernorm, None, block.post_attention_layernorm]
