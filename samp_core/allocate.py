"""From measured plans to what a tier serves: SAMP's modes, its decay-aware rule, fixed sequences.

Everything here is a pure function of measurements on the search split; nothing sees the
verification split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from samp_kernels.interface import Array

from samp_core.evaluate import drop_upper_bound, expected_bound, expected_floor, tango_interval

STEP = 0.1
"""Each plan of a sequence is faster than the one before it by more than this share."""
SAFE = 0.2
"""A sequence begins with the fastest plan whose bound takes at most this part of the way from that
of a plan which changes nothing to the promise."""
FEWEST_TO_POOL = 5
KL_SPREAD = 4.0
"""Changes are pooled over so many plans at least, whose KL differs by such a factor at least."""


@dataclass(frozen=True)
class Candidate:
    """A plan as measured on the search split.

    b: texts that float gets right and the plan wrong; c: the reverse; n: texts. expected_b and
    expected_c: the same by `expected_changes`, which few texts blur less. latency_ms: one text of
    median length. `accuracy` is the task's metric; where it is none of right and wrong texts,
    `lost` is its drop, with `noise` and `worst` as in evaluate.expected_bound. kl: mean divergence
    from float's outputs in nats, 0 where it is not known. timed: latency_ms is of whole passes on
    the device, not modelled.
    """

    name: str
    latency_ms: float
    accuracy: float
    b: int
    c: int
    n: int
    expected_b: float
    expected_c: float
    lost: float | None = None
    noise: float = 0.0
    worst: float = 0.0
    kl: float = 0.0
    timed: bool = True

    @property
    def drop(self) -> float:
        return (self.b - self.c) / self.n if self.lost is None else self.lost

    def lower_drop(self, alpha: float) -> float:
        """Lower end of the one-sided interval of the drop."""
        if self.lost is None:
            return tango_interval(self.b, self.c, self.n, 1.0 - alpha).low
        return expected_floor(self.lost, self.noise, self.n, alpha)


def predicted_bound(candidate: Candidate, n: int, alpha: float = 0.05) -> float:
    """The drop bound to expect on n fresh texts if the search split's rates are the true ones."""
    if candidate.lost is not None:
        return expected_bound(candidate.lost, candidate.noise, candidate.worst, n, alpha)
    scale = n / candidate.n
    b = candidate.expected_b * scale
    c = min(candidate.expected_c, candidate.expected_b) * scale
    return drop_upper_bound(b, c, n, alpha)


def safe_bound(reference: Candidate, promise: float, n: int, alpha: float = 0.05) -> float:
    """The predicted bound that the first plan of a sequence should have at most; see SAFE.

    reference: float's, whose bound is the least that n texts can show.
    """
    least = min(predicted_bound(reference, n, alpha), promise)
    return least + SAFE * (promise - least)


