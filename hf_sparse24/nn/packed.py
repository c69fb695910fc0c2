"""`PackedModule`: a module whose state is a packed 2:4 weight (format 1, see `hf_sparse24.packing`).

Plain tensors as the state of a module rather than a tensor subclass: saving, sharding, offload, `deepcopy`,
`torch.compile` and PEFT need nothing special.

On a GPU a library reads the weight in its own form (`kernels.dispatch.prepare`): `weight` becomes a view of the
library's buffer, and `weight_metadata`, which is never saved, stands in place of the indices.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse24.capability import check_backend
from hf_sparse24.kernels import dispatch
from hf_sparse24.packing import QUANTIZED_DTYPES, PackedWeight, check_value_dtype, indices_width
from hf_sparse24.pattern import bits_of, check_in_features


class PackedModule(nn.Module):
    """What `Sparse24Linear` and `Sparse24Experts` have in common: a packed weight, and its form on a device.

    Args:
        shape (`tuple[int, ...]`): of the dense weight, (N, K) or (E, N, K); K divisible by 4.
        quantization, backend, device, dtype: as in `Sparse24Linear`.

    Raises:
        `ValueError`: K is not divisible by four, or the quantization or backend is unknown or cannot run.
    """

    weight: nn.Parameter
    weight_indices: nn.Parameter
    weight_scale: nn.Parameter | None
    in_features: int
    out_features: int

    def __init__(
        self,
        shape: tuple[int, ...],
        quantization: str | None,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        *leading, self.in_features = shape
        self.out_features = leading[-1]
        check_in_features(self.in_features, type(self).__name__)
        if quantization is not None and quantization not in QUANTIZED_DTYPES:
            raise ValueError(f"quantization must be None or one of {sorted(QUANTIZED_DTYPES)}; got {quantization!r}.")
        check_backend(backend)
        self.quantization, self.backend = quantization, backend
        self._model_dtype = dtype or torch.get_default_dtype()
        value_dtype = QUANTIZED_DTYPES[quantization] if quantization else self._model_dtype
        self.weight = frozen(torch.empty(*leading, self.in_features // 2, dtype=value_dtype, device=device))
        width = indices_width(self.in_features)
        self.weight_indices = frozen(torch.empty(*leading, width, dtype=torch.uint8, device=device))
        scale = torch.empty(*leading, dtype=torch.float32, device=device) if quantization else None
        self.register_parameter("weight_scale", None if scale is None else frozen(scale))
        self.register_buffer("weight_metadata", None, persistent=False)
        self._prepared: tuple[int, ...] | None = None  # the state of the weight that the metadata belong to
        self._few_tokens = self._few_quantized_tokens = 0

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight with its inputs last: (N, K), or (E, N, K)."""
        return (*self.weight.shape[:-1], self.in_features)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of the dense weight: that of the values, or with 8 bits that of the model."""
        return self.weight.dtype if self.quantization is None else self._model_dtype

    @property
    def packed(self) -> PackedWeight:
        """The weight as the three tensors of format 1."""
        return PackedWeight(self.weight, self.weight_indices, self.weight_scale)

    def hold_(self, packed: PackedWeight) -> None:
        """Take a packed weight of this shape as the state, as it is."""
        self.weight = initialized(frozen(packed.weight))
        self.weight_indices = initialized(frozen(packed.weight_indices))
        self.weight_scale = None if packed.weight_scale is None else initialized(frozen(packed.weight_scale))

    def reset_parameters(self) -> None:
        """Refuse: a packed weight is read from a checkpoint or made from a dense one, never initialized at random."""
        raise RuntimeError(
            f"{type(self).__name__} has no random initialization; load a packed checkpoint or pack a dense layer."
        )

    @torch.no_grad()
    def prepare_(self) -> None:
        """Make what the kernels of the weight's device read in place of the indices; on a CPU that is nothing.

        Loading, packing and moving call it, and a forward where the weight was written to since.

        Raises:
            `ValueError`: the backend that was named does not take this weight.
        """
        self.weight_metadata, self._prepared = None, None
        if not self.weight.is_cuda:
            return
        with torch.inference_mode(False):
            prepared = self._prepare()
        self.weight.data, self.weight_metadata = prepared.weight, prepared.metadata
        self._few_tokens, self._few_quantized_tokens = prepared.few_tokens, prepared.few_quantized_tokens
        self._prepared = self._state()

    def _prepare(self) -> dispatch.Prepared:
        return dispatch.prepare(self.packed, self.backend)

    def _current_metadata(self) -> Tensor | None:
        """Return the metadata, made anew where the weight is not the one that they were made from."""
        if torch.compiler.is_compiling() or not self._parameters["weight"].is_cuda:
            return self.weight_metadata
        if self._is_offloaded():  # the weight is here for this call only
            self.weight_metadata, self._prepared = None, None
            dispatch.check_without_metadata(self.backend)
        elif self._prepared != self._state():
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "A packed weight was replaced, and its metadata cannot be made while a CUDA graph is captured. "
                    "Run the model once before."
                )
            self.prepare_()
        return self._buffers["weight_metadata"]

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the weight for each call, by a hook or one of several."""
        hook = self.__dict__.get("_hf_hook")
        parts = () if hook is None else (hook, *getattr(hook, "hooks", ()))
        return any(getattr(part, "offload", False) for part in parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the metadata of a copy, or of what was unpickled: they have to follow the weight in memory."""
        super().__setstate__(state)
        self.prepare_()

    def _state(self) -> tuple[int, ...]:
        weight, indices = self._parameters["weight"], self._parameters["weight_indices"]
        return weight.data_ptr(), indices.data_ptr(), 0 if indices.is_inference() else indices._version

    def _load_from_state_dict(self, *args: Any) -> None:
        """Make the metadata of what was loaded at once: compiled code does not look."""
        super()._load_from_state_dict(*args)
        self.prepare_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        """Move, but never cast, 8-bit values and their scales: `.to(dtype)` sees their bits."""

        def moved(tensor: Tensor) -> Tensor:
            if self.quantization is not None and (tensor is self.weight or tensor is self.weight_scale):
                return fn(bits_of(tensor)).view(tensor.dtype)
            result = fn(tensor)
            if tensor is self.weight:
                check_value_dtype(result.dtype, "what this layer is cast to")
            return result

        self.weight_metadata, self._prepared = None, None
        super()._apply(moved, recurse)
        self._model_dtype = fn(torch.empty(0, dtype=self._model_dtype, device=self.weight.device)).dtype
        self.prepare_()
        return self


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter without a gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def initialized(parameter: nn.Parameter) -> nn.Parameter:
    """Tell transformers' weight initialization, which knows nn.Linear, that this one has its values."""
    parameter._is_hf_initialized = True
    return parameter
