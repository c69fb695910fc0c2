"""Products with 2:4 weights while they are trained: forward passes and gradients of inputs on sparse tensor cores.

A mask that is 2:4 along both dimensions lets the forward pass, input @ W.T, and the gradient of the input, grad @ W,
both use a sparse weight: W and its transpose (Hubara et al. 2021, arXiv:2102.08124). The gradient of the weight is a
dense product. As the mask is fixed, what cuSPARSELt calls metadata is made once; after a step of the optimizer only
the values are new, and each is read from a place in the weight that is known.

Takes 6.5 bytes a weight beside it: two packed forms in 16 bits, and the places of their values in 32.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_sparse24.kernels import dispatch
from hf_sparse24.packing import dtype_name, pack_weight
from hf_sparse24.pattern import GROUP_SIZE
from hf_sparse24.training.masks import Mask, Masks

logger = logging.get_logger(__name__)

DTYPES = (torch.bfloat16, torch.float16)


class Packed(NamedTuple):
    """A matrix (N, K) as a product reads it, and where its values stand in the weight.

    `values` (N, K/2) and `indices` are format 1 (`hf_sparse24.packing`), `metadata` what a library reads in place of
    the indices, or None; `places` (N * K/2,) int32 are positions in the flattened weight.
    """

    values: Tensor
    indices: Tensor
    metadata: Tensor | None
    places: Tensor

    @classmethod
    def of(cls, kept: Tensor, numbers: Tensor, dtype: torch.dtype) -> "Packed":
        """Prepare a matrix of a mask.

        Args:
            kept (`Tensor`): bool (N, K), two of every four of a row.
            numbers (`Tensor`): int32 (N, K), the position of each in the flattened weight.
            dtype (`torch.dtype`): of the values.
        """
        packed = pack_weight(kept.to(dtype))  # the ones of the mask: a weight may be zero where it is kept
        prepared = dispatch.prepare(packed, "cusparselt") if kept.is_cuda else (packed.weight, None)
        return cls(prepared[0], packed.weight_indices, prepared[1], numbers[kept])

    def read_(self, flat: Tensor) -> None:
        """Take the values from the flattened weight, in their dtype."""
        torch.index_select(flat, 0, self.places, out=self.values.view(-1))

    def product(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return input @ matrix.T + bias, in the dtype of the values."""
        how = (self.metadata, "cusparselt" if input.is_cuda else "reference")
        direct = input.is_cuda and not torch.compiler.is_compiling()  # torch's dispatcher costs as much as a launch
        run = dispatch if direct else torch.ops.hf_sparse24
        return run.linear(input, self.values, self.indices, None, bias, *how)


