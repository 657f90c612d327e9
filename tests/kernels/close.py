"""How near a backend must come to the oracle, by backend and dtype, and how nearness is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bert import backend
from edges import check_steps
from samp_kernels.interface import Array, QTensor

BACKENDS = ("reference", "onednn", "cpu")

# Largest error over the largest magnitude of the expected result, or over 1: operands are of that
# size, and a GELU of them near 0 is a difference. An int8 output is the rounding of such a value.
TOLERANCE = {
    "reference": 1e-13,
    "onednn": 5e-6,
    "cpu": 1e-5,  # One order of k, so that a row never depends on its batch.
}


def needs(name: str, precision: str) -> None:
    """Skip where the machine lacks the precision (int8 on a CPU without VNNI)."""
    if ("gemm", precision, "static" if precision == "int8" else "") not in able(name):
        pytest.skip(f"{name} has no {precision} on this CPU")


def able(name: str) -> frozenset[tuple[str, str, str]]:
    return backend(name).capabilities()


def integers(x: QTensor) -> Array:
    """q of a quantized activation, whatever the backend's storage."""
    data = np.asarray(x.data)
    return data.astype(np.int64) - (128 if data.dtype == np.uint8 else 0)


def quantized(name: str, q: Array, scale: float) -> QTensor:
    """Integers as the input of a backend's int8 gemm."""
    import torch

    data: Any = q.astype(np.int8)
    if name != "reference":
        data = (q + 128).astype(np.uint8)
    if name == "onednn":
        data = torch.from_numpy(data)
    return QTensor(data, scale, tuple(q.shape))


def check(name: str, got: Any, wanted: Array, scale: float | None = None) -> None:
    """`got` of a backend against the float64 result; quantized with `scale` where one is given."""
    largest = max(float(np.abs(wanted).max(initial=0.0)), 1.0)
    if scale is None:
        host = got if isinstance(got, np.ndarray) else backend(name).to_host(got)
        assert host.shape == wanted.shape
        error = float(np.abs(host - wanted).max(initial=0.0)) / largest
        assert error <= TOLERANCE[name], f"{name}: relative error {error:.2e}"
        return
    assert isinstance(got, QTensor)
    assert got.scale == scale
    assert tuple(got.shape) == wanted.shape
    how = {"relative": 2.0**-51} if name == "reference" else {}
    check_steps(integers(got), wanted, scale, TOLERANCE[name] * largest, **how)


def rounded(x: Array, scale: float) -> Array:
    """The definition: to the nearest, ties to even, never beyond 127."""
    steps = np.asarray(x, dtype=np.float64) / scale
    down = np.floor(steps)
    rest = steps - down
    up = (rest > 0.5) | ((rest == 0.5) & (down % 2 == 1))
    return np.clip(down + up, -127, 127).astype(np.int64)
