"""A whole encoder on the CUDA kernels beside the reference: `make gpu-check`, and the short check
that backend `auto` makes once on a GPU (gpu_proof.py). Weights are random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.cuda.checks import REFERENCE, Report
from samp_kernels.cuda.formats import has
from samp_kernels.cuda.room import HALVES
from samp_kernels.cuda.session import CudaSession
from samp_kernels.e4m3 import to_e4m3
from samp_kernels.interface import (
    GEMM_SITES,
    LARGEST,
    SITES,
    Array,
    EncoderConfig,
    OutputKind,
    pack_batch,
)

from samp_core.encoder import LoopSession

SMALL = EncoderConfig("bert", 2, 64, 2, 96, 50, 64, 2, 1e-12)
WIDE = EncoderConfig("bert", 1, 768, 12, 3072, 50, 512, 2, 1e-12)
OUTPUTS: tuple[OutputKind, ...] = ("first", "mean", "tokens")


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
BF16_PLANS = {"float bf16": dict.fromkeys(SITES, "bf16")}
FP8_PLANS = {
    "full fp8, rest fp16": {**PLANS["float fp16"], **dict.fromkeys(GEMM_SITES, "fp8")},
    "fp8, rest fp32": dict.fromkeys(GEMM_SITES, "fp8"),
    "fp8 and int8, rest fp16": {
        **PLANS["ffn_only int8, rest fp16"],
        "qkv": "fp8",
        "out": "fp8",
    },
}
# Largest and mean difference from float64 in states of size 1 to 4, by what the plan holds, the
# first that is there. fp8 beside a float of 16 bits: values fall to the neighbouring e4m3 number, a
# step of an eighth.
MOST = {
    "fp8": (0.5, 0.06),
    "int8": (0.3, 0.3),
    "bf16": (0.15, 0.15),
    "fp16": (2e-2, 2e-2),
    "fp32": (2e-5, 2e-5),
}


def plans_of(b: CudaBackend) -> dict[str, dict[str, str]]:
    """Those that this GPU has the precisions for."""
    sm = b.device().sm
    newer = {"bf16": BF16_PLANS, "fp8": FP8_PLANS}
    return {**PLANS, **{n: k for p, plans in newer.items() if has(p, sm) for n, k in plans.items()}}


@lru_cache(maxsize=1)
def float_tensors(config: EncoderConfig, seed: int = 0) -> dict[str, Array]:
    """Random weights of a size that keeps activations of size 1."""
    rng = np.random.default_rng(seed)
    h, f = config.hidden, config.ffn

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    found = {
        "embeddings.word": normal(config.vocab, h),
        "embeddings.position": normal(config.positions, h),
        "embeddings.type": normal(config.types, h),
    }
    shapes = {"qkv": (3 * h, h), "out": (h, h), "ffn_in": (f, h), "ffn_out": (h, f)}
    norms = ["embeddings.ln"]
    for i in range(config.layers):
        norms += [f"layer.{i}.attention_ln", f"layer.{i}.output_ln"]
        for site, (n, k) in shapes.items():
            found[f"layer.{i}.{site}.weight"] = normal(n, k, scale=1 / math.sqrt(k))
            found[f"layer.{i}.{site}.bias"] = normal(n, scale=0.1)
    for name in norms:
        found[f"{name}.weight"] = normal(h, scale=0.1) + 1
        found[f"{name}.bias"] = normal(h, scale=0.1)
    return found


def random_tensors(config: EncoderConfig, plan: RandomPlan) -> dict[str, Array]:
    """The same weights for every plan, quantized as it says, with scales for states of size 1."""
    found = dict(float_tensors(config))
    for i in range(config.layers):
        for site in GEMM_SITES:
            name = f"layer.{i}.{site}"
            kind = plan.precision(name)
            if kind in LARGEST:
                weight = found[f"{name}.weight"]
                scale = np.abs(weight).max(axis=1) / np.float32(LARGEST[kind])
                steps = weight / scale[:, None]
                narrow = to_e4m3(steps) if kind == "fp8" else np.rint(steps).astype(np.int8)
                found[f"{name}.weight"] = narrow
                found[f"{name}.weight_scale"] = scale
                found[f"{name}.input_scale"] = np.array([4 / LARGEST[kind]], np.float32)
        scales = {"scores.q": 4 / 127, "scores.k": 4 / 127, "context.p": 1 / 127}
        scales["context.v"] = 4 / 127
        for part, value in scales.items():
            found[f"layer.{i}.{part}_scale"] = np.array([value], np.float32)
    return found


def batch_of(config: EncoderConfig, lengths: list[int], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, config.vocab, n).astype(np.int32) for n in lengths]
    return pack_batch(ids, [np.zeros(n, np.int32) for n in lengths])


def check_near(report: Report, b: CudaBackend, small: bool) -> None:
    """States of a small encoder, and but for `small` of a layer of BERT-base's width."""
    for name, kinds in plans_of(b).items():
        for config, lengths in ((SMALL, [7, 1, 30]), (WIDE, [128, 1, 77, 384])):
            if config is SMALL or not small:
                near_reference(report, b, name, plan_of(kinds, config.layers), config, lengths)


def near_reference(
    report: Report,
    b: CudaBackend,
    name: str,
    plan: RandomPlan,
    config: EncoderConfig,
    lengths: list[int],
) -> None:
    """States of size 1 to 4; floats of 16 bits are fp32 to the reference."""
    floats = {s: Entry("fp32") if e.precision in HALVES else e for s, e in plan.sites.items()}
    tensors, batch = random_tensors(config, plan), batch_of(config, lengths)
    other: Any = RandomPlan(floats)
    wanted = LoopSession(REFERENCE, config, tensors, other).run(batch, output="tokens")
    session = CudaSession(b, config, tensors, plan, max_tokens=batch.tokens, packs={})
    got = session.run(batch, output="tokens")
    used = {entry.precision for entry in plan.sites.values()}
    most, mean = MOST[next(kind for kind in MOST if kind in used)]
    off = np.abs(got - wanted)
    fine = bool(off.max() <= most and off.mean() <= mean)
    said = f"{off.max():.1e}, at most {most:g}; in the mean {off.mean():.1e}, {mean:g}"
    report.check(f"encoder of {config.hidden}, {name}, reference", fine, said)


def check_session(report: Report, b: CudaBackend, config: EncoderConfig, most: int) -> None:
    """Graph equals eager, alone equals in a batch, bit for bit; buffers for `most` tokens."""
    for name, kinds in plans_of(b).items():
        plan = plan_of(kinds, config.layers)
        tensors = random_tensors(config, plan)
        session = CudaSession(b, config, tensors, plan, max_tokens=most)
        lengths = [7, 1, 30] if most < 600 else [128, 1, 77, 384]
        batch = batch_of(config, lengths)
        for output in OUTPUTS:
            y = session.run(batch, output=output)
            fine = bool(np.isfinite(y).all())
            fine &= bool(np.array_equal(y, session.run_eagerly(batch, output)))
            report.check(f"encoder, {name}, {output}", fine, "graph equals eager")
        y, begin = session.run(batch), 0
        for i, n in enumerate(lengths):
            rows = slice(begin, begin + n)
            alone = pack_batch([batch.ids[rows]], [batch.types[rows]])
            fine = bool(np.array_equal(session.run(alone)[0], y[i]))
            report.check(f"encoder, {name}, sequence {i}", fine, "alone equals in a batch")
            begin += n
