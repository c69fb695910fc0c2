"""What is timed: this package's packed layer, and the ordinary ways to run the same projection in torch.

Every candidate takes 16-bit inputs and returns 16-bit outputs, so that quantizing the activations and applying every
scale is in its time. It is split in two, `prepare` (from an input to what the product takes) and `multiply`, because
projections that read one input prepare it once. (This package's layers prepare theirs in their forward.)

- `2:4-bf16`, `2:4-int8`, `2:4-fp8`: `Sparse24Linear.from_linear` and its forward, as a packed model runs them.
- `dense-bf16`: `F.linear`.
- `dense-fp8`: `torch._scaled_mm` with a scale for each token and each output channel.
- `dense-fp8-tensor`: one scale for the weight; the token scale is left to the consumer of the output, and is *not* in
  the time. It is the fastest that dense FP8 gets, and flatters it.
- `dense-int8`: `torch._int_mm`, then both scales in one compiled pass. It takes more than 16 rows: fewer are padded to
  32 before the clock starts, which flatters it.
- `torch-sparse`: `torch.sparse.to_sparse_semi_structured`.
- `torch-sparse-int8`: `torch._cslt_sparse_mm` with the weight scales as its alpha, then the token scales.

All 8-bit candidates quantize activations with the same kernel, `torch.ops.hf_sparse24.quantize_per_token`, the fastest
that there is here: no baseline is slow for want of a fused pass. (Its call through torch's dispatcher costs the host a
few microseconds that this package's layers save themselves.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse24.benchmark.roofline import DTYPE
from hf_sparse24.nn import SharedInput, Sparse24Linear
from hf_sparse24.packing import QUANTIZED_DTYPES, quantize_rows

_ROWS_OF_INT_MM = 32
_UNUSED_RANGE = 1e-12  # smallest largest magnitude of a weight that is quantized as a whole


class Prepared(NamedTuple):
    """An input as a product takes it: rows (M, K), and with 8 bits a scale for each (M, 1)."""

    rows: Tensor
    scale: Tensor | None = None


class Candidate:
    """A projection, ready to run. Subclasses say how.

    Args:
        weight (`Tensor`): (N, K) bfloat16; 2:4 for a sparse candidate.
        backend (`str`): of this package's layers.
    """

    precision = "bf16"
    sparse = False

    def __init__(self, weight: Tensor, backend: str = "auto") -> None:
        self.weight = weight

    @staticmethod
    def join(siblings: Sequence[Any]) -> None:
        """Tell projections that they read one input, for candidates whose `prepare` leaves it as it is."""

    def place(self, x: Tensor) -> Tensor:
        """Return an input as this candidate wants to find it in memory; not timed."""
        return x

    def prepare(self, x: Tensor) -> Prepared:
        """Quantize an input (M, K), or leave it."""
        return Prepared(x)

    def multiply(self, prepared: Prepared) -> Tensor:
        """Return the output (M, N)."""
        raise NotImplementedError

    def finished(self, output: Tensor, prepared: Prepared, tokens: int) -> Tensor:
        """Return the output as its consumer would see it, for comparison; not timed."""
        return output[:tokens]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the projection."""
        return self.multiply(self.prepare(x))


class DenseBf16(Candidate):
    """`F.linear`."""

    def multiply(self, prepared: Prepared) -> Tensor:
        """Multiply."""
        return F.linear(prepared.rows, self.weight)


class _Quantized(Candidate):
    """What the 8-bit baselines have in common: a weight with a scale for each output, tokens with one each."""

    def __init__(self, weight: Tensor, backend: str = "auto") -> None:
        self.dtype = QUANTIZED_DTYPES[self.precision]
        self.weight, self.scale = quantize_rows(weight, self.precision)

    def prepare(self, x: Tensor) -> Prepared:
        """Quantize each token."""
        return Prepared(*torch.ops.hf_sparse24.quantize_per_token(x, self.dtype))


class DenseFp8(_Quantized):
    """Row-scaled FP8: both scales in the epilogue."""

    precision = "fp8"

    def multiply(self, prepared: Prepared) -> Tensor:
        """Multiply and scale."""
        return torch._scaled_mm(
            prepared.rows,
            self.weight.t(),
            scale_a=prepared.scale,
            scale_b=self.scale.view(1, -1),
            out_dtype=DTYPE,
            use_fast_accum=True,
        )


class DenseFp8Tensor(_Quantized):
    """FP8 with one weight scale; the consumer applies the token scale."""

    precision = "fp8"

    def __init__(self, weight: Tensor, backend: str = "auto") -> None:
        self.dtype = QUANTIZED_DTYPES[self.precision]
        largest = weight.abs().amax().float().clamp(min=_UNUSED_RANGE)
        self.scale = largest / torch.finfo(self.dtype).max
        self.weight = (weight.float() / self.scale).to(self.dtype)
        self.one = torch.ones((), device=weight.device)

    def multiply(self, prepared: Prepared) -> Tensor:
        """Multiply, and apply the weight's scale."""
        return torch._scaled_mm(
            prepared.rows,
            self.weight.t(),
            scale_a=self.one,
            scale_b=self.scale,
            out_dtype=DTYPE,
            use_fast_accum=True,
        )

    def finished(self, output: Tensor, prepared: Prepared, tokens: int) -> Tensor:
        """Apply the token scales."""
        return (output * prepared.scale)[:tokens]


