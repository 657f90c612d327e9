"""The CUDA backend: kernels in src/, compiled to cubins by build.py, launched through CuPy.

formats.py says how numbers lie, units.py what is compiled, tiles.py which tile runs, launcher.py
what launches it, ops.py one op as one launch, session.py a whole encoder as one graph; emulator.py
is a launcher for tests.
Nothing here has run on a GPU yet: docs/gpu.md.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec

MEND = (
    "pip install 'samp-triton[gpu,gpu-build]' on a machine with an NVIDIA GPU, then: make kernels"
)


def emulated() -> str:
    """The architecture that SAMP_CUDA=emulated (sm_80) or emulated:sm_89 asks for: the kernels
    without a GPU, right answers, no speed. "" where it asks for none."""
    word, _, architecture = os.environ.get("SAMP_CUDA", "").partition(":")
    return (architecture or "sm_80") if word == "emulated" else ""


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
        cupy = importlib.import_module("cupy")
        device = cupy.cuda.Device(0)
        capability = int(device.compute_capability)
    except Exception as error:  # CuPy's own kinds, which are not there where it is not.
        return f"no usable GPU ({type(error).__name__}: {error})"
    build = importlib.import_module("samp_kernels.cuda.build")
    units = importlib.import_module("samp_kernels.cuda.units")
    architecture = units.for_device(capability)
    if not architecture:
        return f"no kernels for compute capability {capability}"
    for unit in units.units_of(architecture):
        if not (build.folder() / units.cubin_name(unit, architecture)).is_file():
            return f"no cubin {unit.name} for {architecture}; run: {build.COMMAND}"
    return ""
