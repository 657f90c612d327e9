"""Arrays that end at a locked page, or begin behind one: an op that reads or writes beyond dies.

Shapes that do not fit are refused before anything runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native import backend, both, cu, every_level, locked, normal
from samp_kernels.cpu import missing
from samp_kernels.interface import Array, KernelError, LayerNorm, Out, QTensor, Weight

RNG = np.random.default_rng(0)
ends = pytest.mark.parametrize("end", [True, False], ids=["end", "begin"])
SIZES = [(1, 1, 1), (1, 4, 5), (3, 7, 17), (5, 16, 31), (12, 64, 64), (13, 36, 33), (25, 312, 100)]


def u8(*shape: int) -> Array:
    return RNG.integers(1, 256, shape).astype(np.uint8)


def test_a_locked_page_ends_the_process() -> None:
    """So that these tests see anything at all."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    here = Path(__file__).parent

    code = (
        "import sys\nsys.path.append('..')\n"
        "from native import locked\nimport numpy as np\nx = locked(np.zeros({n}, np.uint8){more})\n"
        "import ctypes\nprint(x.sum())\nctypes.string_at(x.ctypes.data + {at}, 1)\nprint('alive')"
    )
    for more, at in (("", 7), (", end=False", -1)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(n=7, more=more, at=at)],
            cwd=here, env={**os.environ, "PYTHONPATH": str(here.parent)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert done.stdout == "0\n"


@every_level
@ends
@pytest.mark.parametrize("size", SIZES)
def test_gemm(level: str, end: bool, size: tuple[int, int, int]) -> None:
    rows, inputs, outputs = size
    b = backend(level)

    def at(x: Array) -> Array:
        return locked(x, end=end)

    for int8 in (False, True):
        if int8:
            w = RNG.integers(-127, 128, (outputs, inputs)).astype(np.int8)
            packed = b.pack(Weight(at(w), at(np.full(outputs, 0.01, np.float32))), "int8")
            x, more = at(u8(rows, inputs)), {"col_scale": at(np.ones(outputs, np.float32))}
            more["row_scale"] = at(np.ones(rows, np.float32))
        else:
            packed = b.pack(Weight(at(normal(RNG, outputs, inputs))), "fp32")
            x, more = at(normal(RNG, rows, inputs)), {}
        more["side_x"] = at(normal(RNG, rows, 3))
        more["side_w"] = at(normal(RNG, 3, outputs))
        out_f, out_q = at(np.zeros((rows, outputs), np.float32)), at(u8(rows, outputs))
        common: dict[str, Any] = {
            "bias": at(normal(RNG, outputs)),
            "residual": at(normal(RNG, rows, outputs)),
            "out_f": out_f,
            "out_q": out_q,
            "inv_scale": 10.0,
            "act": 1,
        }
        b.level.gemm(x, packed.native, **more, **common)
        copies = {
            name: np.array(value) if isinstance(value, np.ndarray) else value
            for name, value in {**more, **common}.items()
        }
        b.level.gemm(np.array(x), packed.native, **copies)
        if int8:
            sums = at(np.zeros((rows, outputs), np.int32))
            b.level.sums(x, packed.native, sums)
        np.testing.assert_array_equal(out_f, copies["out_f"])
        np.testing.assert_array_equal(out_q, copies["out_q"])


@every_level
@ends
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 33), (2, 312), (5, 65)])
def test_rows(level: str, end: bool, size: tuple[int, int]) -> None:
    rows, width = size
    b = backend(level)

    def at(x: Array) -> Array:
        return locked(x, end=end)

    gamma, beta = at(normal(RNG, width)), at(normal(RNG, width))
    x, rest = at(normal(RNG, rows, width)), at(normal(RNG, rows, width))
    for token in (None, at(np.zeros(rows, np.float32))):
        out_f, out_q = at(np.zeros((rows, width), np.float32)), at(u8(rows, width))
        how = {"out_f": out_f, "out_q": out_q, "inv_scale": 10.0, "token_scale": token}
        b.level.add_layernorm(x, rest, gamma, beta, 1e-5, **how)
        b.level.add_layernorm(x, None, gamma, beta, 1e-5, **how)
        index = at(np.arange(rows, dtype=np.int32))
        b.level.embed(index, index, index, x, rest, x, gamma, beta, 1e-5, **how)
        b.level.quantize(x, out_q, 10.0, token)
    b.level.mean(x, at(cu([rows])), at(np.zeros((1, width), np.float32)))


