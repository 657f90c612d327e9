"""Every op of every backend against torch in float64, and integers against int64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bert import backend
from close import BACKENDS, check, integers, needs, quantized, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.interface import (
    Array,
    EmbeddingTables,
    LayerNorm,
    Out,
    Weight,
    pack_batch,
)
from samp_kernels.onednn import equal_runs

ACTS = (None, "gelu", "gelu_tanh", "tanh", "relu")
FAST = settings(max_examples=20, deadline=None)
every_backend = pytest.mark.parametrize("name", BACKENDS)

seeds = st.integers(0, 2**32 - 1)
tokens = st.sampled_from([1, 2, 3, 17, 33])
widths = st.sampled_from([1, 7, 64, 312, 384, 768])
scale_of = st.floats(1e-3, 0.3)
lengths = st.lists(st.integers(1, 19), min_size=1, max_size=5)


def act64(x: Array, act: str | None) -> Array:
    y = torch.from_numpy(x)
    if act == "gelu":
        y = F.gelu(y)
    elif act == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif act is not None:
        y = {"tanh": torch.tanh, "relu": F.relu}[act](y)
    return y.numpy()


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def cu(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


# gemm


@every_backend
@FAST
@given(tokens, widths, widths, st.sampled_from(ACTS), st.booleans(), seeds)
def test_gemm_fp32(
    name: str, t: int, inputs: int, outputs: int, act: Any, residual: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(name)
    x, w = normal(rng, t, inputs), normal(rng, outputs, inputs) / np.float32(math.sqrt(inputs))
    bias = normal(rng, outputs)
    rest = normal(rng, t, outputs) if residual and act is None else None
    wanted = act64(x.astype(np.float64) @ w.astype(np.float64).T + bias, act)
    if rest is not None:
        wanted = wanted + rest
    packed = b.pack(Weight(w), "fp32")
    args = {"act": act, "residual": None if rest is None else b.array(rest)}
    check(name, b.gemm(b.array(x), packed, b.array(bias), **args, out=Out()), wanted)
    assert b.ran == ("fp32",)
    scale = float(np.abs(wanted).max()) / 100 + 1e-3
    y = b.gemm(b.array(x), packed, b.array(bias), **args, out=Out("int8", scale))
    check(name, y, wanted, scale)


@every_backend
@FAST
@given(tokens, widths, widths, st.sampled_from(ACTS), st.booleans(), scale_of, seeds)
def test_gemm_int8(
    name: str, t: int, inputs: int, outputs: int, act: Any, residual: bool, s: float, seed: int
) -> None:
    needs(name, "int8")
    rng = np.random.default_rng(seed)
    b = backend(name)
    x = rng.integers(-127, 128, (t, inputs))
    w = rng.integers(-127, 128, (outputs, inputs))
    w_scale = rng.uniform(0.5, 1.5, outputs) / (s * 127**2 / 3 * math.sqrt(inputs))
    w_scale = w_scale.astype(np.float32)
    bias = normal(rng, outputs)
    rest = normal(rng, t, outputs) if residual and act is None else None
    wanted = act64((x @ w.T) * s * w_scale.astype(np.float64) + bias, act)
    packed = b.pack(Weight(w.astype(np.int8), w_scale), "int8")
    data = quantized(name, x, s)
    if rest is not None:
        y = b.gemm(data, packed, b.array(bias), residual=b.array(rest), out=Out())
        check(name, y, wanted + rest)
        return
    check(name, b.gemm(data, packed, b.array(bias), act=act, out=Out()), wanted)
    assert b.ran == ("int8",)
    scale = float(np.abs(wanted).max()) / 100 + 1e-3
    y = b.gemm(data, packed, b.array(bias), act=act, out=Out("int8", scale))
    check(name, y, wanted, scale)


@every_backend
@FAST
@given(tokens, st.sampled_from([1, 5, 312, 1024, 3072]), st.sampled_from([1, 31, 64]), seeds)
def test_int8_sums_are_exact(name: str, t: int, inputs: int, outputs: int, seed: int) -> None:
    """Scales are powers of two and the bias whole, so the float epilogue rounds once at most.

    oneDNN on AMX takes its sums of u8, whose zero point is 128, to float before it takes the zero
    point out of them; beyond 2^24 that rounds, each of the two to 24 bits."""
    needs(name, "int8")
    rng = np.random.default_rng(seed)
    b = backend(name)
    x = rng.integers(-127, 128, (t, inputs))
    w = rng.integers(-127, 128, (outputs, inputs))
    x[0] = 127
    w[0] = 127 if seed % 2 else -127
    bias = rng.integers(-1000, 1001, outputs)
    bias[0] = 0
    w_scale = (2.0 ** rng.integers(-6, 3, outputs)).astype(np.float32)
    packed = b.pack(Weight(w.astype(np.int8), w_scale), "int8")
    y = b.to_host(b.gemm(quantized(name, x, 0.5), packed, b.array(bias), out=Out()))
    scale = 0.5 * w_scale.astype(np.float64)
    wanted = (x @ w.T) * scale + bias
    parts = np.stack([(x + 128) @ w.T, np.broadcast_to(128 * w.sum(axis=1), wanted.shape)])
    if name == "onednn" and np.abs(parts).max() > 2**24:
        rounding = np.where(np.abs(parts) > 2**24, np.abs(parts) * 2.0**-24, 0).sum(axis=0)
        assert (np.abs(y - wanted) <= rounding * scale + np.abs(wanted) * 2.0**-22).all()
        return
    assert np.array_equal(y.astype(np.float32), wanted.astype(np.float32))


@every_backend
@FAST
@given(tokens, st.sampled_from([1, 5, 64]), st.sampled_from([1, 31, 64]), st.booleans(), seeds)
def test_int8_outputs_are_exact(
    name: str, t: int, inputs: int, outputs: int, relu: bool, seed: int
) -> None:
    """Half to even and saturation in the gemm's own requantization, to the last integer."""
    needs(name, "int8")
    rng = np.random.default_rng(seed)
    b = backend(name)
    x = rng.integers(-9, 10, (t, inputs))
    w = rng.integers(-3, 4, (outputs, inputs))
    bias = rng.integers(-2, 3, outputs) * 0.5
    packed = b.pack(Weight(w.astype(np.int8), np.full(outputs, 0.5, np.float32)), "int8")
    act: Any = "relu" if relu else None
    y = b.gemm(quantized(name, x, 1.0), packed, b.array(bias), act=act, out=Out("int8", 1.0))
    assert np.array_equal(integers(y), rounded(act64((x @ w.T) * 0.5 + bias, act), 1.0))


