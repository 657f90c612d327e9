"""Every native op at every dispatch level against the float64 reference, over shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from edges import context_error, off_edges
from hypothesis import given, settings
from hypothesis import strategies as st
from native import (
    LEVELS,
    REFERENCE,
    TOLERANCE,
    backend,
    both,
    close,
    cu,
    every_level,
    near,
    normal,
)
from samp_kernels.cpu import missing
from samp_kernels.interface import Array, EmbeddingTables, KernelError, LayerNorm, Out, Weight

ACTS = (None, "gelu", "gelu_tanh", "tanh", "relu")
SOME = settings(max_examples=15, deadline=None)

seeds = st.integers(0, 2**32 - 1)
tokens = st.sampled_from([1, 2, 5, 7, 13, 25, 33])
hidden = st.sampled_from([312, 384, 768, 1024])
widths = st.one_of(hidden, st.sampled_from([1, 3, 7, 16, 31, 33, 64, 65, 127]))
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)
heads = st.sampled_from([(1, 32), (3, 32), (12, 32), (1, 64), (2, 64), (3, 26), (1, 8)])
scale_of = st.floats(1e-3, 0.3)


def split(rng: np.random.Generator, w: Array, outputs: int, count: int) -> dict[str, Any]:
    """An outlier split of an int8 matrix; it writes zeros there."""
    channels = rng.permutation(w.shape[1])[:count].astype(np.int32)
    w[:, channels] = 0
    return {"outliers": channels, "outlier_weight": normal(rng, outputs, len(channels))}


@every_level
@SOME
@given(tokens, widths, widths, st.sampled_from(ACTS), st.booleans(), scale_of, seeds)
def test_gemm_fp32(
    level: str, t: int, inputs: int, outputs: int, act: Any, residual: bool, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    x, w = normal(rng, t, inputs), normal(rng, outputs, inputs) / np.float32(math.sqrt(inputs))
    bias = normal(rng, outputs)
    rest = normal(rng, t, outputs) if residual else None
    packed, plain = (at.pack(Weight(w), "fp32") for at in (b, REFERENCE))
    y = b.gemm(x, packed, bias, act=act, residual=rest, out=Out())
    close(y, REFERENCE.gemm(x.astype(float), plain, bias, act=act, residual=rest, out=Out()))
    near(b.gemm(x, packed, bias, act=act, residual=rest, out=Out("int8", scale)), y, scale)
    assert b.ran == ("fp32",)


@every_level
@SOME
@given(
    tokens,
    widths,
    widths,
    st.sampled_from(ACTS),
    st.booleans(),
    st.sampled_from(["static", "token"]),
    st.integers(0, 4),
    scale_of,
    seeds,
)
def test_gemm_int8(
    level: str,
    t: int,
    inputs: int,
    outputs: int,
    act: Any,
    residual: bool,
    kind: str,
    outliers: int,
    scale: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    q, w = rng.integers(-127, 128, (t, inputs)), rng.integers(-127, 128, (outputs, inputs))
    given_split = split(rng, w, outputs, outliers) if outliers and kind == "static" else {}
    steps = 127**2 / 3 * math.sqrt(inputs)
    w_scale = (rng.uniform(0.5, 1.5, outputs) / (0.1 * steps)).astype(np.float32)
    each: Any = 0.1 if kind == "static" else (0.1 * rng.uniform(0.2, 2, t)).astype(np.float32)
    kept = normal(rng, t, len(given_split["outliers"])) if given_split else None
    x, plain_x = both(q, each, kept)
    bias = normal(rng, outputs)
    rest = normal(rng, t, outputs) if residual else None
    weight = Weight(w.astype(np.int8), w_scale, **given_split)
    packed, plain = (at.pack(weight, "int8") for at in (b, REFERENCE))
    y = b.gemm(x, packed, bias, act=act, residual=rest, out=Out())
    close(y, REFERENCE.gemm(plain_x, plain, bias, act=act, residual=rest, out=Out()))
    near(b.gemm(x, packed, bias, act=act, residual=rest, out=Out("int8", scale)), y, scale)
    assert b.ran == ("int8",)


@every_level
@SOME
@given(tokens, widths.filter(lambda n: n > 1), st.booleans(), scale_of, seeds)
def test_add_layernorm(
    level: str, t: int, width: int, residual: bool, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    x = normal(rng, t, width) * np.float32(rng.choice([0.1, 1, 30])) + np.float32(rng.normal())
    rest = normal(rng, t, width) if residual else None
    ln = LayerNorm(normal(rng, width), normal(rng, width), float(rng.choice([1e-12, 1e-5])))
    wanted, _ = REFERENCE.add_layernorm(x.astype(float), ln, residual=rest, out=Out())
    for out in (Out(), Out("int8", scale), Out("int8", "token")):
        full, fed = b.add_layernorm(x, ln, residual=rest, out=out)
        close(full, wanted)
        near(fed, full, out.scale) if out.scale else close(fed, wanted)


@every_level
@SOME
@given(tokens, hidden, scale_of, seeds)
def test_embed_layernorm(level: str, t: int, width: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    tables = EmbeddingTables(normal(rng, 11, width), normal(rng, 9, width), normal(rng, 2, width))
    ids, positions, types = (rng.integers(0, n, t).astype(np.int32) for n in (11, 9, 2))
    ids[0], positions[0], types[0] = 10, 8, 1
    ln = LayerNorm(normal(rng, width), normal(rng, width), 1e-12)
    wide = EmbeddingTables(*(x.astype(float) for x in (tables.word, tables.position, tables.type)))
    wanted, _ = REFERENCE.embed_layernorm(ids, types, positions, wide, ln, Out())
    for out in (Out(), Out("int8", scale), Out("int8", "token")):
        full, fed = b.embed_layernorm(ids, types, positions, tables, ln, out)
        close(full, wanted)
        near(fed, full, out.scale) if out.scale else close(fed, wanted)


@every_level
@SOME
@given(tokens, widths, scale_of, seeds)
def test_quantize(level: str, t: int, width: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    x = normal(rng, t, width) * np.float32(10)
    x[0] = 0.0
    for out in (Out("int8", scale), Out("int8", "token")):
        near(b.quantize(x, out), x, out.scale)


@every_level
def test_quantize_rounds_half_to_even_and_saturates(level: str) -> None:
    halves = np.arange(-130, 131, 0.5, dtype=np.float32)[None]
    values = np.concatenate([halves, halves * np.float32(1e6)], axis=1)
    for start in (0, 1, 5):
        x = np.ascontiguousarray(values[:, start:])
        q = backend(level).quantize(x, Out("int8", 1.0)).data.astype(int) - 128
        np.testing.assert_array_equal(q, np.clip(np.rint(x), -127, 127).astype(int))


PRECISIONS = [(a, b) for a in ("fp32", "int8") for b in ("fp32", "int8")]


@every_level
@pytest.mark.parametrize("precisions", PRECISIONS, ids="-".join)
@SOME
@given(lengths, heads, st.booleans(), scale_of, seeds)
def test_attention(
    level: str,
    precisions: tuple[str, str],
    counts: list[int],
    shape: tuple[int, int],
    with_bias: bool,
    scale: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    b = backend(level)
    count, dim = shape
    scales = {"q": 3.5 / 127, "k": 3.5 / 127, "p": 1 / 127, "v": 3.5 / 127}
    qkv = off_edges(normal(rng, sum(counts), 3 * count * dim), 3.5 / 127)
    bias = normal(rng, count, 2 * (max(counts) + seed % 3) - 1) if with_bias else None
    args = {"position_bias": bias, "precisions": precisions, "scales": scales}
    wanted = REFERENCE.attention(
        qkv.astype(float), cu(counts), max(counts), count, **args, out=Out()
    )
    y = b.attention(qkv, cu(counts), max(counts), count, **args, out=Out())
    assert b.ran == precisions
    edges = context_error(qkv, cu(counts), count, precisions, scales, bias)
    largest = max(float(np.abs(wanted).max()), 1.0)
    assert (np.abs(y - wanted) <= edges + TOLERANCE * largest).all()
    fed = b.attention(qkv, cu(counts), max(counts), count, **args, out=Out("int8", scale))
    near(fed, y, scale)


@every_level
@SOME
@given(lengths, heads, seeds)
def test_attention_of_quantized_rows(
    level: str, counts: list[int], shape: tuple[int, int], seed: int
) -> None:
    """Q, K and V already in u8, as the gemm of a whole int8 layer writes them: the same result."""
    rng = np.random.default_rng(seed)
    b = backend(level)
    count, dim = shape
    width = count * dim
    qkv = normal(rng, sum(counts), 3 * width)
    scales = np.array([0.03, 0.02, 0.025], np.float32)
    steps = np.repeat(scales, width)
    u8 = (np.clip(np.rint(qkv / steps), -127, 127) + 128).astype(np.uint8)
    how = {"int8_scores": True, "int8_context": True, "p_scale": 1 / 127}
    how |= {f"{name}_scale": float(s) for name, s in zip("qkv", scales, strict=True)}
    got, wanted = np.empty((2, len(qkv), width), np.float32)
    b.level.attention(u8, cu(counts), count, **how, out_f=got)
    exact = (u8.astype(np.float32) - 128) * steps
    b.level.attention(exact, cu(counts), count, **how, out_f=wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@every_level
@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("int8", "int8")], ids="-".join)
@SOME
@given(lengths, heads, seeds)
def test_the_first_rows_alone(
    level: str, precisions: tuple[str, str], counts: list[int], shape: tuple[int, int], seed: int
) -> None:
    """`first_only` is the same rows of the whole, bit for bit."""
    rng = np.random.default_rng(seed)
    b = backend(level)
    qkv = normal(rng, sum(counts), 3 * shape[0] * shape[1])
    how = {f"int8_{n}": p == "int8" for n, p in zip(("scores", "context"), precisions, strict=True)}
    how |= {"q_scale": 0.03, "k_scale": 0.03, "p_scale": 1 / 127, "v_scale": 0.03}
    whole = np.empty((len(qkv), shape[0] * shape[1]), np.float32)
    first = np.empty((len(counts), shape[0] * shape[1]), np.float32)
    b.level.attention(qkv, cu(counts), shape[0], **how, out_f=whole)
    b.level.attention(qkv, cu(counts), shape[0], **how, first_only=True, out_f=first)
    np.testing.assert_array_equal(first, whole[cu(counts)[:-1]])


@every_level
def test_softmax_of_far_scores(level: str) -> None:
    """Scores of any size give probabilities: no overflow, no NaN, the largest wins."""
    b = backend(level)
    for size in (1e-30, 1.0, 30.0, 1e3, 1e15):
        qkv = np.zeros((5, 96), np.float32)
        qkv[:, 0] = size
        qkv[:, 32] = [1, 2, -3, 0, 1.5]
        qkv[:, 64] = [1, 2, 3, 4, 5]
        wanted = REFERENCE.attention(qkv.astype(float), cu([5]), 5, 1, out=Out())
        close(b.attention(qkv, cu([5]), 5, 1, out=Out()), wanted, 2e-5)


@every_level
@SOME
@given(lengths, widths, seeds)
def test_pool(level: str, counts: list[int], width: int, seed: int) -> None:
    b = backend(level)
    x = normal(np.random.default_rng(seed), sum(counts), width)
    for how in ("first", "mean"):
        wanted = REFERENCE.pool(x.astype(float), cu(counts), how)
        close(b.pool(x, cu(counts), how), wanted)


@every_level
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "tanh", "relu"])
def test_activations_everywhere(level: str, act: Any) -> None:
    """Over all magnitudes, through a gemm by one: absolute error against erf and tanh."""
    b = backend(level)
    x = np.concatenate([np.linspace(-12, 12, 20001), 10.0 ** np.arange(-38, 38, 0.5)])
    x = np.concatenate([x, -x]).astype(np.float32)[:, None]
    one = np.ones((1, 1), np.float32)
    zero = np.zeros(1, np.float32)
    y = b.gemm(x, b.pack(Weight(one), "fp32"), zero, act=act, out=Out())
    with np.errstate(over="ignore"):
        wanted = REFERENCE.gemm(
            x.astype(float), REFERENCE.pack(Weight(one), "fp32"), zero, act=act, out=Out()
        )
    error = np.abs(y - wanted) / np.maximum(np.abs(wanted), 1.0)
    assert np.isfinite(y).all()
    assert error.max() <= 2e-6


# levels


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_levels_are_listed_best_first() -> None:
    from samp_kernels.cpu import _native

    states = _native.levels()
    assert tuple(states) == LEVELS
    assert set(states.values()) <= {"runs", "not on this CPU", "not built"}
    assert states["portable"] == "runs"
    best = next(name for name, state in states.items() if state == "runs")
    assert _native.find_level().name == best
    for name, state in states.items():
        if state == "runs":
            assert _native.find_level(name).name == name
        else:
            with pytest.raises(ValueError, match=f"{name}; this build runs here: .*portable"):
                _native.find_level(name)


def test_an_unknown_level_names_those_that_run() -> None:
    backend("portable")
    from samp_kernels.cpu.backend import CpuBackend

    with pytest.raises(KernelError, match=r"cpu: got SAMP_CPU_LEVEL sse9; allowed: .*portable"):
        CpuBackend(level="sse9")
