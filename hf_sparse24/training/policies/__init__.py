"""Mask policies, by the name that `mask_policy` takes."""

import inspect
from typing import Any

from hf_sparse24.training.policies.admm import ADMM
from hf_sparse24.training.policies.base import Frozen, Weight
from hf_sparse24.training.policies.learned import Learned
from hf_sparse24.training.policies.straight_through import SRSTE, MaskedDecay
from hf_sparse24.training.policies.transposable import Transposable

POLICIES: dict[str, type[Frozen]] = {
    policy.name: policy for policy in (Frozen, SRSTE, MaskedDecay, ADMM, Transposable, Learned)
}

__all__ = ["ADMM", "POLICIES", "SRSTE", "Frozen", "Learned", "MaskedDecay", "Transposable", "Weight", "make_policy"]


def make_policy(policy: str | Frozen, **arguments: Any) -> Frozen:
    """Return a policy by its name, with its own arguments.

    Raises:
        `ValueError`: there is no policy of that name, or it takes no such argument.
    """
    if isinstance(policy, Frozen):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"mask_policy must be one of {', '.join(map(repr, POLICIES))}; got {policy!r}.")
    known = inspect.signature(POLICIES[policy]).parameters
    for key in arguments:
        if key not in known:
            raise ValueError(f"mask_policy {policy!r} takes {', '.join(known) or 'no arguments'}; got {key!r}.")
    return POLICIES[policy](**arguments)
