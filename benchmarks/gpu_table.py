"""SAMP's table for gpu_check.py: float, ffn_only and full in FP16, INT8 and FP8 on one checkpoint.

The demo's trained one where it is here (`make demo-checkpoint`), else the small one that a bundle
carries (gpu_checkpoint.py); accuracy is that on rows that did not train it. Without either it is
one of random weights, whose labels are the float model's own answers. Latencies are those of
encoder and head in one process, as a build measures them.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_import
import gpu_serving
import numpy as np
from gpu_report import Report

DEMO = gpu_import.ROOT / ".demo"
CARRIED = gpu_import.BUNDLE / "unpacked" / "checkpoint"
ROWS, FEW = 1024, 24
RANDOM = "random weights"


def table(report: Report, emulate: bool) -> None:
    """Each plan's accuracy, agreement with float, and milliseconds of 1, 8 and 32 texts."""
    if emulate:
        os.environ["SAMP_CUDA"] = f"emulated:{gpu_serving.EMULATED}"
    with tempfile.TemporaryDirectory(prefix="samp-gpu-") as folder:
        bench, split, name = opened(Path(folder), emulate)
        plans = modes(bench, split)
        logits = {key: bench.logits(plan, split, key) for key, plan in plans.items()}
        ms = {} if emulate else bench.latencies(plans, split, "table")
        margins = {key: found[:, 1] - found[:, 0] for key, found in logits.items()}
        # Random weights say one thing nearly always: both labels have half of the texts there.
        middle = 0.0 if name != RANDOM else float(np.median(margins["float"]))
        answers = {key: (margin > middle).astype(int) for key, margin in margins.items()}
        gold = np.asarray(split.gold)
        rows = [
            {
                "plan": key,
                "accuracy": float((answer == gold).mean()),
                "agreement": float((answer == answers["float"]).mean()),
                "kl": float(bench.divergence(logits["float"], logits[key])),
                "latency_ms": ms.get(key),
            }
            for key, answer in answers.items()
        ]
        report.note("table", {"checkpoint": name, "texts": len(gold), "rows": rows})
    for row in rows:
        times = ", ".join(f"{b} texts {t:.3f} ms" for b, t in (row["latency_ms"] or {}).items())
        detail = f"accuracy {row['accuracy']:.4f}, as float {row['agreement']:.4f}"
        # What ran was what was planned, or `logits` had raised. fp16 hardly moves an answer.
        least = {"float": 1.0, "fp16": 0.97}.get(row["plan"], 0.8)
        fine = row["agreement"] >= least
        report.check(f"table, {name}, {row['plan']}", fine, f"{detail} {times}".strip())


def opened(work: Path, emulate: bool) -> tuple[Any, Any, str]:
    """A bench on backend cuda, its rows, and which checkpoint it is."""
    from samp_core.build import open_workbench
    from samp_core.config import BuildConfig, DataSpec
    from samp_core.data import read_rows
    from samp_core.rows import make_rows
    from samp_core.workbench import silent

    checkpoint, data, name = trained(emulate)
    if checkpoint is None:
        model = gpu_serving.Model(work, gpu_serving.SIZES[emulate], 48 if emulate else 512)
        config = model.config.model_copy(update={"backend": "cuda"})
        bench = open_workbench(config, silent)
        return bench, bench.split(read_rows(model.rows)), RANDOM
    config = BuildConfig(
        model=checkpoint, name="demo", backend="cuda", data=DataSpec(data=data), out=work / "out",
    )  # fmt: skip
    bench = open_workbench(config, silent)
    rows = read_rows(data)
    count = FEW if emulate else ROWS
    some = make_rows(rows.texts[:count], rows.labels[:count], rows.source)
    return bench, bench.split(some), name


def trained(emulate: bool = False) -> tuple[Path | None, Path, str]:
    """A trained checkpoint, rows that did not train it, and its name; the demo's, which is too
    large to be emulated, before a bundle's."""
    found = [
        (DEMO / "checkpoint", DEMO / "film_reviews" / "held_out.jsonl", "MiniLM-L6"),
        (CARRIED / "model", CARRIED / "rows.jsonl", "three layers of 128"),
    ]
    for folder, rows, name in found[emulate:]:
        if rows.is_file() and (folder / "model.safetensors").is_file():
            return folder, rows, f"{name} on film reviews"
    return None, Path(), RANDOM


def modes(bench: Any, split: Any) -> dict[str, Any]:
    """By SAMP's names. What is not quantized runs in fp16, as in its table."""
    from samp_core.calibrate import fp8_scales, scales
    from samp_core.encoder import quantizable_sites
    from samp_core.plan import Recipe, SitePlan, mode_plan

    base, recipe = bench.base_plan(), Recipe(calibrator="percentile", percentile=99.99)
    ranges = bench.ranges(split)
    scaled = replace(base, scales={**scales(ranges, recipe), **fp8_scales(ranges, Recipe())})
    half = dict.fromkeys(base.sites, SitePlan("fp16"))

    def quantized(kind: Any, precision: str) -> Any:
        sites = quantizable_sites(bench.backend, precision)
        whole = mode_plan(scaled, kind, base.layers, sites, recipe, precision)
        chosen = {name: e for name, e in whole.sites.items() if e.precision == precision}
        return replace(whole, sites={**half, **chosen})

    made = {"float": base, "fp16": replace(base, sites=half, mode="fp16")}
    for precision in ("int8", "fp8"):
        if quantizable_sites(bench.backend, precision):
            for kind in ("ffn_only", "full"):
                made[f"{kind} {precision}"] = quantized(kind, precision)
    return made
