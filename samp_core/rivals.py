"""What the greedy search would find by itself, and where plans may stand in for its steps.

Pure functions: `milp` looks at every plan that greedy looks at, and tests what greedy would test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samp_core.allocate import Candidate, able, drop_sequence, pooled, predicted_bound
from samp_core.chain import Node
from samp_core.milp import Solution

HOPELESS = 0.1
"""A plan is not timed if another is safer and, as modelled, faster by more than this share."""
SAFER = 0.8
"""A plan stands in for a step of another strategy with at most this part of its KL."""
CLEARLY = 0.05
"""What a plan is faster by, as a share of the other's time, that a clock does not make up."""
HARDLY = 0.02
"""The same where nothing is lost if it does."""


@dataclass(frozen=True)
class Found:
    """What a strategy would have found by itself: every plan with float's, by name.

    cut: the time ended its search, and it might have found safer plans.
    """

    candidates: Mapping[str, Candidate]
    cut: bool = False


def reverted(
    kl: Mapping[str, float], nodes: Sequence[Node], back: int
) -> list[tuple[str, tuple[int, ...]]]:
    """All int8, then the dearest node at option `back`, and so on: greedy's path."""
    choice = [len(node.options) - 1 for node in nodes]
    place = {node.name: index for index, node in enumerate(nodes)}
    found = [("greedy(0)", tuple(choice))]
    for count, name in enumerate(sorted(kl, key=lambda name: -kl[name]), start=1):
        choice[place[name]] = back
        found.append((f"greedy({count})", tuple(choice)))
    return found


def hopeless(
    candidates: Sequence[Candidate], kept: Collection[str], n: int, alpha: float
) -> set[str]:
    """Those that need not be timed: another is safer and by more than HOPELESS faster."""
    found, fastest = set(), float("inf")
    for candidate in sorted(pooled(candidates), key=lambda c: predicted_bound(c, n, alpha)):
        if candidate.name not in kept and candidate.latency_ms * (1 - HOPELESS) > fastest:
            found.add(candidate.name)
        fastest = min(fastest, candidate.latency_ms)
    return found


def alone(candidates: Sequence[Candidate], ms: Mapping[str, float], cut: bool = False) -> Found:
    """These as a search that had looked at no others would leave them; ms: of those it times.

    Bounds depend on which plans their changes are pooled over.
    """
    made = {
        c.name: replace(c, latency_ms=ms.get(c.name, c.latency_ms), timed=c.name in ms)
        for c in pooled(candidates)
    }
    return Found(made, cut)


def stand_ins(
    steps: Iterable[tuple[float, float]], stairs: Sequence[Solution], rest_ms: float
) -> list[Solution]:
    """The stairs that may stand in for steps of a loss and milliseconds, each once.

    Of each step the safest and the fastest: what a plan really loses is known when it has been
    looked at. rest_ms: what a pass costs beside the edges of the stairs.
    """
    found: list[Solution] = []
    for loss, ms in steps:
        able = [
            stair
            for stair in stairs
            if stair.loss <= SAFER * loss and stair.cost + rest_ms < (1.0 - CLEARLY) * ms
        ]
        able.sort(key=lambda stair: stair.loss)
        found += [*able[:1], *able[-1:]]
    return list(dict.fromkeys(found))


def sequence(
    theirs: Found,
    candidates: Sequence[Candidate],
    reference: Candidate,
    promise: float,
    n: int,
    *,
    ceiling_ms: float | None = None,
    alpha: float = 0.05,
) -> list[Candidate]:
    """The plans to verify so as not to serve a slower one than the strategy by itself would.

    Its very sequence: any other test might fail where its own pass. For a step stands in the safest
    candidate that is faster by more than CLEARLY and has a KL, measured, of at most SAFER of the
    step's; steps that are then no faster than what comes before them are left out. Behind the
    last the fastest candidate follows, where that is faster by more than HARDLY: its failure costs
    nothing. Where the strategy's search
    was cut, candidates safer than its first step come before it; where it has no
    steps, the sequence is that of the candidates alone.
    """
    some = theirs.candidates
    able_now = {c.name: c for c in able(candidates, reference, ceiling_ms)}
    limits: dict[str, Any] = {"ceiling_ms": ceiling_ms, "alpha": alpha}
    steps = drop_sequence(list(some.values()), some[reference.name], promise, n, **limits)
    steps = [able_now.get(step.name, step) for step in steps]
    own = drop_sequence(candidates, reference, promise, n, **limits)
    if not steps:
        return own
    chosen: list[Candidate] = []
    if theirs.cut:
        first = steps[0]
        chosen = [c for c in own if c.kl < first.kl and c.latency_ms > first.latency_ms]
    for step in steps:
        better = [
            c
            for c in able_now.values()
            if c.kl <= SAFER * step.kl and c.latency_ms < (1.0 - CLEARLY) * step.latency_ms
        ]
        taken = min(better, key=lambda c: c.kl, default=step)
        if not chosen or taken.latency_ms < chosen[-1].latency_ms:
            chosen.append(taken)
    fastest = own[-1]
    if fastest.latency_ms < (1.0 - HARDLY) * chosen[-1].latency_ms:
        chosen.append(fastest)
    return chosen
