import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse24.packing import (
    LARGEST_VALUE,
    QUANTIZED_DTYPES,
    VALUE_DTYPES,
    PackedWeight,
    absmax_scale,
    indices_width,
    pack_weight,
    quantize_rows,
    unpack_weight,
)
from hf_sparse24.pattern import apply_mask_, mask_2to4, prune_2to4
from hf_sparse24.verification import check_all_packed, check_packed


def sparse(rows, columns, dtype=torch.float32, seed=0, zeros=0.0, leading=()):
    """A random 2:4 weight; a share of the kept values is zero as well, so that groups hold fewer than two."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*leading, rows, columns, generator=generator) * 20
    weight = torch.where(torch.rand(weight.shape, generator=generator) < zeros, 0.0, weight)
    masked = apply_mask_(weight, mask_2to4(weight.abs()))
    return masked.clamp(-127, 127).to(dtype)


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 11),
    dtype=st.sampled_from(VALUE_DTYPES),
    seed=st.integers(0, 10_000),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    experts=st.sampled_from([(), (3,)]),
)
def test_round_trip_is_exact(rows, groups, dtype, seed, zeros, experts):
    weight = sparse(rows, groups * 4, dtype, seed, zeros, experts)
    packed = pack_weight(weight)
    assert packed.weight.shape == (*experts, rows, groups * 2)
    assert packed.weight_indices.shape == (*experts, rows, (groups + 1) // 2)
    scale = torch.ones(weight.shape[:-1]) if dtype in LARGEST_VALUE else None
    check_packed(packed._replace(weight_scale=scale), tuple(weight.shape), "w")
    assert same_bits(unpack_weight(packed), weight)


def test_the_bytes_are_those_of_the_specification():
    weight = torch.tensor([[0.0, 5, 0, 7, 1, 0, 0, 0, 0, 0, 3, 0]])
    packed = pack_weight(weight)
    # Groups: columns (1, 3); (0, 1) with an explicit zero; (0, 2) with an explicit zero before. Low nibble first.
    assert packed.weight.tolist() == [[5, 7, 1, 0, 0, 3]]
    assert packed.weight_indices.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 0 | 2 << 2]]


def test_a_weight_has_one_packed_form_whatever_its_zeros():
    packed = pack_weight(torch.tensor([[-0.0, 5, 0, -0.0]]))
    assert packed.weight_indices.tolist() == [[0 | 1 << 2]]
    assert not torch.signbit(packed.weight).any()


def test_result_does_not_depend_on_how_rows_are_cut_into_blocks(monkeypatch):
    weight = sparse(37, 20)
    whole = pack_weight(weight, "int8")
    monkeypatch.setattr("hf_sparse24.packing._BLOCK_ELEMENTS", 64)
    parts = pack_weight(weight, "int8")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(unpack_weight(parts), unpack_weight(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_nearest_integer_of_a_per_channel_scale(dtype):
    weight = sparse(16, 64, dtype)
    values, scale = quantize_rows(weight, "int8")
    assert values.dtype == torch.int8
    assert torch.equal(scale, weight.float().abs().amax(1) / 127)
    assert values.abs().amax(1).tolist() == [127] * 16
    error = (values.double() * scale.double()[:, None] - weight.double()).abs()
    # Half a step, and the rounding of the float32 quotient (2^-24 of up to 127 steps).
    assert (error <= scale.double()[:, None] * (0.5 + 127 * 2**-23)).all()


def test_fp8_rounds_to_the_nearest_value_and_saturates():
    weight = sparse(16, 64)
    values, scale = quantize_rows(weight, "fp8")
    assert values.dtype == torch.float8_e4m3fn
    assert (scale.frexp().mantissa == 0.5).all()  # powers of two, the smallest that do
    largest = weight.abs().amax(1) / scale
    assert ((largest > 224) & (largest <= 448)).all()
    ratio = (weight / scale[:, None]).double()
    # e4m3 has 3 mantissa bits, so half a step is 2^-4 of the value; below 2^-6 steps are 2^-9.
    assert ((values.double() - ratio).abs() <= torch.clamp(ratio.abs() * 2**-4, min=2**-10) * (1 + 2**-20)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_rounded_to_fp8_is_packed_as_it_is(dtype):
    weight = sparse(64, 256, dtype)
    once = unpack_weight(pack_weight(weight, "fp8"), dtype)
    assert torch.equal(unpack_weight(pack_weight(once, "fp8"), dtype), once)


def test_a_row_whose_largest_value_is_448_keeps_scale_one():
    assert quantize_rows(torch.tensor([[448.0, 1.0, 0.0, 0.0], [449.0, 1.0, 0.0, 0.0]]), "fp8")[1].tolist() == [1, 2]


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_zero_stays_positive_zero_through_quantization(quantization):
    weight = torch.tensor([[-1e-9, 448.0, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0]])
    values, scale = quantize_rows(weight, quantization)
    assert values.view(torch.uint8)[0, [0, 2, 3]].tolist() == [0, 0, 0]
    assert values.float()[1].tolist() == [0, 0, 0, 0]
    assert scale[1] == 1


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_packing_with_quantization_equals_quantizing_first(quantization):
    weight = sparse(8, 20)
    packed = pack_weight(weight, quantization)
    values, scale = quantize_rows(weight, quantization)
    expected = values.float() * scale[:, None]
    assert torch.equal(unpack_weight(packed), expected)
    assert torch.equal(packed.weight_scale, scale)
    assert unpack_weight(packed, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_values_that_underflow_when_unpacked_become_positive_zero(quantization):
    packed = pack_weight(torch.full((1, 4), -1e-8) * torch.tensor([1.0, 0, 1, 0]), quantization)
    unpacked = unpack_weight(packed, torch.float16)
    assert unpacked.view(torch.int16).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_argument_is_not_written_to(quantization, dtype):
    weight = sparse(8, 20, dtype)
    before = weight.clone()
    unpack_weight(pack_weight(weight, quantization))
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_smallest_weights_keep_a_positive_finite_scale(dtype):
    scale = absmax_scale(torch.tensor([[1e-45, 0.0], [1e-38, 0.0]]), dtype)
    assert (scale > 0).all()
    assert scale.isfinite().all()


def test_a_scale_of_what_is_not_finite_is_not_finite():
    assert not absmax_scale(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]), torch.int8).isfinite().any()


@pytest.mark.parametrize(("quantization", "bound"), [(None, 0.57), ("int8", 0.32), ("fp8", 0.32)])
def test_size_of_a_bfloat16_projection(quantization, bound):
    weight = sparse(576, 1536, torch.bfloat16)
    packed = pack_weight(weight, quantization)
    assert sum(tensor.nbytes for tensor in packed if tensor is not None) <= bound * weight.nbytes


def test_a_dense_weight_is_refused_with_the_place():
    with pytest.raises(
        ValueError, match=r"1 of the 4 groups of q_proj hold more than two nonzeros, the first at \(1, 4\)"
    ):
        pack_weight(torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]]), name="q_proj")


def test_unknown_dtype_and_quantization_are_refused():
    with pytest.raises(ValueError, match="w is float64"):
        pack_weight(torch.zeros(1, 4, dtype=torch.float64), name="w")
    with pytest.raises(ValueError, match="got 'int4'"):
        pack_weight(torch.zeros(1, 4), "int4")
    with pytest.raises(ValueError, match=r"can be quantized; got torch\.int8"):
        pack_weight(torch.zeros(1, 4, dtype=torch.int8), "int8")


def damage(packed, **changes):
    return PackedWeight(**{**packed._asdict(), **changes})


DAMAGES = {
    "truncated values": (lambda p: {"weight": p.weight[:, :-2]}, r"w\.weight has shape \(4, 8\)"),
    "missing rows": (lambda p: {"weight_indices": p.weight_indices[:-1]}, r"w\.weight_indices has shape \(3, 3\)"),
    "wrong width": (lambda p: {"weight_indices": p.weight_indices[:, :-1]}, r"w\.weight_indices has shape \(4, 2\)"),
    "indices of another dtype": (lambda p: {"weight_indices": p.weight_indices.int()}, "weight_indices is int32"),
    "scale of another dtype": (lambda p: {"weight_scale": p.weight_scale.half()}, "weight_scale is float16"),
    "missing scale": (lambda p: {"weight_scale": None}, "weight_scale is missing beside int8"),
    "scale beside floats": (lambda p: {"weight": p.weight.float()}, "weight_scale is present beside float32"),
    "unknown values": (lambda p: {"weight": p.weight.int()}, "w is int32"),
    "equal indices": (lambda p: {"weight_indices": p.weight_indices * 0}, r"not ascending, .* \(0, 0\)"),
    "descending indices": (lambda p: {"weight_indices": torch.full_like(p.weight_indices, 0x41)}, "not ascending"),
    "unused nibble": (lambda p: {"weight_indices": p.weight_indices | 0x40}, "unused last nibble"),
    "scale of zero": (lambda p: {"weight_scale": p.weight_scale * 0}, "not a positive finite number"),
    "scale of nan": (lambda p: {"weight_scale": p.weight_scale * float("nan")}, "not a positive finite number"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_sentence(kind):
    # Columns (0, 1) everywhere: or-ing 0x40 to a full byte gives (0, 1) again, and fills the unused last nibble.
    weight = torch.tensor([[1.0, 2, 0, 0] * 5] * 4)
    packed = pack_weight(weight, "int8")
    change, message = DAMAGES[kind]
    with pytest.raises(ValueError, match=message) as error:
        check_packed(damage(packed, **change(packed)), (4, 20), "w")
    assert "\n" not in str(error.value)


def test_constants_agree():
    assert {QUANTIZED_DTYPES[q] for q in QUANTIZED_DTYPES} == set(LARGEST_VALUE)
    assert [indices_width(k) for k in (4, 8, 12, 16)] == [1, 1, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_a_gpu_packs_the_same_bytes(quantization):
    weight = sparse(64, 100, torch.bfloat16)
    on_cpu, on_gpu = pack_weight(weight, quantization), pack_weight(weight.cuda(), quantization)
    for left, right in zip(on_cpu, on_gpu, strict=True):
        assert left is None or same_bits(left, right.cpu())
    assert same_bits(unpack_weight(on_gpu).cpu(), unpack_weight(on_cpu))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_of_many_weights_the_damaged_one_is_named(quantization, monkeypatch):
    monkeypatch.setattr("hf_sparse24.verification._CHECKED_AT_ONCE", 40)
    weights = {
        f"layers.{number}": pack_weight(prune_2to4(torch.randn(4, width)), quantization)
        for number, width in enumerate((20, 64, 20, 64, 64, 20))
    }
    everything = [(name, packed, (4, 2 * packed.weight.shape[1])) for name, packed in weights.items()]
    check_all_packed(everything)
    weights["layers.4"].weight_indices[2, 5] = 0
    with pytest.raises(
        ValueError, match=r"layers\.4\.weight_indices is not ascending, the first time at \(row, group\) \(2, 10\)"
    ):
        check_all_packed(everything)
    weights["layers.4"].weight_indices[2, 5] = 0x44
    if quantization is not None:
        weights["layers.2"].weight_scale[1] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.2\.weight_scale holds a value"):
            check_all_packed(everything)
