"""What gpu_check.py times: BERT-base's and BERT-large's shapes under SAMP's modes, and texts of
real lengths (lengths.json, which lengths.py counts)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_import  # noqa: F401  (before samp_kernels)
import numpy as np
from samp_kernels.cuda.backend import CudaBackend
from samp_kernels.interface import EncoderConfig

from samp_core.gpu_checks import PLANS, RandomPlan, plan_of, plans_of, random_tensors

BASE = EncoderConfig("bert", 12, 768, 12, 3072, 1000, 512, 2, 1e-12)
LENGTHS = Path(__file__).with_name("lengths.json")
LARGE = EncoderConfig("bert", 24, 1024, 16, 4096, 1000, 512, 2, 1e-12)


def base_plans(b: CudaBackend) -> dict[str, tuple[RandomPlan, dict[str, Any]]]:
    """SAMP's table over BERT-base's shape: each plan and weights for it."""
    timed = {k: v for k, v in plans_of(b).items() if k in (*PLANS, "full fp8, rest fp16")}
    plans = {name: plan_of(kinds, BASE.layers) for name, kinds in timed.items()}
    return {name: (plan, random_tensors(BASE, plan)) for name, plan in plans.items()}


def large_plan(name: str) -> tuple[RandomPlan, dict[str, Any]]:
    """One of PLANS over BERT-large's shape, and weights for it."""
    plan = plan_of(PLANS[name], LARGE.layers)
    return plan, random_tensors(LARGE, plan)


def base_cases() -> dict[str, list[int]]:
    """Lengths of the texts of each case of BERT-base."""
    cases = {"1 x 128": [128], "8 x 128": [128] * 8, "32 x 128": [128] * 32}
    cases["32 film reviews"] = real_lengths("film reviews", 32)
    return {**cases, "32 of SQuAD": real_lengths("SQuAD 1.1", 32)}


def large_cases() -> dict[str, list[int]]:
    cases = {"1 x 384": [384], "8 x 384": [384] * 8, "32 x 384": [384] * 32}
    return {**cases, "64 of SQuAD": real_lengths("SQuAD 1.1", 64)}


def real_lengths(name: str, count: int, seed: int = 0) -> list[int]:
    """Lengths of `count` of the texts that lengths.json counts under this name, drawn evenly."""
    counts = np.array(json.loads(LENGTHS.read_text())[name]["counts"])
    return np.random.default_rng(seed).choice(np.repeat(*counts.T), count, replace=False).tolist()