# quantize


@every_backend
def test_quantize_rounds_half_to_even_and_saturates(name: str) -> None:
    b = backend(name)
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, 127.5, -127.5, -128, 300, -1e9, 0]])
    q = b.quantize(b.array(x), Out("int8", 1.0))
    assert integers(q).tolist() == [[0, 2, 2, 0, -2, 126, -126, 127, -127, -127, 127, -127, 0]]
    assert q.scale == 1.0
    assert tuple(q.shape) == x.shape


@every_backend
@FAST
@given(tokens, widths, scale_of, seeds)
def test_quantize(name: str, t: int, width: int, scale: float, seed: int) -> None:
    b = backend(name)
    x = normal(np.random.default_rng(seed), t, width)
    q = b.quantize(b.array(x), Out("int8", scale))
    check(name, q, x, scale)
    inside = np.abs(x) <= 127 * scale
    error = np.abs(integers(q) * scale - x)[inside]
    assert error.max(initial=0.0) <= 0.5 * scale * (1 + 1e-4)


@every_backend
def test_quantize_a_view(name: str) -> None:
    """Rows that do not lie one after another in memory."""
    b = backend(name)
    x = np.arange(-12.0, 12.0).reshape(4, 6)
    view = b.array(x).T
    assert integers(b.quantize(view, Out("int8", 1.0))).tolist() == x.T.tolist()
    columns = b.array(x)[:, 1:3]
    assert integers(b.quantize(columns, Out("int8", 1.0))).tolist() == x[:, 1:3].tolist()


def test_quantize_by_token() -> None:
    b = backend("reference")
    x = np.array([[1.0, -2.0], [0.0, 0.0], [254.0, 1.0]])
    q = b.quantize(x, Out("int8", "token"))
    assert q.data.tolist() == [[64, -127], [0, 0], [127, 0]]
    assert q.scale[0] == 2.0 / 127
    w = Weight(np.array([[1, 0], [0, 2], [1, 1]], np.int8), np.array([1, 0.5, 2], np.float32))
    y = b.gemm(q, b.pack(w, "int8"), np.zeros(3), out=Out())
    assert np.allclose(y, [[128 / 127, -2, -252 / 127], [0, 0, 0], [254, 0, 508]], atol=1e-12)


# attention


