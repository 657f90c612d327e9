"""Times things that compute the same, in turns, in one process.

A machine's speed drifts within seconds; what is compared must see the same machine. In every round
each contender has one turn, in an order drawn anew: it warms up, then a few calls are timed. The
warm-up also outlasts the spinning threads of whoever had the turn before.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from samp_kernels.interface import F32

# Arms of one column this much slower than its best in the pilot are not measured further; those
# that are even farther behind after their first turn are not tried again.
NEAR = 1.2
FAR = 1.8


@dataclass(eq=False)
class Contender:
    """One way of computing a row. `column` is whose figure it is, `arm` how it was done.

    run: one pass. hidden: a pass whose hidden states come back as [tokens, hidden], no padding.
    """

    column: str
    arm: str
    run: Callable[[], object]
    hidden: Callable[[], F32]
    pilot_ms: float = 0.0
    times_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Pace:
    """How long everything takes: rounds, seconds timed and warmed in a turn, least timed calls."""

    rounds: int = 7
    turn_s: float = 0.25
    warm_s: float = 0.08
    calls: int = 2


def pilot(contenders: Sequence[Contender]) -> list[Contender]:
    """Those that are near the best of their column, by the best of up to three short turns."""
    for contender in contenders:
        contender.run()
        contender.pilot_ms = _timed(contender.run)
    for contender in _near(contenders, FAR) * 2:
        contender.run()
        contender.pilot_ms = min(contender.pilot_ms, _timed(contender.run))
    return _near(contenders, NEAR)


def _near(contenders: Sequence[Contender], factor: float) -> list[Contender]:
    best: dict[str, float] = {}
    for contender in contenders:
        column = contender.column
        best[column] = min(best.get(column, contender.pilot_ms), contender.pilot_ms)
    return [one for one in contenders if one.pilot_ms <= factor * best[one.column]]


def measure(
    contenders: Sequence[Contender],
    pace: Pace,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fill `times_ms` of every contender, all of them in turn in every round."""
    rng = random.Random(seed)
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for _ in range(pace.rounds):
            rng.shuffle(order)
            for contender in order:
                _turn(contender, pace)
            progress()
    finally:
        gc.enable()


def _turn(contender: Contender, pace: Pace) -> None:
    run = contender.run
    warm_until = time.perf_counter() + pace.warm_s
    run()
    while time.perf_counter() < warm_until:
        run()
    until = time.perf_counter() + pace.turn_s
    count = 0
    while count < pace.calls or time.perf_counter() < until:
        contender.times_ms.append(_timed(run))
        count += 1


def _timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)
