"""Times for gpu_check.py: our kernels beside torch's on one GPU, CUDA events, L2 flushed, medians.

It has never run on hardware.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_import
import numpy as np
from gpu_report import run
from gpu_torch import FLUSH, ROUNDS

# What BERT's products do with their sums: bias, and this.
EPILOGUES = {"qkv": "", "out": "residual", "ffn_in": "gelu", "ffn_out": "residual"}
STEP = 0.05  # of a quantized output
# The same for int32 sums of cuBLASLt as one element-wise kernel.
FINISH = {
    "": ("float16 y", "y = sum * scale + bias"),
    "residual": ("float16 y", "y = sum * scale + bias + static_cast<float>(rest)"),
    "gelu": (
        "int8 y",
        "float v = sum * scale + bias;"
        f"v = {0.5 / STEP}f * v * (1.0f + erff(v * 0.70710678f));"
        "y = static_cast<signed char>(rintf(fminf(fmaxf(v, -127.0f), 127.0f)))",
    ),
}
SITES = {"qkv": (2304, 768), "out": (768, 768), "ffn_in": (3072, 768), "ffn_out": (768, 3072)}


def device_facts() -> dict[str, Any]:
    import cupy

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"]
    return {
        "device": name.decode() if isinstance(name, bytes) else str(name),
        "driver": runtime.driverGetVersion(),
        "versions": {"cupy": cupy.__version__, "numpy": np.__version__, "torch": torch_version()},
        "commit": gpu_import.commit(),
    }


def torch_version() -> str:
    """Not by importing it, which takes seconds; "" where it is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def short_name(facts: dict[str, Any]) -> str:
    return "-".join(str(facts.get("device", "gpu")).lower().split())


