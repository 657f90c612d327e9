"""The checks of gpu_check.py: each op, tile and a whole encoder against the reference.

Outputs stand in memory that was filled with NaN.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import gpu_import  # noqa: F401  (before samp_kernels)
import numpy as np
from gpu_report import Report
from samp_kernels.cuda import ops
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.formats import has
from samp_kernels.cuda.session import CudaSession
from samp_kernels.cuda.tiles import GROUP_TILES, TILES, Choice, room_for
from samp_kernels.e4m3 import E4M3, to_e4m3
from samp_kernels.interface import (
    GEMM_SITES,
    LARGEST,
    SITES,
    EmbeddingTables,
    EncoderConfig,
    LayerNorm,
    Out,
    QTensor,
    Weight,
    pack_batch,
)
from samp_kernels.reference import ReferenceBackend, activation

REFERENCE = ReferenceBackend()
BASE = EncoderConfig("bert", 12, 768, 12, 3072, 1000, 512, 2, 1e-12)
LARGE = EncoderConfig("bert", 24, 1024, 16, 4096, 1000, 512, 2, 1e-12)
SMALL = EncoderConfig("bert", 2, 64, 2, 96, 50, 64, 2, 1e-12)


@dataclass(frozen=True)
class Entry:
    precision: str
    recipe: Any = None


@dataclass(frozen=True)
class RandomPlan:
    """What a session reads of a plan."""

    sites: dict[str, Entry]

    def precision(self, site: str) -> str:
        entry = self.sites.get(site)
        return entry.precision if entry else "fp32"


def plan_of(kinds: dict[str, str], layers: int) -> RandomPlan:
    return RandomPlan({f"layer.{i}.{s}": Entry(p) for i in range(layers) for s, p in kinds.items()})


PLANS = {
    "float fp32": dict.fromkeys(SITES, "fp32"),
    "float fp16": dict.fromkeys(SITES, "fp16"),
    "ffn_only int8, rest fp16": {
        **dict.fromkeys(SITES, "fp16"),
        "ffn_in": "int8",
        "ffn_out": "int8",
    },
    "full int8": dict.fromkeys(SITES, "int8"),
}
FP8_PLANS = {
    "full fp8, rest fp16": {**PLANS["float fp16"], **dict.fromkeys(GEMM_SITES, "fp8")},
    "fp8, rest fp32": dict.fromkeys(GEMM_SITES, "fp8"),
    "fp8 and int8, rest fp16": {
        **PLANS["ffn_only int8, rest fp16"],
        "qkv": "fp8",
        "out": "fp8",
    },
}
# Largest and mean difference from float64 in states of size 1 to 4, by what the plan holds. fp8
# beside a float of 16 bits: values fall to the neighbouring e4m3 number, a step of an eighth.
MOST = {
    "fp32": (2e-5, 2e-5),
    "fp16": (2e-2, 2e-2),
    "int8": (0.3, 0.3),
    "fp8": (0.5, 0.06),
}


def plans_of(b: CudaBackend) -> dict[str, dict[str, str]]:
    """Those that this GPU has the precisions for."""
    return {**PLANS, **(FP8_PLANS if has("fp8", b.device().sm) else {})}


def random_tensors(config: EncoderConfig, plan: RandomPlan, seed: int = 0) -> dict[str, Any]:
    """Random weights of a size that keeps activations of size 1, quantized as the plan says."""
    rng = np.random.default_rng(seed)
    h, f = config.hidden, config.ffn

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    found: dict[str, Any] = {
        "embeddings.word": normal(config.vocab, h),
        "embeddings.position": normal(config.positions, h),
        "embeddings.type": normal(config.types, h),
    }
    shapes = {"qkv": (3 * h, h), "out": (h, h), "ffn_in": (f, h), "ffn_out": (h, f)}
    norms = ["embeddings.ln"]
    for i in range(config.layers):
        norms += [f"layer.{i}.attention_ln", f"layer.{i}.output_ln"]
        for site, (n, k) in shapes.items():
            name = f"layer.{i}.{site}"
            weight = normal(n, k, scale=1 / math.sqrt(k))
            found[f"{name}.bias"] = normal(n, scale=0.1)
            kind = plan.precision(name)
            if kind in LARGEST:
                scale = np.abs(weight).max(axis=1) / np.float32(LARGEST[kind])
                steps = weight / scale[:, None]
                weight = to_e4m3(steps) if kind == "fp8" else np.rint(steps).astype(np.int8)
                found[f"{name}.weight_scale"] = scale
                found[f"{name}.input_scale"] = np.array([4 / LARGEST[kind]], np.float32)
            found[f"{name}.weight"] = weight
        scales = {
            "scores.q": 4 / 127,
            "scores.k": 4 / 127,
            "context.p": 1 / 127,
            "context.v": 4 / 127,
        }
        for part, value in scales.items():
            found[f"layer.{i}.{part}_scale"] = np.array([value], np.float32)
    for name in norms:
        found[f"{name}.weight"] = normal(h, scale=0.1) + 1
        found[f"{name}.bias"] = normal(h, scale=0.1)
    return found


def batch_of(config: EncoderConfig, lengths: list[int], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, config.vocab, n).astype(np.int32) for n in lengths]
    return pack_batch(ids, [np.zeros(n, np.int32) for n in lengths])


# Checks against the reference. Outputs stand in memory that was filled with NaN.


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
    rng = np.random.default_rng(time.time_ns())
    counts = [3, 70, 1, 64] if small else [384, 1, 65, 128, 17, 511]
    bounds = np.cumsum([0, *counts]).astype(np.int32)
    scales = {"q": 0.03, "k": 0.03, "v": 0.03, "p": 1 / 127}
    kinds = [("fp32", "fp32"), ("int8", "fp32"), ("fp32", "int8")]
    kinds += [(s, c) for s in ("fp16", "int8") for c in ("fp16", "int8")]
    for dim in (32, 64):
        heads = 2
        qkv = rng.standard_normal((sum(counts), 3 * heads * dim)).astype(np.float16)
        bias = rng.standard_normal((heads, 2 * 512 - 1)).astype(np.float32)
        for precisions in kinds:
            more: Any = {"precisions": precisions, "scales": scales, "out": Out()}
            more["position_bias"] = b.array(bias)
            args = (b.array(qkv.astype(np.float32)), bounds, max(counts), heads)
            y = b.attention(*args, **more)
            more["precisions"] = tuple("fp32" if p == "fp16" else p for p in precisions)
            more["position_bias"] = bias
            wanted = REFERENCE.attention(qkv.astype(np.float64), *args[1:], **more)
            off = np.abs(b.to_host(y) - wanted)
            most = {"fp32": 1e-5, "fp16": 1e-2, "int8": 4e-3}[precisions[1]]
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


def base_plans(b: CudaBackend) -> dict[str, tuple[RandomPlan, dict[str, Any]]]:
    """SAMP's table over BERT-base's shape: each plan and weights for it."""
    timed = {k: v for k, v in plans_of(b).items() if k in (*PLANS, "full fp8, rest fp16")}
    plans = {name: plan_of(kinds, BASE.layers) for name, kinds in timed.items()}
    return {name: (plan, random_tensors(BASE, plan)) for name, plan in plans.items()}


def large_plan(name: str) -> tuple[RandomPlan, dict[str, Any]]:
    """One of PLANS over BERT-large's shape, and weights for it."""
    plan = plan_of(PLANS[name], LARGE.layers)
    return plan, random_tensors(LARGE, plan)


