"""How a model is run to be measured: modes, devices, and inputs and outputs that cannot give a figure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in inference mode with dropout and the like off, and switch on again afterwards what was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def moved(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Return a batch on the model's device, with its floating-point tensors in the model's dtype."""
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


def check_not_nan(result: Tensor, number: int, what: str) -> Tensor:
    """Return the result of a batch, or say which batch it is that cannot be scored."""
    if result.isnan().any():
        raise ValueError(
            f"The {what} of batch {number} are NaN. A model in float16 may have overflowed: try bfloat16 or float32."
        )
    return result
