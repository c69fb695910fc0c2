"""What a learning rate schedule adds up to, and whether a training gets anywhere."""

from collections.abc import Sequence
from typing import Any

import torch


def learning_rates(scheduler: Any, steps: int) -> list[float]:
    """Return the learning rate of every step; the present one where a schedule is no function of the step."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return [scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step) for step in range(steps)]
    return [scheduler.get_last_lr()[0]] * steps


def why_no_recovery(log_history: Sequence[dict[str, Any]], patience_steps: int) -> str | None:
    """Return what to say of a training that has not lowered its loss after so many steps, or None.

    Looks at the evaluation's loss where there is one, else at the training's.
    """
    for key in ("eval_loss", "loss"):
        losses = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if len(losses) > 1:
            break
    else:
        return None
    (first_step, first), *later = losses
    steps = later[-1][0] - first_step
    if steps < patience_steps or min(loss for _, loss in later) < first:
        return None
    return (
        f"No recovery in {steps} steps: {key} was {first:.4g} and has not been lower since. The learning rate is "
        "probably wrong: 1e-4 to 1e-3 for models below 1B parameters, 2e-5 to 1e-4 above, with a warm-up and a "
        "cosine, are what has worked for 2:4."
    )
