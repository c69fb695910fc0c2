"""Masks that move, with forward passes on the pruned model: the gradient there moves all weights, straight through.

A decay pulls pruned weights to zero, so that they come back only where the gradient keeps asking for them: "SR-STE" of
Zhou et al. 2021 (arXiv:2102.04010). Without it masks flip to and fro. It is added to the gradient before Adam, and so
divided by the gradient's own size, as Hu et al. 2024 found best (arXiv:2404.01847).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse24.training.policies.base import Moving, Weight, too_slow
from hf_sparse24.training.policies.transposable import transposable_mask


class MaskedDecay(Moving):
    """A constant decay, and a mask that moves to the end: Hu et al. 2024.

    Theirs is a recipe for training faster, whose last sixth is dense and whose result is a dense model: `dense_tail`.
    At its first step the pruned weights come back as far as they have decayed, and no mask is left.

    Args:
        decay (`float`): of pruned weights, relative to the gradient's scale.
        refresh_steps (`int`): how many steps a mask stays; theirs stays 40.
        until (`float`): the share of all steps after which the mask is fixed.
        transposable (`bool`): choose masks that are 2:4 along both dimensions.
        dense_tail (`float`): the share of all steps, at the end, of dense training, theirs 1/6; 0 ends in a 2:4 model.

    Raises:
        `ValueError`: the tail is no share of the training, or `until` is given beside it.
    """

    name = "masked_decay"

    def __init__(
        self,
        decay: float = 6e-5,
        refresh_steps: int = 40,
        until: float = 1.0,
        transposable: bool = False,
        dense_tail: float = 0.0,
    ) -> None:
        if not 0 <= dense_tail < 1:
            raise ValueError(f"dense_tail must be a share of the training, from 0 to below 1; got {dense_tail!r}.")
        if dense_tail and until != 1:
            raise ValueError(f"The mask moves until the dense tail; leave out until={until!r}.")
        super().__init__(refresh_steps, until - dense_tail)
        self.ends_dense = dense_tail > 0
        self.decay = decay
        self.transposable = transposable
        self.shards = not transposable

    def search(self, scores: Tensor, dim: int) -> Tensor:
        """Return the best mask for scores: bool, True for what stays."""
        return transposable_mask(scores) if self.transposable else super().search(scores, dim)

    def decay_at(self, step: int) -> float:
        """Return the decay of a step, counted from 1."""
        return self.decay

    def before_step_(self, weight: Weight, step: int, learning_rate: float) -> None:
        """Bring the pruned weights back, and let them decay."""
        weight.gradient.add_(weight.state["pruned_values"], alpha=self.decay_at(step))
        self.reveal_(weight)

    def after_step_(self, weight: Weight, step: int) -> Tensor | None:
        """Leave a 2:4 weight, or before the dense tail all of it, and a mask that keeps all."""
        if not (self.ends_dense and self.is_fixed(step + 1)):
            return super().after_step_(weight, step)
        weight.state.clear()
        weight.pruned = torch.zeros_like(weight.pruned)
        return ~weight.pruned

    def why_too_short(self, learning_rates: Sequence[float], mean_pruned: float) -> str | None:
        """Return why pruned weights cannot decay in a training of this length, or None."""
        return too_slow(learning_rates, mean_pruned, lambda step: 0.0 if self.is_fixed(step) else 1.0)


class SRSTE(MaskedDecay):
    """A decay that grows step by step, so that the mask moves freely at first: AST (arXiv:2407.20584), as for LLaMA-2.

    Args:
        decay (`float`): at the end of its growth.
        ramp_steps (`int`, *optional*): how long it grows; None: a fifth of all steps, AST's 3000 of 15000.
        refresh_steps (`int`): how many steps a mask stays.
        until (`float`): the share of all steps after which the mask is fixed.
    """

    name = "srste"

    def __init__(
        self, decay: float = 6e-5, ramp_steps: int | None = None, refresh_steps: int = 10, until: float = 1.0
    ) -> None:
        super().__init__(decay, refresh_steps, until)
        self.ramp_steps = ramp_steps

    def decay_at(self, step: int) -> float:
        """Return the decay of a step, counted from 1."""
        return self.decay * min(1.0, step / self._ramp())

    def why_too_short(self, learning_rates: Sequence[float], mean_pruned: float) -> str | None:
        """Return why the decay does not get where it should in a training of this length, or None."""
        moving = int(self.until * self.total_steps)
        if self._ramp() > moving:
            return (
                f"the decay grows for {self._ramp()} steps and the mask moves for {moving}: lower ramp_steps, or "
                "train for more steps"
            )
        return super().why_too_short(learning_rates, mean_pruned)

    def _ramp(self) -> int:
        return self.ramp_steps or max(1, self.total_steps // 5)
