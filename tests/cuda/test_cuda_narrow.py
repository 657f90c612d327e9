"""bf16 and e4m3: rounding against PyTorch's, products, attention and outputs against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from edges import context_error, off_edges
from emulated import backend, close, cu, float_error, launcher, needs_compiler, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.cuda import ops
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.formats import E4M3, decode, encode, to_e4m3
from samp_kernels.cuda.ops import Matrix, Packed, Target
from samp_kernels.cuda.units import check_unit, units_by_name
from samp_kernels.interface import (
    ACTIVATIONS,
    LARGEST,
    Array,
    KernelError,
    LayerNorm,
    Out,
    UnsupportedPrecision,
)
from samp_kernels.reference import ReferenceBackend
from samp_kernels.reference import activation as activation64

FEW = settings(max_examples=10, deadline=None)
REFERENCE = ReferenceBackend()
# What holds a precision first: sm_90 multiplies e4m3 in the same fragments.
OLDEST = {"bf16": "sm_80", "fp8": "sm_89"}
# Half a step of the last place.
ROUNDING = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
TORCH = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
seeds = st.integers(0, 2**32 - 1)
tokens = st.sampled_from([1, 2, 17, 33, 70])
widths = st.sampled_from([1, 7, 64, 100, 312])
lengths = st.lists(st.integers(1, 70), min_size=1, max_size=4)


def telling() -> Array:
    """Every e4m3 value, every middle of two, their neighbours in fp32, all bf16 values, others."""
    finite = np.sort(E4M3[np.isfinite(E4M3)])
    edges = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    sides = [np.nextafter(edges, np.float32(s)) for s in (-np.inf, np.inf)]
    every = decode(np.arange(2**16, dtype=np.uint16), "bf16")
    drawn = np.random.default_rng(3).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    return np.concatenate([edges, *sides, every, drawn])


def by_torch(x: Array, kind: str) -> Array:
    if kind == "fp8":
        x = np.clip(x, -448.0, 448.0)
    return torch.from_numpy(x).to(TORCH[kind]).float().numpy()


@pytest.mark.parametrize("kind", TORCH)
def test_the_host_rounds_as_torch(kind: str) -> None:
    x = telling()
    got, wanted = decode(encode(x, kind), kind), by_torch(x, kind)
    assert np.array_equal(got, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(got)[x == 0], np.signbit(x)[x == 0])


@needs_compiler
@pytest.mark.parametrize("kind", TORCH)
def test_the_kernels_round_as_torch(kind: str) -> None:
    x = telling()
    x = np.where(np.abs(x) < 2.0**-126, 0.0, x)[None, : x.size // 16 * 16]  # A GPU may flush them.
    b = backend(OLDEST[kind])
    got = []
    for part in np.array_split(x, 12, axis=1):
        to = b.empty(1, part.shape[1], kind)
        target = Target(halves=to) if kind == "bf16" else Target(integers=to)
        b.launcher.launch(ops.convert(b.array(part), target))
        got.append(b.to_host(to))
    assert np.array_equal(np.concatenate(got, axis=1), by_torch(x, kind), equal_nan=True)


def test_e4m3_of_a_few() -> None:
    values = [0.0, -0.0, 448.0, 1e9, -np.inf, 2.0**-9, 2.0**-10, 2.0**-6, 464.0, 1.0625, 1.1875]
    bits = to_e4m3(np.array(values, np.float32)).tolist()
    assert bits == [0, 0x80, 0x7E, 0x7E, 0xFE, 1, 0, 8, 0x7E, 0x38, 0x3A]


def run_gemm(
    b: CudaBackend, kind: str, x: Matrix, w: Matrix, bias: Array, out: str, **more: Any
) -> Matrix:
    y = b.empty(x.rows, w.rows, out)
    packed = Packed(w, kind, None)
    b.launcher.launch(ops.gemm(b.device(), x, packed, b.array(bias), y, **more))
    return y


@needs_compiler
@pytest.mark.parametrize("kind", OLDEST)
@FEW
@given(
    tokens, widths, widths, st.sampled_from([None, *ACTIVATIONS]), st.booleans(),
    st.sampled_from(["fp32", "fp16", "bf16"]), seeds,
)  # fmt: skip
def test_gemm(kind: str, t: int, k: int, n: int, act: Any, rest: bool, out: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = backend(OLDEST[kind])
    x, w = b.array(normal(rng, t, k), kind), b.array(normal(rng, n, k), kind)
    bias = normal(rng, n)
    residual = b.array(normal(rng, t, n), out) if rest else None
    columns = (rng.uniform(0.5, 2.0, n) / math.sqrt(k)).astype(np.float32)
    rows = rng.uniform(0.5, 2.0, t).astype(np.float32)
    scales: Any = {"column_scale": b.array(columns), "row_scale": b.array(rows)}
    y = run_gemm(b, kind, x, w, bias, out, act=act, residual=residual, **scales)
    product = b.to_host(x).astype(np.float64) @ b.to_host(w).astype(np.float64).T
    wanted = activation64(product * rows[:, None] * columns + bias, act)
    if residual is not None:
        wanted = wanted + b.to_host(residual)
    error = np.abs(b.to_host(y).astype(np.float64) - wanted)
    assert (error <= np.abs(wanted) * ROUNDING[out] + 1e-5 * max(1.0, np.abs(wanted).max())).all()


@needs_compiler
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
@FEW
@given(tokens, st.sampled_from([1, 5, 64]), widths, st.booleans(), seeds)
def test_fp8_outputs_are_exact(kind: str, t: int, k: int, n: int, relu: bool, seed: int) -> None:
    """Small whole numbers: the sums are exact, so each output is its value's rounding."""
    rng = np.random.default_rng(seed)
    b = backend("sm_89")
    x, w = rng.integers(-9, 10, (t, k)), rng.integers(-3, 4, (n, k))
    bias = rng.integers(-2, 3, n) * 0.5
    columns = b.array(np.full(n, 0.5)) if kind != "bf16" else None
    act: Any = "relu" if relu else None
    y = run_gemm(
        b, kind, b.array(x, kind), b.array(w, kind), bias, "fp8",
        act=act, column_scale=columns, out_scale=0.25,
    )  # fmt: skip
    wanted = activation64(x @ w.T * (1.0 if kind == "bf16" else 0.5) + bias, act) * 4
    assert np.array_equal(b.to_host(y), by_torch(wanted.astype(np.float32), "fp8"))


