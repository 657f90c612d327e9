"""Times for gpu_check.py: our kernels beside torch's on one GPU, CUDA events, L2 flushed, medians.

It has never run on hardware.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_shapes import real_lengths

FLUSH = 256 << 20  # bytes written before each timed call; more than any L2
ROUNDS = 30
SITES = {"qkv": (2304, 768), "out": (768, 768), "ffn_in": (3072, 768), "ffn_out": (768, 3072)}


def device_facts(root: Path) -> dict[str, Any]:
    import cupy

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "device": name.decode() if isinstance(name, bytes) else str(name),
        "driver": runtime.driverGetVersion(),
        "cupy": cupy.__version__,
        "commit": commit.stdout.strip(),
    }


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


def time_gemms(report: Any, b: Any) -> None:
    """Every tile and split of BERT-base's products: what tiles.py chose, and what was fastest. Also
    tiles that it may not choose, floats' of mma.sync on sm_90a: which family is worth it."""
    from samp_kernels.cuda import ops
    from samp_kernels.cuda.formats import has
    from samp_kernels.cuda.tiles import ALL_TILES, TILES, Choice, Product, choose, room_for
    from samp_kernels.interface import CODES, Weight

    rng, stream, rows_found = np.random.default_rng(0), b.launcher.stream, []
    for rows in (128, 1024, 4096):
        for site, (n, k) in SITES.items():
            if report.left() < 8:
                print("     products: the rest is left out, out of time", flush=True)
                break
            for precision in ("int8", "fp16", *(["fp8"] if has("fp8", b.device().sm) else [])):
                scale = np.ones(n, np.float32) if precision in CODES else None
                weight = rng.integers(-127, 127, (n, k))  # As codes of e4m3: no NaN.
                typed = weight.astype(CODES.get(precision, np.float32))
                packed = b.pack(Weight(typed, scale), precision)
                x = b.array(rng.integers(-127, 127, (rows, k)), precision)
                bias, out = b.array(np.zeros(n)), b.empty(rows, n, "fp16")
                columns = None if scale is None else b.array(scale)
                sums, counters = room_for(rows, ops.padded(n))
                space = ops.Workspace(
                    b.launcher.allocate(4 * sums), b.launcher.allocate(4 * counters)
                )
                b.launcher.fill(space.counters, 0, 4 * counters)
                device, times = b.device(space), {}
                tiled, small = packed.tiled is not None, precision == "int8" and rows <= 1024
                for tile in ALL_TILES if tiled else TILES:
                    for splits in (1, 2, 4) if small and tile in TILES else (1,):
                        one = ops.gemm(
                            device, x, packed, bias, out,
                            column_scale=columns, choice=Choice(tile, splits),
                        )  # fmt: skip
                        call = _launcher(b, one)
                        times[f"{tile}/{splits}"] = timed(stream, call, 10)
                each = 1 if precision in CODES else 2
                product = Product(rows, ops.padded(n), k * each, precision)
                chosen = choose(product, device.sm, device.multiprocessors, tiled=tiled)
                best = min(times, key=lambda name: times[name])
                peer, whole = _torch_product(precision, rows, n, k)
                name = f"{chosen.tile}/{chosen.splits}"
                row = {
                    "precision": precision, "rows": rows, "site": site, "us": times.get(name),
                    "chosen": name, "best": best, "best_us": times[best], "torch_us": peer,
                    "torch_with_epilogue_us": whole,
                    "tera_ops": 2e-6 * rows * n * k / times[best],
                }  # fmt: skip
                rows_found.append(row)
                print(
                    f"     {precision} {rows}x{k}x{n}: {times.get(name, math.nan):.1f} us {name}, "
                    f"best {times[best]:.1f} {best}, torch {peer or math.nan:.1f}, "
                    f"with what our epilogue does {whole or math.nan:.1f}",
                    flush=True,
                )
    report.note("gemms", rows_found)


def _launcher(b: Any, one: Any) -> Callable[[], None]:
    return lambda: b.launcher.launch(one)


def _torch_product(precision: str, rows: int, n: int, k: int) -> tuple[float | None, float | None]:
    """Microseconds of cuBLASLt by torch: the product alone, and with scale and bias to fp16.

    int8 is _int_mm, whose int32 sums one fused element-wise kernel of CuPy then takes; fp8 is
    _scaled_mm of e4m3, fp16 addmm, both with the bias in their own epilogue.
    """
    try:
        import cupy
        import torch
    except ImportError:
        return None, None
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    bias = torch.zeros(n, device="cuda", dtype=torch.float16)
    if precision == "int8":
        x = torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8)
        w = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        finish = cupy.ElementwiseKernel(
            "int32 sum, float32 scale, float32 bias",
            "float16 y",
            "y = sum * scale + bias",
            "finish",
        )
        scale, added = cupy.ones(n, cupy.float32), cupy.zeros(n, cupy.float32)
        out = cupy.empty((rows, n), cupy.float16)

        def whole() -> None:
            with stream:
                finish(cupy.from_dlpack(torch._int_mm(x, w.T)), scale, added, out)

        return timed(stream, lambda: torch._int_mm(x, w.T), 10), timed(stream, whole, 10)
    a = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    c = torch.randn(n, k, device="cuda", dtype=torch.float16)
    if precision == "fp8":
        x8, w8 = a.to(torch.float8_e4m3fn), c.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        scaled = {"scale_a": one, "scale_b": one, "out_dtype": torch.float16}
        try:
            return (
                timed(stream, lambda: torch._scaled_mm(x8, w8.T, **scaled), 10),
                timed(stream, lambda: torch._scaled_mm(x8, w8.T, bias=bias, **scaled), 10),
            )
        except (RuntimeError, TypeError) as error:  # A private function, whose form has changed.
            print(f"     torch._scaled_mm: {error}"[:200], flush=True)
            return None, None
    return (
        timed(stream, lambda: a @ c.T, 10),
        timed(stream, lambda: torch.addmm(bias, a, c.T), 10),
    )


