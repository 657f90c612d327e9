"""What each tier serves: chosen on the search split, tested on the verification split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from samp_kernels.interface import Array

from samp_core import allocate, evaluate, rivals
from samp_core.allocate import Candidate
from samp_core.config import TierSpec
from samp_core.metrics import Accuracy, Metric
from samp_core.modes import KINDS
from samp_core.plan import Plan
from samp_core.workbench import Split, Workbench

FLOAT = "float"


@dataclass(frozen=True)
class Choice:
    """What a tier serves, and every verification test on the way to it.

    `met` is False where the promise cannot be kept even by the plan served. sequence: the plans
    that were to be tested, in their order; empty where no drop is promised.
    """

    tier: str
    spec: TierSpec
    plan: str
    tests: tuple[tuple[str, evaluate.DropTest], ...]
    met: bool
    warnings: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A tier's plan on the verification split; `accuracy` is the task's metric, a fraction."""

    accuracy: float
    ci95: tuple[float, float]
    counts: evaluate.Counts
    drop_bound: float
    latency_ms: Mapping[str, float]


class Verifier:
    """Tests plans on the verification split; each plan runs over it at most once."""

    def __init__(
        self,
        bench: Workbench,
        plans: Mapping[str, Plan],
        split: Split,
        alpha: float,
        metric: Metric | None = None,
    ) -> None:
        self.metric = metric or Accuracy()
        self._bench = bench
        self._plans = plans
        self._split = split
        self.alpha = alpha
        self.n = split.rows.n
        self._texts: dict[str, Array] = {}

    def add(self, plans: Mapping[str, Plan]) -> None:
        """Plans that may be tested, too, by name."""
        self._plans = {**self._plans, **plans}

    def ran(self, name: str) -> bool:
        """Whether a plan has been run over the split."""
        return name in self._texts

    def texts(self, name: str) -> Array:
        """What the metric makes of each text under a plan; whether it is right, for accuracy."""
        if name not in self._texts:
            logits = self._bench.logits(self._plans[name], self._split, f"verify: {name}")
            self._texts[name] = self.metric.measure(logits, self._split)
        return self._texts[name]

    def test(self, name: str, promise: float) -> evaluate.DropTest:
        return self.metric.test(self.texts(FLOAT), self.texts(name), promise, self.alpha)

    def unchanged(self, promise: float) -> tuple[evaluate.DropTest, str]:
        """The test of a plan that changes no answer, and at least how many rows would pass it."""
        known = self.metric.unchanged(self.n, promise, self.alpha)
        test = known or self.test(FLOAT, promise)
        if test.passed:
            return test, f"{self.n:,}"
        texts = np.empty(0) if known else self.texts(FLOAT)
        return test, self.metric.needed(test, texts, texts)

    def needed(self, name: str, test: evaluate.DropTest) -> str:
        """About how many rows would settle a test that failed, in words."""
        return self.metric.needed(test, self.texts(FLOAT), self.texts(name))

    def ranks(self, served: Mapping[str, str]) -> list[str]:
        """Spearman's correlation of each tier's plan in words, where the metric has one."""
        rank = getattr(self.metric, "rank", None)
        if rank is None:
            return []
        found = (f"{tier} {100 * rank(self.texts(plan)):.2f}" for tier, plan in served.items())
        return [f"Spearman's rank correlation, in points: {', '.join(found)}"]

    def measured(self, name: str, latency_ms: Mapping[str, float]) -> Measured:
        texts = self.texts(name)
        test = self.metric.test(self.texts(FLOAT), texts, 1.0, self.alpha)
        return Measured(
            accuracy=self.metric.value(texts),
            ci95=tuple(self.metric.ci95(texts)),  # type: ignore[arg-type]
            counts=evaluate.Counts(test.b, test.c, test.n),
            drop_bound=test.bound,
            latency_ms=latency_ms,
        )


def choose(
    tier: str,
    spec: TierSpec,
    candidates: Mapping[str, Candidate],
    verifier: Verifier,
    stop: Callable[[], bool] = lambda: False,
    greedy: rivals.Found | None = None,
) -> Choice:
    """The plan of one tier, by its wish; verified where it promises a drop.

    After `stop` no further plan is run over the verification rows but a tier's first. greedy: the
    strategy than which none shall be slower, see rivals.sequence.
    """
    reference = candidates[FLOAT]
    timed = [c for c in candidates.values() if c.timed]
    faster = [c for c in timed if c.latency_ms < reference.latency_ms]
    everything = [reference, *faster]
    if spec.drop is not None:
        return _by_drop(tier, spec, reference, everything, verifier, stop, greedy)
    if spec.latency is not None:
        chosen = allocate.most_accurate_under(everything, spec.latency, verifier.n, verifier.alpha)
        if chosen is not None:
            return Choice(tier, spec, chosen.name, (), True)
        fastest = min(everything, key=lambda c: c.latency_ms)
        note = (
            f"tier {tier}: no plan is under {spec.latency:g} ms; the nearest, {fastest.name}, "
            f"takes {fastest.latency_ms:.2f} ms and is served"
        )
        return Choice(tier, spec, fastest.name, (), False, (note,))
    recommended = [
        allocate.decay_aware([reference, *(c for c in everything if c.name.startswith(kind))])
        for kind in KINDS
    ]
    best = min(recommended, key=lambda c: c.latency_ms)
    return Choice(tier, spec, best.name, (), True)


