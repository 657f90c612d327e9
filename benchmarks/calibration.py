"""What every recipe loses: each calibrator and activation scale, on fine-tuned checkpoints.

    python benchmarks/calibration.py --datasets film-reviews --rows 1000

Accuracy, not speed: it may run beside other work. A data set takes one to three minutes; what was
measured is kept in build/bench/calibration, so that a second run only prints. Every GEMM is in
int8 (`gemms`), or attention too (`full`); metric, drop with its 95% interval and KL are of held-out
rows that neither calibrate nor choose.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, versions, write_result

from samp_core import evaluate, metrics, recipes
from samp_core.build import open_workbench, read_splits
from samp_core.config import load_config
from samp_core.plan import Plan, Recipe, Recipes, mode_plan
from samp_core.rows import make_rows
from samp_core.workbench import Split, Workbench, silent

SHARED = ROOT.parent / "shared"
FOLDER = ROOT / "build" / "bench" / "calibration"
GEMMS = ("qkv", "out", "ffn_in", "ffn_out")
OUTLIERS = (4, 16)


@dataclass(frozen=True)
class DataSet:
    """A checkpoint and the held-out rows for it; its task and longest text."""

    model: Path
    data: Mapping[str, str]
    task: str = "classification"
    length: int | None = None


DATA = {
    "film-reviews": DataSet(
        ROOT / ".demo" / "checkpoint",
        {
            "search": str(ROOT / ".demo/film_reviews/held_out.jsonl"),
            "verification": str(ROOT / ".demo/film_reviews/verification.jsonl"),
        },
    ),
    "banking77": DataSet(
        SHARED / "checkpoints/banking", {"data": str(SHARED / "data/banking77-test.jsonl")}
    ),
    "sick": DataSet(
        SHARED / "checkpoints/sick", {"data": str(SHARED / "data/sick-test.jsonl")}, "pairs", 96
    ),
    "wnut17": DataSet(
        SHARED / "checkpoints/wnut", {"data": str(SHARED / "data/wnut17-test.jsonl")},
        "entities", 96,
    ),
}  # fmt: skip


def main() -> None:
    """Measure the data sets that are there, print their table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--rows", type=int, default=1000, help="held-out rows at most")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    not_run = []
    for name in asked.datasets:
        if not DATA[name].model.is_dir():
            not_run.append(f"{name}: {DATA[name].model.name} is not there")
            continue
        made = measure(name, DATA[name], asked)
        rows += made
        print(table(made), flush=True)
    whole = set(asked.datasets) == set(DATA) and not not_run
    more = {} if whole or asked.datasets == ["film-reviews"] else {"folder": FOLDER / "results"}
    path = write_result(
        "calibration", threads=2, rows=rows, not_run=not_run, found_limits={},
        found_versions=versions(), seed=asked.seed, **more,
    )  # fmt: skip
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)


def measure(name: str, data: DataSet, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Every recipe on one data set; a line of progress for each."""
    fields = {"max_length": data.length} if data.length else {}
    config = load_config(
        None,
        {
            "model": data.model, "data": dict(data.data), "task": data.task, "threads": 2,
            "out": FOLDER / name, "backend": asked.backend, "seed": asked.seed, **fields,
        },
    )  # fmt: skip
    bench = open_workbench(config, silent)
    splits = read_splits(config, [])
    calibration, search = bench.split(splits.calibration), bench.split(splits.search)
    held = first_rows(bench, splits.verification, asked.rows)
    metric = metrics.of(bench.task, bench.checkpoint.labels, True)
    ranges = bench.ranges(calibration)
    base = bench.base_plan()
    reference = bench.logits(base, held, "float")
    control = metric.measure(reference, held)
    chosen = recipes.choose(config, bench, calibration, search)
    print(f"{name}: auto takes {chosen.record['chosen']}", file=sys.stderr)
    found = []
    for title, recipe in arms(bench, chosen).items():
        for attention in (False, True):
            plan = full(bench, recipes.with_scales(base, ranges, recipe), recipe, attention)
            logits = bench.logits(plan, held, title)
            texts = metric.measure(logits, held)
            low, high = drop_interval(metric, control, texts)
            found.append(
                {
                    "model": name, "recipe": title, "sites": "full" if attention else "gemms",
                    "metric": metric.name, "n": held.rows.n, "seed": asked.seed,
                    "backend": bench.backend_name, "float_value": metric.value(control),
                    "value": metric.value(texts),
                    "drop": metric.value(control) - metric.value(texts),
                    "drop_ci95": [low, high], "kl": bench.divergence(reference, logits),
                    "auto": title == "auto",
                }
            )  # fmt: skip
        print(f"  {title}: KL {found[-1]['kl']:.5f}", file=sys.stderr, flush=True)
    bench.close()
    return found


def arms(bench: Workbench, chosen: recipes.Chosen) -> dict[str, Recipes]:
    """Every calibrator static and, where the backend can, per token and with split outliers."""
    static = recipes.uniform()
    found: dict[str, Recipes] = dict(static)
    if recipes.per_token(bench):
        tokens = [replace(recipe, activation="token") for recipe in static.values()]
        found |= {recipes.title(recipe): recipe for recipe in tokens}
    if ("gemm", "outliers", "") in bench.backend.capabilities():
        apart = [Recipe(calibrator=c, outliers=k) for c in ("minmax", "mse") for k in OUTLIERS]
        found |= {recipes.title(recipe): recipe for recipe in apart}
    return {**found, recipes.PER_SITE: recipes.per_site(chosen.record["errors"], static),
            "auto": chosen.recipes}  # fmt: skip


def full(bench: Workbench, scaled: Plan, recipe: Recipes, attention: bool) -> Plan:
    sites = tuple(s for s in bench.quantizable() if attention or s in GEMMS)
    return mode_plan(scaled, "full", scaled.layers, sites, recipe)


def first_rows(bench: Workbench, rows: Any, most: int) -> Split:
    """Up to so many rows, evenly spread."""
    places = np.linspace(0, rows.n - 1, min(most, rows.n)).astype(int).tolist()
    texts, labels = ([part[i] for i in places] for part in (rows.texts, rows.labels))
    return bench.split(make_rows(texts, labels, rows.source))


def drop_interval(metric: Any, control: Any, texts: Any) -> tuple[float, float]:
    """95% of the drop: Tango's for accuracy, else the paired bootstrap (seed 0)."""
    if isinstance(metric, metrics.Accuracy):
        found = evaluate.tango_interval(*metric.changed(control, texts))
        return float(found.low), float(found.high)
    drops = evaluate.paired_bootstrap(control, texts, metric.statistic, metric.worst(control))
    low, high = np.quantile(drops, [0.025, 0.975])
    return float(low), float(high)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each recipe, GEMMs alone and with attention."""
    first = rows[0]
    lines = [
        f"**{first['model']}**: {first['metric']} {100 * first['float_value']:.2f}% in float, "
        f"n = {first['n']:,}, seed {first['seed']}, backend {first['backend']}",
        "",
        "| recipe | GEMMs: drop in points [95%] | KL | and attention: drop [95%] | KL |",
        "|---|---|---|---|---|",
    ]

    def cells(row: dict[str, Any]) -> str:
        low, high = (100 * end for end in row["drop_ci95"])
        return f"{100 * row['drop']:+.2f} [{low:+.2f}, {high:+.2f}] | {row['kl']:.5f}"

    for title in dict.fromkeys(row["recipe"] for row in rows):
        pair = {row["sites"]: row for row in rows if row["recipe"] == title}
        lines.append(f"| {title} | {cells(pair['gemms'])} | {cells(pair['full'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