@every_level
@ends
@pytest.mark.parametrize("counts", [[1], [2, 1], [17], [5, 33, 4]])
@pytest.mark.parametrize("shape", [(1, 32), (2, 64), (3, 8), (12, 26)])
def test_attention(level: str, end: bool, counts: list[int], shape: tuple[int, int]) -> None:
    b = backend(level)
    (heads, dim), rows = shape, sum(counts)

    def at(x: Array) -> Array:
        return locked(x, end=end)

    scales = {"q_scale": 0.03, "k_scale": 0.03, "p_scale": 1 / 127, "v_scale": 0.03}
    bias = at(normal(RNG, heads, 2 * max(counts) - 1))
    for qkv in (at(normal(RNG, rows, 3 * heads * dim)), at(u8(rows, 3 * heads * dim))):
        for scores in (False, True):
            for context in (False, True):
                if qkv.dtype == np.uint8 and not (scores and context):
                    continue
                for first in (False, True):
                    out = (len(counts) if first else rows, heads * dim)
                    b.level.attention(
                        qkv,
                        at(cu(counts)),
                        heads,
                        bias,
                        scores,
                        context,
                        **scales,
                        first_only=first,
                        out_f=at(np.zeros(out, np.float32)),
                        out_q=at(u8(*out)),
                    )