def near_ones(choice: Choice, candidates: Mapping[str, Candidate]) -> list[str]:
    """The plan served and those that passed, too, and are so near in time that noise may decide."""
    most = candidates[choice.plan].latency_ms * (1.0 + 2.0 * allocate.STEP)
    passed = [name for name, test in choice.tests if test.passed]
    return [n for n in dict.fromkeys([*passed, choice.plan]) if candidates[n].latency_ms <= most]


def fastest(
    choice: Choice, again: Mapping[str, float], greedy: rivals.Found | None = None
) -> Choice:
    """The choice with the fastest plan that passed, by times measured again, in turns.

    Of a plan of greedy's and one that is hardly faster, greedy's: a clock shall not part them.
    """
    passed = [name for name, test in choice.tests if test.passed and name in again]
    best = min(passed, key=lambda name: again[name], default=choice.plan)
    theirs = [name for name in passed if greedy is not None and name in greedy.candidates]
    other = min(theirs, key=lambda name: again[name], default=best)
    if again[best] >= (1.0 - rivals.HARDLY) * again[other]:
        best = other
    return replace(choice, plan=best) if again[best] != again[choice.plan] else choice


def recheck(choice: Choice, latency_ms: float, float_ms: float = math.inf) -> Choice:
    """The choice after its plan was measured again: above its ceiling it is not met.

    A plan that is no faster than float gives way to float's.
    """
    ceiling = choice.spec.latency
    if choice.plan != FLOAT and latency_ms >= float_ms:
        note = (
            f"tier {choice.tier}: same plan as exact; {choice.plan} takes {latency_ms:.2f} ms when "
            f"measured again, exact {float_ms:.2f} ms"
        )
        choice = replace(choice, plan=FLOAT, warnings=(*choice.warnings, note))
        latency_ms = float_ms
    if ceiling is None or not choice.met or latency_ms <= ceiling:
        return choice
    note = (
        f"tier {choice.tier}: {choice.plan} was under {ceiling:g} ms in the search and takes "
        f"{latency_ms:.2f} ms when measured again"
    )
    return replace(choice, met=False, warnings=(*choice.warnings, note))


def _by_drop(
    tier: str,
    spec: TierSpec,
    reference: Candidate,
    candidates: Sequence[Candidate],
    verifier: Verifier,
    stop: Callable[[], bool],
    greedy: rivals.Found | None,
) -> Choice:
    assert spec.drop is not None
    promise = spec.drop / 100.0
    n = verifier.n
    follow = allocate.drop_sequence if greedy is None else partial(rivals.sequence, greedy)
    sequence = follow(
        candidates, reference, promise, n, ceiling_ms=spec.latency, alpha=verifier.alpha
    )
    notes: list[str] = []

    def until_late() -> Iterator[str]:
        for place, candidate in enumerate(sequence):
            if place and stop() and not verifier.ran(candidate.name):
                rest = len(sequence) - place
                notes.append(f"tier {tier}: the time budget left {rest} faster plans untested")
                return
            yield candidate.name

    result = evaluate.fixed_sequence(until_late(), lambda name: verifier.test(name, promise))
    met = result.served is not None or verifier.unchanged(promise)[0].passed
    if result.tests and not result.tests[-1][1].passed:
        name, test = result.tests[-1]
        if test.drop < promise and test.b + test.c > 0:
            rows = verifier.needed(name, test)
            notes.append(
                f"tier {tier}: {name} was stopped by its bound of {test.bound * 100:.2f} points "
                f"(drop {test.drop * 100:.2f}); about {rows} verification rows could settle it"
            )
    if spec.latency is not None and result.served is None and reference.latency_ms > spec.latency:
        met = False
        notes.append(
            f"tier {tier}: no plan holds {spec.drop:g} points within {spec.latency:g} ms; exact "
            f"takes {reference.latency_ms:.2f} ms; {_nearest(spec, candidates, result.tests)}; "
            "exact's plan is served"
        )
    elif result.served is None:
        notes.append(f"tier {tier}: same plan as exact; no faster plan held {spec.drop:g} points")
    names = tuple(candidate.name for candidate in sequence)
    return Choice(tier, spec, result.served or FLOAT, result.tests, met, tuple(notes), names)


def _nearest(
    spec: TierSpec,
    candidates: Sequence[Candidate],
    tests: Sequence[tuple[str, evaluate.DropTest]],
) -> str:
    """Which plan comes nearest to a drop within a ceiling that none holds, and what it misses."""
    assert spec.drop is not None
    assert spec.latency is not None
    by_name = {c.name: c for c in candidates}
    if tests:
        name, test = min(tests, key=lambda found: found[1].bound)
        bound = 100 * test.bound
        return (
            f"nearest is {name}: {by_name[name].latency_ms:.2f} ms, and its bound of {bound:.2f} "
            f"points misses the promise by {bound - spec.drop:.2f}"
        )
    fastest = min(candidates, key=lambda c: c.latency_ms)
    over = fastest.latency_ms - spec.latency
    return (
        f"nearest is {fastest.name}, the fastest: {fastest.latency_ms:.2f} ms miss the ceiling by "
        f"{over:.2f}"
    )
