"""Exactness: int32 sums at every level, saturation included; alone and in a batch bit for bit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import backend, both, cu, every_level, normal
from samp_kernels.interface import Array, EmbeddingTables, LayerNorm, Out, QTensor, Weight

SOME = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
depths = st.sampled_from([1, 3, 4, 5, 8, 31, 64, 100, 312, 768, 1024, 3072])


def sums(level: str, x: Array, w: Array) -> Array:
    """The int32 sums of u8 rows, less their zero point, times s8 rows."""
    from samp_kernels.cpu import _native

    b = backend(level)
    out = np.full((len(x), len(w)), 77, np.int32)
    b.level.sums(x, _native.Packed(w, b.level), out)
    return out


def exact(x: Array, w: Array) -> Array:
    return (x.astype(np.int64) - 128) @ w.astype(np.int64).T


@every_level
@SOME
@given(
    st.sampled_from([1, 2, 6, 11, 12, 13, 24, 29]),
    depths,
    st.sampled_from([1, 15, 16, 17, 32, 33, 64, 97]),
    seeds,
)
def test_sums_are_exact(level: str, rows: int, depth: int, outputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    w = rng.integers(-127, 128, (outputs, depth)).astype(np.int8)
    np.testing.assert_array_equal(sums(level, x, w), exact(x, w))


@every_level
@pytest.mark.parametrize("depth", [2, 4, 32, 768, 4096])
def test_nothing_saturates(level: str, depth: int) -> None:
    """Two products u8 255 x s8 127 are 64,770, beyond the 16 bits in which AVX2's own instruction
    (vpmaddubsw) adds them: where it is used as it is, these sums come out as 32,767."""
    rows = np.stack([np.full(depth, value, np.uint8) for value in (255, 0, 1, 128)])
    columns = np.stack([np.full(depth, value, np.int8) for value in (127, -127, 1, -128)])
    got = sums(level, rows, columns)
    np.testing.assert_array_equal(got, exact(rows, columns))
    assert got[0, 0] == depth * 127 * 127
    # The same extremes in every pattern of a group of four, with both signs beside each other.
    patterns = np.array(list(np.ndindex(2, 2, 2, 2)))
    x = np.tile(np.where(patterns, 255, 0).astype(np.uint8), (1, max(1, depth // 4)))
    w = np.tile(np.where(patterns, 127, -127).astype(np.int8), (1, max(1, depth // 4)))
    np.testing.assert_array_equal(sums(level, x, w), exact(x, w))


def test_the_levels_agree_bit_for_bit_in_int8() -> None:
    """Sums are the same integers; a scale of a power of two leaves nothing to round."""
    rng = np.random.default_rng(0)
    q, w = rng.integers(-127, 128, (9, 384)), rng.integers(-127, 128, (65, 384)).astype(np.int8)
    scale = np.full(65, 2.0**-7, np.float32)
    results = []
    for level in ("amx_int8", "avx512_vnni", "avx2_vnni", "avx2", "portable"):
        try:
            b = backend(level)
        except pytest.skip.Exception:
            continue
        y = b.gemm(both(q, 0.5)[0], b.pack(Weight(w, scale), "int8"), np.zeros(65, np.float32),
                   out=Out())  # fmt: skip
        results.append(y)
    assert all(np.array_equal(y, results[0]) for y in results)
    assert np.array_equal(results[0], (q @ w.T.astype(int)) * 2.0**-8)


# Alone and in a batch


def rows_alone(call: Any, x: Array) -> Any:
    """The op on each row by itself."""
    parts = [call(x[i : i + 1]) for i in range(len(x))]
    if isinstance(parts[0], QTensor):
        return np.concatenate([part.data for part in parts])
    return np.concatenate(parts)


def values(y: Any) -> Array:
    return np.asarray(y.data if isinstance(y, QTensor) else y)


@every_level
@SOME
@given(
    st.integers(2, 40),
    st.sampled_from([7, 64, 312, 768]),
    st.sampled_from([1, 17, 33, 64, 100]),
    st.sampled_from([None, "gelu", "gelu_tanh", "tanh"]),
    st.booleans(),
    seeds,
)
def test_a_gemms_row_alone(
    level: str, rows: int, inputs: int, outputs: int, act: Any, int8: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    bias = normal(rng, outputs)
    for out in (Out(), Out("int8", 0.05)):
        if int8:
            w = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
            scale = (rng.uniform(0.5, 1, outputs) / 6000 / math.sqrt(inputs)).astype(np.float32)
            packed = b.pack(Weight(w, scale), "int8")
            x = rng.integers(1, 256, (rows, inputs)).astype(np.uint8)

            def call(part: Array) -> Any:
                q = QTensor(part, 0.25, part.shape)
                return b.gemm(q, packed, bias, act=act, out=out)  # noqa: B023
        else:
            packed = b.pack(Weight(normal(rng, outputs, inputs)), "fp32")
            x = normal(rng, rows, inputs)

            def call(part: Array) -> Any:
                return b.gemm(part, packed, bias, act=act, out=out)  # noqa: B023

        np.testing.assert_array_equal(values(call(x)), rows_alone(call, x))


@every_level
@SOME
@given(st.integers(2, 9), st.sampled_from([7, 64, 312, 384, 768, 1024]), seeds)
def test_a_rows_layer_norm_alone(level: str, rows: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    ln = LayerNorm(normal(rng, width), normal(rng, width), 1e-12)
    x = normal(rng, rows, width)
    for out in (Out(), Out("int8", 0.05), Out("int8", "token")):

        def call(part: Array) -> Any:
            return b.add_layernorm(part, ln, residual=part, out=out)[1]  # noqa: B023

        np.testing.assert_array_equal(values(call(x)), rows_alone(call, x))
    ids = rng.integers(0, rows, rows).astype(np.int32)
    tables = EmbeddingTables(x, x, x)

    def embed(part: Array) -> Any:
        index = np.ascontiguousarray(part[:, 0])
        return b.embed_layernorm(index, index, index, tables, ln, Out())[1]

    np.testing.assert_array_equal(embed(ids[:, None]), rows_alone(embed, ids[:, None]))


@every_level
@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("int8", "fp32"), ("int8", "int8")])
@SOME
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=5),
    st.sampled_from([(1, 32), (2, 64), (12, 32)]),
    seeds,
)
def test_a_sequence_alone(
    level: str, precisions: tuple[str, str], counts: list[int], shape: tuple[int, int], seed: int
) -> None:
    b = backend(level)
    heads, dim = shape
    qkv = normal(np.random.default_rng(seed), sum(counts), 3 * heads * dim)
    scales = {"q": 0.03, "k": 0.03, "p": 1 / 127, "v": 0.03}
    args: dict[str, Any] = {"precisions": precisions, "scales": scales}
    for out in (Out(), Out("int8", 0.02)):
        together = values(b.attention(qkv, cu(counts), max(counts), heads, **args, out=out))
        for begin, end in pairwise(cu(counts)):
            alone = b.attention(
                qkv[begin:end], cu([end - begin]), end - begin, heads, **args, out=out
            )
            np.testing.assert_array_equal(together[begin:end], values(alone))


@every_level
@SOME
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.sampled_from([7, 384]), seeds)
def test_a_mean_alone(level: str, counts: list[int], width: int, seed: int) -> None:
    b = backend(level)
    x = normal(np.random.default_rng(seed), sum(counts), width)
    together = b.pool(x, cu(counts), "mean")
    for i, (begin, end) in enumerate(pairwise(cu(counts))):
        alone = b.pool(x[begin:end], cu([end - begin]), "mean")
        np.testing.assert_array_equal(together[i], alone[0])
