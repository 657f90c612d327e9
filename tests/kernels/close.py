"""How near a backend must come to the oracle, by backend and dtype, and how nearness is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bert import backend
from samp_kernels.interface import Array, QTensor

BACKENDS = ("reference", "onednn", "cpu")

# fp32: largest error over the largest magnitude of the expected result, or over 1: operands are
# of that size, and a GELU of them near 0 is a difference.
# int8: share of quantized values that may lie one step away; none may lie two.
TOLERANCE = {
    ("reference", "fp32"): 1e-13,
    ("onednn", "fp32"): 5e-6,
    ("cpu", "fp32"): 1e-5,  # One order of k, so that a row never depends on its batch.
    ("reference", "int8"): 0.0,
    ("onednn", "int8"): 1e-3,
    ("cpu", "int8"): 1e-3,
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
    if scale is None:
        host = got if isinstance(got, np.ndarray) else backend(name).to_host(got)
        assert host.shape == wanted.shape
        largest = max(float(np.abs(wanted).max(initial=0.0)), 1.0)
        error = float(np.abs(host - wanted).max(initial=0.0)) / largest
        assert error <= TOLERANCE[name, "fp32"], f"{name}: relative error {error:.2e}"
        return
    assert isinstance(got, QTensor)
    assert got.scale == scale
    assert tuple(got.shape) == wanted.shape
    q = integers(got)
    assert np.abs(q).max() <= 127
    off = np.abs(q - rounded(wanted, scale))
    assert off.max() <= 1, f"{name}: {off.max()} steps away"
    # A tensor of few values may hold one that lies on an edge.
    assert off.sum() <= max(off.size * TOLERANCE[name, "int8"], name != "reference")


def rounded(x: Array, scale: float) -> Array:
    """The definition: to the nearest, ties to even, never beyond 127."""
    steps = np.asarray(x, dtype=np.float64) / scale
    down = np.floor(steps)
    rest = steps - down
    up = (rest > 0.5) | ((rest == 0.5) & (down % 2 == 1))
    return np.clip(down + up, -127, 127).astype(np.int64)
