"""Masks that move, with forward passes on the pruned model: the gradient there moves all weights, straight through.

A decay pulls pruned weights to zero, so that they come back only where the gradient keeps asking for them: "SR-STE" of
Zhou et al. 2021 (arXiv:2102.04010). Without it masks flip to and fro. It is added to the gradient before Adam, and so
divided by the gradient's own size, as Hu et al. 2024 found best (arXiv:2404.01847).
"""

from collections.abc import Sequence

from torch import Tensor

from hf_sparse24.training.policies.base import Moving, Weight, too_slow
from hf_sparse24.training.policies.transposable import transposable_mask


class MaskedDecay(Moving):
    """A constant decay, and a mask that moves to the end: Hu et al. 2024.

    They finish with dense training for the last sixth, which ends in a dense model and is left out here.

    Args:
        decay (`float`): of pruned weights, relative to the gradient's scale.
        refresh_steps (`int`): how many steps a mask stays; theirs stays 40.
        until (`float`): the share of all steps after which the mask is fixed.
        transposable (`bool`): choose masks that are 2:4 along both dimensions.
    """

    name = "masked_decay"

    def __init__(
        self, decay: float = 6e-5, refresh_steps: int = 40, until: float = 1.0, transposable: bool = False
    ) -> None:
        super().__init__(refresh_steps, until)
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
