"""The portable CPU backend: oneDNN through torch's CPU operators.

int8 GEMM: prepacked per-channel weights, activations as u8 with zero point 128, bias, activation,
residual and requantization fused (`onednn::qlinear_pointwise`). s8 activations would fall to a
reference path. fp32 GEMM: prepacked oneDNN (`mkldnn::_linear_pointwise`), the same epilogues.
Attention is fp32 here: torch has no variable-length int8 attention for CPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from samp_kernels.interface import (
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
    check_weight,
)

# torch announces that its quantized dtypes will go; the range of torch in pyproject.toml has them,
# and no other operator of it rounds, saturates and narrows in one pass.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)

ZERO_POINT = 128
_POST_OPS: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "tanh": ("tanh", ""),
    "relu": ("relu", ""),
}


@dataclass(frozen=True)
class PackedInt8:
    """oneDNN's blocked int8 weight, its scale `[out]` and zero points (all 0)."""

    data: torch.Tensor
    scale: torch.Tensor
    zero_points: torch.Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedFloat:
    """oneDNN's blocked fp32 weight."""

    data: torch.Tensor
    shape: tuple[int, ...]


class OneDnnBackend:
    """fp32 and int8 (static activation scales) GEMMs; fp32 attention."""

    name = "onednn"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.ran: tuple[str, ...] = ()

    def capabilities(self) -> frozenset[tuple[str, str, str]]:
        base = {
            ("gemm", "fp32", ""),
            ("gemm", "residual", ""),
            ("attention.scores", "fp32", ""),
            ("attention.context", "fp32", ""),
        }
        # Without VNNI u8 x s8 products saturate in 16 bits: accuracy collapses without a word.
        return frozenset(base | {("gemm", "int8", "static")} if has_vnni() else base)

    def token_bucket(self, tokens: int) -> int:
        """oneDNN compiles a GEMM for every number of rows that it meets, a millisecond or more a
        layer's four, and keeps 1,024 of them: rounded up, few are met and all are kept."""
        step = 1 if tokens <= 64 else 16 if tokens <= 512 else 64
        return -(-tokens // step) * step

    def array(self, x: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    def pack(self, weight: Weight, precision: str) -> PackedInt8 | PackedFloat:
        check_weight(weight, precision)
        if weight.outliers is not None:
            raise UnsupportedPrecision("pack", "int8 with outliers", "fp32, int8 without outliers")
        shape = weight.data.shape
        if weight.scale is None:
            dense = torch.from_numpy(np.ascontiguousarray(weight.data, dtype=np.float32))
            return PackedFloat(dense.to_mkldnn(), shape)
        if ("gemm", "int8", "static") not in self.capabilities():
            raise UnsupportedPrecision("pack", "int8 on a CPU without VNNI", "fp32")
        integers = torch.from_numpy(np.ascontiguousarray(weight.data, dtype=np.int8))
        packed = torch.ops.onednn.qlinear_prepack(integers, None)
        scale = torch.from_numpy(np.array(weight.scale, dtype=np.float32))
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        return PackedInt8(packed, scale, zeros, shape)

    def embed_layernorm(
        self,
        ids: Array,
        types: Array,
        positions: Array,
        tables: EmbeddingTables,
        ln: LayerNorm,
        out: Out,
    ) -> tuple[torch.Tensor, Any]:
        try:
            x = F.embedding(torch.from_numpy(ids), tables.word)
            x += F.embedding(torch.from_numpy(positions), tables.position)
            x += F.embedding(torch.from_numpy(types), tables.type)
        except IndexError:
            check_embedding(ids, types, positions, tables)
            raise
        return self.add_layernorm(x, ln, out=out)

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
        if isinstance(x, QTensor) and isinstance(packed, PackedInt8):
            if x.data.dtype != torch.uint8:
                raise KernelError("gemm", f"{x.data.dtype} activations", "uint8, zero point 128")
            return self._int8(x, packed, bias, act, residual, out)
        if isinstance(x, torch.Tensor) and isinstance(packed, PackedFloat):
            if x.dtype != torch.float32:
                raise KernelError("gemm", f"{x.dtype} activations", "float32")
            return self._float(x, packed, bias, act, residual, out)
        kinds = f"{type(x).__name__} with {type(packed).__name__}"
        raise KernelError("gemm", kinds, "QTensor with int8 weights, float with fp32 weights")

    def _int8(
        self, x: QTensor, packed: PackedInt8, bias: Any, act: Any, residual: Any, out: Out
    ) -> Any:
        post, algorithm = _POST_OPS[act]
        self.ran = ("int8",)
        head = (x.data, x.scale, ZERO_POINT, packed.data, packed.scale, packed.zero_points)
        if residual is not None:
            if act is not None or out.dtype != "fp32":
                raise KernelError("gemm", f"residual with act {act}, {out.dtype}", "no act, fp32")
            return torch.ops.onednn.qlinear_pointwise.binary(
                *head, residual, bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""
            )
        if out.dtype == "fp32":
            return torch.ops.onednn.qlinear_pointwise(
                *head, bias, 1.0, 0, torch.float32, post, [], algorithm
            )
        scale = _static_scale(out)
        y = torch.ops.onednn.qlinear_pointwise(
            *head, bias, scale, ZERO_POINT, torch.uint8, post, [], algorithm
        )
        return QTensor(y.clamp_(min=1), scale, tuple(y.shape))

    def _float(
        self, x: torch.Tensor, packed: PackedFloat, bias: Any, act: Any, residual: Any, out: Out
    ) -> Any:
        post, algorithm = _POST_OPS[act]
        self.ran = ("fp32",)
        if residual is not None:
            if act is not None:
                raise KernelError("gemm", f"residual with act {act}", "a residual without act")
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.data, bias, "add")
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, packed.data, bias, post, [], algorithm)
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
        """Neighbours of equal length share one call, so a caller sorts sequences by length."""
        if precisions != ("fp32", "fp32"):
            raise UnsupportedPrecision("attention", " and ".join(precisions), "fp32 and fp32")
        check_attention(qkv, cu_seqlens, heads, position_bias)
        self.ran = precisions
        width = qkv.shape[1]
        hidden = width // 3
        dim = hidden // heads
        pieces = []
        begin = 0
        for count, length in equal_runs(cu_seqlens):
            end = begin + count * length
            rows = qkv[begin:end].view(count, length, 3, heads, dim)
            q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
            bias = None if position_bias is None else _by_place(position_bias, length)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            pieces.append(y.transpose(1, 2).reshape(count * length, hidden))
            begin = end
        if begin < qkv.shape[0]:
            pieces.append(qkv.new_zeros(qkv.shape[0] - begin, hidden))
        context = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return self.quantize(context, out)

    def add_layernorm(
        self, x: Any, ln: LayerNorm, *, residual: Any = None, out: Out
    ) -> tuple[torch.Tensor, Any]:
        y = x if residual is None else x + residual
        y = F.layer_norm(y, (y.shape[-1],), ln.gamma, ln.beta, ln.eps)
        return y, self.quantize(y, out)

    def quantize(self, x: Any, out: Out) -> Any:
        if out.dtype == "fp32":
            return x
        scale = _static_scale(out)
        q = torch.quantize_per_tensor(x, scale, ZERO_POINT, torch.quint8)
        # The integers without int_repr's copy, which costs three times the quantization itself.
        data = torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape, q.stride())
        return QTensor(data.clamp_(min=1), scale, tuple(x.shape))

    def pool(self, x: Any, cu_seqlens: Array, how: Literal["first", "mean"]) -> torch.Tensor:
        if how == "first":
            rows: torch.Tensor = x[torch.from_numpy(cu_seqlens[:-1].astype(np.int64))]
            return rows
        lengths = torch.from_numpy(np.diff(cu_seqlens).astype(np.int64))
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = torch.zeros(len(lengths), x.shape[1]).index_add_(0, sequence, x[: len(sequence)])
        return sums / lengths[:, None]

    def to_host(self, x: Any) -> Array:
        return np.asarray(x.numpy())


def _by_place(position_bias: torch.Tensor, length: int) -> torch.Tensor:
    """[heads, 2 n - 1] by distance -> [heads, length, length] by query and key."""
    middle = position_bias.shape[1] // 2
    near = position_bias[:, middle + 1 - length : middle + length]
    # Query i's row begins at length - 1 - i.
    return near.unfold(1, length, 1).flip(1)


def equal_runs(cu_seqlens: Array) -> list[tuple[int, int]]:
    """Consecutive sequences of equal length as (count, length)."""
    runs: list[tuple[int, int]] = []
    for length in np.diff(cu_seqlens).tolist():
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs


def has_vnni() -> bool:
    """Whether this CPU multiplies u8 by s8 into int32 without saturating (VNNI or AMX)."""
    global _VNNI
    if _VNNI is None:
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            flags = ""
        _VNNI = any(name in flags for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return _VNNI


_VNNI: bool | None = None


def _static_scale(out: Out) -> float:
    static = isinstance(out.scale, float) and out.scale > 0.0
    if out.dtype != "int8" or not static or out.keep:
        raise UnsupportedPrecision("quantize", f"{out}", "fp32, or int8 with a static scale > 0")
    return float(out.scale)  # type: ignore[arg-type]