def time_encoders(
    report: Any,
    b: Any,
    config: Any,
    makers: dict[str, tuple[Any, dict[str, Any]]],
) -> None:
    """SAMP's table: each plan, BERT-base's shape; the graph on the device and `run` as called. Real
    lengths are those of lengths.json."""
    from samp_kernels.cuda.session import CudaSession

    rng = np.random.default_rng(0)
    cases = {"1 x 128": [128], "8 x 128": [128] * 8, "32 x 128": [128] * 32}
    cases["32 film reviews"] = real_lengths("film reviews", 32)
    cases["32 of SQuAD"] = real_lengths("SQuAD 1.1", 32)
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
        report.note("encoders", [*found, row])
        # What is left is shared by the cases to come; compiling takes most of it.
        row |= _torch_encoder(config, lengths, report.left() / (len(cases) - len(found)))
        row |= ratios(row)
        found.append(row)
        report.note("encoders", found)
        times = [f"{k} {v:.0f}" for k, v in row.items() if k.endswith("us") and v]
        shown = ", ".join([*times, *(f"{k} {v:.2f}" for k, v in row.items() if " / " in k)])
        print(f"     {case}: {shown}", flush=True)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """torch.compile's time over each plan's, on the device; wanted: int8 1.5, 2 on real lengths,
    fp16 1."""
    compiled = [us for key, us in row.items() if key.startswith("torch.compile") and us]
    peers = [us for us in compiled if isinstance(us, float)]
    ours = {key.removesuffix(", graph us"): us for key, us in row.items() if "graph us" in key}
    return {f"torch.compile / {name}": min(peers) / us for name, us in ours.items() if peers}


def time_large(report: Any, b: Any, config: Any, make: Callable[[str], Any]) -> None:
    """BERT-large's shape: 384 tokens, and 64 sequences as long as some of SQuAD's; ours alone.
    `make` gives a plan's name its plan and weights."""
    from samp_kernels.cuda.session import CudaSession

    rng = np.random.default_rng(0)
    cases = {"1 x 384": [384], "8 x 384": [384] * 8, "32 x 384": [384] * 32}
    cases["64 of SQuAD"] = real_lengths("SQuAD 1.1", 64)
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


def _batch_of(rng: Any, config: Any, lengths: list[int]) -> Any:
    from samp_kernels.interface import pack_batch

    ids = [rng.integers(0, config.vocab, n).astype(np.int32) for n in lengths]
    return pack_batch(ids, [np.zeros(n, np.int32) for n in lengths])


def _graph_us(b: Any, session: Any, batch: Any) -> float:
    """Median microseconds of the batch's graph on the device."""
    session.run(batch)
    return timed(b.launcher.stream, session._send(batch, "first").replay)


def _torch_encoder(config: Any, lengths: list[int], seconds: float) -> dict[str, Any]:
    """The same encoder in torch fp16, padded, eager and compiled with CUDA graphs."""
    try:
        import cupy
        import torch
        import torch.nn.functional as F
    except ImportError:
        return {"torch": "not installed"}
    h, heads, f = config.hidden, config.heads, config.ffn
    rows, longest = len(lengths), max(lengths)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(h, 3 * h), torch.nn.Linear(h, h)
            self.up, self.down = torch.nn.Linear(h, f), torch.nn.Linear(f, h)
            self.first, self.second = torch.nn.LayerNorm(h), torch.nn.LayerNorm(h)

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = self.qkv(x).view(rows, longest, 3, heads, h // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = self.first(x + self.out(y.transpose(1, 2).reshape(rows, longest, h)))
            return self.second(x + self.down(F.gelu(self.up(x))))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(config.layers))

        def forward(self, x: Any, mask: Any) -> Any:
            for layer in self.layers:
                x = layer(x, mask)
            return x[:, 0]

    model = Encoder().half().cuda().eval()
    x = torch.randn(rows, longest, h, device="cuda", dtype=torch.float16)
    mask = None
    if min(lengths) < longest:
        places = torch.arange(longest, device="cuda")[None, :]
        mask = (places < torch.tensor(lengths, device="cuda")[:, None])[:, None, None, :]
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        found["torch fp16 eager, us"] = timed(stream, lambda: model(x, mask))
        mode = "max-autotune" if seconds > 25 else "reduce-overhead"
        if seconds < 10:
            return {**found, "torch.compile": "left out: out of time"}
        try:
            compiled = torch.compile(model, mode=mode, dynamic=False)
            for _ in range(3):
                compiled(x, mask)
            found[f"torch.compile {mode}, us"] = timed(stream, lambda: compiled(x, mask))
        except Exception as error:
            found["torch.compile"] = f"{type(error).__name__}: {error}"[:300]
    return found
