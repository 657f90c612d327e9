"""The native CPU kernels at every dispatch level of this machine; arrays that end at a locked page.

No torch here: these tests also run under AddressSanitizer (make sanitize).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np
import pytest
from edges import check_steps
from samp_kernels.cpu import missing
from samp_kernels.interface import Array, QTensor
from samp_kernels.reference import ReferenceBackend

LEVELS = ("amx_int8", "avx512_vnni", "avx2_vnni", "avx2", "portable")
TOLERANCE = 1e-5
"""Largest error over the largest magnitude of the result, or over 1."""

REFERENCE = ReferenceBackend()

every_level = pytest.mark.parametrize("level", LEVELS)


@cache
def backend(level: str) -> Any:
    """The backend at one level; skips where this CPU or this build lacks it."""
    if missing():
        pytest.skip(missing())
    from samp_kernels.cpu import _native
    from samp_kernels.cpu.backend import CpuBackend

    state = _native.levels()[level]
    if state != "runs":
        pytest.skip(f"level {level}: {state}")
    return CpuBackend(1, level)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def cu(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


def both(q: Array, scale: Any, kept: Array | None = None) -> tuple[QTensor, QTensor]:
    """Integers as the input of the native gemm and of the reference's."""
    host = scale if isinstance(scale, float) else np.asarray(scale, dtype=np.float64)
    native = QTensor((q + 128).astype(np.uint8), scale, q.shape, kept)
    return native, QTensor(q.astype(np.int8), host, q.shape, kept)


def close(got: Array, wanted: Array, tolerance: float = TOLERANCE) -> None:
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    largest = max(float(np.abs(wanted).max(initial=0.0)), 1.0)
    error = float(np.abs(got - wanted).max(initial=0.0)) / largest
    assert error <= tolerance, f"relative error {error:.2e}"


def near(got: QTensor, floats: Array, scale: Any) -> None:
    """The roundings of `floats`, which this level computes itself; `scale`: one, or "token"."""
    assert got.data.dtype == np.uint8
    assert tuple(got.shape) == floats.shape == got.data.shape
    each: Any = scale
    if scale == "token":
        each = np.asarray(got.scale)[:, None]
        wanted = np.maximum(np.abs(floats).max(axis=-1, initial=0.0), 1e-30) / 127
        np.testing.assert_allclose(got.scale, wanted, rtol=1e-6)
    else:
        np.testing.assert_allclose(got.scale, scale, rtol=1e-6)
    check_steps(got.data.astype(int) - 128, floats, each)


# Arrays beside pages that nobody may touch.

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def locked(x: Array, *, end: bool = True) -> Array:
    """The same array; right behind its last byte (or before its first) the process would die."""
    x = np.ascontiguousarray(x)
    page = mmap.PAGESIZE
    size = -(-max(x.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = start + size if end else start
    if _LIBC.mprotect(guard, page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = size - x.nbytes if end else page
    made = np.frombuffer(memory, dtype=x.dtype, count=x.size, offset=offset).reshape(x.shape)
    made[...] = x
    return made
