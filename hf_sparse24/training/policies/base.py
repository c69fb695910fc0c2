"""What a mask policy is: when weights, gradients and masks of one matrix change, and how.

Between two optimizer steps the model is always 2:4: evaluation, saving and the best model see what will be deployed.
(The one exception is a policy that ends dense: its last masks keep everything.)
What a policy keeps of the pruned weights lies beside the model, in tensors of the weight's shape, and comes back for
the forward pass or the step alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_sparse24.pattern import mask_2to4


@dataclass(slots=True)
class Weight:
    """One matrix as a policy sees it, or this process's shard of it.

    Attributes:
        name (`str`): of the parameter.
        values (`Tensor`): the weights themselves; what is written to them, the model has.
        gradient (`Tensor`, *optional*): theirs, where there is one.
        pruned (`Tensor`): bool, the shape of `values`.
        dim (`int`): the input dimension.
        state (`dict`): what the policy keeps, saved with every checkpoint.
    """

    name: str
    values: Tensor
    gradient: Tensor | None
    pruned: Tensor
    dim: int
    state: dict[str, Tensor] = field(default_factory=dict)


class Frozen:
    """The mask stays as it is: Mishra et al. 2021 (arXiv:2104.08378). Every other policy changes some of this.

    Attributes:
        name (`str`): what `mask_policy` calls it.
        moves (`bool`): whether masks change, and pruned weights live on.
        starts_dense (`bool`): whether it may begin with a model that is not pruned.
        trains_weights (`bool`): whether the optimizer's step is taken at all.
        shards (`bool`): whether it can work on the shards of FSDP2.
        ends_dense (`bool`): whether the model that it leaves is a dense one.
        total_steps (`int`): of the training; set before the start.
    """

    name = "frozen"
    moves = False
    starts_dense = False
    trains_weights = True
    shards = True
    ends_dense = False

    def __init__(self) -> None:
        self.until = 1.0
        self.total_steps = 0

    def search(self, scores: Tensor, dim: int) -> Tensor:
        """Return the best mask for scores: bool, True for what stays."""
        return mask_2to4(scores, dim)

    def is_fixed(self, step: int) -> bool:
        """Tell whether a step, counted from 1, is one of a frozen mask."""
        return not self.moves or step > self.until * self.total_steps

    def start(self, weight: Weight) -> None:
        """Begin with a mask that was chosen."""
        weight.values.masked_fill_(weight.pruned, 0)

    def before_forward_(self, weight: Weight, step: int) -> None:
        """Bring back what the forward pass reads."""

    def before_step_(self, weight: Weight, step: int, learning_rate: float) -> None:
        """Change the gradient, after clipping; there is one."""

    def after_step_(self, weight: Weight, step: int) -> Tensor | None:
        """Leave 2:4 weights, and return the new mask of what stays where it may have changed."""
        weight.values.masked_fill_(weight.pruned, 0)
        return None

    def why_too_short(self, learning_rates: Sequence[float], mean_pruned: float) -> str | None:
        """Return why a training of this length cannot do what the policy is for, or None.

        Args:
            learning_rates (`Sequence[float]`): of every step.
            mean_pruned (`float`): the mean magnitude of the weights that are pruned at the start.
        """
        return None


class Moving(Frozen):
    """What policies share whose mask moves: pruned weights live on in `state["pruned_values"]`.

    Args:
        refresh_steps (`int`): how many steps a mask stays.
        until (`float`): the share of all steps after which it is fixed.
    """

    moves = True
    starts_dense = True

    def __init__(self, refresh_steps: int, until: float = 1.0) -> None:
        super().__init__()
        if not 0 < until <= 1:
            raise ValueError(f"until must be a share of the training, above 0 and at most 1; got {until!r}.")
        self.until = until
        if refresh_steps < 1:
            raise ValueError(f"refresh_steps must be at least 1; got {refresh_steps!r}.")
        self.refresh_steps = refresh_steps

    def start(self, weight: Weight) -> None:
        """Put the pruned weights aside."""
        self.hide_(weight)

    def hide_(self, weight: Weight) -> None:
        """Put the pruned weights aside: exact, as each weight is in one of two places."""
        weight.state["pruned_values"] = weight.values.masked_fill(~weight.pruned, 0)
        weight.values.masked_fill_(weight.pruned, 0)

    def reveal_(self, weight: Weight) -> None:
        """Bring the pruned weights back."""
        weight.values.add_(weight.state["pruned_values"])

    def after_step_(self, weight: Weight, step: int) -> Tensor | None:
        """Choose the mask anew where it is time to, and put the pruned weights aside, or away at the last step."""
        last = self.is_fixed(step + 1)
        kept = self.choose_(weight, step, last)
        if kept is not None:
            weight.pruned = ~kept
        if last:
            weight.state.clear()
            weight.values.masked_fill_(weight.pruned, 0)
        else:
            self.hide_(weight)
        return kept

    def choose_(self, weight: Weight, step: int, last: bool) -> Tensor | None:
        """Return a new mask, where it is time for one; `last` for the final one."""
        return self.search(weight.values.abs(), weight.dim) if last or step % self.refresh_steps == 0 else None


def too_slow(learning_rates: Sequence[float], mean_pruned: float, share: Callable[[int], float]) -> str | None:
    """Apply the budget rule of decay: an Adam step moves a weight by about the learning rate, and no further.

    The sum of the learning rates has to be several times the mean magnitude of what is to decay; four, as in a
    reproduction of CAST (arXiv:2509.25996) where decay ended.
    """
    reach = sum(rate * share(step) for step, rate in enumerate(learning_rates, 1))
    if reach >= 4 * mean_pruned:
        return None
    return (
        f"pruned weights of mean magnitude {mean_pruned:.2g} have to decay, and {len(learning_rates)} steps of Adam "
        f"move a weight by {reach:.2g} at most, where four times that magnitude is needed: train longer, with smaller "
        "batches or at a higher learning rate, or use mask_policy='frozen'"
    )
