"""The highest rate at which a tier keeps a latency target, found by trying.

Requests are offered at a rate (arrivals.py), so that a queue shows as latency. The rate is doubled
until the target breaks twice, then narrowed down on a logarithmic scale; the best is offered again,
for longer, and lowered by a tenth until it holds twice.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samp_client import BadRequest

# Two rates this close are one: the spread of such short trials is larger.
CLOSE = 1.08
LOWER = 0.9
# Of what was offered, so much must have been answered.
KEPT = 0.9
_SLO = re.compile(r"(p50|p95|p99)\s*(?:=|<=?)\s*(\d+(?:\.\d+)?)\s*(ms|s)")

Trial = Callable[[float, float], Mapping[str, Any]]
"""(requests a second, seconds) -> requests, failures, rps, p50, p95, p99."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """`percentile` (p50, p95, p99) of the response time is at most `ms`."""

    percentile: str
    ms: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "p95=50ms". BadRequest for anything else."""
        match = _SLO.fullmatch(text.strip())
        if match is None or float(match[2]) <= 0:
            allowed = "p50, p95 or p99, and a time above 0: p95=50ms"
            raise BadRequest(f"target {text!r}", allowed, "correct it")
        return cls(match[1], float(match[2]) * (1000 if match[3] == "s" else 1))

    def __str__(self) -> str:
        return f"{self.percentile} <= {self.ms:g} ms"

    def holds(self, rate: float, found: Mapping[str, Any]) -> bool:
        """Nothing failed, the latency is within the target, and what was offered was answered.

        The last with room for the chance of Poisson arrivals: three standard deviations.
        """
        late = found[self.percentile]
        if found["failures"] or late is None or late > self.ms:
            return False
        room = 3 * rate / math.sqrt(max(found["requests"], 1))
        return bool(found["rps"] >= min(KEPT * rate, rate - room))


def find_rate(
    trial: Trial,
    target: Target,
    *,
    first: float,
    step_s: float = 5.0,
    budget_s: float = 180.0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Search within about `budget_s` seconds, from the rate `first`.

    Returns target, rate (None: not even the lowest tried held), confirmed, points (every trial:
    rate, holds, and its figures; confirmations are marked).
    """
    end = time.monotonic() + budget_s
    # A confirmation takes twice a step, and what a run needs to start.
    reserve_s = 3 * (step_s + 5)
    points: list[dict[str, Any]] = []

    def holds(rate: float, seconds: float, confirming: bool = False) -> bool:
        found = trial(rate, seconds)
        good = target.holds(rate, found)
        points.append({"rate": round(rate, 2), "holds": good, "confirms": confirming, **found})
        late = found[target.percentile]
        shown = "-" if late is None else f"{late:.1f} ms"
        say(f"{rate:8.1f}/s: {target.percentile} {shown}, {'holds' if good else 'broken'}")
        return good

    low, high = 0.0, math.inf
    rate = first
    wide = True
    while wide and (not points or time.monotonic() + reserve_s < end):
        # Once may be somebody else's work on the machine.
        if holds(rate, step_s) or holds(rate, step_s):
            low = max(low, rate)
        else:
            high = min(high, rate)
        if high == math.inf:
            rate = 2 * low
        elif low == 0:
            rate = high / 2
            if rate < first / 64:
                break
        else:
            rate = math.sqrt(low * high)
        wide = high == math.inf or high / max(low, 1e-9) > CLOSE
    confirmed = False
    while low and not confirmed:
        confirmed = holds(low, 2 * step_s, confirming=True)
        if not confirmed:
            if time.monotonic() + reserve_s / 2 > end:
                break
            low *= LOWER
    return {
        "target": str(target),
        "rate": round(low, 2) if low else None,
        "confirmed": confirmed,
        "points": points,
    }


def draw(
    found: Mapping[str, Any], target: Target, path: Path, title: str, percentiles: Sequence[str]
) -> None:
    """The curve of latency over offered rate as a PNG. Needs matplotlib (extra `loadtest`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    points = sorted(found["points"], key=lambda p: float(p["rate"]))
    figure, axes = pyplot.subplots(figsize=(8.5, 4.5), dpi=130)
    for name, colour in zip(percentiles, ("#7f9cc9", "#1f4e9c", "#c0562f"), strict=False):
        tried: dict[float, list[float]] = {}
        for point in points:
            if point[name] is not None:
                tried.setdefault(point["rate"], []).append(point[name])
        if not tried:
            continue
        # A rate that was offered again has a mark for each time, and the line goes between them.
        medians = [statistics.median(found_ms) for found_ms in tried.values()]
        axes.plot(list(tried), medians, "-", color=colour, label=name)
        marks = [(rate, ms) for rate, found_ms in tried.items() for ms in found_ms]
        axes.plot(*zip(*marks, strict=True), "o", markersize=4, color=colour)
    broken = [(p["rate"], p[target.percentile]) for p in points if not p["holds"]]
    broken = [point for point in broken if point[1] is not None]
    if broken:
        axes.plot(*zip(*broken, strict=True), "x", markersize=9, color="#b00020", label="broken")
    axes.axhline(target.ms, color="#555", linestyle="--", linewidth=1, label=str(target))
    if found["rate"]:
        state = "confirmed" if found["confirmed"] else "not confirmed"
        label = f"{found['rate']:g}/s, {state}"
        axes.axvline(found["rate"], color="#2e7d32", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("offered requests a second (Poisson)")
    axes.set_ylabel("response time, ms")
    # Within one decade, as most curves are, the powers of ten would be a single mark.
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial)
    pyplot.close(figure)
    partial.replace(path)
