"""The exact search against all paths there are, on instances small enough to list them."""

from __future__ import annotations

import ctypes
import itertools
import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samp_core import milp
from samp_core.chain import path_cost
from samp_core.errors import SampError

Instance = tuple[list[list[list[float]]], list[list[float]]]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to 5 nodes of 1 to 3 options; the first option loses nothing; costs may be negative."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    ms = st.floats(-2, 10, allow_nan=False, width=32)
    loss = st.one_of(st.just(0.0), st.floats(1e-7, 1e-2))
    counts = [1, *sizes, 1]
    edges = [
        [[draw(ms) for _ in range(after)] for _ in range(before)]
        for before, after in pairwise(counts)
    ]
    losses = [[0.0, *(draw(loss) for _ in range(size - 1))] for size in sizes]
    return edges, losses


def paths(losses: list[list[float]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(options)) for options in losses)))


@settings(max_examples=150, deadline=None)
@given(instances(), st.floats(0, 1.2))
def test_no_path_within_the_budget_is_cheaper(instance: Instance, share: float) -> None:
    edges, losses = instance
    budget = share * sum(max(options) for options in losses)
    found = milp.solve(edges, losses, budget)
    allowed = [p for p in paths(losses) if milp.lost(losses, p) <= budget]
    best = min(path_cost(edges, p) for p in allowed)
    assert found.loss <= budget * (1 + 1e-6)
    assert found.cost == path_cost(edges, found.choice)
    assert found.cost <= best + 1e-6
    # Never cheaper either, but by a loss that only rounding puts above the budget.
    rounded = [p for p in paths(losses) if milp.lost(losses, p) <= budget * (1 + 1e-6)]
    assert found.cost >= min(path_cost(edges, p) for p in rounded) - 1e-6


@settings(max_examples=40, deadline=None)
@given(instances())
def test_the_staircase_descends_and_ends_at_the_cheapest(instance: Instance) -> None:
    edges, losses = instance
    stairs = milp.staircase(edges, losses, steps=12)
    assert stairs[0].loss == 0.0
    for safe, fast in pairwise(stairs):
        assert fast.cost < safe.cost
        assert fast.loss > safe.loss
    assert stairs[-1].cost == pytest.approx(
        min(path_cost(edges, p) for p in paths(losses)), abs=1e-6
    )
    # Each is the cheapest of all paths that lose no more.
    for step in stairs:
        least = min(path_cost(edges, p) for p in paths(losses) if milp.lost(losses, p) <= step.loss)
        assert step.cost == pytest.approx(least, abs=1e-6)


def test_an_edge_makes_two_quantized_neighbours_cheaper_than_one() -> None:
    """Alone each node gains nothing (converting eats it), together they do."""
    alone = [[[0.0, 0.0]], [[5.0, 5.0], [5.0, 1.0]], [[0.0], [0.0]]]
    losses = [[0.0, 1e-4], [0.0, 2e-4]]
    assert milp.solve(alone, losses, 2.5e-4).choice == (0, 0)
    both = milp.solve(alone, losses, 3e-4)
    assert (both.choice, both.cost) == ((1, 1), 1.0)
    assert both.loss == pytest.approx(3e-4)


def test_as_large_as_a_bert_of_24_layers() -> None:
    rng = np.random.default_rng(0)
    nodes = 120
    losses = [[0.0, float(loss)] for loss in 10 ** rng.uniform(-7, -2, nodes)]
    counts = [1, *[2] * nodes, 1]
    edges = [rng.uniform(0.1, 1.0, (a, b)).tolist() for a, b in pairwise(counts)]
    budget = 0.05
    found = milp.solve(edges, losses, budget)
    assert found.loss <= budget
    # Lagrange's bound from below: no path is cheaper than the best of cost + weight x loss.
    bounds = []
    for price in np.geomspace(0.01, 1e4, 60):
        best = np.zeros(1)
        for place in range(nodes + 1):
            step = best[:, None] + np.asarray(edges[place])
            best = step.min(axis=0)
            if place < nodes:
                best = best + price * np.asarray(losses[place])
        bounds.append(float(best[0]) - price * budget)
    assert max(bounds) - 1e-9 <= found.cost <= max(bounds) + 0.5


def test_no_path_fits() -> None:
    with pytest.raises(SampError, match=r"no_plan: a loss of at most 0\.1; allowed: 0\.3 or more"):
        milp.solve([[[1.0]], [[1.0]]], [[0.3]], 0.1)


def test_nothing_is_written_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """Results are printed there, and HiGHS would print too; what comes after it still arrives."""
    with milp._without_prints():
        ctypes.CDLL(None).puts(b"a line of the solver's own")
        os.write(1, b"another")
    print("a result", flush=True)
    assert capfd.readouterr().out == "a result\n"
