"""The time budget of a build, and the best plans that a stopped one leaves."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from samp_core.plan import Plan


class Clock:
    """What is left of a time budget."""

    def __init__(self, begin: float, budget_s: float) -> None:
        self._end = self._last = begin + budget_s
        self._begin = begin

    def reserve(self, seconds: float) -> None:
        """Keep so much of the rest for what comes after the search, at most half of it."""
        left = max(self._end - time.perf_counter(), 0.0)
        self._end -= min(seconds, left / 2)

    def part(self, share: float) -> Callable[[], bool]:
        """Whether this share of what is left now has gone by."""
        now = time.perf_counter()
        end = now + share * max(self._end - now, 0.0)
        return lambda: time.perf_counter() >= end

    def over(self) -> bool:
        return time.perf_counter() >= self._end

    def spent_all(self) -> bool:
        """Whether nothing is left, not even of what was reserved."""
        return time.perf_counter() >= self._last

    def spent(self) -> float:
        return time.perf_counter() - self._begin


def keep_best(out: Path, best: Mapping[str, Plan]) -> None:
    """`<out>/best/<tier>.json`: plans that a stopped build leaves, not verified."""
    folder = out / "best"
    for tier, plan in best.items():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{tier}.partial"
        partial.write_text(plan.to_json(), encoding="utf-8")
        os.replace(partial, folder / f"{tier}.json")


def forget_best(out: Path) -> None:
    """A finished build serves its plans; those on the way to it are no longer needed."""
    shutil.rmtree(out / "best", ignore_errors=True)
