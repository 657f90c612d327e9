"""Raw response times into the figures of a load test."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from samp_client import TierTimes

PERCENTILES = (50, 95, 99)
_COLUMNS = ("requests", "failures", "rps", "p50", "p95", "p99")


@dataclass
class Samples:
    """What was sent to one tier: response times of answered requests, failures, the time span.

    times_ms: milliseconds, as measured; first, last: seconds since the epoch, of the first
    request's start and the last one's end; error: what the first failure said.
    """

    times_ms: array[float] = field(default_factory=lambda: array("d"))
    failures: int = 0
    first: float = math.inf
    last: float = -math.inf
    error: str | None = None

    def add(self, start: float, time_ms: float, failure: Exception | None) -> None:
        if failure is None:
            self.times_ms.append(time_ms)
        else:
            self.failures += 1
            self.error = self.error or str(failure)
        self.first = min(self.first, start)
        self.last = max(self.last, start + time_ms / 1e3)

    def join(self, other: Samples) -> None:
        self.times_ms.extend(other.times_ms)
        self.failures += other.failures
        self.error = self.error or other.error
        self.first = min(self.first, other.first)
        self.last = max(self.last, other.last)

    def to_json(self) -> dict[str, Any]:
        """What a locust worker sends to its master."""
        return {
            "times_ms": list(self.times_ms),
            "failures": self.failures,
            "first": self.first,
            "last": self.last,
            "error": self.error,
        }

    @classmethod
    def from_json(cls, sent: Mapping[str, Any]) -> Samples:
        return cls(**{**sent, "times_ms": array("d", sent["times_ms"])})


def summarize(samples: Samples) -> dict[str, int | float | None]:
    """requests sent, failures among them, answered requests per second, and the percentiles of
    their milliseconds (linear between samples); None without an answer."""
    answered = len(samples.times_ms)
    span = samples.last - samples.first
    if answered:
        marks = np.percentile(np.frombuffer(samples.times_ms, dtype=np.float64), PERCENTILES)
    figures: dict[str, int | float | None] = {
        "requests": answered + samples.failures,
        "failures": samples.failures,
        "rps": round(answered / span, 3) if span > 0 else 0.0,
    }
    for place, percentile in enumerate(PERCENTILES):
        figures[f"p{percentile}"] = round(float(marks[place]), 3) if answered else None
    return figures


def report(
    samples: Mapping[str, Samples], times: Mapping[str, TierTimes]
) -> dict[str, dict[str, int | float | None]]:
    """The `loadtest` object of the command line: figures by tier, milliseconds."""
    tiers = [*samples, *(tier for tier in times if tier not in samples)]
    return {
        tier: {
            **summarize(samples.get(tier, Samples())),
            "server_queue_ms": _rounded(times[tier].queue_ms) if tier in times else None,
            "server_compute_ms": _rounded(times[tier].compute_ms) if tier in times else None,
        }
        for tier in tiers
    }


def table(samples: Mapping[str, Samples], times: Iterable[TierTimes]) -> str:
    """Client and server side by side. samples: by request name, such as "grpc:fast"."""
    rows: list[tuple[str, ...]] = [("client", *_COLUMNS)]
    for name, one in sorted(samples.items()):
        figures = summarize(one)
        rows.append((name, *(_cell(figures[column]) for column in _COLUMNS)))
    server: list[tuple[str, ...]] = [("server", "requests", "queue ms", "compute ms")]
    for tier in times:
        server.append((tier.tier, "", _cell(tier.queue_ms), _cell(tier.compute_ms)))
        for step in tier.steps:
            server.append(
                (
                    f"  {step.model}",
                    str(step.requests),
                    _cell(step.queue_ms),
                    _cell(step.compute_ms),
                )
            )
    return "\n".join([*_aligned(rows), "", *_aligned(server)])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
