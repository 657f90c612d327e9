"""What every backend refuses, in words that name the op, what came and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bert import backend
from close import BACKENDS, able, needs, quantized
from samp_kernels import onednn
from samp_kernels.interface import (
    CODES,
    Array,
    EmbeddingTables,
    KernelError,
    LayerNorm,
    Out,
    QTensor,
    UnsupportedPrecision,
    Weight,
    pack_batch,
)

every_backend = pytest.mark.parametrize("name", BACKENDS)
UNKNOWN_OUTPUTS = [
    *(Out("fp16"), Out("bf16"), Out("e4m3", 1.0), Out("int8")),
    *(Out("int8", scale) for scale in (0.0, -1.0, math.nan)),
]


def cu(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


@every_backend
@pytest.mark.parametrize("counts", [[], [3, 0, 2]])
def test_an_empty_row_is_refused(name: str, counts: list[int]) -> None:
    with pytest.raises(KernelError, match=r"pack_batch: got lengths \[.*\]; allowed: one row"):
        pack_batch([np.zeros(n) for n in counts], [np.zeros(n) for n in counts])


def call_gemm(name: str, kind: str = "fp32", **wrong: Any) -> Any:
    """A gemm [3, 8] x [5, 8] of zeros, with one thing wrong."""
    b = backend(name)
    x: Any = b.array(np.zeros((3, 8)))
    weight = Weight(np.zeros((5, 8), np.float32))
    if kind == "int8":
        needs(name, "int8")
        x = quantized(name, np.zeros((3, 8), np.int64), 1.0)
        weight = Weight(np.zeros((5, 8), np.int8), np.ones(5, np.float32))
    args: dict[str, Any] = {"x": x, "bias": b.array(np.zeros(5)), "out": Out(), **wrong}
    return b.gemm(packed=b.pack(weight, kind), **args)


@every_backend
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_gemm_refuses(name: str, kind: str) -> None:
    array = backend(name).array
    assert tuple(call_gemm(name, kind).shape) == (3, 5)
    wide = array(np.zeros((3, 7)))
    if kind == "int8":
        wide = quantized(name, np.zeros((3, 7), np.int64), 1.0)
    other = array(np.zeros((3, 8)))
    if kind == "fp32":
        needs(name, "int8")
        other = quantized(name, np.zeros((3, 8), np.int64), 1.0)
    for wrong, message in (
        ({"x": wide}, r"gemm: got x \[3, 7\]; allowed: x \[tokens, 8\]"),
        ({"x": other}, r"gemm: got .*; allowed: "),
        ({"bias": array(np.zeros(4))}, r"gemm: got bias \[4\]; allowed: bias \[5\]"),
        (
            {"residual": array(np.zeros((1, 5)))},
            r"gemm: got residual \[1, 5\]; allowed: residual \[3, 5\]",
        ),
        (
            {"residual": array(np.zeros((4, 5)))},
            r"gemm: got residual \[4, 5\]; allowed: residual \[3, 5\]",
        ),
        ({"act": "silu"}, r"gemm: got activation 'silu'; allowed: gelu, gelu_tanh, tanh, relu"),
    ):
        with pytest.raises(KernelError, match=message):
            call_gemm(name, kind, **wrong)


@every_backend
def test_gemm_refuses_another_storage(name: str) -> None:
    needs(name, "int8")
    data: Any = np.zeros((3, 8), np.uint8 if name == "reference" else np.int8)
    if name == "onednn":
        data = torch.from_numpy(data)
    with pytest.raises(KernelError, match=r"gemm: got .*int8 activations; allowed: u?int8"):
        call_gemm(name, "int8", x=QTensor(data, 1.0, (3, 8)))


def test_onednn_refuses_what_it_cannot_fuse() -> None:
    array = backend("onednn").array
    with pytest.raises(KernelError, match=r"gemm: got torch.float64 activations; allowed: float32"):
        call_gemm("onednn", x=torch.zeros(3, 8, dtype=torch.float64))
    with pytest.raises(KernelError, match="gemm: got residual with act gelu"):
        call_gemm("onednn", act="gelu", residual=array(np.zeros((3, 5))))
    with pytest.raises(KernelError, match="gemm: got residual with act None, int8; allowed"):
        call_gemm("onednn", "int8", residual=array(np.zeros((3, 5))), out=Out("int8", 1.0))


@every_backend
@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("out", UNKNOWN_OUTPUTS, ids=str)
def test_an_unknown_output_is_refused(name: str, kind: str, out: Out) -> None:
    with pytest.raises(UnsupportedPrecision, match=r"quantize: got Out\(.*\); allowed: "):
        call_gemm(name, kind, out=out)


@every_backend
@pytest.mark.parametrize("bounds", [[0, 2, 8], [0, 4, 2, 6], [0, 0, 6], [1, 6]])
def test_attention_refuses_bounds(name: str, bounds: list[int]) -> None:
    b = backend(name)
    qkv = b.array(np.zeros((6, 24)))
    with pytest.raises(KernelError, match=r"attention: got cu_seqlens .*; allowed: rising"):
        b.attention(qkv, np.array(bounds, np.int32), 6, 2, out=Out())
    assert tuple(b.attention(qkv, cu([2, 4]), 4, 2, out=Out()).shape) == (6, 8)


@every_backend
def test_attention_refuses(name: str) -> None:
    b = backend(name)
    qkv = b.array(np.zeros((6, 24)))
    with pytest.raises(KernelError, match=r"attention: got qkv \[6, 24\], 3 heads"):
        b.attention(qkv, cu([6]), 6, 3, out=Out())
    with pytest.raises(UnsupportedPrecision, match=r"attention: got .*fp16.*; allowed: .*fp32"):
        b.attention(qkv, cu([6]), 6, 2, precisions=("fp16", "fp32"), out=Out())


def test_attention_needs_its_scales() -> None:
    b, x, mixed = backend("reference"), np.zeros((6, 24)), ("fp32", "int8")
    with pytest.raises(KernelError, match=r"attention: got int8 with scales .*; allowed: scales p"):
        b.attention(x, cu([6]), 6, 2, precisions=mixed, scales={"p": 1.0}, out=Out())


@every_backend
@pytest.mark.parametrize("which", ["ids", "types", "positions"])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_embed_refuses_an_index_outside(name: str, which: str, wrong: int) -> None:
    b = backend(name)
    tables = EmbeddingTables(*(b.array(np.zeros((4, 8))) for _ in range(3)))
    ln = LayerNorm(b.array(np.ones(8)), b.array(np.zeros(8)), 1e-12)
    indices = {key: np.array([0, 3], np.int32) for key in ("ids", "types", "positions")}
    b.embed_layernorm(**indices, tables=tables, ln=ln, out=Out())
    indices[which] = np.array([0, wrong], np.int32)
    with pytest.raises(
        KernelError, match=rf"embed_layernorm: got {which} from .*; allowed: 0 to 3"
    ):
        b.embed_layernorm(**indices, tables=tables, ln=ln, out=Out())


@every_backend
def test_pack_refuses(name: str) -> None:
    b = backend(name)
    real = Weight(np.zeros((5, 8), np.float32))
    for weight, precision in (
        (real, "fp16"),
        (real, "int8"),
        (Weight(np.zeros((5, 8), np.int8), np.ones(5, np.float32)), "fp32"),
    ):
        with pytest.raises(KernelError, match=f"pack: got {precision}.*; allowed: "):
            b.pack(weight, precision)


# capabilities


@every_backend
def test_capabilities_run(name: str) -> None:
    """What a backend says it has runs, and runs in that precision."""
    b = backend(name)
    x = np.random.default_rng(0).standard_normal((4, 24))
    for op, precision, activation in able(name):
        if op.startswith("attention."):
            part = ("scores", "context").index(op.removeprefix("attention."))
            pair = ["fp32", "fp32"]
            pair[part] = precision
            both: Any = {"precisions": tuple(pair), "scales": dict.fromkeys("qkpv", 0.1)}
            b.attention(b.array(x), cu([4]), 4, 2, **both, out=Out())
            assert b.ran[part] == precision
        elif precision == "residual":
            y = call_gemm(name, residual=b.array(np.ones((3, 5))))
            assert np.array_equal(b.to_host(y), np.ones((3, 5)))
        elif precision == "outliers":
            columns = np.array([2], np.int32), np.full((5, 1), 0.5, np.float32)
            weight = Weight(np.zeros((5, 24), np.int8), np.ones(5, np.float32), *columns)
            q = b.quantize(b.array(x), Out("int8", 0.1, keep=(2,)))
            y = b.gemm(q, b.pack(weight, "int8"), b.array(np.zeros(5)), out=Out())
            assert np.allclose(b.to_host(y), 0.5 * x[:, [2]], atol=1e-6)
        else:
            assert op == "gemm"
            weight = Weight(np.ones((5, 24), np.float32))
            feed = Out()
            if precision in CODES:
                codes = np.full((5, 24), 1, CODES[precision])
                weight = Weight(codes, np.ones(5, np.float32))
                feed = Out(precision, 0.1 if activation == "static" else "token")
            packed = b.pack(weight, precision)
            b.gemm(b.quantize(b.array(x), feed), packed, b.array(np.zeros(5)), out=Out())
            assert b.ran == (precision,)


def test_onednn_has_no_int8_attention_and_no_token_scales() -> None:
    kinds = {c for c in able("onednn") if c[0].startswith("attention") or c[2] == "token"}
    assert {c[1:] for c in kinds} == {("fp32", "")}
    with pytest.raises(UnsupportedPrecision, match="got int8 and fp32; allowed: fp32 and fp32"):
        backend("onednn").attention(
            torch.zeros(2, 24), cu([2]), 2, 1, precisions=("int8", "fp32"), out=Out()
        )
    with pytest.raises(UnsupportedPrecision, match="static scale"):
        backend("onednn").quantize(torch.zeros(2, 4), Out("int8", "token"))


def test_without_vnni_there_is_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, pairs of u8 x s8 products saturate in 16 bits."""
    monkeypatch.setattr(onednn, "_VNNI", False)
    assert not [c for c in able("onednn") if "int8" in c]
    weight = Weight(np.zeros((5, 8), np.int8), np.ones(5, np.float32))
    with pytest.raises(UnsupportedPrecision, match="int8 on a CPU without VNNI; allowed: fp32"):
        backend("onednn").pack(weight, "int8")
