"""Our int8 GEMM by itself at an encoder's shapes, epilogue included, against the machine's limits.

Each product is timed in two ways. Alone: the backend's `gemm`, called again and again; at few
tokens over so many copies of the weight that each is read from memory. A backend may run a single
op on one thread: the limit is then that of the cores that really worked. In the encoder: what the
session's own `profile` says of it, on all threads, where all weights of the model pass through.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import encoder_models
import limits
import machine
import numpy as np
from samp_kernels.interface import Backend, Batch, EncoderConfig, Out, Session, Weight

TOKENS = (8, 128, 1024)
# Up to this many tokens a product is bound by reading its weight.
FEW = 8
TARGETS = {"vnni_gops": 0.80, "gbps": 0.70}
# Above a CPU's vector peak there is, where it has tiles (AMX), theirs: given beside, no target.
TILES = 1.2
LONGEST = 128


def shapes(config: EncoderConfig) -> dict[str, tuple[int, int]]:
    """site -> (outputs, inputs)."""
    h, f = config.hidden, config.ffn
    return {"qkv": (3 * h, h), "out": (h, h), "ffn_in": (f, h), "ffn_out": (h, f)}


def rows(
    model: encoder_models.Model,
    backend: Backend,
    session: Session,
    found: Mapping[int, Mapping[str, float]],
    seconds: float,
    progress: Callable[[], None],
) -> list[dict[str, Any]]:
    """One row for each site and number of tokens, and one for all four together.

    found: threads -> limits; the largest number of threads is the session's.
    """
    made: list[dict[str, Any]] = []
    config = model.checkpoint.config
    for tokens in TOKENS:
        inside = _in_encoder(session, config, tokens, seconds)
        cache = limits.last_level_cache() if tokens <= FEW else 0
        parts = []
        for site, (outputs, inputs) in shapes(config).items():
            copies = max(1, math.ceil(2 * cache / (outputs * inputs)))
            alone, cores = _alone(backend, site, outputs, inputs, tokens, copies, seconds)
            parts.append(
                Part(
                    site, alone, min(cores, max(found)), inside[site],
                    2.0 * tokens * outputs * inputs, float(outputs * inputs), copies > 1,
                )
            )  # fmt: skip
            progress()
        made += [_row(model.name, tokens, part, found) for part in (*parts, _together(parts))]
    return made


@dataclass(frozen=True)
class Part:
    """One product at one number of tokens: its times, and its work."""

    site: str
    alone_ms: Mapping[str, float]
    cores: int
    inside_ms: float
    operations: float
    weight_bytes: float
    cold: bool


def _together(parts: Sequence[Part]) -> Part:
    median = sum(part.alone_ms["median"] for part in parts)
    return Part(
        "all four",
        {"median": round(median, 4)},
        parts[0].cores,
        sum(part.inside_ms for part in parts),
        sum(part.operations for part in parts),
        sum(part.weight_bytes for part in parts),
        parts[0].cold,
    )


def _row(
    model: str, tokens: int, part: Part, found: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    limit, amount = ("vnni_gops", part.operations)
    if tokens <= FEW:
        limit, amount = ("gbps", part.weight_bytes)
    row: dict[str, Any] = {
        "model": model,
        "what": "gemm",
        "site": part.site,
        "batch": 1,
        "tokens": tokens,
        "precision": "int8",
        "ours_ms": dict(part.alone_ms),
        "cores": part.cores,
        "weights": "cold" if part.cold else "warm",
        "in_encoder_ms": round(part.inside_ms, 4),
        "limit": limit,
        "targets": {},
    }
    shares = {
        "share_of_limit": (part.cores, part.alone_ms["median"]),
        "share_in_encoder": (max(found), part.inside_ms),
    }
    for name, (threads, milliseconds) in shares.items():
        if limit in found[threads]:
            share = round(amount / 1e6 / found[threads][limit] / milliseconds, 4)
            met = share >= TARGETS[limit]
            row[name] = share
            row["targets"][name] = {"wanted": TARGETS[limit], "found": share, "met": met}
            tiles = found[threads]["int8_gops"] / found[threads]["vnni_gops"]
            if limit == "vnni_gops" and tiles > TILES:
                row[f"{name}_tiles"] = round(share / tiles, 4)
    return row


def _alone(
    backend: Backend,
    site: str,
    outputs: int,
    inputs: int,
    tokens: int,
    copies: int,
    seconds: float,
) -> tuple[dict[str, float], int]:
    """Milliseconds of one call, from the time of a round over all copies, and the cores at work."""
    rng = np.random.default_rng(outputs + inputs)
    integers = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    weight = Weight(integers, np.full(outputs, 0.001, dtype=np.float32))
    packed = [backend.pack(weight, "int8") for _ in range(copies)]
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    quantized = backend.quantize(backend.array(x), Out("int8", 0.03))
    bias = backend.array(np.zeros(outputs, dtype=np.float32))
    epilogue: dict[str, Any] = {"out": Out()}
    if site == "ffn_in":
        epilogue = {"act": "gelu", "out": Out("int8", 0.05)}
    elif site in ("out", "ffn_out"):
        residual = rng.standard_normal((tokens, outputs)).astype(np.float32)
        epilogue["residual"] = backend.array(residual)
    times: list[float] = []
    calls = max(1, 16 // copies)
    cpu, begin = time.process_time(), time.perf_counter()
    deadline = time.perf_counter() + seconds
    for turn in range(10_000):
        begun = time.perf_counter()
        for _ in range(calls):
            for each in packed:
                backend.gemm(quantized, each, bias, **epilogue)
        passed = 1000 * (time.perf_counter() - begun) / (calls * copies)
        if turn:  # the first round warms up
            times.append(passed)
        if time.perf_counter() > deadline and len(times) >= 3:
            break
    cores = (time.process_time() - cpu) / (time.perf_counter() - begin)
    return machine.quantiles(times, digits=4), max(1, round(cores))


def _in_encoder(
    session: Session, config: EncoderConfig, tokens: int, seconds: float
) -> dict[str, float]:
    """site -> milliseconds in a pass, the median over layers and passes.

    Without the last layer: behind its attention only the rows that are pooled go on.
    """
    length = min(tokens, LONGEST)
    ids = [np.full(length, 1000 + row, dtype=np.int32) for row in range(tokens // length)]
    batch: Batch = encoder_models.Inputs("", tuple(ids)).batch()
    found: dict[str, list[float]] = {site: [] for site in shapes(config)}
    deadline = time.perf_counter() + seconds
    session.profile(batch)
    while time.perf_counter() < deadline or not found["out"]:
        for op, name, passed in session.profile(batch):
            _, _, rest = name.partition(".")
            layer, _, site = rest.partition(".")
            if op == "gemm" and site in found and int(layer) + 1 < config.layers:
                found[site].append(1000 * passed)
    return {site: statistics.median(times) for site, times in found.items()}
