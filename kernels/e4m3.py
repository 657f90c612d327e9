"""OCP's E4M3, the 8-bit float of precision fp8: 4 bits of exponent, 3 of mantissa, no infinities.

NumPy has no such type: a number stands as its code in uint8. Rounding is half to even and
saturates at 448; NaN stays NaN.
"""

from __future__ import annotations

import numpy as np
from samp_kernels.interface import F32, LARGEST, Array


def to_e4m3(x: Array) -> Array:
    """The codes, uint8, of floats (fp32 or float64; each is rounded once)."""
    known = np.where(np.isnan(x), x.dtype.type(0.0), x)
    size = np.minimum(np.abs(known), x.dtype.type(LARGEST["fp8"]))
    # In steps of an eighth of the power of two below it, of 2^-6 at least; 8 steps are the next
    # power's first. frexp of zero says 0, so it is lifted.
    lifted = np.maximum(size, x.dtype.type(2.0**-9))
    exponent = np.maximum(np.frexp(lifted)[1] - 1, -6)
    bits = (exponent + 7) * 8 + np.rint(np.ldexp(size, 3 - exponent)) - 8
    signed = bits.astype(np.uint8) | np.signbit(known) * np.uint8(0x80)
    return np.where(np.isnan(x), np.uint8(0x7F), signed).astype(np.uint8)


def _values() -> F32:
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(
        exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7)
    )
    size[bits & 127 == 127] = np.nan
    values: F32 = np.where(bits & 128, -size, size).astype(np.float32)
    return values


E4M3: F32 = _values()
"""The value of each of the 256 codes."""