def near_reference(report: Report, b: CudaBackend, name: str, plan: RandomPlan) -> None:
    """States of a small encoder, of size 1 to 4; fp16 is fp32 to the reference."""
    from samp_core.encoder import LoopSession

    floats = {s: Entry("fp32") if e.precision == "fp16" else e for s, e in plan.sites.items()}
    tensors, batch = random_tensors(SMALL, plan), batch_of(SMALL, [7, 1, 30])
    other: Any = RandomPlan(floats)
    wanted = LoopSession(REFERENCE, SMALL, tensors, other).run(batch, output="tokens")
    got = CudaSession(b, SMALL, tensors, plan, max_tokens=64).run(batch, output="tokens")
    used = {entry.precision for entry in plan.sites.values()}
    most, mean = MOST[next(kind for kind in ("fp8", "int8", "fp16", "fp32") if kind in used)]
    off = np.abs(got - wanted)
    fine = bool(off.max() <= most and off.mean() <= mean)
    said = f"{off.max():.1e}, at most {most:g}; in the mean {off.mean():.1e}, {mean:g}"
    report.check(f"encoder, {name}, reference", fine, said)


def check_encoder(report: Report, b: CudaBackend, small: bool) -> None:
    """Graph equals eager, alone equals in a batch, bit for bit; a small one near the reference."""
    for name, kinds in plans_of(b).items():
        near_reference(report, b, name, plan_of(kinds, SMALL.layers))
        config = SMALL if small else BASE
        plan = plan_of(kinds, config.layers)
        tensors = random_tensors(config, plan)
        session = CudaSession(b, config, tensors, plan, max_tokens=64 if small else 1024)
        lengths = [7, 1, 30] if small else [128, 1, 77, 384]
        batch = batch_of(config, lengths)
        for output in ("first", "mean", "tokens"):
            y = session.run(batch, output=output)  # type: ignore[arg-type]
            fine = bool(np.isfinite(y).all())
            eager = session.run_eagerly(batch, output)  # type: ignore[arg-type]
            fine &= bool(np.array_equal(y, eager))
            report.check(f"encoder, {name}, {output}", fine, "graph equals eager")
        y, begin = session.run(batch), 0
        for i, n in enumerate(lengths):
            rows = slice(begin, begin + n)
            alone = pack_batch([batch.ids[rows]], [batch.types[rows]])
            fine = bool(np.array_equal(session.run(alone)[0], y[i]))
            report.check(f"encoder, {name}, sequence {i}", fine, "alone equals in a batch")
            begin += n
