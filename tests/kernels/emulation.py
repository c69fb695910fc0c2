"""CUDA C++ of the package on an emulated GPU: compiled for the CPU, every lane a fiber."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import hf_sparse24.kernels


@functools.cache
def emulator(name, **definitions):
    """Return the library that emulates `NAME.cu` with some definitions."""
    if shutil.which("g++") is None:
        pytest.skip("no GPU, and no g++ to emulate one")
    here = Path(__file__).parent
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    command += [here / f"emulated_{name}.cpp", "-I", Path(hf_sparse24.kernels.__path__[0])]
    command += [f"-D{key}={value}" for key, value in definitions.items()]
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays so without its file
        library = Path(folder) / "emulated.so"
        subprocess.run([*command, "-o", library], check=True)
        return ctypes.CDLL(library)


def address(tensor):
    """Return the address of a tensor's data for a call, or none."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
