"""Where a tier's requests spent their time inside Triton, from its statistics.

Triton counts per model. A tier is an ensemble, and its time is that of its steps: `tokenizer_<m>`
and `head_<m>` are shared by all tiers of a model, so their means are over all tiers that were
called between the two readings; `encoder_<m>_<tier>` is the tier's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Counters:
    """One model since it was loaded: requests answered, and their times summed, nanoseconds."""

    requests: int
    queue_ns: int
    compute_ns: int


@dataclass(frozen=True)
class StepTime:
    """Mean milliseconds per request of one model between two readings; None without requests."""

    model: str
    requests: int
    queue_ms: float | None
    compute_ms: float | None


@dataclass(frozen=True)
class TierTimes:
    """The steps of one tier's ensemble, in its order."""

    tier: str
    steps: tuple[StepTime, ...]

    @property
    def queue_ms(self) -> float | None:
        """Mean milliseconds that a request waited, all steps together."""
        return _total(step.queue_ms for step in self.steps)

    @property
    def compute_ms(self) -> float | None:
        """Mean milliseconds that models worked for a request, all steps together."""
        return _total(step.compute_ms for step in self.steps)


def read_counters(statistics: Iterable[Mapping[str, Any]]) -> dict[str, Counters]:
    """Counters by model name, its versions summed, from Triton's `model_stats` JSON.

    gRPC writes whole numbers as strings and leaves zeros out; HTTP does neither.
    """
    found: dict[str, Counters] = {}
    for entry in statistics:
        stats = entry.get("inference_stats", {})
        before = found.get(entry["name"], Counters(0, 0, 0))
        found[entry["name"]] = Counters(
            before.requests + _number(stats, "success", "count"),
            before.queue_ns + _number(stats, "queue", "ns"),
            before.compute_ns + sum(_number(stats, part, "ns") for part in _COMPUTE),
        )
    return found


def tier_times(
    tier: str,
    steps: Sequence[str],
    before: Mapping[str, Counters],
    after: Mapping[str, Counters],
) -> TierTimes:
    """Mean times of `steps` between two readings; a model that was reloaded starts from zero."""
    return TierTimes(tier, tuple(_step(model, before, after) for model in steps))


def _step(model: str, before: Mapping[str, Counters], after: Mapping[str, Counters]) -> StepTime:
    zero = Counters(0, 0, 0)
    start, end = before.get(model, zero), after.get(model, zero)
    if end.requests < start.requests:
        start = zero
    requests = end.requests - start.requests
    if requests == 0:
        return StepTime(model, 0, None, None)
    return StepTime(
        model,
        requests,
        (end.queue_ns - start.queue_ns) / requests / 1e6,
        (end.compute_ns - start.compute_ns) / requests / 1e6,
    )


def _number(stats: Mapping[str, Any], part: str, field: str) -> int:
    return int(stats.get(part, {}).get(field, 0))


def _total(parts: Iterable[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