@needs_compiler
@pytest.mark.parametrize("precisions", [("bf16", "bf16"), ("bf16", "int8"), ("int8", "bf16")])
@settings(max_examples=6, deadline=None)
@given(lengths, st.sampled_from([(3, 32), (2, 64)]), st.sampled_from(["fp32", "bf16"]), seeds)
def test_attention(
    precisions: tuple[str, str], counts: list[int], shape: tuple[int, int], kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend()
    heads, dim = shape
    scales = {"q": 0.03, "k": 0.03, "v": 0.03, "p": 1 / 127}
    # bf16 holds them, and what int8 makes of them lies on no edge.
    qkv = decode(encode(normal(rng, sum(counts), 3 * heads * dim), "bf16"), "bf16")
    qkv = decode(encode(off_edges(qkv, 0.03), "bf16"), "bf16")
    as_float: Any = tuple("fp32" if p == "bf16" else p for p in precisions)
    wanted = REFERENCE.attention(
        qkv.astype(np.float64), cu(counts), max(counts), heads,
        precisions=as_float, scales=scales, out=Out(),
    )  # fmt: skip
    tiles = ops.attention_tiles(cu(counts))
    bounds, work = b.integers(cu(counts)), b.integers(tiles)

    def run(out: str, out_scale: float = 1.0) -> Array:
        y = b.empty(sum(counts), heads * dim, out)
        one = ops.attention(
            b.array(qkv, kind), bounds.pointer, work.pointer, len(tiles), heads, y,
            precisions=precisions, scales=scales, out_scale=out_scale,
        )  # fmt: skip
        b.launcher.launch(one)
        assert launcher(b).counts(one.unit).mma > 0
        return b.to_host(y)

    y = run("fp32")
    if precisions[1] == "int8":
        edges = context_error(qkv, cu(counts), heads, precisions, scales)
        assert (np.abs(y - wanted) <= edges + float_error(wanted)).all()
    else:
        # Probabilities are rounded to 8 bits of mantissa.
        assert np.abs(y - wanted).max() <= 2.0**-7 * max(1.0, np.abs(wanted).max())
    assert np.array_equal(run("bf16"), decode(encode(y, "bf16"), "bf16"))
    launcher(b).check_guards()


@needs_compiler
def test_attention_writes_fp8() -> None:
    rng = np.random.default_rng(4)
    b = backend("sm_89")
    qkv, bounds = b.array(normal(rng, 40, 3 * 64), "fp16"), b.integers(cu([40]))
    work = b.integers(ops.attention_tiles(cu([40])))
    made = {}
    for kind in ("fp32", "fp8"):
        y = b.empty(40, 64, kind)
        one = ops.attention(
            qkv, bounds.pointer, work.pointer, 1, 2, y, precisions=("fp16", "fp16"), out_scale=0.25
        )
        b.launcher.launch(one)
        made[kind] = b.to_host(y)
    assert np.array_equal(made["fp8"], by_torch(made["fp32"] * 4, "fp8"))


@needs_compiler
@FEW
@given(tokens, st.sampled_from([7, 64, 312, 1000]), st.floats(1e-2, 0.3), st.booleans(), seeds)
def test_layernorm_writes_bf16_and_fp8(
    t: int, width: int, scale: float, by_token: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend("sm_89")
    x, ones = normal(rng, t, width), np.ones(width, np.float32)
    wanted, _ = REFERENCE.add_layernorm(x.astype(np.float64), LayerNorm(ones, ones, 0.1), out=Out())
    ln = LayerNorm(b.array(ones), b.array(ones), 0.1)
    full, half, narrow = (b.empty(t, width, kind) for kind in ("fp32", "bf16", "fp8"))
    scales = b.empty(1, t, "fp32") if by_token else None
    to = Target(full, half, narrow, scale, scales)
    b.launcher.launch(ops.layernorm(b.array(x), ln, to))
    close(b, full, wanted)
    held = b.to_host(full)
    assert np.array_equal(b.to_host(half), by_torch(held, "bf16"))
    each: Any = np.float32(scale)
    if scales is not None:
        each = b.to_host(scales)[0][:, None]
        largest = np.abs(held).max(axis=1, keepdims=True)
        assert np.allclose(each, largest / LARGEST["fp8"], rtol=1e-6)
    got = b.to_host(narrow) * each
    # Half of e4m3's step: 2^-4 of a value, 2^-10 of the scale below the normal numbers.
    kept = np.clip(held, -448.0 * each, 448.0 * each)
    assert (np.abs(got - kept) <= np.abs(kept) * 2.0**-4 * 1.0001 + each * 2.0**-10).all()


def test_an_older_gpu_refuses() -> None:
    for kind, architecture in (("bf16", "sm_75"), ("fp8", "sm_86")):
        b = backend(architecture)
        x, bias = b.empty(16, 16, kind), b.empty(1, 16, "fp32")
        with pytest.raises(UnsupportedPrecision, match=rf"{kind} on sm_\d+.*from sm_8[09] on"):
            ops.gemm(b.device(), x, Packed(x, kind, None), bias, x)
    with pytest.raises(UnsupportedPrecision, match="attention_bf16_bf16_64 on sm_75"):
        check_unit(units_by_name()["attention_bf16_bf16_64"], "sm_75")
    with pytest.raises(KernelError, match="each int8 or one of fp32, fp16, bf16"):
        ops.check_attention_kind(("fp16", "bf16"), 64)