class SparseProduct(torch.autograd.Function):
    """input @ weight.T + bias, with two packed forms of the weight: of itself, and of its transpose."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, matrix: Packed, transposed: Packed
    ) -> Tensor:
        """Multiply; the dense weight only says whose gradient is wanted."""
        read = input if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(read, *transposed)  # a change of values before the backward pass is then an error
        ctx.weight_dtype = weight.dtype
        return matrix.product(input, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, through the sparse transpose, of the dense weight, and of the bias."""
        input, *transposed = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = Packed(*transposed).product(rows).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            of_weight = (rows.t() @ input.reshape(-1, input.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_input, of_weight, of_bias, None, None


class SparseLinear:
    """The forward pass of one `nn.Linear` while it is trained.

    Args:
        module (`nn.Linear`): the layer, whose weight is 2:4 along both dimensions.
        mask (`Mask`): its mask.
        dtype (`torch.dtype`): of the products; calls in another one run dense.
    """

    def __init__(self, module: nn.Linear, mask: Mask, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        kept = mask.kept()
        numbers = torch.arange(kept.numel(), dtype=torch.int32, device=kept.device).view(kept.shape)
        self.matrix = Packed.of(kept, numbers, dtype)
        self.transposed = Packed.of(kept.t(), numbers.t(), dtype)
        self.repack_()

    @torch.no_grad()
    def repack_(self) -> None:
        """Take the values of the weight as it is now."""
        flat = self.module.weight.detach().to(self.dtype).reshape(-1)
        self.matrix.read_(flat)
        self.transposed.read_(flat)
        self._packed = self._state()

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the layer returns for an input (..., in)."""
        module, device = self.module, input.device.type
        autocast = torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else input.dtype) != self.dtype:
            return F.linear(input, module.weight, module.bias)
        if not torch.compiler.is_compiling() and self._packed != self._state():
            self.repack_()  # something other than a step wrote to the weight
        bias = None if module.bias is None else module.bias.to(self.dtype)
        return SparseProduct.apply(input.to(self.dtype), module.weight, bias, self.matrix, self.transposed)

    def _state(self) -> tuple[int, int]:
        return self.module.weight.data_ptr(), self.module.weight._version


class SparseMatmul:
    """Sparse products in all layers of a model, from now until `remove`.

    Args:
        masks (`Masks`): of the model.
        dtype (`torch.dtype`): of the products: that of autocast, or of the weights.
        modules (`list[str]`, *optional*): names of projections, such as "up_proj"; the others stay dense products.

    Raises:
        `ValueError`: a mask is not 2:4 along both dimensions, products are not in 16 bits, or no layer can be sparse.
    """

    def __init__(self, masks: Masks, dtype: torch.dtype, modules: list[str] | None = None) -> None:
        if dtype not in DTYPES:
            raise ValueError(
                f"sparse_matmul needs products in 16 bits; these are in {dtype_name(dtype)}. Train with bf16=True."
            )
        self.layers: dict[str, SparseLinear] = {}
        left = {}
        for name, mask in masks.items():
            if modules is not None and not set(modules) & set(name.split(".")):
                continue
            _check(name, mask)
            reason = _why_dense(mask, dtype)
            if reason is not None:
                left[name] = reason
                continue
            self.layers[name] = SparseLinear(mask.module, mask, dtype)
        if not self.layers:
            what = next(iter(left.values()), f"none of {len(masks)} is called as sparse_matmul_modules says")
            raise ValueError(f"sparse_matmul finds no projection for sparse products: {what}.")
        for name, reason in left.items():
            logger.warning(f"Products with {name} stay dense: {reason}.")
        for layer in self.layers.values():
            layer.module.forward = layer

    def repack_(self) -> None:
        """Take the values of all weights as they are now."""
        for layer in self.layers.values():
            layer.repack_()

    def remove(self) -> None:
        """Give the layers back the forward pass of their class."""
        for layer in self.layers.values():
            layer.module.__dict__.pop("forward", None)
        self.layers.clear()


def is_transposable(kept: Tensor) -> bool:
    """Tell whether a mask (out, in) keeps two of every four of each row and of each column.

    ```python
    >>> is_transposable(torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool())
    True
    >>> is_transposable(torch.tensor([[1, 1, 0, 0]] * 4).bool())
    False

    ```
    """
    if kept.ndim != 2 or any(size % GROUP_SIZE for size in kept.shape):
        return False
    groups = (kept.unflatten(-1, (-1, GROUP_SIZE)).sum(-1), kept.t().unflatten(-1, (-1, GROUP_SIZE)).sum(-1))
    return all(bool((counts == 2).all()) for counts in groups)


def _check(name: str, mask: Mask) -> None:
    if isinstance(mask.parameter, DTensor):
        raise ValueError(f"sparse_matmul needs whole weights; {name} is sharded. Use DDP, or leave it out.")
    if type(mask.module) is not nn.Linear or "forward" in vars(mask.module):
        raise ValueError(
            f"sparse_matmul takes plain nn.Linear layers; {name} is of a {type(mask.module).__name__} or has hooks. "
            "Name others in sparse_matmul_modules."
        )
    if not is_transposable(mask.kept()):
        raise ValueError(
            f"sparse_matmul needs masks that are 2:4 along both dimensions; that of {name} is not. Use "
            "mask_policy='transposable'."
        )


def _why_dense(mask: Mask, dtype: torch.dtype) -> str | None:
    """Return why the library takes no products with a matrix and its transpose on this device, or None."""
    if not mask.parameter.is_cuda:
        return None  # the reference kernels take everything
    outputs, inputs = mask.shape
    found = [dispatch.takes_weight(dtype, *shape, "cusparselt") for shape in ((outputs, inputs), (inputs, outputs))]
    return next((capability.reason for capability in found if not capability.ok), None)
