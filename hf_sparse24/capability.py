"""What this machine can run, and why not: decisions as data, without printing and without fallbacks."""

import importlib.metadata
import platform
from typing import NamedTuple

import torch

from hf_sparse24.version import __version__

BACKENDS = ("cusparselt", "cutlass", "triton", "reference")


class Capability(NamedTuple):
    """Whether something can be used, and in a few words why, or why not."""

    ok: bool
    reason: str


def backend_capability(backend: str) -> Capability:
    """Tell whether a backend of `Sparse24Config` can run here.

    Args:
        backend (`str`): one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, or 'auto' in a config; got {backend!r}.")
    if backend == "reference":
        return Capability(True, "plain torch on any device; unpacks each weight once and runs it dense")
    if not torch.cuda.is_available():
        return Capability(False, "needs an NVIDIA GPU and torch sees none")
    return Capability(False, f"this version of hf_sparse24 has no {backend} kernel")


def resolve_backend(backend: str) -> str:
    """Return the backend that runs: "auto" takes the first that can, a name that cannot run is an error.

    Raises:
        `ValueError`: the named backend is unknown or cannot run here.
    """
    if backend == "auto":
        return next(name for name in BACKENDS if backend_capability(name).ok)
    capability = backend_capability(backend)
    if not capability.ok:
        raise ValueError(
            f"backend={backend!r} cannot run here: {capability.reason}. Use backend='auto' or 'reference'."
        )
    return backend


def environment() -> dict[str, str]:
    """Describe versions, devices and backends, for `hf-sparse24 env` and for bug reports."""
    facts = {"hf_sparse24": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "transformers", "accelerate", "safetensors", "torchao", "nvmath-python", "triton"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["gpu"] = ", ".join(devices) or "none"
    for backend in BACKENDS:
        capability = backend_capability(backend)
        facts[f"backend {backend}"] = f"{'yes' if capability.ok else 'no'}: {capability.reason}"
    return facts