def expected_changes(reference: Array, logits: Array, gold: Array) -> tuple[float, float]:
    """Expected (b, c) over the rows of two sets of logits [n, C].

    A row flips when the plan's noise on the gap between float's two best classes exceeds the gap.
    Each row's chance to flip is the share of the noises, seen on the rows with the nearest gaps,
    that would flip it: n x window chances in place of n, so a rate of one in a thousand shows in
    a thousand rows.
    """
    rows = np.arange(len(gold))
    order = np.argsort(-reference, axis=1, kind="stable")[:, :2]
    first, second = order[:, 0], order[:, 1]
    gap = (reference[rows, first] - reference[rows, second]).astype(np.float64)
    noise = (logits[rows, first] - logits[rows, second]) - gap
    by_gap = np.argsort(gap, kind="stable")
    window = min(len(gold), 201)
    flips = np.empty(len(gold))
    for place, row in enumerate(by_gap.tolist()):
        start = min(max(place - window // 2, 0), len(gold) - window)
        near = noise[by_gap[start : start + window]]
        flips[row] = np.mean(gap[row] + near < 0.0)
    right = first == gold
    gains = (~right) & (second == gold)
    return float(flips[right].sum()), float(flips[gains].sum())


def pooled(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same, with each one's changes as the KL of all of them foretells.

    How many texts change follows a plan's KL: log(changes) = u + v log(KL), fitted over all plans
    by least squares, weighted by the root of the changes; and of the changes the share that is
    lost is one for all. Each plan's own few changes say less: on three recorded tasks the error of
    log(changes) falls from 0.33-0.60 to 0.24-0.52.
    """
    known = [c for c in candidates if c.kl > 0.0 and _changes(c)[0] > 0.0]
    logs = np.log([c.kl for c in known]) if known else np.empty(0)
    if len(known) < FEWEST_TO_POOL or logs.max() - logs.min() < np.log(KL_SPREAD):
        return list(candidates)
    found = np.array([_changes(c) for c in known])
    weights = np.sqrt(np.sqrt(found[:, 0]))
    design = np.stack([np.ones(len(logs)), logs], axis=1) * weights[:, None]
    (u, v), *_ = np.linalg.lstsq(design, np.log(found[:, 0]) * weights, rcond=None)
    if v <= 0.0:
        return list(candidates)
    share = max(float(found[:, 1].sum() / found[:, 0].sum()), 0.0)
    changes = dict(zip([c.name for c in known], np.exp(u + v * logs).tolist(), strict=True))
    return [_changed(c, changes[c.name], share) if c.name in changes else c for c in candidates]


def _changes(candidate: Candidate) -> tuple[float, float]:
    """How much changes, and how much of it is lost: texts, or squared noise and drop."""
    if candidate.lost is not None:
        return candidate.noise**2, candidate.lost
    return (
        candidate.expected_b + candidate.expected_c,
        candidate.expected_b - candidate.expected_c,
    )


def _changed(candidate: Candidate, changes: float, share: float) -> Candidate:
    if candidate.lost is not None:
        return replace(candidate, noise=float(np.sqrt(changes)), lost=share * changes)
    share = min(share, 1.0)
    return replace(
        candidate, expected_b=changes * (1 + share) / 2, expected_c=changes * (1 - share) / 2
    )


def front(candidates: Sequence[Candidate], n: int, alpha: float = 0.05) -> list[Candidate]:
    """Plans that no other beats in both predicted bound and latency, slowest and safest first."""
    ordered = sorted(candidates, key=lambda c: (predicted_bound(c, n, alpha), c.latency_ms))
    kept: list[Candidate] = []
    for candidate in ordered:
        if not kept or candidate.latency_ms < kept[-1].latency_ms:
            kept.append(candidate)
    return kept


def drop_sequence(
    candidates: Sequence[Candidate],
    reference: Candidate,
    promise: float,
    n: int,
    *,
    ceiling_ms: float | None = None,
    alpha: float = 0.05,
) -> list[Candidate]:
    """The plans to verify for a promised drop, safest first; the last that passes is served.

    The first failure ends it, so each test in between may cost everything after it and has to
    bring something: the front of predicted bound and latency in steps of more than STEP, from the
    fastest plan within safe_bound on. A failure of the last costs nothing: it is the fastest.
    """
    ordered = front(able(candidates, reference, ceiling_ms), n, alpha)
    most = safe_bound(reference, promise, n, alpha)
    safe = [c for c in ordered if predicted_bound(c, n, alpha) <= most]
    chosen: list[Candidate] = []
    for candidate in ordered[max(len(safe) - 1, 0) :]:
        if not chosen or candidate.latency_ms < (1.0 - STEP) * chosen[-1].latency_ms:
            chosen.append(candidate)
    if chosen and chosen[-1] is not ordered[-1]:
        chosen.append(ordered[-1])
    return chosen


def able(
    candidates: Sequence[Candidate], reference: Candidate, ceiling_ms: float | None
) -> list[Candidate]:
    """Timed ones that are faster than the reference and under the ceiling."""
    return [
        c
        for c in candidates
        if c.timed
        and c.latency_ms < reference.latency_ms
        and (ceiling_ms is None or c.latency_ms <= ceiling_ms)
    ]


def most_accurate_under(
    candidates: Sequence[Candidate], ceiling_ms: float, n: int, alpha: float = 0.05
) -> Candidate | None:
    """The plan with the smallest predicted bound whose latency is at most the ceiling."""
    under = [c for c in candidates if c.latency_ms <= ceiling_ms]
    if not under:
        return None
    return min(under, key=lambda c: (predicted_bound(c, n, alpha), c.latency_ms))


def decay_aware(plans: Sequence[Candidate], alpha: float = 0.05) -> Candidate:
    """SAMP's recommendation among `float` and mode(1) .. mode(L), in that order.

    The accuracies A_k are smoothed to fall with k; the plan farthest above the chord from (0, A_0)
    to (T_0 - T_L, A_L) is where the accuracy lost per millisecond gained begins to jump. If the
    whole drop is within noise the fastest plan is taken, if nothing lies above the chord mode(L).
    """
    first, last = plans[0], plans[-1]
    if last.lower_drop(alpha) <= 0.0:
        return min(plans, key=lambda c: c.latency_ms)
    accuracy = falling([c.accuracy for c in plans])
    gained = np.array([first.latency_ms - c.latency_ms for c in plans])
    span = gained[-1]
    if span <= 0.0:
        return first
    chord = accuracy[0] + (accuracy[-1] - accuracy[0]) * gained / span
    above = accuracy - chord
    best = int(np.argmax(above))
    return plans[best] if above[best] > 1e-12 else last


def falling(values: Sequence[float]) -> Array:
    """The closest non-increasing sequence in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] < mean:
            other, count = blocks.pop()
            mean = (other * count + mean * size) / (count + size)
            size += count
        blocks.append((mean, size))
    return np.concatenate([np.full(size, mean) for mean, size in blocks])


def last_fit(
    count: int, look: Callable[[int], Candidate | None], fits: Callable[[Candidate], bool]
) -> int:
    """By halves, the last of `count` places that fits; -1 where none was found to.

    A place that could not be looked at ends the search.
    """
    low, high = -1, count
    middle = count - 1  # the fastest of all may do
    while low < middle < high:
        made = look(middle)
        if made is None:
            break
        if fits(made):
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return low
