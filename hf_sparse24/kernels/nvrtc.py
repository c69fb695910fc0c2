"""CUDA C++ on the user's machine: compiled by NVRTC at its first use, launched through the driver.

Both libraries come with torch's CUDA builds, and so do their Python bindings (`cuda.bindings`): no compiler, no build
step and no binary of ours. Compiling takes about half a second a kernel, once in a process.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_HEADER = "overlap.h"  # that every file includes
_OLDEST_OVERLAP = (9, 0)
_USUAL_SHARED_MEMORY = 48 * 1024  # bytes


@functools.cache
def device_capability(device: int) -> tuple[int, int]:
    """Return the compute capability of a device."""
    return torch.cuda.get_device_capability(device)


def load(file: str, function: str, definitions: Mapping[str, int], capability: tuple[int, int]) -> Any:
    """Compile a function of a `.cu` file of this folder and return its handle, which serves every such device.

    Args:
        file (`str`): its name.
        function (`str`): its C name.
        definitions (`Mapping[str, int]`): macros.
        capability (`tuple[int, int]`): the compute capability to compile for.

    Raises:
        `RuntimeError`: NVRTC refuses the code; the message has its log.
    """
    from cuda.bindings import driver

    (library,) = _checked(driver.cuLibraryLoadData(compile_cuda(file, definitions, capability), [], [], 0, [], [], 0))
    (kernel,) = _checked(driver.cuLibraryGetKernel(library, function.encode()))
    return driver.CUfunction(int(kernel))


def compile_cuda(file: str, definitions: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Return the machine code of a `.cu` file of this folder."""
    from cuda.bindings import nvrtc

    source, header = (resources.files(__package__).joinpath(name).read_bytes() for name in (file, _HEADER))
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in definitions.items()]
    encoded = [option.encode() for option in options]
    (program,) = _checked(nvrtc.nvrtcCreateProgram(source, file.encode(), 1, [header], [_HEADER.encode()]))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if int(status):
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC cannot compile {file} with {options}: {log.decode()}")
    (size,) = _checked(nvrtc.nvrtcGetCUBINSize(program))
    binary = b" " * size  # which the binding writes to
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


def allow_shared_memory(kernel: Any, size: int, device: int) -> None:
    """Let a kernel ask for `size` bytes of dynamic shared memory on a device; up to 48 KiB it may without."""
    if size <= _USUAL_SHARED_MEMORY:
        return
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (number,) = _checked(driver.cuDeviceGet(device))
    # A kernel of a library takes the place of a function in a launch, and only there.
    _checked(driver.cuKernelSetAttribute(attribute, size, driver.CUkernel(int(kernel)), number))


@functools.cache
def clusters_at_once(size: int, device: int) -> int:
    """Return how many clusters of `size` blocks a device runs at once if every block has a multiprocessor to itself.

    A cluster stays within a part of the GPU, whose multiprocessors it need not fill: an H100 with 132 of them runs no
    more than 16 clusters of 8.
    """
    if size == 1:
        return torch.cuda.get_device_properties(device).multi_processor_count
    from cuda.bindings import driver

    kernel = load("clusters.cu", "nothing", {}, device_capability(device))
    (number,) = _checked(driver.cuDeviceGet(device))
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    (memory,) = _checked(driver.cuDeviceGetAttribute(attribute, number))  # more than half of a multiprocessor's
    allow_shared_memory(kernel, memory, device)
    cluster = driver.CUlaunchAttribute()
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = 1, size, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 1, size, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 32, 1, 1
    config.sharedMemBytes, config.attrs, config.numAttrs = memory, [cluster], 1
    with torch.cuda.device(device):
        _make_current(device)
        (count,) = _checked(driver.cuOccupancyMaxActiveClusters(kernel, config))
    return int(count)


def launch(
    kernel: Any, grid: tuple[int, int], threads: int, arguments: Sequence[int], device: int, shared_memory: int = 0
) -> None:
    """Launch a kernel on torch's current stream of a device, where that can be while the one before it ends.

    Args:
        kernel: as `load` returns it.
        grid (`tuple[int, int]`), threads (`int`): blocks, and threads of a block.
        arguments (`Sequence[int]`): addresses and 32-bit integers, in the order of the kernel's parameters.
        device (`int`): its number.
        shared_memory (`int`): dynamic shared memory of a block, bytes.
    """
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            launch(kernel, grid, threads, arguments, device, shared_memory)
        return
    count = len(arguments)
    values = (ctypes.c_uint64 * count)(*arguments)  # little-endian: an int stands in the first four of eight bytes
    first = ctypes.addressof(values)
    addresses = (ctypes.c_uint64 * count)(*range(first, first + 8 * count, 8))
    stream = torch._C._cuda_getCurrentRawStream(device)
    config = _launch_config(grid, threads, shared_memory, stream, device_capability(device) >= _OLDEST_OVERLAP)
    call = (config, kernel, ctypes.addressof(addresses), 0)
    (status,) = _driver().cuLaunchKernelEx(*call)
    if int(status) == _INVALID_CONTEXT:  # the first call of CUDA's in this thread
        _make_current(device)
        (status,) = _driver().cuLaunchKernelEx(*call)
    if int(status):
        raise RuntimeError(f"CUDA cannot launch a kernel: {status!r}.")


@functools.lru_cache(maxsize=4096)
def _launch_config(grid: tuple[int, int], threads: int, shared_memory: int, stream: int, overlaps: bool) -> Any:
    """Return how to launch a kernel, which nobody may change: making it costs the host more than a launch."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_memory, driver.CUstream(stream)
    if overlaps:
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [overlap], 1
    return config


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _make_current(device: int) -> None:
    (number,) = _checked(_driver().cuDeviceGet(device))
    (context,) = _checked(_driver().cuDevicePrimaryCtxRetain(number))
    _checked(_driver().cuCtxSetCurrent(context))


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Raise `RuntimeError` for the status that a call of CUDA's begins with, or return the rest."""
    status, *rest = result
    if int(status):
        raise RuntimeError(f"CUDA says {status!r}.")
    return tuple(rest)
