"""How far a student's outputs are from its teacher's: logits, last hidden states, hidden states of every layer.

Logits are the largest tensors of a language model, and the logarithms of their softmax, in float32, several times as
large. So they are made a chunk of tokens at a time, and again for the gradient.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    kept: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Sum the Kullback-Leibler divergence of the student's tokens from the teacher's: Hinton et al. 2015.

    Args:
        student, teacher (`Tensor`): logits (..., classes), any floating dtype.
        kept (`Tensor`): bool (...), the tokens that count.
        temperature (`float`): both logits are divided by it, and the result is multiplied by its square, which keeps
            the gradient's size (arXiv:1503.02531, section 2).
        top_k (`int`, *optional*): compare only the teacher's likeliest classes, and the rest as one class more.
        chunk_tokens (`int`): how many tokens are compared at a time.

    Returns:
        `Tensor`: a float32 scalar; the sum over the tokens that count, in nats.

    Raises:
        `ValueError`: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Distillation needs logits of one shape; the student's are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}. Use a teacher with the same vocabulary."
        )

    def compare(own: Tensor, other: Tensor, tokens: Tensor) -> Tensor:
        own, other = ((logits.float() / temperature).log_softmax(-1) for logits in (own, other))
        if top_k is not None and top_k < own.shape[-1] - 1:
            own, other = _likeliest(own, other, top_k)
        divergence = F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
        return (divergence * tokens).sum()

    return _in_chunks(compare, student, teacher, kept, chunk_tokens) * temperature**2


def squared_error(student: Tensor, teacher: Tensor, kept: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Return the squared error of states (..., features) and the teacher's sum of squares: (2,) float32."""

    def compare(own: Tensor, other: Tensor, tokens: Tensor) -> Tensor:
        own, other = own.float(), other.float()
        sums = torch.stack([(own - other).square().sum(-1), other.square().sum(-1)])
        return (sums * tokens).sum(-1)

    return _in_chunks(compare, student, teacher, kept, chunk_tokens)


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Return the squared error of every layer's hidden states relative to the teacher's, averaged over the layers.

    SquareHead of Kurtic et al. 2023 (arXiv:2310.06927), with which Sparse-Llama was retrained.

    Args:
        student, teacher (`Sequence[Tensor]`): the hidden states of each layer, (batch, tokens, features).
        kept (`Tensor`): bool (batch, tokens), the tokens that count.
    """
    if len(student) != len(teacher):
        raise ValueError(f"The student has {len(student)} layers of hidden states, the teacher {len(teacher)}.")
    ratios = []
    for own, other in zip(student, teacher, strict=True):
        error, size = squared_error(own, other, kept)
        ratios.append(error / size.clamp_min(torch.finfo(size.dtype).tiny))
    return torch.stack(ratios).mean()


def _in_chunks(
    compare: Callable[[Tensor, Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, kept: Tensor, size: int
) -> Tensor:
    """Sum a comparison over chunks of tokens; nothing of a chunk is kept for the gradient but its inputs."""
    parts = (tensor.flatten(0, -2).split(size) for tensor in (student, teacher.detach()))
    chunks = zip(*parts, kept.to(student.device).flatten().split(size), strict=True)
    return torch.stack([checkpoint(compare, *chunk, use_reentrant=False) for chunk in chunks]).sum(0)


def _likeliest(own: Tensor, other: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Reduce logarithms of probabilities to the classes that are likeliest to the teacher, and all others as one."""
    index = other.topk(count, sorted=False).indices
    pairs = []
    for logarithms in (own, other):
        top = logarithms.gather(-1, index)
        rest = (1 - top.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(top.dtype).eps).log()
        pairs.append(torch.cat([top, rest], -1))
    return pairs[0], pairs[1]
