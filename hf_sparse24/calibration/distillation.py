"""A short distillation of the whole pruned model from the dense one, after the walk.

Block losses weigh every direction of the hidden states alike; only the output knows which ones matter. The teacher
costs nothing: the walk has left the dense model's hidden states behind the last block, and they ride through the rest
of the model (final norm, head) in one batch with the student's. What comes out is compared: logits by the
Kullback-Leibler divergence (Hinton et al. 2015, arXiv:1503.02531, temperature 1, no labels), else hidden states by
squared error.

Embeddings, the final norm and heads stay as they are; kept weights, norms and biases of the blocks are trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse24.calibration.blocks import Batch, Stream, block_names, hidden_of, model_inputs
from hf_sparse24.calibration.fitting import Fit, Masks, Schedule, fit_, mixed_precision
from hf_sparse24.calibration.matching import trained_parameters
from hf_sparse24.divergence import kl_divergence, squared_error


def distill_(
    model: nn.Module,
    masks: Masks,
    batches: Sequence[Batch],
    last_block: str,
    teacher: Stream,
    schedule: Schedule,
    seed: int,
) -> Fit:
    """Train the blocks of a pruned model in place towards the dense model's output.

    Args:
        model (`nn.Module`): the pruned model, on the device where it is to be trained.
        masks (`dict`): for each pruned parameter its bool mask.
        batches (`Sequence[dict]`): this process's model inputs.
        last_block (`str`): the path of the last block.
        teacher (`Stream`): the dense model's hidden states behind it, batch by batch.
        schedule (`Schedule`): how long and how fast.
        seed (`int`): of the order of the batches.
    """
    device = next(model.parameters()).device
    parameters = list(masks)
    for name in block_names(model, [f"{last_block}."]):
        parameters += trained_parameters(model.get_submodule(name), {})

    def loss(index: int) -> Tensor:
        states = teacher.hidden[index]
        with _riding_along(model.get_submodule(last_block), states), mixed_precision(device, states.dtype):
            output = model(**model_inputs(model, batches[index]))
        return _divergence(output, teacher, index)

    return fit_(parameters, masks, loss, len(batches), schedule, seed)


@torch.no_grad()
def why_not_distilled(model: nn.Module, batch: Batch, last_block: str) -> str | None:
    """Return why the dense model's hidden states cannot ride through the rest of a model, or None.

    They cannot where two towers meet, or where the head looks for a token of its own for each sequence of the input.
    """
    try:
        with _riding_along(model.get_submodule(last_block)) as rows:
            output = model(**model_inputs(model, batch))
        states = output.get("logits", output.get("last_hidden_state"))
    except Exception as error:  # it ran before; whatever fails now fails for the doubled hidden states
        return f"what follows {last_block} takes no second batch ({type(error).__name__})"
    if not isinstance(states, Tensor) or [len(states)] != rows:
        return f"the model's output does not follow from {last_block} alone"
    return None


@contextmanager
def _riding_along(block: nn.Module, states: Tensor | None = None) -> Iterator[list[int]]:
    """While active, other hidden states follow a block's own in one batch; without any, a copy of its own.

    Yields a list to which each call adds the number of sequences in that batch.
    """
    rows: list[int] = []

    def append(block: nn.Module, args: Any, output: Any) -> Any:
        own = hidden_of(output)
        both = torch.cat([own, own if states is None else states.to(own)])
        rows.append(len(both))
        return both if isinstance(output, Tensor) else (both, *output[1:])

    handle = block.register_forward_hook(append)
    try:
        yield rows
    finally:
        handle.remove()


def _divergence(output: Any, teacher: Stream, index: int) -> Tensor:
    """Compare the first half of the model's output with the second, token by token, padding left out."""
    states = output.get("logits")
    student, dense = (output["last_hidden_state"] if states is None else states).chunk(2)
    kept = teacher.kept_tokens(index, student)
    if kept is None:
        kept = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if states is not None:
        return kl_divergence(student, dense, kept) / kept.sum()
    error, size = squared_error(student, dense, kept)
    return error / size
