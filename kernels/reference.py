"""The ops in float64 NumPy: the oracle of every test. Slow, plain, and the definition.

Quantization: q = clip(rint(x / s), -127, 127), rint being round half to even, or with fp8 the
nearest E4M3 number to x / s, ties to the even one, at most 448; value = s * q. Integer products are
summed in int64, so that they are exact for any size, those of E4M3 in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from samp_kernels.e4m3 import E4M3, to_e4m3
from samp_kernels.interface import (
    CODES,
    LARGEST,
    Activation,
    Array,
    EmbeddingTables,
    KernelError,
    LayerNorm,
    Out,
    QTensor,
    UnsupportedPrecision,
    Weight,
    check_attention,
    check_embedding,
    check_gemm,
    check_kept,
    check_weight,
)

try:
    from scipy.special import erf
except ModuleNotFoundError:  # The same function, a number at a time.
    erf = np.vectorize(math.erf, otypes=[float])

_PRECISIONS = ("fp32", "int8")


class ReferenceBackend:
    """Every site in fp32 or int8, GEMMs in fp8 too; also per-token activation scales."""

    name = "reference"

    def __init__(self) -> None:
        self.ran: tuple[str, ...] = ()

    def capabilities(self) -> frozenset[tuple[str, str, str]]:
        quantized = {("gemm", p, how) for p in CODES for how in ("static", "token")}
        kinds = (("fp32", ""), ("int8", "static"))
        attention = {(f"attention.{s}", *kind) for s in ("scores", "context") for kind in kinds}
        base = {("gemm", "fp32", ""), ("gemm", "residual", ""), ("gemm", "outliers", "")}
        return frozenset(base | quantized | attention)

    def array(self, x: Array) -> Array:
        return np.asarray(x, dtype=np.float64)

    def pack(self, weight: Weight, precision: str) -> Weight:
        check_weight(weight, precision, ("fp32", *CODES))
        if weight.scale is None:
            return Weight(weight.data.astype(np.float64))
        if precision == "fp8":
            return replace(weight, data=E4M3[weight.data].astype(np.float64))
        return replace(weight, data=weight.data.astype(np.int64))

    def embed_layernorm(
        self,
        ids: Array,
        types: Array,
        positions: Array,
        tables: EmbeddingTables,
        ln: LayerNorm,
        out: Out,
    ) -> tuple[Array, Any]:
        check_embedding(ids, types, positions, tables)
        x = tables.word[ids] + tables.position[positions] + tables.type[types]
        return self.add_layernorm(x, ln, out=out)

    def gemm(
        self,
        x: Any,
        packed: Weight,
        bias: Any,
        *,
        act: Activation | None = None,
        residual: Any = None,
        out: Out,
    ) -> Any:
        check_gemm(x, packed.data.shape, bias, act, residual)
        _check_kinds(x, packed)
        if isinstance(x, QTensor):
            assert packed.scale is not None
            codes = E4M3[x.data].astype(np.float64) if _is_fp8(x) else x.data.astype(np.int64)
            sums = codes @ packed.data.T
            scale = np.asarray(x.scale, dtype=np.float64)
            rows = scale[:, None] if scale.ndim == 1 else scale
            y = sums.astype(np.float64) * rows * packed.scale.astype(np.float64)
            check_kept(x, 0 if packed.outliers is None else len(packed.outliers))
            if x.kept is not None:
                assert packed.outlier_weight is not None
                y = y + x.kept @ packed.outlier_weight.astype(np.float64).T
            self.ran = ("fp8" if _is_fp8(x) else "int8",)
        else:
            y = x @ packed.data.T
            self.ran = ("fp32",)
        y = activation(y + bias, act)
        if residual is not None:
            y = y + residual
        return self.quantize(y, out)

    def attention(
        self,
        qkv: Any,
        cu_seqlens: Array,
        max_seqlen: int,
        heads: int,
        *,
        position_bias: Any = None,
        precisions: tuple[str, str] = ("fp32", "fp32"),
        scales: Mapping[str, float] | None = None,
        out: Out,
    ) -> Any:
        for precision in precisions:
            _require("attention", precision)
        check_attention(qkv, cu_seqlens, heads, position_bias)
        tokens, width = qkv.shape
        hidden = width // 3
        dim = hidden // heads
        result = np.zeros((tokens, hidden))
        for begin, end in itertools.pairwise(cu_seqlens):
            length = int(end - begin)
            q, k, v = qkv[begin:end].reshape(length, 3, heads, dim).transpose(1, 2, 0, 3)
            scores = _product(q, k.transpose(0, 2, 1), precisions[0], scales, "q", "k")
            scores = scores / np.sqrt(dim)
            if position_bias is not None:
                place = np.arange(length)
                middle = position_bias.shape[1] // 2
                scores = scores + position_bias[:, middle + place[None] - place[:, None]]
            p = softmax(scores)
            context = _product(p, v, precisions[1], scales, "p", "v")
            result[begin:end] = context.transpose(1, 0, 2).reshape(length, hidden)
        self.ran = precisions
        return self.quantize(result, out)

    def add_layernorm(
        self, x: Any, ln: LayerNorm, *, residual: Any = None, out: Out
    ) -> tuple[Array, Any]:
        y = x if residual is None else x + residual
        mean = y.mean(axis=-1, keepdims=True)
        variance = np.square(y - mean).mean(axis=-1, keepdims=True)
        y = (y - mean) / np.sqrt(variance + ln.eps) * ln.gamma + ln.beta
        return y, self.quantize(y, out)

    def quantize(self, x: Any, out: Out) -> Any:
        if out.dtype == "fp32":
            return x
        if out.dtype not in CODES or out.scale is None:
            raise UnsupportedPrecision("quantize", f"{out}", "fp32, or int8 or fp8 with a scale")
        rounded = to_e4m3 if out.dtype == "fp8" else _round_clip
        if out.scale == "token":
            if out.keep:
                raise UnsupportedPrecision("quantize", f"{out}", "keep with a static scale")
            scale = np.maximum(np.abs(x).max(axis=-1), 1e-30) / LARGEST[out.dtype]
            return QTensor(rounded(x / scale[:, None]), scale, x.shape)
        if not out.scale > 0.0:
            raise UnsupportedPrecision("quantize", f"{out}", "a scale > 0")
        kept = x[:, list(out.keep)] if out.keep else None
        return QTensor(rounded(x / float(out.scale)), float(out.scale), x.shape, kept)

    def pool(self, x: Any, cu_seqlens: Array, how: Literal["first", "mean"]) -> Array:
        if how == "first":
            return np.asarray(x[cu_seqlens[:-1]])
        lengths = np.diff(cu_seqlens)
        return np.asarray(
            np.add.reduceat(x[: cu_seqlens[-1]], cu_seqlens[:-1], axis=0) / lengths[:, None]
        )

    def to_host(self, x: Any) -> Array:
        return np.asarray(x)


def activation(x: Array, act: Activation | None) -> Array:
    """GELU exact (erf) and in its tanh form (Hendrycks and Gimpel, 2016), tanh, ReLU."""
    if act is None:
        return x
    if act == "gelu":
        return np.asarray(0.5 * x * (1.0 + erf(x / np.sqrt(2.0))))
    if act == "gelu_tanh":
        inner = np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)
        return np.asarray(0.5 * x * (1.0 + np.tanh(inner)))
    return np.asarray(np.tanh(x) if act == "tanh" else np.maximum(x, 0.0))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _round_clip(x: Array) -> Array:
    return np.clip(np.rint(x), -127, 127).astype(np.int8)


def _product(
    a: Array, b: Array, precision: str, scales: Mapping[str, float] | None, a_name: str, b_name: str
) -> Array:
    if precision == "fp32":
        return np.asarray(a @ b)
    if scales is None or a_name not in scales or b_name not in scales:
        raise KernelError("attention", f"int8 with scales {scales}", f"scales {a_name}, {b_name}")
    sums = _round_clip(a / scales[a_name]).astype(np.int64) @ _round_clip(
        b / scales[b_name]
    ).astype(np.int64)
    return sums.astype(np.float64) * (scales[a_name] * scales[b_name])


def _require(op: str, precision: str) -> None:
    if precision not in _PRECISIONS:
        raise UnsupportedPrecision(op, precision, ", ".join(_PRECISIONS))


def _is_fp8(x: QTensor) -> bool:
    return bool(x.data.dtype == CODES["fp8"])


def _check_kinds(x: Any, packed: Weight) -> None:
    quantized = isinstance(x, QTensor)
    if quantized != (packed.scale is not None):
        got = "quantized activations" if quantized else "float activations"
        raise KernelError("gemm", f"{got} for {packed.data.dtype} weights", "the same kind of both")
    # Packed weights are int64, or the values of e4m3.
    wanted = CODES["fp8"] if packed.data.dtype == np.float64 else CODES["int8"]
    if quantized and x.data.dtype != wanted:
        allowed = f"{np.dtype(wanted)}, as the weights"
        raise KernelError("gemm", f"{x.data.dtype} activations", allowed)
