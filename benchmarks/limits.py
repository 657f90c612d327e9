"""What the machine can do at most: int8 and fp32 arithmetic, reading memory, and a row's floor.

The figures come from kernels/cpu/src/limits.cc: through our native module, or compiled alone where
there is only a compiler. Without both, from the largest thing that torch offers, which is lower.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
import store

SOURCE = machine.ROOT / "kernels" / "cpu" / "src" / "limits.cc"
MODULES = ("samp_kernels._cpu", "samp_kernels.cpu._native", "samp_kernels.cpu._cpu")
NAMES = {
    "int8_gops": "int8_gops",
    "vnni_gops": "vnni_gops",
    "f32_gflops": "f32_gflops",
    "gbps": "read_gbps",
}
SECONDS = 0.5
# The best of a few tries: what disturbs one only takes away.
TRIES = 4

Measure = Callable[[int, float], float]


def limits(threads: int) -> dict[str, float]:
    """int8_gops, f32_gflops (a multiply-add is two) and gbps, of this many threads.

    vnni_gops is int8 on vectors; int8_gops is the same or, where the CPU has them, on AMX tiles.
    """
    for find in (_of_module, _compiled):
        measures = find()
        if measures:
            tries = [
                {name: measure(threads, SECONDS) for name, measure in measures.items()}
                for _ in range(TRIES)
            ]
            best = {name: max(one[name] for one in tries) for name in measures}
            return {name: round(value, 1) for name, value in best.items() if value > 0}
    return _of_torch(threads)


def last_level_cache() -> int:
    """Bytes of the largest cache of core 0; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2]])
    return max(sizes)


def floor_ms(found: Mapping[str, float], gop: float, weight_bytes: float, peak: str) -> float:
    """The least time of a pass: its arithmetic at `peak`, or its weights read from memory.

    Weights that fit the last cache need not be read from memory again. 0 where nothing is known.
    """
    arithmetic = gop / found[peak] if peak in found else 0.0
    cold = weight_bytes > last_level_cache()
    reading = weight_bytes / 1e9 / found["gbps"] if cold and "gbps" in found else 0.0
    return 1000 * max(arithmetic, reading)


def _of_module() -> dict[str, Measure]:
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if all(hasattr(module, function) for function in NAMES.values()):
            return {ours: getattr(module, function) for ours, function in NAMES.items()}
    return {}


def _compiled() -> dict[str, Measure]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not SOURCE.is_file():
        return {}
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", "-DSAMP_LIMITS_ALONE"]

    def make(folder: Path) -> None:
        command = [compiler, *flags, str(SOURCE), "-o", str(folder / "limits.so")]
        subprocess.run(command, check=True)

    try:
        folder = store.made("limits", [store.sha256(SOURCE), compiler, flags], make)
    except (OSError, subprocess.CalledProcessError):
        return {}
    library = ctypes.CDLL(str(folder / "limits.so"))
    measures: dict[str, Any] = {}
    for ours, name in NAMES.items():
        measures[ours] = getattr(library, f"samp_{name}")
        measures[ours].restype = ctypes.c_double
        measures[ours].argtypes = [ctypes.c_int, ctypes.c_double]
    return measures


def _of_torch(threads: int) -> dict[str, float]:
    """int8 GOP/s of a large oneDNN GEMM, GB/s of a sum over a gigabyte."""
    import numpy as np
    import torch
    from samp_kernels.interface import Out, Weight
    from samp_kernels.onednn import OneDnnBackend

    backend = OneDnnBackend(threads)
    memory = torch.ones(1 << 28)  # zeros would all be one page
    found = {"gbps": memory.nbytes / _best(lambda: memory.sum()) / 1e9}
    if ("gemm", "int8", "static") in backend.capabilities():
        rows, inner, outputs = 1024, 2048, 2048
        rng = np.random.default_rng(0)
        weight = rng.integers(-127, 128, (outputs, inner)).astype(np.int8)
        packed = backend.pack(Weight(weight, np.ones(outputs, dtype=np.float32)), "int8")
        x = backend.array(rng.standard_normal((rows, inner)).astype(np.float32))
        quantized = backend.quantize(x, Out("int8", 0.03))
        bias, out = backend.array(np.zeros(outputs)), Out("int8", 3.0)
        seconds = _best(lambda: backend.gemm(quantized, packed, bias, out=out))
        found["int8_gops"] = 2 * rows * inner * outputs / seconds / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def _best(run: Callable[[], object], seconds: float = 0.6) -> float:
    """Seconds of the fastest of many calls."""
    run()
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best
