"""Every CUDA source under g++ (cuda_on_cpu.h) against the reference: sums of integers exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from edges import check_steps, context_error, off_edges
from emulated import (
    activation,
    backend,
    close,
    cu,
    float_error,
    integers,
    launcher,
    needs_compiler,
    normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.cuda import ops
from samp_kernels.cuda.tiles import TILES, Choice
from samp_kernels.interface import (
    ACTIVATIONS,
    EmbeddingTables,
    KernelError,
    LayerNorm,
    Out,
    UnsupportedPrecision,
    Weight,
)
from samp_kernels.reference import ReferenceBackend
from samp_kernels.reference import activation as activation64

pytestmark = needs_compiler
FEW = settings(max_examples=12, deadline=None)
SM = pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
REFERENCE = ReferenceBackend()
seeds = st.integers(0, 2**32 - 1)
tokens = st.sampled_from([1, 2, 17, 33, 70])
widths = st.sampled_from([1, 7, 64, 100, 312, 384])
acts = st.sampled_from([None, *ACTIVATIONS])
lengths = st.lists(st.integers(1, 70), min_size=1, max_size=4)


# gemm


@SM
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@FEW
@given(tokens, widths, widths, acts, st.booleans(), st.sampled_from(["fp32", "fp16"]), seeds)
def test_gemm_of_floats(
    architecture: str, precision: str, t: int, k: int, n: int, act: Any, rest: bool, out: str,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    b = backend(architecture)
    x, w, bias = normal(rng, t, k), normal(rng, n, k) / np.float32(math.sqrt(k)), normal(rng, n)
    residual = normal(rng, t, n) if rest else None
    wanted = activation64(x.astype(np.float64) @ w.astype(np.float64).T + bias, act)
    if residual is not None:
        wanted = wanted + residual
    y = b.gemm(
        b.array(x, precision),
        b.pack(Weight(w), precision),
        b.array(bias),
        act=act,
        residual=None if residual is None else b.array(residual),
        out=Out(out),
    )
    assert b.ran == (precision,)
    close(b, y, wanted, "fp16" if "fp16" in (precision, out) else "fp32")


@SM
@FEW
@given(tokens, widths, widths, st.booleans(), seeds)
def test_gemm_int8_is_exact(
    architecture: str, t: int, k: int, n: int, by_token: bool, seed: int
) -> None:
    """Scales are powers of two and the bias whole, so the float epilogue rounds nothing."""
    rng = np.random.default_rng(seed)
    b = backend(architecture)
    x, w = rng.integers(-127, 128, (t, k)), rng.integers(-127, 128, (n, k))
    x[0], w[0] = 127, -127
    bias = rng.integers(-1000, 1001, n)
    w_scale = (2.0 ** rng.integers(-6, 3, n)).astype(np.float32)
    x_scale: Any = 0.5
    if by_token:
        x_scale = (2.0 ** rng.integers(-3, 3, t)).astype(np.float32)
    packed = b.pack(Weight(w.astype(np.int8), w_scale), "int8")
    y = b.gemm(activation(b, x, x_scale), packed, b.array(bias), out=Out())
    rows = np.asarray(x_scale).reshape(-1, 1) * np.ones((t, 1))
    wanted = (x @ w.T) * rows * w_scale.astype(np.float64) + bias
    assert np.array_equal(b.to_host(y), wanted.astype(np.float32))


@SM
@FEW
@given(tokens, st.sampled_from([1, 5, 64]), widths, st.booleans(), seeds)
def test_int8_outputs_are_exact(
    architecture: str, t: int, k: int, n: int, relu: bool, seed: int
) -> None:
    """Half to even and saturation, to the last integer."""
    rng = np.random.default_rng(seed)
    b = backend(architecture)
    x, w = rng.integers(-9, 10, (t, k)), rng.integers(-3, 4, (n, k))
    bias = rng.integers(-2, 3, n) * 0.5
    packed = b.pack(Weight(w.astype(np.int8), np.full(n, 0.5, np.float32)), "int8")
    act: Any = "relu" if relu else None
    y = b.gemm(activation(b, x, 1.0), packed, b.array(bias), act=act, out=Out("int8", 1.0))
    wanted = activation64((x @ w.T) * 0.5 + bias, act)
    assert np.array_equal(integers(b, y), np.clip(np.rint(wanted), -127, 127))


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16", "fp8"])
def test_every_tile_gives_the_same_rows(precision: str, tile: str, splits: int) -> None:
    """Bit for bit the same in any tile and split, and alone; each tile uses the MMA, no bank
    conflicts. Orders of the threads do not matter."""
    if precision != "int8" and splits > 1:
        return  # Never chosen: the order of a float sum would show.
    rng = np.random.default_rng(5)
    rows, k, n = 141, 560, 136
    top = 15 if precision == "fp8" else 127  # Whole numbers that e4m3 has.
    whole_x, whole_w = rng.integers(-top, top + 1, (rows, k)), rng.integers(-top, top + 1, (n, k))
    newest = "sm_89" if precision == "fp8" else "sm_80"
    devices = [(newest, 0), (newest, 1), (newest, 6), ("sm_75", 0)]
    found = []
    for architecture, order in devices[: 4 if precision in ("int8", "fp16") else 3]:
        b = backend(architecture, order=order)
        run = _product(b, whole_w, precision, tile)
        x = b.array(whole_x, precision)
        y = run(x, splits)
        counts = launcher(b).counts(launcher(b).launched[-1].unit)
        assert counts.mma > 0
        assert counts.copies > 0
        assert counts.conflicts == 0
        assert np.array_equal(y, run(x, splits)), "the counters were left changed"
        assert np.array_equal(y[3:4], run(x[3:4], 1))
        found.append(y)
    wanted = whole_x @ whole_w.T * 2.0**-12 + np.linspace(-1, 1, n)
    for y in found:
        assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()
        # sm_75 sums fp16 in other groups of k.
        same = precision != "fp16" or y is not found[-1]
        assert np.array_equal(y, found[0]) or not same
    launcher(b).check_guards()


def _product(b: Any, weight: Any, precision: str, tile: str) -> Any:
    """(x, splits) -> x W^T / 4096 + bias on the host, in that tile."""
    n = weight.shape[0]
    packed = ops.Packed(b.array(weight, precision), precision, None)
    bias, scales = b.array(np.linspace(-1, 1, n)), b.array(np.full(n, 2.0**-12))
    counters = b.launcher.allocate(4 * 4096)
    b.launcher.fill(counters, 0, 4 * 4096)

    def run(x: Any, splits: int) -> Any:
        sums = b.launcher.allocate(4 * splits * x.rows * ops.padded(n))
        device = b.device(ops.Workspace(sums, counters))
        out = b.empty(x.rows, n, "fp32")
        choice = Choice(tile, splits)
        one = ops.gemm(device, x, packed, bias, out, column_scale=scales, choice=choice)
        assert tile in one.unit
        b.launcher.launch(one)
        return b.to_host(out)

    return run


@SM
@FEW
@given(tokens, widths, widths, st.floats(1e-3, 0.3), seeds)
def test_gemm_int8_requantizes(
    architecture: str, t: int, k: int, n: int, s: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(architecture)
    x, w = rng.integers(-127, 128, (t, k)), rng.integers(-127, 128, (n, k))
    w_scale = (rng.uniform(0.5, 1.5, n) / (s * 127**2 / 3 * math.sqrt(k))).astype(np.float32)
    bias = normal(rng, n)
    wanted = activation64((x @ w.T) * s * w_scale.astype(np.float64) + bias, "gelu")
    packed = b.pack(Weight(w.astype(np.int8), w_scale), "int8")
    scale = float(np.abs(wanted).max()) / 100 + 1e-3
    y = b.gemm(activation(b, x, s), packed, b.array(bias), act="gelu", out=Out("int8", scale))
    check_steps(integers(b, y), wanted, scale, float_error(wanted))


# attention


@SM
@pytest.mark.parametrize(
    "precisions",
    [
        ("fp32", "fp32"),
        ("int8", "fp32"),
        ("fp32", "int8"),
        ("fp16", "fp16"),
        ("int8", "int8"),
        ("int8", "fp16"),
        ("fp16", "int8"),
    ],
)
@settings(max_examples=6, deadline=None)
@given(
    lengths,
    st.sampled_from([(1, 32), (3, 32), (2, 64)]),
    st.sampled_from(["fp32", "fp16"]),
    st.booleans(),
    seeds,
)
def test_attention(
    architecture: str, precisions: tuple[str, str], counts: list[int], shape: tuple[int, int],
    kind: str, biased: bool, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    b = backend(architecture)
    heads, dim = shape
    scales = {"q": 0.03, "k": 0.03, "v": 0.03, "p": 1 / 127}
    # fp16 holds them, so a product of halves is as exact as one of floats.
    halves = normal(rng, sum(counts), 3 * heads * dim).astype(np.float16)
    qkv = off_edges(halves, 0.03).astype(np.float32)
    bias = normal(rng, heads, 2 * 75 - 1) if biased else None
    as_float: Any = tuple("fp32" if p == "fp16" else p for p in precisions)
    wanted = REFERENCE.attention(
        qkv.astype(np.float64), cu(counts), max(counts), heads, position_bias=bias,
        precisions=as_float, scales=scales, out=Out(),
    )  # fmt: skip
    args = (b.array(qkv, kind), cu(counts), max(counts), heads)
    more: Any = {"precisions": precisions, "scales": scales}
    if bias is not None:
        more["position_bias"] = b.array(bias)
    y = b.attention(*args, **more, out=Out())
    assert b.ran == precisions
    if precisions[1] == "int8":
        edges = context_error(qkv, cu(counts), heads, precisions, scales, bias)
        assert (np.abs(b.to_host(y) - wanted) <= edges + float_error(wanted)).all()
    else:
        close(b, y, wanted, precisions[1])
    scale = float(np.abs(wanted).max()) / 100
    quantized = b.attention(*args, **more, out=Out("int8", scale))
    check_steps(integers(b, quantized), b.to_host(y), scale)  # the same sums, bit for bit
    unit = launcher(b).launched[-1].unit
    assert launcher(b).counts(unit).conflicts == 0
    assert (launcher(b).counts(unit).mma > 0) == (unit != f"attention_fp32_fp32_{dim}")
    launcher(b).check_guards()


@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8")])
def test_attention_stays_inside_a_sequence(precisions: tuple[str, str]) -> None:
    """Neighbours of NaN leave a sequence as it is alone, bit for bit; rows behind are 0."""
    qkv = normal(np.random.default_rng(2), 150, 3 * 64)
    poisoned = qkv.copy()
    poisoned[:4] = poisoned[137:] = np.nan
    scales = {"q": 0.03, "k": 0.03, "v": 0.03, "p": 1 / 127}
    more: Any = {"precisions": precisions, "scales": scales, "out": Out()}
    for order in (0, 1, 6):
        b = backend(order=order)
        alone = b.to_host(b.attention(b.array(qkv[4:137]), cu([133]), 133, 2, **more))
        y = b.to_host(b.attention(b.array(poisoned), cu([4, 133, 5]), 133, 2, **more))
        assert np.array_equal(y[4:137], alone)
        assert not y[142:].any()


# rows


@SM
@FEW
@given(tokens, st.sampled_from([7, 64, 312, 384, 1000]), st.booleans(), st.floats(1e-3, 0.3), seeds)
def test_add_layernorm(
    architecture: str, t: int, width: int, rest: bool, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(architecture)
    x, residual = normal(rng, t, width) * 3 + 1, normal(rng, t, width)
    ln = LayerNorm(normal(rng, width), normal(rng, width), float(rng.choice([1e-12, 0.1])))
    total = x.astype(np.float64) + (residual.astype(np.float64) if rest else 0.0)
    wanted, _ = REFERENCE.add_layernorm(total, ln, out=Out())
    own = replace(ln, gamma=b.array(ln.gamma), beta=b.array(ln.beta))
    add = b.array(residual) if rest else None
    full, fed = b.add_layernorm(b.array(x), own, residual=add, out=Out("int8", scale))
    close(b, full, wanted)
    check_steps(integers(b, fed), b.to_host(full), scale)
    full, fed = b.add_layernorm(b.array(x), own, residual=add, out=Out("fp16"))
    close(b, fed, wanted, "fp16")
    full, fed = b.add_layernorm(b.array(x), own, residual=add, out=Out("int8", "token"))
    scales = b.to_host(fed.scale)
    assert np.allclose(scales, np.abs(wanted).max(axis=1) / 127, rtol=1e-5)
    check_steps(integers(b, fed), b.to_host(full), scales[:, None])


@FEW
@given(tokens, st.sampled_from([7, 384]), st.sampled_from(["fp32", "fp16", "token"]), seeds)
def test_embed_layernorm(t: int, width: int, to: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = backend()
    tables = [normal(rng, rows, width) for rows in (11, 9, 2)]
    gamma, beta = normal(rng, width), normal(rng, width)
    indices = [rng.integers(0, len(table), t).astype(np.int32) for table in tables]
    ids, positions, types = indices
    rows = sum(a[i].astype(np.float64) for a, i in zip(tables, indices, strict=True))
    wanted, _ = REFERENCE.add_layernorm(rows, LayerNorm(gamma, beta, 1e-12), out=Out())
    residual, x = b.embed_layernorm(
        ids, types, positions,
        EmbeddingTables(*(b.array(table) for table in tables)),
        LayerNorm(b.array(gamma), b.array(beta), 1e-12),
        Out("int8", "token") if to == "token" else Out(to),
    )  # fmt: skip
    close(b, residual, wanted)
    if to != "token":
        close(b, x, wanted, to)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    b = backend()
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, 127.5, -127.5, -128, 300, -1e9, 0]])
    q = b.quantize(b.array(x), Out("int8", 1.0))
    wanted = [[0, 2, 2, 0, -2, 126, -126, 127, -127, -127, 127, -127, 0]]
    assert b.to_host(q.data).tolist() == wanted


@FEW
@given(lengths, widths, st.sampled_from(["fp32", "fp16"]), seeds)
def test_pool(counts: list[int], width: int, kind: str, seed: int) -> None:
    b = backend()
    x = normal(np.random.default_rng(seed), sum(counts), width)
    rows = b.array(x, kind)
    held = b.to_host(rows).astype(np.float64)
    pieces = np.split(held, cu(counts)[1:-1])
    first = b.to_host(b.pool(rows, cu(counts), "first"))
    assert np.array_equal(first, np.stack([p[0] for p in pieces]).astype(np.float32))
    close(b, b.pool(rows, cu(counts), "mean"), np.stack([p.mean(axis=0) for p in pieces]))


# refusals


def test_what_is_not_there_is_refused() -> None:
    b = backend()
    qkv = b.array(np.zeros((3, 3 * 64), np.float32))
    with pytest.raises(UnsupportedPrecision, match="each int8 or one of fp32, fp16, bf16"):
        b.attention(qkv, cu([3]), 3, 2, precisions=("fp16", "fp32"), out=Out())
    with pytest.raises(KernelError, match="heads of 32, 64"):
        b.attention(qkv, cu([3]), 3, 4, out=Out())
    with pytest.raises(KernelError, match="scales q, k"):
        b.attention(qkv, cu([3]), 3, 2, precisions=("int8", "fp16"), out=Out())
    weight = Weight(np.zeros((4, 8), np.float32))
    with pytest.raises(KernelError, match="int8 activations"):
        b.gemm(
            activation(b, np.zeros((1, 8)), 1.0), b.pack(weight, "fp32"), b.array(np.zeros(4)),
            out=Out(),
        )  # fmt: skip
    with pytest.raises(KernelError, match="fp32 activations for fp16"):
        b.gemm(b.array(np.zeros((1, 8))), b.pack(weight, "fp16"), b.array(np.zeros(4)), out=Out())
    with pytest.raises(KernelError, match="at most 65504"):
        b.pack(Weight(np.full((1, 1), 1e6, np.float32)), "fp16")