def ops(b: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Calls of every native op that are right: arguments of which one at a time is made wrong."""
    w, q = b.pack(Weight(normal(RNG, 6, 8)), "fp32").native, u8(3, 8)
    w8 = b.pack(Weight(np.ones((6, 8), np.int8), np.ones(6, np.float32)), "int8").native
    index = np.zeros(3, np.int32)
    tables = {"word": normal(RNG, 4, 8), "position": normal(RNG, 4, 8), "type": normal(RNG, 4, 8)}
    norm = {"gamma": normal(RNG, 8), "beta": normal(RNG, 8), "eps": 1e-5}
    outputs = {"out_f": normal(RNG, 3, 6), "out_q": u8(3, 6)}
    chain = {"bias": normal(RNG, 6), "residual": normal(RNG, 3, 6), **outputs}
    chain |= {"side_x": normal(RNG, 3, 2), "side_w": normal(RNG, 2, 6)}
    wide = {"out_f": normal(RNG, 3, 8), "out_q": u8(3, 8), "token_scale": normal(RNG, 3)}
    scales = {"col_scale": normal(RNG, 6), "row_scale": normal(RNG, 3)}
    level = b.level
    return {
        "gemm_f32": (level.gemm, {"x": normal(RNG, 3, 8), "packed": w, **chain}),
        "gemm_int8": (level.gemm, {"x": q, "packed": w8, **scales, **chain}),
        "sums": (level.sums, {"x": q, "packed": w8, "out": np.zeros((3, 6), np.int32)}),
        "layernorm": (
            level.add_layernorm,
            {"x": normal(RNG, 3, 8), "residual": normal(RNG, 3, 8), **norm, **wide},
        ),
        "embed": (
            level.embed,
            {"ids": index, "types": index, "positions": index, **tables, **norm, **wide},
        ),
        "quantize": (
            level.quantize,
            {"x": normal(RNG, 3, 8), "out_q": u8(3, 8), "token_scale": normal(RNG, 3)},
        ),
        "attention": (
            level.attention,
            {
                "qkv": normal(RNG, 3, 24),
                "cu_seqlens": cu([1, 2]),
                "heads": 2,
                "position_bias": normal(RNG, 2, 3),
                "out_f": normal(RNG, 3, 8),
                "out_q": u8(3, 8),
            },
        ),
        "mean": (
            level.mean,
            {"x": normal(RNG, 3, 8), "cu_seqlens": cu([1, 2]), "out": normal(RNG, 2, 8)},
        ),
    }


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize(
    "op",
    ["gemm_f32", "gemm_int8", "sums", "layernorm", "embed", "quantize", "attention", "mean"],
)
def test_every_argument_is_checked(op: str) -> None:
    """Each array one shorter in each dimension, of another type, and with gaps in its rows."""
    call, arguments = ops(backend("portable"))[op]
    call(**arguments)
    for name, x in arguments.items():
        if not isinstance(x, np.ndarray):
            continue
        wrong = [x.astype(np.float64), x[None]]
        if x.size > 1:
            wrong += [np.repeat(x, 2, axis=-1)[..., ::2], x[..., ::-1]]
        if name not in ("x", "word", "qkv"):  # They say what the other shapes must be.
            axes = (1,) if name in ("position", "type") else range(x.ndim)
            wrong += [np.ascontiguousarray(np.delete(x, 0, axis)) for axis in axes]
        if name.startswith("out") or name == "token_scale":
            fixed = x.copy()
            fixed.flags.writeable = False
            wrong.append(fixed)
        for bad in wrong:
            with pytest.raises((ValueError, TypeError)):
                call(**{**arguments, name: bad})


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_indices_and_bounds_are_checked() -> None:
    calls = ops(backend("portable"))
    embed, arguments = calls["embed"]
    for name in ("ids", "types", "positions"):
        for value in (-1, 4, 2**31 - 1, -(2**31)):
            with pytest.raises(ValueError, match="within its table"):
                embed(**{**arguments, name: np.array([0, value, 0], np.int32)})
    for op in ("attention", "mean"):
        call, arguments = calls[op]
        for bounds in ([0, 2, 4], [1, 3], [0, 2, 1], [0, 0, 3], [0], [0, -1, 3], [0, 2**31 - 1]):
            with pytest.raises(ValueError):
                call(**{**arguments, "cu_seqlens": np.array(bounds, np.int32)})
    call, arguments = calls["attention"]
    for wrong in (
        {"heads": 0},
        {"heads": 3},
        {"heads": -1},
        {"position_bias": normal(RNG, 2, 1)},
        {"position_bias": normal(RNG, 2, 4)},
        {"position_bias": normal(RNG, 3, 3)},
    ):
        with pytest.raises(ValueError):
            call(**{**arguments, **wrong})
    u8_rows = {**arguments, "qkv": u8(3, 24)}
    with pytest.raises(ValueError, match="int8 scores and context"):
        call(**{**u8_rows, "int8_scores": True})
    for act in (-1, 5):
        with pytest.raises(ValueError):
            calls["gemm_f32"][0](**{**calls["gemm_f32"][1], "act": act})


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_weight_of_another_level_is_refused() -> None:
    from samp_kernels.cpu import _native

    names = [name for name, state in _native.levels().items() if state == "runs"]
    if len(names) < 2:
        pytest.skip("this CPU runs one level")
    packed = backend(names[0]).pack(Weight(np.ones((4, 4), np.float32)), "fp32")
    with pytest.raises(ValueError, match="packed at this level"):
        backend(names[1]).gemm(
            np.ones((1, 4), np.float32), packed, np.zeros(4, np.float32), out=Out()
        )


@every_level
def test_no_rows(level: str) -> None:
    b = backend(level)
    x, q = np.zeros((0, 8), np.float32), both(np.zeros((0, 8), np.int64), 1.0)[0]
    bias = np.zeros(4, np.float32)
    weights = Weight(np.ones((4, 8), np.int8), np.ones(4, np.float32))
    assert b.gemm(q, b.pack(weights, "int8"), bias, out=Out()).shape == (0, 4)
    assert b.gemm(x, b.pack(Weight(np.ones((4, 8))), "fp32"), bias, out=Out()).shape == (0, 4)
    assert b.quantize(x, Out("int8", "token")).data.shape == (0, 8)
    ln = LayerNorm(np.ones(8, np.float32), np.zeros(8, np.float32), 1e-12)
    assert b.add_layernorm(x, ln, out=Out())[0].shape == (0, 8)


@every_level
def test_rows_at_any_distance(level: str) -> None:
    """Views: rows with gaps between them are read where they lie, others are copied."""
    b = backend(level)
    whole = normal(RNG, 6, 40)
    w, bias = b.pack(Weight(normal(RNG, 5, 16)), "fp32"), normal(RNG, 5)
    for view in (whole[:, 8:24], whole[::2, :16], whole[:, ::2][:, :16], whole.T[:16, :6].T):
        y = b.gemm(view, w, bias, out=Out())
        np.testing.assert_array_equal(y, b.gemm(np.ascontiguousarray(view), w, bias, out=Out()))
    q = u8(6, 40)
    w8 = b.pack(Weight(np.ones((5, 14), np.int8), np.ones(5, np.float32)), "int8")
    view = q[:, 3:17]
    y = b.gemm(QTensor(view, 1.0, view.shape), w8, bias, out=Out())
    dense = QTensor(view.copy(), 1.0, view.shape)
    np.testing.assert_array_equal(y, b.gemm(dense, w8, bias, out=Out()))


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_what_is_no_float32_is_refused() -> None:
    b = backend("portable")
    ln = LayerNorm(np.ones(4, np.float32), np.zeros(4, np.float32), 1e-12)
    wrong = np.zeros((2, 4))
    w = b.pack(Weight(np.ones((4, 4))), "fp32")
    bias = np.zeros(4, np.float32)
    for call in (
        lambda: b.gemm(wrong, w, bias, out=Out()),
        lambda: b.gemm(wrong.astype(np.float32), w, bias, residual=wrong, out=Out()),
        lambda: b.add_layernorm(wrong, ln, out=Out()),
        lambda: b.add_layernorm(wrong.astype(np.float32), ln, residual=wrong, out=Out()),
        lambda: b.quantize(wrong, Out("int8", 1.0)),
        lambda: b.attention(np.zeros((2, 12)), cu([2]), 2, 1, out=Out()),
        lambda: b.pool(wrong, cu([2]), "mean"),
    ):
        with pytest.raises(KernelError, match=r"float64 .*; allowed: float32"):
            call()
