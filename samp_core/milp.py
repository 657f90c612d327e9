"""The fastest plan within a budget of loss, solved exactly: a shortest path with one knapsack row.

The chain of nodes is a layered graph: a vertex is a node's option, an edge two neighbours' options
with its milliseconds. One unit flows from the first node to the last; the losses that it passes
add up to at most the budget. HiGHS, through scipy.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from samp_core.chain import path_cost
from samp_core.errors import SampError

Edges = Sequence[Sequence[Sequence[float]]]
Losses = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Solution:
    """The options chosen, what they cost and lose."""

    choice: tuple[int, ...]
    cost: float
    loss: float


def solve(edges: Edges, losses: Losses, budget: float) -> Solution:
    """The cheapest path whose losses add up to at most `budget`.

    edges: one more than there are nodes, the first from a single start, the last to a single end;
    losses: of each node's options, none below 0. SampError where no path fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    counts = [1, *(len(options) for options in losses), 1]
    shapes = list(itertools.pairwise(counts))
    starts = np.concatenate([[0], np.cumsum([a * b for a, b in shapes])]).astype(int)
    cost = np.concatenate([np.asarray(edge, dtype=np.float64).ravel() for edge in edges])
    weight = np.zeros(len(cost))
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    row = 0
    for place, (before, after) in enumerate(shapes[:-1]):
        following = shapes[place + 1][1]
        for option in range(after):
            enters = [starts[place] + source * after + option for source in range(before)]
            first = starts[place + 1] + option * following
            leaves = list(range(first, first + following))
            weight[leaves] = losses[place][option]
            rows += [row] * (len(enters) + len(leaves))
            columns += [int(column) for column in (*enters, *leaves)]
            values += [1.0] * len(enters) + [-1.0] * len(leaves)
            row += 1
    begin = list(range(counts[1]))
    rows += [row] * len(begin)
    columns += begin
    values += [1.0] * len(begin)
    flow = coo_array((values, (rows, columns)), shape=(row + 1, len(cost)))
    wanted = np.zeros(row + 1)
    wanted[row] = 1.0
    # Losses in units of the budget: the solver's tolerance is absolute.
    over = weight > max(budget, 0.0)
    share = np.divide(weight, budget, out=np.zeros_like(weight), where=~over & (weight > 0.0))
    with _without_prints():
        found = milp(
            cost / max(float(np.abs(cost).max()), 1e-300),
            constraints=[
                LinearConstraint(flow, wanted, wanted),
                LinearConstraint(share[None], -np.inf, 1.0),
            ],
            integrality=np.ones(len(cost)),
            bounds=Bounds(0.0, np.where(over, 0.0, 1.0)),
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        least = sum(min(options) for options in losses)
        raise SampError(
            "no_plan", f"a loss of at most {budget:g}", f"{least:g} or more", "allow more loss"
        )
    taken = found.x > 0.5
    choice = tuple(
        int(np.flatnonzero(taken[starts[i] : starts[i + 1]])[0]) % after
        for i, (_, after) in enumerate(shapes[:-1])
    )
    return Solution(choice, path_cost(edges, choice), lost(losses, choice))


def lost(losses: Losses, choice: Sequence[int]) -> float:
    """The losses of a path added up."""
    return float(sum(options[option] for options, option in zip(losses, choice, strict=True)))


def staircase(edges: Edges, losses: Losses, steps: int = 40) -> list[Solution]:
    """The cheapest paths for budgets from no loss to any, evenly spaced in their logarithm.

    Each once, safest first: cost falls from one to the next, and loss rises.
    """
    positive = [loss for options in losses for loss in options if loss > 0.0]
    budgets = [0.0]
    if positive:
        most = sum(max(options) for options in losses)
        budgets += np.geomspace(min(positive), most * (1 + 1e-9), steps).tolist()
    kept: list[Solution] = []
    for budget in budgets:
        found = solve(edges, losses, budget)
        if not kept or found.cost < kept[-1].cost - 1e-12:
            kept.append(found)
    return kept


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    """HiGHS writes a line of its own to stdout now and then, which is for results alone."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
