"""A launcher without a GPU: the same .cu sources compiled by g++ over cuda_on_cpu.h.

For tests: it proves results, barriers, copies and indices, and counts; it is thousands of times
slower than a GPU and says nothing of speed. Objects are cached by content in emulated/.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.cuda.launcher import Buffer, Launch
from samp_kernels.cuda.units import (
    SOURCES,
    Unit,
    check_unit,
    content_key,
    defines_of,
    number,
    source_text,
    units_by_name,
)
from samp_kernels.interface import Array, KernelError

FLAGS = "-std=c++17 -O2 -fPIC -shared -fvisibility=default -w -fno-math-errno"
GUARD = 512  # bytes before and behind each buffer, whose change is an error


@dataclass(frozen=True)
class Counts:
    """What the emulator saw, summed over all units: warp-wide MMAs, ldmatrix and its 8-row reads
    that met a bank twice, 16-byte copies, blocks."""

    mma: int
    ldmatrix: int
    conflicts: int
    copies: int
    blocks: int


def folder() -> Path:
    return Path(os.environ.get("SAMP_EMULATED") or Path(__file__).parent / "emulated")


def find_compiler() -> list[str]:
    for name in (os.environ.get("CXX", ""), "g++", "c++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return []


def compile_units(names: Iterable[str], architecture: str) -> None:
    """Compile several units side by side, so that tests find them made."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        units = [units_by_name()[name] for name in names]
        fitting = [unit for unit in units if unit.runs_on(architecture)]
        list(pool.map(lambda unit: compile_for_cpu(unit, architecture), fitting))


def compile_for_cpu(unit: Unit, architecture: str) -> Path:
    """The unit as a shared library. Raises KernelError where it does not compile."""
    check_unit(unit, architecture)
    compiler = find_compiler()
    command = [*compiler, *FLAGS.split(), *shlex.split(os.environ.get("SAMP_EMULATED_FLAGS", ""))]
    sm = f"sm_{number(architecture)}"
    key = " ".join([*command, content_key(unit, sm), source_text("cuda_on_cpu.h")])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    made = folder() / f"{unit.name}-{sm}-{digest}.so"
    if made.is_file():
        return made
    if not compiler:
        raise KernelError("emulator", "no C++ compiler", "apt-get install g++")
    made.parent.mkdir(parents=True, exist_ok=True)
    defines = [f"-D{name}={value}" for name, value in defines_of(unit, sm).items()]
    aside = made.with_suffix(f".{os.getpid()}")
    command += ["-DSAMP_EMULATED", *defines, "-xc++", str(SOURCES / unit.source), "-o", str(aside)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError("emulator", f"{unit.name}: {done.stderr[:2000]}", "a clean compile")
    os.replace(aside, made)
    return made


class CpuLauncher:
    """NumPy arrays for device memory. `order`: in which order threads run (0 forwards, 1
    backwards, others mixed); results must not depend on it."""

    def __init__(
        self, architecture: str = "sm_80", multiprocessors: int = 4, order: int = 0
    ) -> None:
        self.architecture = architecture
        self.multiprocessors = multiprocessors
        self.order = order
        self.launched: list[Launch] = []
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._guarded: list[Array] = []

    def allocate(self, size: int) -> Buffer:
        raw = np.empty(size + 2 * GUARD + 1024, dtype=np.uint8)
        start = -(-(raw.ctypes.data + GUARD) // 1024) * 1024 - raw.ctypes.data
        whole = raw[start - GUARD : start + size + GUARD]
        whole[:] = 0xFF  # NaN as a float, -1 as an integer: what is never written shows.
        self._guarded.append(whole)
        return Buffer(int(raw.ctypes.data) + start, size, raw[start : start + size])

    def to_device(self, buffer: Buffer, data: Array, offset: int = 0) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        buffer.owner[offset : offset + flat.size] = flat

    def to_host(self, buffer: Buffer, data: Array, offset: int = 0) -> None:
        flat = data.reshape(-1).view(np.uint8)
        flat[:] = buffer.owner[offset : offset + flat.size]

    def fill(self, buffer: Buffer, offset: int, size: int) -> None:
        buffer.owner[offset : offset + size] = 0

    def pinned(self, size: int) -> Array:
        return np.zeros(size, dtype=np.uint8)

    def launch(self, one: Launch) -> None:
        if one.unit not in self._libraries:
            path = compile_for_cpu(units_by_name()[one.unit], self.architecture)
            self._libraries[one.unit] = ctypes.CDLL(str(path))
        values = [np.array(value) for value in one.arguments]
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        grid = (ctypes.c_uint * 3)(*one.grid)
        entry = getattr(self._libraries[one.unit], f"emulate_{one.kernel}")
        if entry(grid, one.threads, one.shared, pointers, len(values), self.order):
            got = f"{len(values)} arguments"
            raise KernelError("emulator", f"{one.kernel}: {got}", "as many as it has parameters")
        self.launched.append(one)

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        def replay() -> None:
            for one in launches:
                self.launch(one)

        return replay

    def seconds(self, one: Launch) -> float:
        begin = time.perf_counter()
        self.launch(one)
        return time.perf_counter() - begin

    def close(self) -> None:
        self.check_guards()
        self._guarded.clear()

    def check_guards(self) -> None:
        """Raises KernelError where a kernel wrote before or behind a buffer."""
        for whole in self._guarded:
            if (whole[:GUARD] != 0xFF).any() or (whole[-GUARD:] != 0xFF).any():
                raise KernelError("emulator", "a write outside of its buffer", "writes inside")

    def counts(self, unit: str | None = None) -> Counts:
        """Of one unit, or of all that this launcher used; counted since the process began."""
        total: Any = np.zeros(5, dtype=np.int64)
        for name, library in self._libraries.items():
            if unit in (None, name):
                one = np.zeros(5, dtype=np.int64)
                entry = getattr(library, f"count_{units_by_name()[name].kernels[0]}")
                entry(ctypes.c_void_p(one.ctypes.data))
                total += one
        return Counts(*total.tolist())
