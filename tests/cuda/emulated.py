"""The CUDA backend without a GPU, and how near it must come to the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.emulator import CpuLauncher, find_compiler
from samp_kernels.interface import Array, QTensor

needs_compiler = pytest.mark.skipif(not find_compiler(), reason="no C++ compiler for the emulator")

# Largest error over the largest magnitude, or over 1. fp16: sums of products of rounded operands.
TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3}


@cache
def backend(architecture: str = "sm_80", multiprocessors: int = 4, order: int = 0) -> CudaBackend:
    return CudaBackend(CpuLauncher(architecture, multiprocessors, order))


def launcher(b: CudaBackend) -> CpuLauncher:
    assert isinstance(b.launcher, CpuLauncher)
    return b.launcher


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def cu(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


def activation(b: CudaBackend, q: Array, scale: Any) -> QTensor:
    if not isinstance(scale, float):
        scale = b.array(scale)
    return QTensor(b.array(q, "int8"), scale, (q.shape[0], q.shape[1]))


def close(b: CudaBackend, got: Any, wanted: Array, precision: str = "fp32") -> None:
    host = b.to_host(got)
    assert host.shape == wanted.shape
    error = float(np.abs(host - wanted).max(initial=0.0))
    allowed = float_error(wanted, precision)
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def float_error(wanted: Array, precision: str = "fp32") -> float:
    """The largest error that `close` takes."""
    return TOLERANCE[precision] * max(float(np.abs(wanted).max(initial=0.0)), 1.0)


def integers(b: CudaBackend, got: QTensor) -> Array:
    return b.to_host(got.data).astype(np.int64)
