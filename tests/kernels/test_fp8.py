"""fp8: E4M3 by its own definition, and the reference's ops in it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bert import backend
from close import able
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.e4m3 import E4M3, to_e4m3
from samp_kernels.interface import (
    LARGEST,
    Array,
    KernelError,
    LayerNorm,
    Out,
    QTensor,
    UnsupportedPrecision,
    Weight,
)
from samp_kernels.reference import activation as activation64

FAST = settings(max_examples=25, deadline=None)


def defined(code: int) -> Fraction | None:
    """OCP 8-bit floating point, 2023, table 1: bias 7, subnormals, one NaN of each sign."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return None
    power, whole = (Fraction(2) ** -6, 0) if exponent == 0 else (Fraction(2) ** (exponent - 7), 1)
    return (-1) ** sign * power * (whole + Fraction(mantissa, 8))


def nearest(x: float) -> int:
    """By comparing with every number there is: ties to the even mantissa, 448 beyond the end."""
    sign = int(np.signbit(x)) << 7
    near = [(abs(abs(Fraction(x)) - (defined(c) or 0)), c & 1, c) for c in range(127)]
    return sign | min(near)[2]


def test_all_256_codes() -> None:
    for code in range(256):
        value = defined(code)
        if value is None:
            assert np.isnan(E4M3[code])
        else:
            assert Fraction(float(E4M3[code])) == value
            assert np.signbit(E4M3[code]) == (code > 127)
    assert float(np.nanmax(E4M3)) == LARGEST["fp8"] == 448.0
    assert E4M3[1] == 2.0**-9
    again = to_e4m3(E4M3)
    nan = np.isnan(E4M3)
    assert np.array_equal(again[~nan], np.arange(256)[~nan])
    assert np.isnan(E4M3[again[nan]]).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_ties_are_even_and_what_is_beyond_saturates(kind: Any) -> None:
    finite = np.arange(127)
    below, above = E4M3[finite[:-1]], E4M3[finite[1:]]
    middle = ((below.astype(np.float64) + above) / 2).astype(kind)  # exact in both
    even = np.where(finite[:-1] % 2 == 0, finite[:-1], finite[1:])
    assert np.array_equal(to_e4m3(middle), even)
    assert np.array_equal(to_e4m3(-middle), even | 128)
    assert np.array_equal(to_e4m3(np.nextafter(middle, kind(0))), finite[:-1])
    assert np.array_equal(to_e4m3(np.nextafter(middle, kind(1e9))), finite[1:])
    far = np.array([448.0, 449.0, 464.0, 1e30, np.inf], kind)
    assert to_e4m3(far).tolist() == [0x7E] * 5
    assert to_e4m3(-far).tolist() == [0xFE] * 5
    assert np.isnan(E4M3[to_e4m3(np.array([np.nan], kind))]).all()
    assert to_e4m3(np.array([0.0, -0.0, 2.0**-10, 1e-30], kind)).tolist() == [0, 128, 0, 0]


@FAST
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20))
def test_the_nearest_of_all(values: list[float]) -> None:
    x = np.array(values, np.float32)
    assert to_e4m3(x).tolist() == [nearest(value) for value in values]
    as_torch = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3[to_e4m3(x)], as_torch)


@FAST
@given(st.integers(1, 9), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_the_reference_multiplies_e4m3(t: int, k: int, by_token: bool, seed: int) -> None:
    """quantize, pack, gemm: what a float64 product of the rounded numbers gives."""
    b, rng = backend("reference"), np.random.default_rng(seed)
    x, codes = rng.standard_normal((t, k)) * 3, rng.integers(0, 127, (7, k)).astype(np.uint8)
    scale, bias = rng.uniform(0.1, 2.0, 7).astype(np.float32), rng.standard_normal(7)
    q = b.quantize(x, Out("fp8", "token" if by_token else 0.01))
    each = np.full(t, 0.01)
    if by_token:
        each = np.abs(x).max(axis=1) / 448
    assert isinstance(q, QTensor)
    assert np.allclose(q.scale, each if by_token else 0.01, rtol=1e-15)
    rounded = np.array(
        [[float(defined(nearest(v)) or 0) for v in row] for row in x / each[:, None]]
    )
    assert np.array_equal(E4M3[q.data], rounded)
    y = b.gemm(q, b.pack(Weight(codes, scale), "fp8"), bias, act="gelu", out=Out())
    weights = np.array([[float(defined(c) or 0) for c in row] for row in codes.tolist()])
    wanted = activation64(
        rounded @ weights.T * each[:, None] * scale.astype(np.float64) + bias, "gelu"
    )
    assert np.allclose(y, wanted, rtol=1e-12, atol=1e-12)
    assert b.ran == ("fp8",)
    out = b.gemm(q, b.pack(Weight(codes, scale), "fp8"), bias, out=Out("fp8", 0.5))
    assert out.data.dtype == np.uint8


def test_layer_norm_writes_fp8() -> None:
    b, rng = backend("reference"), np.random.default_rng(2)
    x, ln = rng.standard_normal((3, 16)), LayerNorm(np.ones(16), np.zeros(16), 1e-6)
    y, q = b.add_layernorm(x, ln, out=Out("fp8", 0.02))
    wanted = [nearest(v) for v in (y / 0.02).ravel().tolist()]
    assert q.data.ravel().tolist() == wanted


def test_the_kinds_are_not_mixed() -> None:
    b = backend("reference")
    ones, bias = np.ones(5, np.float32), np.zeros(5)
    fp8, int8 = Weight(np.ones((5, 8), np.uint8), ones), Weight(np.ones((5, 8), np.int8), ones)
    x = {kind: b.quantize(np.ones((2, 8)), Out(kind, 0.5)) for kind in ("int8", "fp8")}
    for weight, kind, other in ((fp8, "fp8", "int8"), (int8, "int8", "fp8")):
        with pytest.raises(KernelError, match=r"int8 activations; allowed: u?int8, as the weights"):
            b.gemm(x[other], b.pack(weight, kind), bias, out=Out())
        with pytest.raises(UnsupportedPrecision, match=f"pack: got {other} from u?int8"):
            b.pack(weight, other)
    split = Weight(fp8.data, ones, np.array([1], np.int32), np.ones((5, 1), np.float32))
    with pytest.raises(KernelError, match="beside int8"):
        b.pack(split, "fp8")
    with pytest.raises(UnsupportedPrecision, match="attention: got fp8"):
        b.attention(np.ones((2, 24)), np.array([0, 2]), 2, 1, precisions=("fp8", "fp32"), out=Out())


@pytest.mark.parametrize("name", ["cpu", "onednn"])
def test_a_backend_without_fp8_says_so(name: str) -> None:
    b: Any = backend(name)
    assert not any(precision == "fp8" for _, precision, _ in able(name))
    weight = Weight(np.ones((5, 8), np.uint8), np.ones(5, np.float32))
    with pytest.raises(UnsupportedPrecision, match=r"pack: got fp8 from uint8.*allowed: fp32"):
        b.pack(weight, "fp8")
    x: Array = b.array(np.ones((2, 8)))
    with pytest.raises(UnsupportedPrecision, match="fp8"):
        b.quantize(x, Out("fp8", 0.5))
