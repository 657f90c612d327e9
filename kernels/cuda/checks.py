"""Every op and tile beside the reference, on fresh random data: `make gpu-check`, and the short
check that backend `auto` makes once on a GPU (samp_core/gpu_proof.py).

On a GPU outputs stand in memory that was filled with NaN (`poisoned`); the emulator's always do.
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import numpy as np
from samp_kernels.cuda import ops
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.emulator import CpuLauncher
from samp_kernels.cuda.formats import has
from samp_kernels.cuda.launcher import Buffer, CupyLauncher
from samp_kernels.cuda.room import HALVES
from samp_kernels.cuda.tiles import GROUP_TILES, TILES, Choice, room_for
from samp_kernels.cuda.units import ATTENTIONS, HEAD_DIMS
from samp_kernels.e4m3 import E4M3, to_e4m3
from samp_kernels.interface import EmbeddingTables, LayerNorm, Out, QTensor, Weight
from samp_kernels.reference import ReferenceBackend, activation

REFERENCE = ReferenceBackend()
STEP = 0.030123
"""Of int8 attention's operands: no multiple of 1/64 lies on an edge between two steps."""


class Report(Protocol):
    """Who is told what was found. `attempt`: a step's exception is a failed check."""

    def check(self, name: str, fine: bool, detail: str) -> None: ...

    def attempt(self, name: str, step: Any, *arguments: Any) -> None: ...


class Poisoned(CupyLauncher):
    """What is allocated begins as NaN, or -1."""

    def allocate(self, size: int) -> Buffer:
        made = super().allocate(size)
        made.owner.memset_async(0xFF, max(size, 256), self.stream)
        return made


def poisoned(emulated: str = "") -> CudaBackend:
    """The backend on device 0, or emulated as that architecture."""
    return CudaBackend(CpuLauncher(emulated) if emulated else Poisoned())


def relative(b: CudaBackend, got: Any, wanted: Any) -> float:
    """Largest error over the largest magnitude; NaN counts as infinite."""
    error = np.abs(b.to_host(got) - wanted).max() / max(float(np.abs(wanted).max()), 1.0)
    return float(error) if np.isfinite(error) else math.inf


def check_gemms(report: Report, b: CudaBackend, small: bool) -> None:
    rng = np.random.default_rng(time.time_ns())
    shapes = [(1, 64, 64), (33, 312, 100), (70, 96, 312)]
    shapes += [] if small else [(128, 768, 3072), (1000, 3072, 768), (4096, 768, 2304)]
    for t, k, n in shapes:
        x8, w8 = rng.integers(-127, 128, (t, k)), rng.integers(-127, 128, (n, k))
        w = (rng.standard_normal((n, k)) / math.sqrt(k)).astype(np.float32)
        x = rng.standard_normal((t, k)).astype(np.float32)
        bias, rest = rng.standard_normal(n).astype(np.float32), rng.standard_normal((t, n))
        sums = (x8.astype(np.float64) @ w8.T.astype(np.float64)) * 2.0**-12
        packed = b.pack(Weight(w8.astype(np.int8), np.full(n, 2.0**-12, np.float32)), "int8")
        given = QTensor(b.array(x8, "int8"), 1.0, (t, k))
        y = b.gemm(given, packed, b.array(np.zeros(n)), out=Out())
        exact = bool(np.array_equal(b.to_host(y), sums.astype(np.float32)))
        report.check(f"gemm int8 {t}x{k}x{n}", exact, "bit for bit" if exact else "differs")
        y = b.gemm(given, packed, b.array(bias), act="gelu", out=Out("int8", 0.05))
        wanted = np.clip(np.rint(activation(sums + bias, "gelu") / 0.05), -127, 127)
        off = np.abs(b.to_host(y.data).astype(np.int64) - wanted)
        share = float((off > 0).mean())
        report.check(f"  + gelu, to int8 {t}x{k}x{n}", off.max() <= 1, f"{share:.1e} one step away")
        for precision, most in (("fp16", 4e-3), ("fp32", 1e-5)):
            y = b.gemm(
                b.array(x, precision), b.pack(Weight(w), precision), b.array(bias),
                residual=b.array(rest.astype(np.float32)), out=Out(),
            )  # fmt: skip
            error = relative(b, y, x.astype(np.float64) @ w.T + bias + rest.astype(np.float32))
            report.check(f"gemm {precision} {t}x{k}x{n}", error <= most, f"{error:.1e}")
        if has("fp8", b.device().sm):
            check_fp8(report, b, x, w, bias)


