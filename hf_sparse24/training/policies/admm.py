"""Dense training that is drawn to the nearest 2:4 model: ELSA (arXiv:2510.01650), ADMM on the loss itself.

The weights w stay dense in the forward pass. Beside them are z, which is always 2:4, and u, which adds up how far they
were apart: `z = project(w + u)`, `u += w - z`. Each gradient is drawn by `penalty * (w - z + u)`. At the end w is
nearly 2:4, and the projection costs little.
"""

from collections.abc import Sequence

from torch import Tensor

from hf_sparse24.training.policies.base import Moving, Weight, too_slow


class ADMM(Moving):
    """Alternating directions: the optimizer for the loss, a projection for the pattern.

    Takes two tensors of the weight's shape and dtype, and one more for what lies outside the mask.

    Args:
        penalty (`float`): how strongly weights are drawn, relative to the gradient's scale; ELSA's lambda.
        refresh_steps (`int`): how many steps lie between two projections.
        until (`float`): the share of all steps after which weights are projected for good, and trained as they are.
    """

    name = "admm"

    def __init__(self, penalty: float = 0.01, refresh_steps: int = 32, until: float = 1.0) -> None:
        super().__init__(refresh_steps, until)
        self.penalty = penalty

    def start(self, weight: Weight) -> None:
        """Begin with the projection of the weights."""
        weight.state["projected"] = weight.values.masked_fill(weight.pruned, 0)
        weight.state["dual"] = weight.values.new_zeros(weight.values.shape)
        self.hide_(weight)

    def before_forward_(self, weight: Weight, step: int) -> None:
        """Bring the pruned weights back: the forward pass is dense."""
        self.reveal_(weight)

    def before_step_(self, weight: Weight, step: int, learning_rate: float) -> None:
        """Draw the weights to their projection."""
        weight.gradient.add_(weight.values - weight.state["projected"] + weight.state["dual"], alpha=self.penalty)

    def choose_(self, weight: Weight, step: int, last: bool) -> Tensor | None:
        """Project, every so many steps; what is deployed at the end is the projection of the weights alone."""
        if last:
            return self.search(weight.values.abs(), weight.dim)
        if step % self.refresh_steps:
            return None
        shifted = weight.values + weight.state["dual"]
        kept = self.search(shifted.abs(), weight.dim)
        weight.state["projected"] = shifted.masked_fill(~kept, 0)
        weight.state["dual"].add_(weight.values).sub_(weight.state["projected"])
        return kept

    def why_too_short(self, learning_rates: Sequence[float], mean_pruned: float) -> str | None:
        """Return why the weights cannot reach a 2:4 model in a training of this length, or None."""
        moving = int(self.until * self.total_steps)
        if moving < 4 * self.refresh_steps:
            return f"there are {moving} steps for projections every {self.refresh_steps}: lower refresh_steps"
        return too_slow(learning_rates, mean_pruned, lambda step: 0.0 if self.is_fixed(step) else 1.0)
