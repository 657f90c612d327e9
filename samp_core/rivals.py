"""What other strategies would propose, as points of one model of loss and time.

Pure functions over a chain's choices: `milp` looks at what stands for each of their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from samp_core.allocate import STEP
from samp_core.chain import Node, path_cost
from samp_core.milp import Solution, lost

NEAR = 0.05
"""Of two plans of one loss, the share of time by which the slower may still be as good."""


@dataclass(frozen=True)
class Point:
    """A plan as modelled: what its nodes lose together, and the milliseconds of a pass."""

    name: str
    choice: tuple[int, ...]
    loss: float
    ms: float


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


def points(
    named: Sequence[tuple[str, tuple[int, ...]]],
    losses: Sequence[Sequence[float]],
    edges: Sequence[Sequence[Sequence[float]]],
    rest_ms: float,
) -> list[Point]:
    """Choices as the model has them. rest_ms: what a pass costs beside the edges."""
    return [
        Point(name, choice, lost(losses, choice), path_cost(edges, choice) + rest_ms)
        for name, choice in named
    ]


def steps(points: Sequence[Point], least: float, most: float) -> list[Point]:
    """A strategy's own front in steps of STEP of time, from the last of at most `least` loss to
    `most`; the fastest is always there. Safest first.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.loss, p.ms)):
        if point.loss <= most and (not kept or point.ms < kept[-1].ms):
            kept.append(point)
    safe = sum(point.loss <= least for point in kept)
    chosen: list[Point] = []
    for point in kept[max(safe - 1, 0) :]:
        if not chosen or point.ms < (1.0 - STEP) * chosen[-1].ms:
            chosen.append(point)
    return chosen if not kept or kept[-1] in chosen else [*chosen, kept[-1]]


def stand_in(point: Point, stairs: Sequence[Solution], rest_ms: float) -> Point | Solution:
    """The fastest stair of no more loss, or the point itself where that is hardly faster.

    rest_ms: what a pass costs beside the edges of the stairs.
    """
    able = [stair for stair in stairs if stair.loss <= point.loss * (1 + 1e-9)]
    best = min(able, key=lambda stair: stair.cost, default=None)
    if best is None or best.cost + rest_ms > (1.0 - NEAR) * point.ms:
        return point
    return best