def check_fp8(report: Report, b: CudaBackend, x: Any, w: Any, bias: Any) -> None:
    """Quantization by code, and a product of the same codes; its sums may keep fewer bits."""
    name = f"fp8 {x.shape[0]}x{x.shape[1]}x{w.shape[0]}"
    scale = np.abs(w).max(axis=1) / np.float32(448)
    weight = Weight(to_e4m3(w / scale[:, None]), scale)
    exact = REFERENCE.quantize(x.astype(np.float64), Out("fp8", 0.01))
    own = b.to_host(b.quantize(b.array(x), Out("fp8", 0.01)).data)
    same = float((own == E4M3[exact.data]).mean())
    report.check(f"quantize to {name}", same >= 0.999, f"{same:.5f} are the same numbers")
    given = QTensor(b.array(exact.data, "fp8"), 0.01, x.shape)
    y = b.gemm(given, b.pack(weight, "fp8"), b.array(bias), act="gelu", out=Out())
    packed = REFERENCE.pack(weight, "fp8")
    error = relative(b, y, REFERENCE.gemm(exact, packed, bias, act="gelu", out=Out()))
    report.check(f"gemm {name}", error <= 2e-3, f"{error:.1e}")
    y = b.gemm(given, b.pack(weight, "fp8"), b.array(bias), out=Out("fp8", 0.05))
    wanted = REFERENCE.gemm(exact, packed, bias, out=Out()) / 0.05
    error = float((np.abs(b.to_host(y.data) - wanted) / np.maximum(np.abs(wanted), 1 / 64)).max())
    report.check(f"  + to {name}", error <= 0.07, f"{error:.3f} of a value, half a step is 0.0625")


def check_tiles(report: Report, b: CudaBackend, small: bool) -> None:
    """Whole numbers: every tile and split of mma.sync gives the same bits, every tile of wgmma too,
    and int8's are exact in both. e4m3 sums may keep fewer bits than fp32 has."""
    rng = np.random.default_rng(time.time_ns())
    rows, k, n = (70, 560, 136) if small else (300, 768, 768)
    for precision, most in (("int8", 0.0), ("fp16", 1e-5), ("bf16", 1e-5), ("fp8", 2e-3)):
        if not has(precision, b.device().sm):
            continue
        top = 15 if precision == "fp8" else 127
        whole_x, whole_w = (rng.integers(-top, top + 1, shape) for shape in ((rows, k), (n, k)))
        wanted = (whole_x @ whole_w.T) * 2.0**-12
        tiled = b.in_tiles(whole_w, precision)
        packed = ops.Packed(b.array(whole_w, precision), precision, None, tiled)
        x, bias = b.array(whole_x, precision), b.array(np.zeros(n))
        columns = b.array(np.full(n, 2.0**-12))
        for family in (TILES, GROUP_TILES) if tiled is not None else (TILES,):
            found = []
            for tile in family:
                for splits in (1, 2, 4) if precision == "int8" and tile in TILES else (1,):
                    device, out = with_workspace(b, rows, n), b.empty(rows, n, "fp32")
                    one = ops.gemm(
                        device, x, packed, bias, out,
                        column_scale=columns, choice=Choice(tile, splits),
                    )  # fmt: skip
                    for _ in range(2):
                        b.launcher.launch(one)
                    found.append(b.to_host(out))
            same = all(np.array_equal(found[0], other) for other in found)
            error = float(np.abs(found[0] - wanted).max() / np.abs(wanted).max())
            name = f"tiles {precision}, {'mma.sync' if family is TILES else 'wgmma'}"
            said = f"{len(found)} tiles and splits bit for bit, {error:.1e} from exact"
            report.check(name, same and error <= most, said)


def with_workspace(b: CudaBackend, rows: int, n: int) -> Any:
    sums, counters = room_for(rows, ops.padded(n))
    space = ops.Workspace(b.launcher.allocate(4 * sums), b.launcher.allocate(4 * counters))
    b.launcher.fill(space.counters, 0, 4 * counters)
    return b.device(space)


