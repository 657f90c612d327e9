"""Every task by every strategy: the paper's table, our plans at each promise, and fresh rows.

    make bench-tasks BENCH="--data FOLDER --checkpoints FOLDER"
    python benchmarks/tasks.py --only banking77 --warm     # beforehand, on a machine that is in use
    python benchmarks/tasks.py --only film-reviews --slice 150 --force    # a rehearsal, no figures

For each pair of checkpoint and data: accuracy and speed of SAMP's modes by number of layers; what
each strategy serves at each promise, all plans timed together; the drop of each served plan on
rows that neither search nor verification saw; what lower-loss does to the loss; seconds of whole
builds; modelled beside measured latency. What is not on this machine is skipped, and the result
says so. Pairs are added to the newest result as they are done; what an earlier run measured of
accuracy is found again, times are measured anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
import machine
import numpy as np
import tasks_table

ROOT = machine.ROOT
OUT = ROOT / ".demo" / "bench_tasks"
FILMS = ROOT / ".demo" / "film_reviews"
STRATEGIES = ("milp", "samp", "greedy", "lower-loss")
TIMES = ("latency", "costs", "pace")
"""Entries of a build's cache that a clock made."""
BUCKETS = ("1", "8")
MODES = 6
"""SAMP's modes for so many numbers of layers, evenly spread up to all."""
SEARCH, CALIBRATION, VERIFICATION = 512, 256, 2_500
ALPHA = 0.05


@dataclass(frozen=True)
class Pair:
    """A checkpoint and its labelled rows; `files` share no text, `searched` may be one apart."""

    name: str
    model: Path
    rows: Path
    task: str = "classification"
    searched: Path | None = None
    exclude: Path | None = None
    drops: tuple[float, ...] = (0.5, 1.0, 2.0)
    fields: tuple[tuple[str, Any], ...] = ()


def pairs(data: Path, checkpoints: Path) -> list[Pair]:
    """All of them, whether they are here or not."""
    films = {
        "rows": FILMS / "verification.jsonl",
        "searched": FILMS / "held_out.jsonl",
        "exclude": FILMS / "train.jsonl",
    }
    twelve = ROOT / ".demo" / "twelve_layers"
    return [
        Pair("film-reviews", ROOT / ".demo" / "checkpoint", **films),
        Pair("banking77", checkpoints / "banking", data / "banking77-test.jsonl"),
        Pair("sick", checkpoints / "sick", data / "sick-test.jsonl", "pairs"),
        Pair(
            "wnut17", checkpoints / "wnut", data / "wnut17-test.jsonl", "entities",
            drops=(2.0, 4.0), fields=(("words", "spaces"),),
        ),
        Pair("film-reviews-e5-small", twelve / "e5-small", **films),
        Pair("film-reviews-mpnet", twelve / "mpnet", **films),
    ]  # fmt: skip


