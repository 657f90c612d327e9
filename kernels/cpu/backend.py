"""The native CPU backend, one op at a time. Arrays are NumPy's.

int8 activations are u8 with zero point 128; weights are packed once, for the dispatch level that
this CPU runs (SAMP_CPU_LEVEL names another). Every int8 sum is exact at every level. A call of an
op runs on one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from samp_kernels.cpu import _native
from samp_kernels.cpu.session import NativeSession
from samp_kernels.interface import (
    ACTIVATIONS,
    F32,
    I32,
    Activation,
    Array,
    EmbeddingTables,
    EncoderConfig,
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

ZERO_POINT = 128
_ACTS: dict[str | None, int] = {None: 0, **{act: i + 1 for i, act in enumerate(ACTIVATIONS)}}


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[out, in]` as the kernels read it; int8: its scales, and its outlier split."""

    native: _native.Packed
    shape: tuple[int, ...]
    scale: F32 | None = None
    outliers: I32 | None = None
    side: F32 | None = None
    """`outlier_weight` transposed, [k, out]."""


class _Ran(threading.local):
    """What the last op of this thread ran: ops of several batches may run side by side."""

    ran: tuple[str, ...] = ()


class CpuBackend:
    """Every site in fp32 or int8, per-token scales, the outlier split."""

    name = "cpu"

    def __init__(self, threads: int | None = None, level: str = "") -> None:
        try:
            self.level = _native.find_level(level) if level else _native.current_level()
        except ValueError as error:
            got, _, allowed = str(error).partition("; ")
            raise KernelError("cpu", got, allowed) from None
        self.threads = threads
        self._last = _Ran()

    @property
    def ran(self) -> tuple[str, ...]:
        return self._last.ran

    @ran.setter
    def ran(self, ran: tuple[str, ...]) -> None:
        self._last.ran = ran

    def capabilities(self) -> frozenset[tuple[str, str, str]]:
        base = {("gemm", "fp32", ""), ("gemm", "residual", ""), ("gemm", "outliers", "")}
        quantized = {("gemm", "int8", "static"), ("gemm", "int8", "token")}
        kinds = (("fp32", ""), ("int8", "static"))
        attention = {(f"attention.{s}", *kind) for s in ("scores", "context") for kind in kinds}
        return frozenset(base | quantized | attention)

    def prepare(
        self,
        config: EncoderConfig,
        tensors: Mapping[str, Array],
        plan: Any,
        *,
        max_tokens: int | None = None,
        threads: int | None = None,
        packs: dict[tuple[str, str, str], Any] | None = None,
    ) -> NativeSession:
        """One native call a pass. Buffers grow with the largest batch met: `max_tokens` is not
        needed. `threads` wins over the backend's; default: the cores that this process may use."""
        count = threads or self.threads or len(os.sched_getaffinity(0))
        return NativeSession(self, config, tensors, plan, threads=count, packs=packs)

    def array(self, x: Array) -> F32:
        return np.ascontiguousarray(x, dtype=np.float32)

    def pack(self, weight: Weight, precision: str) -> PackedWeight:
        check_weight(weight, precision)
        shape = weight.data.shape
        if weight.scale is None:
            return PackedWeight(_native.Packed(self.array(weight.data), self.level), shape)
        data = np.ascontiguousarray(weight.data, dtype=np.int8)
        side = None
        if weight.outlier_weight is not None:
            side = self.array(weight.outlier_weight.T)
        packed = _native.Packed(data, self.level)
        return PackedWeight(packed, shape, self.array(weight.scale), weight.outliers, side)

    def embed_layernorm(
        self,
        ids: I32,
        types: I32,
        positions: I32,
        tables: EmbeddingTables,
        ln: LayerNorm,
        out: Out,
    ) -> tuple[F32, Any]:
        check_embedding(ids, types, positions, tables)
        shape = (len(ids), tables.word.shape[1])
        to = _Result(out, shape, token=True, full=True)
        self.level.embed(
            _indices(ids),
            _indices(types),
            _indices(positions),
            tables.word,
            tables.position,
            tables.type,
            ln.gamma,
            ln.beta,
            ln.eps,
            **to.arguments,
            token_scale=to.token_scale,
        )
        return to.floats, to.value

    def gemm(
        self,
        x: Any,
        packed: Any,
        bias: Any,
        *,
        act: Activation | None = None,
        residual: Any = None,
        out: Out,
    ) -> Any:
        check_gemm(x, packed.shape, bias, act, residual)
        more: dict[str, Any] = {}
        if isinstance(x, QTensor) and packed.scale is not None:
            if x.data.dtype != np.uint8:
                raise KernelError("gemm", f"{x.data.dtype} activations", "uint8, zero point 128")
            check_kept(x, 0 if packed.outliers is None else len(packed.outliers))
            data, ran = x.data, "int8"
            if isinstance(x.scale, float):
                more["col_scale"] = packed.scale * np.float32(x.scale)
            else:
                more.update(col_scale=packed.scale, row_scale=self.array(x.scale))
            if x.kept is not None:
                more.update(side_x=_floats("gemm", "kept", x.kept), side_w=packed.side)
        elif isinstance(x, np.ndarray) and packed.scale is None:
            data, ran = _floats("gemm", "activations", x), "fp32"
        else:
            kinds = f"{type(x).__name__} with {'fp32' if packed.scale is None else 'int8'} weights"
            raise KernelError("gemm", kinds, "QTensor with int8 weights, float with fp32 weights")
        if residual is not None:
            more["residual"] = _floats("gemm", "residual", residual)
        to = _Result(out, (x.shape[0], packed.shape[0]))
        self.level.gemm(
            _rows(data), packed.native, bias=bias, act=_ACTS[act], **more, **to.arguments
        )
        self.ran = (ran,)
        return to.value

    def attention(
        self,
        qkv: Any,
        cu_seqlens: I32,
        max_seqlen: int,
        heads: int,
        *,
        position_bias: Any = None,
        precisions: tuple[str, str] = ("fp32", "fp32"),
        scales: Mapping[str, float] | None = None,
        out: Out,
    ) -> Any:
        if not set(precisions) <= {"fp32", "int8"}:
            raise UnsupportedPrecision("attention", " and ".join(precisions), "fp32, int8")
        check_attention(qkv, cu_seqlens, heads, position_bias)
        int8_scores, int8_context = (precision == "int8" for precision in precisions)
        needed = ("q", "k") * int8_scores + ("p", "v") * int8_context
        given: dict[str, Any] = {f"{name}_scale": (scales or {}).get(name, 0.0) for name in needed}
        if not all(scale > 0.0 for scale in given.values()):
            allowed = f"scales {', '.join(needed)} > 0"
            raise KernelError("attention", f"int8 with scales {scales}", allowed)
        tokens, width = qkv.shape
        to = _Result(out, (tokens, width // 3))
        to.blank(int(cu_seqlens[-1]))
        self.level.attention(
            _floats("attention", "qkv", qkv),
            _indices(cu_seqlens),
            heads,
            position_bias=None if position_bias is None else self.array(position_bias),
            int8_scores=int8_scores,
            int8_context=int8_context,
            **given,
            **to.arguments,
        )
        self.ran = precisions
        return to.value

    def add_layernorm(
        self, x: Any, ln: LayerNorm, *, residual: Any = None, out: Out
    ) -> tuple[F32, Any]:
        to = _Result(out, x.shape, token=True, full=True)
        rest = None if residual is None else _floats("add_layernorm", "residual", residual)
        self.level.add_layernorm(
            _floats("add_layernorm", "x", x),
            rest,
            ln.gamma,
            ln.beta,
            ln.eps,
            **to.arguments,
            token_scale=to.token_scale,
        )
        return to.floats, to.value

    def quantize(self, x: Any, out: Out) -> Any:
        if out.dtype == "fp32":
            return x
        to = _Result(out, x.shape, token=True)
        assert to.integers is not None
        floats = _floats("quantize", "x", x)
        self.level.quantize(floats, to.integers, to.inv_scale, to.token_scale)
        to.floats = floats
        return to.value

    def pool(self, x: Any, cu_seqlens: I32, how: Literal["first", "mean"]) -> F32:
        if how == "first":
            return np.asarray(x[cu_seqlens[:-1]])
        y = np.empty((len(cu_seqlens) - 1, x.shape[1]), dtype=np.float32)
        self.level.mean(_floats("pool", "x", x), _indices(cu_seqlens), y)
        return y

    def to_host(self, x: Any) -> Array:
        return np.asarray(x)


class _Result:
    """What one op writes for `out`: its arrays and, when it has run, the value that it returns.

    `token`: the op can write a scale for each token; `full`: it writes floats in any case.
    """

    def __init__(
        self, out: Out, shape: tuple[int, int], *, token: bool = False, full: bool = False
    ) -> None:
        self.out = out
        self.shape = shape
        self.inv_scale = 1.0
        self.integers: Array | None = None
        self.token_scale: F32 | None = None
        if out.dtype != "fp32":
            self._quantize(out, token)
        self.floats: Any = None
        if full or out.dtype == "fp32" or out.keep:
            self.floats = np.empty(shape, dtype=np.float32)

    def _quantize(self, out: Out, token: bool) -> None:
        if out.dtype == "int8" and out.scale == "token" and token and not out.keep:
            self.token_scale = np.empty(self.shape[0], dtype=np.float32)
        elif out.dtype == "int8" and isinstance(out.scale, float) and out.scale > 0.0:
            self.inv_scale = 1.0 / out.scale
        else:
            allowed = "fp32, or int8 with a static scale > 0"
            allowed += ", or one a token without keep" * token
            raise UnsupportedPrecision("quantize", f"{out}", allowed)
        self.integers = np.empty(self.shape, dtype=np.uint8)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"out_f": self.floats, "out_q": self.integers, "inv_scale": self.inv_scale}

    def blank(self, begin: int) -> None:
        """Zeros in the rows from `begin` on, which the op does not write."""
        if self.floats is not None:
            self.floats[begin:] = 0.0
        if self.integers is not None:
            self.integers[begin:] = ZERO_POINT

    @property
    def value(self) -> Any:
        if self.integers is None:
            return self.floats
        scale = self.out.scale if self.token_scale is None else self.token_scale
        kept = self.floats[:, list(self.out.keep)] if self.out.keep else None
        return QTensor(self.integers, scale, self.shape, kept)


def _indices(x: Array) -> I32:
    return np.ascontiguousarray(x, dtype=np.int32)


def _rows(x: Array) -> Array:
    """Rows that lie without gaps, at any distance from each other."""
    if x.strides[1] == x.itemsize and x.strides[0] >= x.shape[1] * x.itemsize:
        return x
    return np.ascontiguousarray(x)


def _floats(op: str, name: str, x: Any) -> F32:
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 2:
        got = f"{x.dtype} [{x.ndim} dimensions]" if isinstance(x, np.ndarray) else type(x).__name__
        raise KernelError(op, f"{name} {got}", "float32 [rows, columns]")
    return _rows(x)
