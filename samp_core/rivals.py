"""What the greedy search would find by itself, and what may be tested beside its steps.

Pure functions: `milp` looks at every plan that greedy looks at, and tests what greedy would test.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samp_core.allocate import (
    Candidate,
    able,
    drop_sequence,
    pooled,
    predicted_bound,
    safe_bound,
)
from samp_core.chain import Node

HOPELESS = 0.1
"""A plan is not timed if another is safer and, as modelled, faster by more than this share."""
HARDLY = 0.02
"""What a plan is faster by, as a share of the other's time, that a clock may make up."""
STEPS = 32
"""Plans on greedy's path at most, about: of a longer one every second or third. Tests leave out
more, since their steps are of 10% of latency."""
HOPE = 2.0
"""What may fail without harm is tested up to a predicted bound of so many times the promise."""


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
    """All int8, then the dearest node at option `back`, and so on: greedy's path, in STEPS."""
    choice = [len(node.options) - 1 for node in nodes]
    place = {node.name: index for index, node in enumerate(nodes)}
    found = [("greedy(0)", tuple(choice))]
    stride = max(-(-len(kl) // STEPS), 1)
    for count, name in enumerate(sorted(kl, key=lambda name: -kl[name]), start=1):
        choice[place[name]] = back
        if count % stride == 0 or count == len(kl):
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

    Its very sequence: any other test might fail where its own pass. Behind its last step, where a
    failure costs nothing, the plans that are faster than that by more than HARDLY: first the
    fastest whose predicted bound keeps the promise, then the fastest that may (HOPE). Where the
    strategy's search was cut and its first step is less safe than safe_bound, the first of the
    candidates' own sequence comes before it; where it has no steps, that sequence is all.
    """
    some = theirs.candidates
    able_now = {c.name: c for c in able(candidates, reference, ceiling_ms)}
    limits: dict[str, Any] = {"ceiling_ms": ceiling_ms, "alpha": alpha}
    steps = drop_sequence(list(some.values()), some[reference.name], promise, n, **limits)
    chosen = [able_now.get(step.name, step) for step in steps]
    own = drop_sequence(candidates, reference, promise, n, **limits)
    if not chosen:
        return own

    def bound(candidate: Candidate) -> float:
        return predicted_bound(candidate, n, alpha)

    first = own[0]
    risky = bound(chosen[0]) > safe_bound(reference, promise, n, alpha)
    if theirs.cut and risky and first.latency_ms > chosen[0].latency_ms:
        chosen.insert(0, first)
    for most in (promise, HOPE * promise):
        hopeful = [c for c in able_now.values() if bound(c) <= most]
        fastest = min(hopeful, key=lambda c: c.latency_ms, default=chosen[-1])
        if fastest.latency_ms < (1.0 - HARDLY) * chosen[-1].latency_ms:
            chosen.append(fastest)
    return chosen
