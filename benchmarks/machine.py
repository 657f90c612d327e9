"""What a benchmark's result says of the machine, and whether the machine is quiet enough."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "grpcio", "tritonclient")
# Above this share of the CPU in other hands the figures mean nothing.
BUSY = 0.15
# The same over a whole run; a system's own background stays well below.
OTHERS = 0.05


def busy_share(seconds: float = 3.0) -> float:
    """Share of all cores that is in use now, by anybody."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def require_quiet(force: bool) -> float:
    """The busy share; ends the program when it is too high, unless forced."""
    share = busy_share()
    if share > BUSY and not force:
        raise SystemExit(
            f"bench: the machine is {share:.0%} busy; allowed: {BUSY:.0%}; wait until it is quiet, "
            "or --force (the result then says so)"
        )
    return share


class Bystanders:
    """How much of the machine went to anybody else while our processes were measured."""

    def __init__(self, pids: Sequence[int]) -> None:
        """`pids` and all that they started are ours, and this process too."""
        self._pids = (os.getpid(), *pids)
        self._begun = time.monotonic()
        self._at_start = _busy_seconds(), self._own_seconds()

    def share(self) -> float:
        """Share of all cores in other hands since the start."""
        busy = _busy_seconds() - self._at_start[0]
        own = self._own_seconds() - self._at_start[1]
        cores = os.cpu_count() or 1
        return max(0.0, busy - own) / (cores * (time.monotonic() - self._begun))

    def _own_seconds(self) -> float:
        roots = [psutil.Process(pid) for pid in self._pids]
        family = {process for root in roots for process in (root, *root.children(recursive=True))}
        # User, system, and the same of children that have ended and were waited for.
        return sum(sum(process.cpu_times()[:4]) for process in family)


def _busy_seconds() -> float:
    """CPU seconds that all cores have spent on anything so far; stolen time counts as busy."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name; where that hides which it is ("AMD EPYC"), family and model, too."""
    text = cpuinfo.read_text()

    def value(name: str) -> str:
        match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.M)
        return match[1].strip() if match else ""

    name = value("model name") or platform.machine()
    if re.search(r"\d", name) or not value("cpu family"):
        return name
    return f"{name} family {value('cpu family')} model {value('model')}"


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def versions(**more: str) -> dict[str, str]:
    """Python's version, those of the packages that matter, and `more`."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        **more,
    }


def quantiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """median, p10, p90, p95, p99 and n, the numbers in milliseconds as given."""
    p10, p50, p90, p95, p99 = np.percentile(values, [10, 50, 90, 95, 99])
    found = {"median": p50, "p10": p10, "p90": p90, "p95": p95, "p99": p99}
    shown = {name: round(float(value), digits) for name, value in found.items()}
    return {**shown, "n": len(values)}


def slug(suite: str) -> str:
    """`<suite>-<cpu>`, what a result's file name holds beside its date."""
    return f"{suite}-{re.sub(r'[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}"


def write_result(
    suite: str,
    *,
    threads: int,
    rows: Sequence[Mapping[str, Any]],
    not_run: Sequence[str],
    found_limits: Mapping[str, float],
    found_versions: Mapping[str, str],
    folder: Path = RESULTS,
    **more: Any,
) -> Path:
    """<date>-<suite>-<cpu>.json in the schema of all our benchmarks; its path."""
    device = cpu_name()
    body = {
        "schema": 1,
        "suite": suite,
        "commit": commit(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": threads,
        "versions": dict(found_versions),
        "limits": dict(found_limits),
        **more,
        "rows": list(rows),
        "not_run": list(not_run),
    }
    path = folder / f"{body['date'][:10]}-{slug(suite)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def report(path: Path, others: float) -> None:
    """Where a result was written; and if others used too much of the machine meanwhile, that."""
    if others > OTHERS:
        print(
            f"bench: others used {others:.0%} of the machine meanwhile (allowed: {OTHERS:.0%}); "
            "these figures are not to be quoted: run it again",
            file=sys.stderr,
        )
    print(f"written to {os.path.relpath(path)}")
