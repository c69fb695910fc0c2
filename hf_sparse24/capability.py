"""What this machine can run, and why not: decisions as data, without printing and without fallbacks."""

import functools
import importlib.metadata
import importlib.util
import platform
from typing import NamedTuple

import torch

from hf_sparse24.version import __version__

BACKENDS = ("cusparselt", "cutlass", "nvrtc", "reference")
_OLDEST = (8, 0)  # the first GPUs with sparse tensor cores


class Capability(NamedTuple):
    """Whether something can be used, and in a few words why, or why not."""

    ok: bool
    reason: str


@functools.cache
def backend_capability(backend: str) -> Capability:
    """Tell whether a backend of `Sparse24Config` can run here.

    Args:
        backend (`str`): one of `BACKENDS`.

    | backend | what it is |
    |---|---|
    | `cusparselt` | NVIDIA's library, for many tokens: 16 bits, INT8, FP8 |
    | `cutlass` | torchao's FP8 kernel for Hopper, with all scales in its epilogue |
    | `nvrtc` | this package's kernels for few tokens: 16 bits, weights in 8 bits, also with activations in 8 bits |
    | `reference` | plain torch |
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, or 'auto' in a config; got {backend!r}.")
    if backend == "reference":
        return Capability(True, "plain torch on any device; unpacks each weight once and runs it dense")
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return Capability(False, "needs an NVIDIA GPU and torch sees none")
    if gpu_capability() < _OLDEST:
        return Capability(False, "needs compute capability 8.0 or newer; this GPU has {}.{}".format(*gpu_capability()))
    return {"cusparselt": _cusparselt, "cutlass": _cutlass, "nvrtc": _nvrtc}[backend]()


@functools.cache
def gpu_capability() -> tuple[int, int]:
    """Return the compute capability of the current GPU, taken to be that of all."""
    return torch.cuda.get_device_capability()


def _cusparselt() -> Capability:
    if not torch.backends.cusparselt.is_available():
        return Capability(False, "this build of torch has no cuSPARSELt")
    if not has_nvmath():
        return Capability(True, "through torch, which plans every call anew: install nvmath-python to keep plans")
    return Capability(True, "through nvmath-python, with plans that are kept and algorithms that were searched")


def _cutlass() -> Capability:
    if gpu_capability() != (9, 0):
        return Capability(False, "torchao's FP8 kernel needs compute capability 9.0 exactly (Hopper)")
    if importlib.util.find_spec("torchao") is None:
        return Capability(False, "needs torchao, which is not installed")
    return Capability(True, "torchao's FP8 2:4 kernel")


def _nvrtc() -> Capability:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return Capability(False, "needs the package cuda-bindings, which torch's CUDA wheels bring along")
    return Capability(True, "the package's own kernels for few tokens, compiled at their first use")


@functools.cache
def has_nvmath() -> bool:
    """Tell whether nvmath-python is installed, through which cuSPARSELt is fast."""
    return importlib.util.find_spec("nvmath") is not None


def check_backend(backend: str) -> None:
    """Raise `ValueError` when a backend is unknown or was named and cannot run here; "auto" always can."""
    if backend == "auto":
        return
    capability = backend_capability(backend)
    if not capability.ok:
        raise ValueError(
            f"backend={backend!r} cannot run here: {capability.reason}. Use backend='auto' or 'reference'."
        )


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