def parted(pair: Pair, folder: Path, most: int | None) -> dict[str, Path]:
    """search, verification and fresh rows of a pair as files, always the same ones.

    A third of the rows that the search does not take is fresh, and what is over VERIFICATION.
    """
    lines = pair.rows.read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines)).tolist()
    searched = pair.searched.read_text(encoding="utf-8").splitlines() if pair.searched else []
    if not searched:
        count = min(SEARCH + CALIBRATION, len(lines) // 3)
        searched, order = [lines[i] for i in order[:count]], order[count:]
    keep = min(VERIFICATION, len(order) * 2 // 3)
    split = {
        "search": searched,
        "verification": [lines[i] for i in order[:keep]],
        "fresh": [lines[i] for i in order[keep:]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, some in split.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("\n".join(some[:most]) + "\n", encoding="utf-8")
    return files


def fields(pair: Pair, files: Mapping[str, Path], strategy: str, how: argparse.Namespace) -> Any:
    """A build of the pair, as in build.yaml."""
    searched = len(files["search"].read_text(encoding="utf-8").splitlines())
    calibration = min(CALIBRATION, searched // 3)
    source = {"search": str(files["search"]), "verification": str(files["verification"])}
    if pair.exclude is not None:
        source["exclude"] = str(pair.exclude)
    tiers: dict[str, Any] = {f"p{drop:g}".replace(".", "-"): {"drop": drop} for drop in pair.drops}
    return {
        "model": str(pair.model), "name": pair.name, "task": pair.task, "data": source,
        "out": str(OUT / pair.name / "out"), "tiers": {**tiers, "recommended": {}},
        "rows": {"calibration": calibration, "search": min(SEARCH, searched - calibration)},
        "strategy": strategy, "threads": how.threads, "budget_s": how.budget, "alpha": ALPHA,
        "default_tier": next(iter(tiers)), **dict(pair.fields),
    }  # fmt: skip


class Measured:
    """One pair, measured: a workbench of its own over the builds' cache."""

    def __init__(self, pair: Pair, how: argparse.Namespace) -> None:
        self.pair, self.how = pair, how
        if how.cold or how.slice:
            shutil.rmtree(OUT / pair.name, ignore_errors=True)
        cache = OUT / pair.name / "out" / "cache"
        self.cold = not cache.is_dir()
        for kind in TIMES:
            for entry in cache.glob(f"{kind}-*"):
                entry.unlink()
        self.files = parted(pair, OUT / pair.name / "rows", how.slice)
        self.rows: list[dict[str, Any]] = []
        self.plans: dict[str, Any] = {}

    def run(self) -> list[dict[str, Any]]:
        """Builds by each strategy, then modes and served plans together."""
        watched = machine.Bystanders([])
        for strategy in self.how.strategies:
            if strategy != "lower-loss" or self.pair.task != "entities":  # which has no one loss
                self._build(strategy)
        self._together()
        self.rows.append(
            {
                "kind": "run", "model": self.pair.name, "commit": machine.commit(),
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "command": " ".join(["python", "benchmarks/tasks.py", *sys.argv[1:]]),
                "strategies": list(self.how.strategies), "others_share": round(watched.share(), 3),
            }
        )  # fmt: skip
        return self.rows

    def _build(self, strategy: str) -> None:
        import samp_core
        from samp_core.plan import Plan
        from samp_core.show import progress

        say(f"{self.pair.name}: build by {strategy}")
        begin = time.perf_counter()
        with progress() as bars:
            made = samp_core.build(fields(self.pair, self.files, strategy, self.how), bars)
        seconds = time.perf_counter() - begin
        report = made.report
        record = json.loads((made.folder / "build.json").read_text(encoding="utf-8"))
        self.rows.append(
            {
                "kind": "build", "model": self.pair.name, "strategy": strategy,
                "seconds": round(seconds, 1), "peak_mb": record["peak_mb"],
                "cache": report["cache"],
                "cold": self.cold and strategy == self.how.strategies[0],
                "warnings": report["warnings"],
            }
        )  # fmt: skip
        loss = record.get("search", {}).get("loss")
        if loss:
            self.rows.append({"kind": "loss", "model": self.pair.name, **loss})
        for tier in report["tiers"]:
            folder = made.folder / "models" / f"encoder_{self.pair.name}_{tier['name']}" / "1"
            plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"), "plan.json")
            self.plans[plan.key()] = plan
            self.rows.append(
                {
                    "kind": "tier", "model": self.pair.name, "strategy": strategy, **tier,
                    "key": plan.key(), "modelled": dict(plan.modelled),
                    "measured": dict(plan.measured),
                }
            )  # fmt: skip

    def _together(self) -> None:
        """Every plan on verification rows and on fresh ones, all timed in turns."""
        from samp_core.show import progress

        with progress() as bars:
            self._compare(bars)

    def _compare(self, bars: Any) -> None:
        from samp_core import build, metrics
        from samp_core.config import load_config
        from samp_core.data import read_rows

        config = load_config(None, fields(self.pair, self.files, "samp", self.how))
        bench = build.open_workbench(config, bars)
        splits = build.read_splits(config, [])
        calibration, search, verification = (
            bench.split(s) for s in (splits.calibration, splits.search, splits.verification)
        )
        fresh = bench.split(read_rows(self.files["fresh"], task=bench.task))
        metric = metrics.of(bench.task, bench.checkpoint.labels)
        modes = some_of(build.plan_modes(config, bench, calibration, search))
        every = {**modes, **self.plans}
        ms = bench.latencies(every, search, "bench: all plans together", BUCKETS)
        control = {
            name: metric.measure(bench.logits(modes["float"], split, f"{name}: float"), split)
            for name, split in (("verification", verification), ("fresh", fresh))
        }
        facts = {}
        for name, plan in every.items():
            found: dict[str, Any] = {"together_ms": ms[name]}
            for where, split in (("verification", verification), ("fresh", fresh)):
                if where == "fresh" and name in modes:
                    continue
                logits = bench.logits(plan, split, f"{where}: {name[:16]}")
                texts = metric.measure(logits, split)
                upper = metric.test(control[where], texts, 1.0, ALPHA)
                lower = -metric.test(texts, control[where], 1.0, ALPHA).bound
                found[where] = {
                    "n": len(texts), "value": metric.value(texts), "ci95": metric.ci95(texts),
                    "changed": [upper.b, upper.c], "drop": upper.drop,
                    "lower_bound": lower, "upper_bound": upper.bound,
                }  # fmt: skip
            facts[name] = found
        for name in modes:
            row = {"kind": "mode", "model": self.pair.name, "mode": name, "metric": metric.name}
            self.rows.append({**row, **facts[name]})
        for row in self.rows:
            if row["kind"] == "tier":
                row |= facts[row["key"]]
        bench.close()


def some_of(modes: Mapping[str, Any]) -> dict[str, Any]:
    """float and both modes for MODES numbers of layers, the last of them all."""
    layers = (len(modes) - 1) // 2
    counts = {-(-layers * i // MODES) for i in range(1, MODES + 1)}
    return {
        name: plan
        for name, plan in modes.items()
        if name == "float" or int(name.split("(")[1].rstrip(")")) in counts
    }


def earlier(folder: Path, suite: str = "tasks") -> list[dict[str, Any]]:
    """The rows of the newest result on this machine; none where there is none."""
    found = sorted(folder.glob(f"*-{machine.slug(suite)}.json"))
    return json.loads(found[-1].read_text(encoding="utf-8"))["rows"] if found else []


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def missing(pair: Pair) -> str:
    """Why a pair cannot run here, or nothing."""
    wanted = [pair.model / "config.json", pair.rows]
    wanted += [path for path in (pair.searched, pair.exclude) if path is not None]
    absent = [os.path.relpath(path, ROOT) for path in wanted if not path.is_file()]
    return f"{pair.name}: no {', '.join(absent)}" if absent else ""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / ".demo" / "tasks", help="of jsonl rows")
    parser.add_argument(
        "--checkpoints", type=Path, default=ROOT / ".demo" / "checkpoints", help="banking, sick ..."
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the pairs; default: all")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds a build may take")
    parser.add_argument("--slice", type=int, help="rows of each file: a rehearsal, no figures")
    parser.add_argument("--cold", action="store_true", help="forget what earlier runs measured")
    parser.add_argument("--warm", action="store_true", help="measure, and write no result")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    return parser.parse_args(given)


def main() -> None:
    how = arguments()
    machine.require_quiet(how.force or how.warm)
    folder = machine.ROOT / "build" / "bench" / "results" if how.slice else how.results
    every = pairs(how.data, how.checkpoints)
    for pair in every:
        why = missing(pair)
        if how.only and pair.name not in how.only:
            why = f"{pair.name}: not asked for"
        if why:
            say(f"skipped: {why}")
            continue
        watched = machine.Bystanders([])
        rows = Measured(pair, how).run()
        tasks_table.show(rows)
        if how.warm:
            continue
        kept = [row for row in earlier(folder) if row["model"] != pair.name]
        order = [p.name for p in every]
        merged = sorted([*kept, *rows], key=lambda row: order.index(row["model"]))
        absent = [name for name in order if all(row["model"] != name for row in merged)]
        path = machine.write_result(
            "tasks", threads=how.threads, rows=json.loads(json.dumps(merged)),
            not_run=[missing(p) or f"{p.name}: not asked for" for p in every if p.name in absent]
            + ([f"no figures: a rehearsal on {how.slice} rows"] if how.slice else []),
            found_limits=limits.limits(how.threads), found_versions=machine.versions(),
            folder=folder,
        )  # fmt: skip
        machine.report(path, watched.share())


if __name__ == "__main__":
    main()
