"""Numbers as the kernels hold them: the kinds, their sizes, and bf16 on the host.

NumPy has neither bf16 nor e4m3 (e4m3.py); both stand as bits in unsigned integers. Rounding is half
to even, as the device's is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from samp_kernels.e4m3 import E4M3, to_e4m3
from samp_kernels.interface import F32, Array, UnsupportedPrecision

KINDS = {"fp32": 0, "fp16": 1, "int8": 2, "bf16": 3, "fp8": 4}
"""The numbers of copy.cuh; `int32` is an index and never an operand."""

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int32": 4}
DTYPES: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int8": np.int8,
    "fp8": np.uint8,
}
_OLDEST = {"bf16": 80, "fp8": 89}


def has(precision: str, sm: int) -> bool:
    """Whether the tensor cores of this architecture (80 for sm_80) multiply this precision."""
    return sm >= _OLDEST.get(precision, 0)


def check_precision(precision: str, sm: int) -> None:
    if not has(precision, sm):
        allowed = f"{precision} from sm_{_OLDEST[precision]} on"
        raise UnsupportedPrecision("cuda", f"{precision} on sm_{sm}", allowed)


def encode(x: Array, kind: str) -> Array:
    """Numbers as a kind's array: `DTYPES[kind]`. Integers of int8 and codes of fp8 stay as they
    are."""
    if kind == "bf16":
        return to_bf16(np.asarray(x, dtype=np.float32))
    if kind == "fp8":
        return x if x.dtype == np.uint8 else to_e4m3(np.asarray(x, dtype=np.float32))
    return np.asarray(x, dtype=DTYPES[kind])


def decode(held: Array, kind: str) -> Array:
    """The other way; bf16 and e4m3 to fp32, the rest as it is."""
    if kind == "bf16":
        return (held.astype(np.uint32) << 16).view(np.float32)
    return E4M3[held] if kind == "fp8" else held


def to_bf16(x: F32) -> Array:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