def timed(stream: Any, call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median microseconds of `call`, which launches on `stream`, from a cold L2."""
    import cupy

    memory = cupy.cuda.alloc(FLUSH)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for turn in range(rounds + 5):
        memory.memset_async(turn % 251, FLUSH, stream)
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
    return float(statistics.median(times[5:]))


def time_gemms(
    report: Any,
    b: Any,
    counts: Sequence[int] = (128, 1024, 4096),
    sites: Mapping[str, tuple[int, int]] = SITES,
) -> None:
    """Every tile and split of BERT-base's products with their epilogues: what tiles.py chose, and
    what was fastest. Also tiles that it may not choose, floats' of mma.sync on sm_90a: which family
    is worth it."""
    from samp_kernels.cuda import checks, ops
    from samp_kernels.cuda.formats import has
    from samp_kernels.cuda.tiles import ALL_TILES, TILES, Choice, Product, choose
    from samp_kernels.interface import CODES, Weight

    rng, stream, rows_found = np.random.default_rng(0), b.launcher.stream, []
    for rows in counts:
        for site, (n, k) in sites.items():
            if report.left() < 8:
                print("     products: the rest is left out, out of time", flush=True)
                break
            for precision in ("int8", "fp16", *(["fp8"] if has("fp8", b.device().sm) else [])):
                scale = np.ones(n, np.float32) if precision in CODES else None
                weight = rng.integers(-127, 127, (n, k))  # As codes of e4m3: no NaN.
                typed = weight.astype(CODES.get(precision, np.float32))
                packed = b.pack(Weight(typed, scale), precision)
                x = b.array(rng.integers(-127, 127, (rows, k)), precision)
                ends = EPILOGUES[site]
                narrow = ends == "gelu" and precision in CODES
                bias, out = b.array(np.zeros(n)), b.empty(rows, n, precision if narrow else "fp16")
                more: dict[str, Any] = {"out_scale": STEP}
                if scale is not None:
                    more["column_scale"] = b.array(scale)
                if ends == "gelu":
                    more["act"] = "gelu"
                if ends == "residual":
                    more["residual"] = b.array(np.zeros((rows, n)), "fp16")
                device, times = checks.with_workspace(b, rows, n), {}
                tiled, small = packed.tiled is not None, precision == "int8" and rows <= 1024
                for tile in ALL_TILES if tiled else TILES:
                    for splits in (1, 2, 4) if small and tile in TILES else (1,):
                        choice = Choice(tile, splits)
                        one = ops.gemm(device, x, packed, bias, out, choice=choice, **more)
                        call = _launcher(b, one)
                        times[f"{tile}/{splits}"] = timed(stream, call, 10)
                each = 1 if precision in CODES else 2
                product = Product(rows, ops.padded(n), k * each, precision)
                chosen = choose(product, device.sm, device.multiprocessors, tiled=tiled)
                best = min(times, key=lambda name: times[name])
                peer, whole = _torch_product(precision, rows, n, k, ends)
                name = f"{chosen.tile}/{chosen.splits}"
                us = times.get(name)
                row = {
                    "precision": precision, "rows": rows, "site": site, "us": us,
                    "chosen": name, "best": best, "best_us": times[best], "torch_us": peer,
                    "torch_with_epilogue_us": whole, "ratio": whole / us if whole and us else None,
                    "tera_ops": 2e-6 * rows * n * k / times[best],
                }  # fmt: skip
                rows_found.append(row)
                print(
                    f"     {precision} {rows}x{k}x{n}: {us or math.nan:.1f} us {name}, "
                    f"best {times[best]:.1f} {best}, torch {peer or math.nan:.1f}, "
                    f"with what our epilogue does {whole or math.nan:.1f}",
                    flush=True,
                )
    report.note("gemms", rows_found)


def _launcher(b: Any, one: Any) -> Callable[[], None]:
    return lambda: b.launcher.launch(one)


def _torch_product(
    precision: str, rows: int, n: int, k: int, ends: str
) -> tuple[float | None, float | None]:
    """Microseconds of cuBLASLt by torch: the product alone, and with what our epilogue does.

    int8 is _int_mm, whose int32 sums one fused element-wise kernel of CuPy then takes; fp8 is
    _scaled_mm of e4m3, fp16 addmm, both with the bias in their own epilogue and torch's kernel for
    the rest. fp8 behind a GELU stays fp16: torch has no one kernel for both.
    """
    try:
        import cupy
        import torch
    except ImportError:
        return None, None
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    bias = torch.zeros(n, device="cuda", dtype=torch.float16)
    rest = torch.zeros(rows, n, device="cuda", dtype=torch.float16)
    if precision == "int8":
        x = torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8)
        w = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        given = "int32 sum, float32 scale, float32 bias, float16 rest"
        finish = cupy.ElementwiseKernel(given, *FINISH[ends], f"finish_{ends}")
        scale, added = cupy.ones(n, cupy.float32), cupy.zeros(n, cupy.float32)
        out = cupy.empty((rows, n), cupy.int8 if ends == "gelu" else cupy.float16)
        other = cupy.from_dlpack(rest)

        def whole() -> None:
            with stream:
                finish(cupy.from_dlpack(torch._int_mm(x, w.T)), scale, added, other, out)

        return timed(stream, lambda: torch._int_mm(x, w.T), 10), timed(stream, whole, 10)

    def ended(y: Any) -> Any:
        if ends == "gelu":
            return torch.nn.functional.gelu(y)
        return y + rest if ends == "residual" else y

    a = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    c = torch.randn(n, k, device="cuda", dtype=torch.float16)
    if precision == "fp8":
        x8, w8 = a.to(torch.float8_e4m3fn), c.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        scaled = {"scale_a": one, "scale_b": one, "out_dtype": torch.float16}
        try:
            return (
                timed(stream, lambda: torch._scaled_mm(x8, w8.T, **scaled), 10),
                timed(stream, lambda: ended(torch._scaled_mm(x8, w8.T, bias=bias, **scaled)), 10),
            )
        except (RuntimeError, TypeError) as error:  # A private function, whose form has changed.
            print(f"     torch._scaled_mm: {error}"[:200], flush=True)
            return None, None
    return (
        timed(stream, lambda: a @ c.T, 10),
        timed(stream, lambda: ended(torch.addmm(bias, a, c.T)), 10),
    )


def time_encoders(
    report: Any,
    b: Any,
    config: Any,
    makers: dict[str, tuple[Any, dict[str, Any]]],
    cases: dict[str, list[int]],
) -> None:
    """SAMP's table: each plan in each case, the graph on the device and `run` as called. All of
    ours first, then torch while there is time."""
    from samp_kernels.cuda.session import CudaSession

    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    packs: dict[str, Any] = {name: {} for name in makers}
    for case, lengths in cases.items():
        batch = _batch_of(rng, config, lengths)
        row: dict[str, Any] = {"case": case, "tokens": batch.tokens, "lengths": lengths}
        for name, (plan, tensors) in makers.items():
            most, own = batch.tokens, packs[name]
            session = CudaSession(b, config, tensors, plan, max_tokens=most, packs=own)
            row[f"{name}, graph us"] = _graph_us(b, session, batch)
            walls = []
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                session.run(batch)
                walls.append(time.perf_counter() - begun)
            row[f"{name}, run us"] = statistics.median(walls) * 1e6
            if case == "8 x 128":
                spent = sorted(session.profile(batch), key=lambda one: -one[2])[:8]
                row[f"{name}, longest"] = [(op, site, s * 1e6) for op, site, s in spent]
            session.close()
        found.append(row)
        report.note("encoders", found)
    peers = torch_times(config, cases, report.left() - 10)
    for row in found:
        row |= peers[row["case"]]
        row |= ratios(row)
        times = [f"{k} {v:.0f}" for k, v in row.items() if k.endswith("us") and _is_time(v)]
        shown = ", ".join([*times, *(f"{k} {v:.2f}" for k, v in row.items() if " / " in k)])
        print(f"     {row['case']}: {shown}", flush=True)
    report.note("encoders", found)


def _is_time(value: Any) -> bool:
    return isinstance(value, float)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """torch.compile's least time over each plan's, on the device; wanted: int8 1.5, 2 on real
    lengths, fp16 1."""
    peers = [us for k, us in row.items() if k.startswith("torch.compile") and _is_time(us)]
    ours = {key.removesuffix(", graph us"): us for key, us in row.items() if "graph us" in key}
    return {f"torch.compile / {name}": min(peers) / us for name, us in ours.items() if peers}


def torch_times(
    config: Any, cases: dict[str, list[int]], seconds: float
) -> dict[str, dict[str, Any]]:
    """What gpu_torch.py found of each case until it was stopped."""
    if importlib.util.find_spec("torch") is None:
        return {case: {"torch": "not installed"} for case in cases}
    sizes = {"layers": config.layers, "hidden": config.hidden, "ffn": config.ffn}
    work = json.dumps({**sizes, "heads": config.heads, "cases": cases})
    script = str(Path(__file__).with_name("gpu_torch.py"))
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        command = [sys.executable, script, "--part", str(part), "--work", work]
        code, said = run(command, seconds)
        found = json.loads(part.read_text(encoding="utf-8")) if part.is_file() else {}
    if code != 0:
        why = "stopped, out of time" if code is None else f"ended with {code}: {said[-300:]}"
        print(f"     torch: {why}", flush=True)
        found = {case: {**found.get(case, {}), "torch": why} for case in cases}
    whole: dict[str, dict[str, Any]] = found
    return whole


def time_large(
    report: Any, b: Any, config: Any, make: Callable[[str], Any], cases: dict[str, list[int]]
) -> None:
    """Ours in int8 and fp16, then torch. `make` gives a plan's name its plan and weights."""
    from samp_kernels.cuda.session import CudaSession

    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for name in ("full int8", "float fp16"):
        if report.left() < 20:
            report.skip(f"large times, {name}", "out of time")
            continue
        plan, tensors = make(name)
        packs: dict[Any, Any] = {}
        for case, lengths in cases.items():
            batch = _batch_of(rng, config, lengths)
            most = batch.tokens
            session = CudaSession(b, config, tensors, plan, max_tokens=most, packs=packs)
            us = _graph_us(b, session, batch)
            session.close()
            row = {"plan": name, "case": case, "tokens": batch.tokens, "graph us": us}
            found.append({**row, "sequences/s": 1e6 * len(lengths) / us})
            report.note("large", found)
            print(f"     BERT-large {name}, {case}: {us:.0f} us", flush=True)
    if report.left() < 20:
        report.skip("large times, torch", "out of time")
        return
    peers = torch_times(config, cases, report.left() - 10)
    report.note("large peers", peers)
    for row in found:
        best = ratios({**peers[row["case"]], f"{row['plan']}, graph us": row["graph us"]})
        row |= best
        for name, ratio in best.items():
            print(f"     BERT-large {row['case']}: {name} {ratio:.2f}", flush=True)
    report.note("large", found)


def _batch_of(rng: Any, config: Any, lengths: list[int]) -> Any:
    from samp_kernels.interface import pack_batch

    ids = [rng.integers(0, config.vocab, n).astype(np.int32) for n in lengths]
    return pack_batch(ids, [np.zeros(n, np.int32) for n in lengths])


def _graph_us(b: Any, session: Any, batch: Any) -> float:
    """Median microseconds of the batch's graph on the device."""
    session.run(batch)
    return timed(b.launcher.stream, session._send(batch, "first").replay)