def check_attention(report: Report, b: CudaBackend, small: bool) -> None:
    """Each pair of precisions, sequences that end inside a block of queries and of keys."""
    rng = np.random.default_rng(time.time_ns())
    counts = [3, 70, 1, 64] if small else [384, 1, 65, 128, 17, 511]
    bounds = np.cumsum([0, *counts]).astype(np.int32)
    scales = {"q": STEP, "k": STEP, "v": STEP, "p": 1 / 127}
    sm = b.device().sm
    kinds = [("fp32", "fp32"), ("int8", "fp32"), ("fp32", "int8")]
    kinds += [pair for pair in ATTENTIONS if all(has(precision, sm) for precision in pair)]
    for dim in HEAD_DIMS:
        heads = 2
        # What both floats of 16 bits hold: their products are as exact as fp32's.
        qkv = rng.integers(-128, 129, (sum(counts), 3 * heads * dim)) / 64
        bias = rng.standard_normal((heads, 2 * 512 - 1)).astype(np.float32)
        for precisions in kinds:
            more: Any = {"precisions": precisions, "scales": scales, "out": Out()}
            more["position_bias"] = b.array(bias)
            args = (b.array(qkv), bounds, max(counts), heads)
            y = b.attention(*args, **more)
            more["precisions"] = tuple("fp32" if p in HALVES else p for p in precisions)
            more["position_bias"] = bias
            wanted = REFERENCE.attention(qkv, *args[1:], **more)
            off = np.abs(b.to_host(y) - wanted)
            most = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 2e-2, "int8": 4e-3}[precisions[1]]
            error = float(off.mean() if precisions[1] == "int8" else off.max())
            name = f"attention {precisions[0]}/{precisions[1]} of {dim}"
            report.check(name, error <= most, f"{error:.1e}")


def check_rows(report: Report, b: CudaBackend, small: bool) -> None:
    rng = np.random.default_rng(time.time_ns())
    for width in (7, 312, 768):
        t = 17 if small else 1000
        x, rest = rng.standard_normal((t, width)) * 3, rng.standard_normal((t, width))
        x, rest = x.astype(np.float32), rest.astype(np.float32)
        gamma, beta = rng.standard_normal((2, width)).astype(np.float32)
        ln = LayerNorm(b.array(gamma), b.array(beta), 1e-12)
        total = x.astype(np.float64) + rest
        wanted, _ = REFERENCE.add_layernorm(total, LayerNorm(gamma, beta, 1e-12), out=Out())
        y, q = b.add_layernorm(b.array(x), ln, residual=b.array(rest), out=Out("int8", 0.03))
        error = relative(b, y, wanted)
        off = np.abs(b.to_host(q.data) - np.clip(np.rint(wanted / 0.03), -127, 127)).max()
        report.check(f"layer norm {width}", error <= 1e-5 and off <= 1, f"{error:.1e}, {off} steps")
        tables = [rng.standard_normal((rows, width)).astype(np.float32) for rows in (50, 40, 2)]
        index = [rng.integers(0, len(table), t).astype(np.int32) for table in tables]
        ids, positions, kinds = index
        own = EmbeddingTables(*(b.array(table) for table in tables))
        y, _ = b.embed_layernorm(ids, kinds, positions, own, ln, Out("int8", "token"))
        summed = sum(a[i].astype(np.float64) for a, i in zip(tables, index, strict=True))
        wanted, _ = REFERENCE.add_layernorm(summed, LayerNorm(gamma, beta, 1e-12), out=Out())
        error = relative(b, y, wanted)
        report.check(f"embedding {width}", error <= 1e-5, f"{error:.1e}")
        bounds = np.array([0, 3, 4, t], np.int32)
        for how in ("first", "mean"):
            wanted = REFERENCE.pool(x.astype(np.float64), bounds, how)  # type: ignore[arg-type]
            error = relative(b, b.pool(b.array(x), bounds, how), wanted)  # type: ignore[arg-type]
            report.check(f"pool {how} {width}", error <= 1e-5, f"{error:.1e}")


def check_ops(report: Report, b: CudaBackend, small: bool) -> None:
    for step in (check_gemms, check_tiles, check_attention, check_rows):
        report.attempt(step.__name__, step, b, small)