def attention64(qkv: Array, bounds: Array, heads: int, bias: Array | None = None) -> Array:
    """One query of one head at a time."""
    hidden = qkv.shape[1] // 3
    dim = hidden // heads
    x = torch.from_numpy(qkv.astype(np.float64))
    y = torch.empty(len(qkv), hidden, dtype=torch.float64)
    for begin, end in pairwise(bounds):
        for head in range(heads):
            q, k, v = (
                x[begin:end, part * hidden + head * dim : part * hidden + (head + 1) * dim]
                for part in range(3)
            )
            scores = q @ k.T / math.sqrt(dim)
            if bias is not None:
                for i in range(end - begin):
                    for j in range(end - begin):
                        scores[i, j] += bias[head, bias.shape[1] // 2 + j - i]
            y[begin:end, head * dim : (head + 1) * dim] = torch.softmax(scores, 1) @ v
    return y.numpy()


@every_backend
@FAST
@given(lengths, st.sampled_from([(1, 32), (2, 32), (12, 32), (1, 64), (3, 64)]), scale_of, seeds)
def test_attention(
    name: str, counts: list[int], shape: tuple[int, int], scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(name)
    heads, dim = shape
    qkv = normal(rng, sum(counts), 3 * heads * dim)
    wanted = attention64(qkv, cu(counts), heads)
    args = (b.array(qkv), cu(counts), max(counts), heads)
    check(name, b.attention(*args, out=Out()), wanted)
    assert b.ran == ("fp32", "fp32")
    check(name, b.attention(*args, out=Out("int8", scale)), wanted, scale)


@every_backend
@FAST
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.sampled_from([(1, 32), (3, 64)]),
    st.integers(0, 9),
    seeds,
)
def test_attention_adds_a_position_bias(
    name: str, counts: list[int], shape: tuple[int, int], spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(name)
    heads, dim = shape
    qkv = normal(rng, sum(counts), 3 * heads * dim)
    bias = 3 * normal(rng, heads, 2 * (max(counts) + spare) - 1)
    wanted = attention64(qkv, cu(counts), heads, bias)
    args = (b.array(qkv), cu(counts), max(counts), heads)
    y = b.attention(*args, position_bias=b.array(bias), out=Out())
    check(name, y, wanted)


@every_backend
def test_attention_stays_inside_a_sequence(name: str) -> None:
    """A neighbour of NaN leaves a sequence as it is alone."""
    b = backend(name)
    qkv = normal(np.random.default_rng(2), 11, 3 * 64)
    alone = b.to_host(b.attention(b.array(qkv[4:7]), cu([3]), 3, 2, out=Out()))
    poisoned = qkv.copy()
    poisoned[:4] = poisoned[7:] = np.nan
    y = b.to_host(b.attention(b.array(poisoned), cu([4, 3, 4]), 4, 2, out=Out()))
    assert np.array_equal(y[4:7], alone)
    assert np.isnan(y[:4]).all()
    assert np.isnan(y[7:]).all()


@pytest.mark.parametrize("precisions", [("int8", "int8"), ("int8", "fp32"), ("fp32", "int8")])
def test_attention_int8(precisions: tuple[str, str]) -> None:
    rng = np.random.default_rng(3)
    counts, heads, dim = [4, 1, 6], 2, 8
    scales = {"q": 0.02, "k": 0.03, "v": 0.01, "p": 1 / 127}
    qkv = normal(rng, 11, 3 * heads * dim).astype(np.float64)
    wanted = np.empty((11, heads * dim))
    bounds = cu(counts)
    for begin, end in pairwise(bounds):
        for head in range(heads):
            at = [slice((p * heads + head) * dim, (p * heads + head + 1) * dim) for p in range(3)]
            q, k, v = (qkv[begin:end, place] for place in at)
            if precisions[0] == "int8":
                q, k = (rounded(a, scales[n]) * scales[n] for a, n in ((q, "q"), (k, "k")))
            e = np.exp(q @ k.T / np.sqrt(dim))
            p = e / e.sum(1, keepdims=True)
            if precisions[1] == "int8":
                p, v = (rounded(a, scales[n]) * scales[n] for a, n in ((p, "p"), (v, "v")))
            wanted[begin:end, head * dim : (head + 1) * dim] = p @ v
    b = backend("reference")
    y = b.attention(qkv, bounds, 6, heads, precisions=precisions, scales=scales, out=Out())
    assert b.ran == precisions
    assert np.abs(y - wanted).max() <= 1e-12
    assert np.abs(y - attention64(qkv, bounds, heads)).max() > 1e-5


# layer norm, embedding, pool


def layer_norm64(x: Array, gamma: Array, beta: Array, eps: float) -> Array:
    doubles = (torch.from_numpy(a.astype(np.float64)) for a in (gamma, beta))
    return F.layer_norm(torch.from_numpy(x), gamma.shape, *doubles, eps).numpy()


@every_backend
@FAST
@given(tokens, st.sampled_from([7, 64, 312, 384, 768]), st.booleans(), scale_of, seeds)
def test_add_layernorm(
    name: str, t: int, width: int, residual: bool, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(name)
    x, rest = normal(rng, t, width) * 3 + 1, normal(rng, t, width)
    gamma, beta, eps = normal(rng, width), normal(rng, width), float(rng.choice([1e-12, 1e-5, 0.1]))
    total = x.astype(np.float64) + (rest if residual else 0.0)
    wanted = layer_norm64(total, gamma, beta, eps)
    ln = LayerNorm(b.array(gamma), b.array(beta), eps)
    add = b.array(rest) if residual else None
    if residual:
        wanted = F.layer_norm(
            torch.from_numpy(x.astype(np.float64) + rest.astype(np.float64)),
            (width,),
            torch.from_numpy(gamma.astype(np.float64)),
            torch.from_numpy(beta.astype(np.float64)),
            eps,
        ).numpy()
    full, fed = b.add_layernorm(b.array(x), ln, residual=add, out=Out("int8", scale))
    check(name, full, wanted)
    check(name, fed, wanted, scale)
    full, fed = b.add_layernorm(b.array(x), ln, residual=add, out=Out())
    check(name, fed, wanted)


@every_backend
@FAST
@given(tokens, st.sampled_from([7, 384]), scale_of, seeds)
def test_embed_layernorm(name: str, t: int, width: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = backend(name)
    tables = [normal(rng, rows, width) for rows in (11, 9, 2)]
    gamma, beta = normal(rng, width), normal(rng, width)
    indices = [rng.integers(0, len(table), t).astype(np.int32) for table in tables]
    ids, positions, types = indices
    ids[0], positions[0], types[0] = 10, 8, 1
    rows = sum(a[i].astype(np.float64) for a, i in zip(tables, indices, strict=True))
    wanted = layer_norm64(np.asarray(rows), gamma, beta, 1e-12)
    residual, x = b.embed_layernorm(
        ids,
        types,
        positions,
        EmbeddingTables(*(b.array(table) for table in tables)),
        LayerNorm(b.array(gamma), b.array(beta), 1e-12),
        Out("int8", scale),
    )
    check(name, residual, wanted)
    check(name, x, wanted, scale)


@every_backend
@FAST
@given(lengths, widths, seeds)
def test_pool(name: str, counts: list[int], width: int, seed: int) -> None:
    b = backend(name)
    x = normal(np.random.default_rng(seed), sum(counts), width)
    pieces = np.split(x.astype(np.float64), cu(counts)[1:-1])
    first = b.pool(b.array(x), cu(counts), "first")
    assert np.array_equal(b.to_host(first), np.stack([p[0] for p in pieces]))
    check(name, b.pool(b.array(x), cu(counts), "mean"), np.stack([p.mean(axis=0) for p in pieces]))


@every_backend
def test_rows_behind_the_last_sequence(name: str) -> None:
    """They belong to no sequence: attention writes zeros there, no pool reads them."""
    b = backend(name)
    counts, bounds = [3, 2], cu([3, 2])
    qkv = normal(np.random.default_rng(4), 8, 3 * 64)
    qkv[5:] = np.nan
    y = b.to_host(b.attention(b.array(qkv), bounds, 3, 2, out=Out()))
    check(name, y[:5], attention64(qkv[:5], bounds, 2))
    assert not y[5:].any()
    x = qkv[:, :64].copy()
    for how in ("first", "mean"):
        alone = b.to_host(b.pool(b.array(x[: sum(counts)]), bounds, how))
        assert np.array_equal(b.to_host(b.pool(b.array(x), bounds, how)), alone)


# batches


@FAST
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2))
def test_pack_batch(counts: list[int], offset: int) -> None:
    ids = [np.arange(n) + 100 * i for i, n in enumerate(counts)]
    batch = pack_batch(ids, [np.full(n, i) for i, n in enumerate(counts)], position_offset=offset)
    assert batch.tokens == sum(counts)
    assert batch.sequences == len(counts)
    assert batch.max_seqlen == max(counts)
    assert batch.positions.tolist() == [p + offset for n in counts for p in range(n)]
    for i, (begin, end) in enumerate(pairwise(batch.cu_seqlens)):
        assert np.array_equal(batch.ids[begin:end], ids[i])
        assert (batch.types[begin:end] == i).all()
    for array in (batch.ids, batch.types, batch.positions, batch.cu_seqlens):
        assert array.dtype == np.int32


@given(lengths)
def test_equal_runs(counts: list[int]) -> None:
    runs = equal_runs(cu(counts))
    assert [n for count, n in runs for _ in range(count)] == counts
    assert all(a[1] != b[1] for a, b in pairwise(runs))
