"""The CUDA backend: kernels in src/, compiled to cubins by build.py, launched through CuPy.

formats.py says how numbers lie, units.py what is compiled, tiles.py which tile runs, launcher.py
what launches it, ops.py one op as one launch, session.py a whole encoder as one graph; emulator.py
is a launcher for tests, checks.py holds the checks of an op, proven.py what they found on hardware.
Nothing here has run on a GPU yet: docs/gpu.md.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MEND = (
    "pip install 'samp-triton[gpu,gpu-build]' on a machine with an NVIDIA GPU, then: make kernels"
)


STANDS_FOR_A_GPU = "automatic"


def emulated() -> str:
    """The architecture that SAMP_CUDA=emulated (sm_80) or emulated:sm_89 asks for: the kernels
    without a GPU, right answers, no speed. "" where it asks for none. SAMP_CUDA=automatic:sm_80 is
    the same, and `auto` treats it as a GPU: for tests of that."""
    word, _, architecture = os.environ.get("SAMP_CUDA", "").partition(":")
    return (architecture or "sm_80") if word in ("emulated", STANDS_FOR_A_GPU) else ""


def for_tests() -> bool:
    """Whether the kernels are emulated and nobody but who names backend cuda gets them."""
    return bool(emulated()) and not os.environ["SAMP_CUDA"].startswith(STANDS_FOR_A_GPU)


def architecture() -> str:
    """The architecture whose cubins device 0 runs. Raises what CuPy does where there is none."""
    return emulated() or _of_device_0()


def load_cupy() -> Any:
    """CuPy. When it is imported it makes a folder for what it compiles, in HOME unless told
    otherwise, and fails where it cannot; it compiles nothing of ours."""
    if not os.environ.get("CUPY_CACHE_DIR"):
        os.environ["CUPY_CACHE_DIR"] = str(Path(__file__).parent)
    return importlib.import_module("cupy")


@cache
def _of_device_0() -> str:
    cupy = load_cupy()
    units = importlib.import_module("samp_kernels.cuda.units")
    capability = int(cupy.cuda.Device(0).compute_capability)
    found: str = units.for_device(capability)
    if not found:
        raise RuntimeError(f"no kernels for compute capability {capability}")
    return found


@cache
def missing() -> str:
    """Why this backend cannot run here; "" where it can. Compiles nothing."""
    if emulated():
        emulator = importlib.import_module("samp_kernels.cuda.emulator")
        known = importlib.import_module("samp_kernels.cuda.units").ARCHITECTURES
        if emulated() not in known:
            return f"SAMP_CUDA=emulated:{emulated()}; there are {', '.join(known)}"
        return "" if emulator.find_compiler() else "no C++ compiler for the emulator"
    if find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        ctypes.CDLL("libcuda.so.1")  # CuPy takes its time to load.
    except OSError:
        return "no usable GPU (no NVIDIA driver)"
    try:
        here = architecture()
    except Exception as error:  # CuPy's own kinds, which are not there where it is not.
        return f"no usable GPU ({type(error).__name__}: {error})"
    build = importlib.import_module("samp_kernels.cuda.build")
    units = importlib.import_module("samp_kernels.cuda.units")
    for unit in units.units_of(here):
        if not (build.folder() / units.cubin_name(unit, here)).is_file():
            return f"no cubin {unit.name} for {here}; run: {build.COMMAND}"
    return ""


def device_key() -> str:
    """What checks are noted under (proven.py): the architecture, and what else decides which
    kernels run there."""
    key = f"emulated {architecture()}" if emulated() else architecture()
    return key if os.environ.get("SAMP_WGMMA", "1") != "0" else f"{key} without wgmma"


def unfit(head_dim: int | None = None) -> str:
    """Why backend `auto` could not take this one, proven or not; "" where it could."""
    proven = importlib.import_module("samp_kernels.cuda.proven")
    if proven.switched_off():
        return f"SAMP_PROVEN is {os.devnull}"
    if for_tests():
        return "emulated kernels are for tests"
    dims = importlib.import_module("samp_kernels.cuda.units").HEAD_DIMS
    why: str = missing()
    if not why and head_dim is not None and head_dim not in dims:
        return f"heads of {head_dim}; it has heads of {', '.join(map(str, dims))}"
    return why


def not_automatic(head_dim: int | None = None) -> str:
    """Why backend `auto` does not take this one; "" where it does: a GPU that can be used, heads
    that the kernels have, and a check of these kernels that passed on such a GPU. Checks nothing:
    samp_core/gpu_proof.py does."""
    proven = importlib.import_module("samp_kernels.cuda.proven")
    why: str = unfit(head_dim) or proven.unproven(device_key())
    return why