class DenseInt8(_Quantized):
    """Exact integer sums, then both scales in one pass."""

    precision = "int8"

    def place(self, x: Tensor) -> Tensor:
        """Add rows up to the number that `torch._int_mm` takes."""
        return F.pad(x, (0, 0, 0, max(0, _ROWS_OF_INT_MM - len(x)))) if len(x) <= _ROWS_OF_INT_MM // 2 else x

    def multiply(self, prepared: Prepared) -> Tensor:
        """Multiply and scale."""
        sums = torch._int_mm(prepared.rows, self.weight.t())
        if not sums.is_cuda:
            return _scale(sums, prepared.scale, self.scale)
        for tensor in (sums, prepared.scale):  # one compiled kernel for all numbers of tokens
            torch._dynamo.mark_dynamic(tensor, 0)
        return _compiled_scale()(sums, prepared.scale, self.scale)


class Sparse24(Candidate):
    """A layer of this package: `Sparse24Linear` and its forward."""

    sparse = True

    def __init__(self, weight: Tensor, backend: str = "auto") -> None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantization = None if self.precision == "bf16" else self.precision
        self.layer = Sparse24Linear.from_linear(linear, quantization, backend).eval()

    @staticmethod
    def join(siblings: Sequence[Any]) -> None:
        """Let the layers quantize their input once, as `pack_` does."""
        shared = SharedInput(len(siblings))
        for number, sibling in enumerate(siblings):
            sibling.layer.share_input(shared, number)

    def multiply(self, prepared: Prepared) -> Tensor:
        """Run the layer."""
        return self.layer(prepared.rows)


class Sparse24Int8(Sparse24):
    """W8A8 with INT8."""

    precision = "int8"


class Sparse24Fp8(Sparse24):
    """W8A8 with FP8."""

    precision = "fp8"


class TorchSparse(Candidate):
    """torch's own 2:4 tensor."""

    sparse = True

    def __init__(self, weight: Tensor, backend: str = "auto") -> None:
        self.weight = torch.sparse.to_sparse_semi_structured(weight)

    def multiply(self, prepared: Prepared) -> Tensor:
        """Multiply."""
        return F.linear(prepared.rows, self.weight)


class TorchSparseInt8(_Quantized):
    """torch's operator of cuSPARSELt, weight scales inside, token scales after it."""

    precision = "int8"
    sparse = True

    def __init__(self, weight: Tensor, backend: str = "auto") -> None:
        super().__init__(weight)
        self.weight = torch._cslt_compress(self.weight)

    def place(self, x: Tensor) -> Tensor:
        """Add rows up to a multiple of 16."""
        return F.pad(x, (0, 0, 0, -len(x) % 16))

    def multiply(self, prepared: Prepared) -> Tensor:
        """Multiply and scale."""
        product = torch._cslt_sparse_mm(
            self.weight, prepared.rows.t(), alpha=self.scale, out_dtype=DTYPE, transpose_result=True
        )
        return product.mul_(prepared.scale)


OURS: dict[str | None, type[Candidate]] = {None: Sparse24, "int8": Sparse24Int8, "fp8": Sparse24Fp8}
BASELINES: dict[str, type[Candidate]] = {
    "dense-bf16": DenseBf16,
    "dense-fp8": DenseFp8,
    "dense-fp8-tensor": DenseFp8Tensor,
    "dense-int8": DenseInt8,
    "torch-sparse": TorchSparse,
    "torch-sparse-int8": TorchSparseInt8,
}


def chosen(quantization: str, against: str) -> dict[str, type[Candidate]]:
    """Return candidates by name, from the options of `hf-sparse24 bench`: baselines first.

    Args:
        quantization (`str`): of this package's layers: none, int8, fp8, separated by commas.
        against (`str`): names of `BASELINES`, separated by commas. `dense-bf16` is always there.

    Raises:
        `ValueError`: an unknown name.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    precisions = [None if name.strip() == "none" else name.strip() for name in quantization.split(",")]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"--against takes {', '.join(BASELINES)}; got {unknown[0]!r}.")
    unknown = [str(name) for name in precisions if name not in OURS]
    if unknown:
        raise ValueError(f"--quantization takes none, int8, fp8, separated by commas; got {unknown[0]!r}.")
    found = {name: BASELINES[name] for name in ("dense-bf16", *names)}
    return found | {f"2:4-{precision or 'bf16'}": OURS[precision] for precision in precisions}


@functools.cache
def _compiled_scale() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_scale, dynamic=False)


def _scale(sums: Tensor, token_scale: Tensor, channel_scale: Tensor) -> Tensor:
    return (sums * token_scale * channel_scale).to(DTYPE)
