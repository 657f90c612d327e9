"""The CUDA backend, one op at a time, over any launcher: a GPU, or the emulator in tests.

int8 activations are signed, fp8 ones codes of e4m3. Arrays are `Matrix`es: device memory, rows
padded to 16 elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from samp_kernels.cuda import ops
from samp_kernels.cuda.formats import DTYPES, check_precision, decode, encode, has
from samp_kernels.cuda.launcher import Buffer, Launch, Launcher
from samp_kernels.cuda.ops import Matrix, Packed, Target, padded, size_of
from samp_kernels.cuda.session import CudaSession
from samp_kernels.cuda.tiles import room_for
from samp_kernels.cuda.units import number
from samp_kernels.interface import (
    CODES,
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
    check_weight,
)

FLOATS = ("fp32", "fp16", "bf16")


class CudaBackend:
    """Every site in fp32, fp16, bf16 (from sm_80 on) or int8, GEMMs in fp8 (from sm_89 on), too;
    scales per token."""

    name = "cuda"

    def __init__(self, launcher: Launcher | None = None, *, gpu: int = 0) -> None:
        if launcher is None:
            from samp_kernels.cuda import emulated
            from samp_kernels.cuda.emulator import CpuLauncher
            from samp_kernels.cuda.launcher import CupyLauncher

            launcher = CpuLauncher(emulated()) if emulated() else CupyLauncher(gpu)
        self.launcher: Launcher = launcher
        self.ran: tuple[str, ...] = ()

    def device_facts(self) -> dict[str, str]:
        """The GPU's name and the architecture of its cubins, as a plan's `device` says them."""
        name = getattr(self.launcher, "device_name", "emulated")
        return {"gpu": name, "isa": self.launcher.architecture}

    def capabilities(self) -> frozenset[tuple[str, str, str]]:
        sm = number(self.launcher.architecture)
        floats = {(f, "") for f in FLOATS if has(f, sm)}
        codes = {(p, how) for p in CODES if has(p, sm) for how in ("static", "token")}
        inside = floats | {("int8", "static")}
        attention = {(f"attention.{s}", *kind) for s in ("scores", "context") for kind in inside}
        gemm = {("gemm", *kind) for kind in floats | codes}
        return frozenset({("gemm", "residual", "")} | gemm | attention)

    def prepare(
        self,
        config: EncoderConfig,
        tensors: Mapping[str, Array],
        plan: Any,
        *,
        max_tokens: int | None = None,
        threads: int | None = None,
        packs: dict[tuple[str, str, str], Any] | None = None,
    ) -> CudaSession:
        """Seven launches a layer, as one graph for each token bucket up to `max_tokens` (8,192)."""
        return CudaSession(self, config, tensors, plan, max_tokens=max_tokens or 8192, packs=packs)

    def array(self, x: Array, kind: str = "fp32") -> Matrix:
        host = encode(x, kind)
        rows, columns = host.shape if host.ndim == 2 else (1, host.shape[0])
        whole = np.zeros((rows, padded(columns)), dtype=host.dtype)
        whole[:, :columns] = host
        made = self.empty(rows, columns, kind)
        self.launcher.to_device(made.buffer, whole)
        return Matrix(made.buffer, 0, tuple(host.shape), made.ld, kind)

    def empty(self, rows: int, columns: int, kind: str) -> Matrix:
        buffer = self.launcher.allocate(size_of(rows, columns, kind))
        return Matrix(buffer, 0, (rows, columns), padded(columns), kind)

    def pack(self, weight: Weight, precision: str) -> Packed:
        check_precision(precision, number(self.launcher.architecture))
        check_weight(weight, "fp32" if precision in FLOATS else precision, ("fp32", *CODES))
        if weight.outliers is not None:
            raise UnsupportedPrecision("cuda pack", "outliers", "weights without an outlier split")
        if precision == "fp16" and float(np.abs(weight.data).max(initial=0.0)) > 65504.0:
            raise KernelError("pack", "a weight beyond fp16", "magnitudes of at most 65504")
        scale = None if weight.scale is None else np.asarray(weight.scale, dtype=np.float32)
        tiled = self.in_tiles(weight.data, precision)
        return Packed(self.array(weight.data, precision), precision, scale, tiled)

    def in_tiles(self, weight: Array, precision: str) -> Buffer | None:
        """The same in the order that wgmma reads, where it may run."""
        if not ops.wants_tiles(self.launcher.architecture, precision):
            return None
        data = ops.in_tiles(encode(weight, precision))
        made = self.launcher.allocate(data.nbytes)
        self.launcher.to_device(made, data)
        return made

    def embed_layernorm(
        self,
        ids: I32,
        types: I32,
        positions: I32,
        tables: EmbeddingTables,
        ln: LayerNorm,
        out: Out,
    ) -> tuple[Matrix, Any]:
        check_embedding(ids, types, positions, tables)
        indices = [self.integers(x) for x in (ids, types, positions)]
        to = _Result(self, out, (len(ids), tables.word.columns), full=True)
        a, b, c = (x.pointer for x in indices)
        self._run(ops.embed(len(ids), (a, b, c), tables, ln, to.target))
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
        row_scale = column_scale = None
        data = x
        if isinstance(x, QTensor):
            if packed.scale is None:
                raise KernelError("gemm", f"{x.data.kind} activations", "as the weights: floats")
            data = x.data
            factor: Any = np.float32(1.0)
            if isinstance(x.scale, Matrix):
                row_scale = x.scale
            else:
                factor = np.float32(x.scale)
            column_scale = self.array(packed.scale * factor)
        if data.kind != packed.precision:
            got = f"{data.kind} activations for {packed.precision} weights"
            raise KernelError("gemm", got, "the same kind of both")
        if out.scale == "token":
            raise UnsupportedPrecision("gemm", f"{out}", "a float, or a static scale")
        to = _Result(self, out, (x.shape[0], packed.shape[0]))
        width = padded(packed.shape[0])
        sums, blocks = room_for(data.rows, width) if packed.precision == "int8" else (0, 0)
        counters = self.launcher.allocate(blocks * 4)
        self.launcher.fill(counters, 0, blocks * 4)
        space = ops.Workspace(self.launcher.allocate(sums * 4), counters)
        one = ops.gemm(
            self.device(space),
            data,
            packed,
            bias,
            to.only,
            act=act,
            residual=residual,
            row_scale=row_scale,
            column_scale=column_scale,
            out_scale=to.target.scale,
        )
        self._run(one)
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
        check_attention(qkv, cu_seqlens, heads, position_bias)
        if out.scale == "token":
            raise UnsupportedPrecision("attention", f"{out}", "a static scale")
        tiles = ops.attention_tiles(cu_seqlens)
        bounds, work = self.integers(cu_seqlens), self.integers(tiles)
        to = _Result(self, out, (qkv.rows, qkv.columns // 3))
        behind = to.only[int(cu_seqlens[-1]) :]
        size = size_of(behind.rows, behind.columns, behind.kind)
        self.launcher.fill(behind.buffer, behind.offset, size)
        one = ops.attention(
            qkv,
            bounds.pointer,
            work.pointer,
            len(tiles),
            heads,
            to.only,
            precisions=precisions,
            scales=scales,
            bias=position_bias,
            out_scale=to.target.scale,
        )
        self._run(one)
        return to.value

    def add_layernorm(
        self, x: Any, ln: LayerNorm, *, residual: Any = None, out: Out
    ) -> tuple[Matrix, Any]:
        to = _Result(self, out, x.shape, full=True)
        self._run(ops.layernorm(x, ln, to.target, residual=residual))
        return to.floats, to.value

    def quantize(self, x: Any, out: Out) -> Any:
        if out.dtype == x.kind:
            return x
        to = _Result(self, out, x.shape)
        self._run(ops.convert(x, to.target))
        return to.value

    def pool(self, x: Any, cu_seqlens: I32, how: Literal["first", "mean"]) -> Matrix:
        out = self.empty(len(cu_seqlens) - 1, x.columns, "fp32")
        bounds = self.integers(cu_seqlens)
        self._run(ops.pool(x, bounds.pointer, out.rows, how, out))
        return out

    def to_host(self, x: Any) -> Array:
        host = np.empty((x.rows, x.ld), dtype=DTYPES[x.kind])
        self.launcher.to_host(x.buffer, host, x.offset)
        kept = np.ascontiguousarray(host[:, : x.columns])
        return decode(kept.reshape(x.shape), x.kind)

    def integers(self, x: Array) -> Buffer:
        """An int32 host array on the device, as it lies."""
        host = np.ascontiguousarray(x, dtype=np.int32)
        buffer = self.launcher.allocate(host.nbytes)
        self.launcher.to_device(buffer, host)
        return buffer

    def device(self, workspace: ops.Workspace | None = None) -> ops.Device:
        return ops.Device(self.launcher.architecture, self.launcher.multiprocessors, workspace)

    def _run(self, one: Launch) -> None:
        self.launcher.launch(one)
        if one.ran:
            self.ran = one.ran


class _Result:
    """What one op writes for `out`, and the value that it returns. `full`: floats in any case."""

    def __init__(
        self, backend: CudaBackend, out: Out, shape: tuple[int, int], *, full: bool = False
    ) -> None:
        if out.keep or out.dtype not in (*FLOATS, *CODES):
            allowed = f"{', '.join((*FLOATS, *CODES))}, without keep"
            raise UnsupportedPrecision("cuda", f"{out}", allowed)
        check_precision(out.dtype, number(backend.launcher.architecture))
        self._out = out
        self._shape = (int(shape[0]), int(shape[1]))
        self.floats: Any = None
        halves = integers = scales = None
        scale = 1.0
        if full or out.dtype == "fp32":
            self.floats = backend.empty(*self._shape, "fp32")
        if out.dtype in ("fp16", "bf16"):
            halves = backend.empty(*self._shape, out.dtype)
        if out.dtype in CODES:
            integers = backend.empty(*self._shape, out.dtype)
            if out.scale == "token":
                scales = backend.empty(1, self._shape[0], "fp32")
                scales = Matrix(scales.buffer, 0, (self._shape[0],), scales.ld, "fp32")
            elif isinstance(out.scale, float) and out.scale > 0.0:
                scale = out.scale
            else:
                raise UnsupportedPrecision("quantize", f"{out}", 'a scale > 0 or "token"')
        self.target = Target(self.floats, halves, integers, scale, scales)

    @property
    def only(self) -> Matrix:
        """The one array of an op that writes one."""
        found = self.target.integers or self.target.halves or self.target.floats
        assert found is not None
        return found

    @property
    def value(self) -> Any:
        if self.target.integers is None:
            return self.target.halves or self.target.floats
        scale = self._out.scale if self.target.token_scale is None else self.target.token_scale
        assert scale is not None
        return QTensor(self.target.integers, scale, self._shape)
