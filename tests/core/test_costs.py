"""The table of edges: every pair is met, and what is fitted is what was stamped."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from separable import small

from samp_core import costs
from samp_core.build import open_workbench, plan_modes, read_splits
from samp_core.chain import PLAIN, SPLIT, Variant, chain, choice_of, plan_of
from samp_core.config import load_config
from samp_core.costs import CostTable, covering, fit, line
from samp_core.plan import Plan, Recipe, SitePlan
from samp_core.workbench import silent

PLAN = Plan("0" * 64, {"layers": 1}, "cpu", {}, {})


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_every_pair_of_neighbours_is_met(sizes: list[int]) -> None:
    choices = covering(sizes)
    assert len(choices) == len(set(choices)) <= max(sizes) ** 2
    for place, (before, after) in enumerate(pairwise(sizes)):
        met = {(choice[place], choice[place + 1]) for choice in choices}
        assert met == set(itertools.product(range(before), range(after)))
    for place, size in enumerate(sizes):
        assert {choice[place] for choice in choices} == set(range(size))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 1000))
def test_an_additive_device_is_fitted_exactly(sizes: list[int], seed: int) -> None:
    """Times made of edges and a constant: any plan's total comes out, met or not."""
    rng = np.random.default_rng(seed)
    counts = [1, *sizes, 1]
    true = [rng.uniform(0, 1, (a, b)) for a, b in pairwise(counts)]

    def stamped(choice: tuple[int, ...]) -> list[float]:
        path = (0, *choice, 0)
        return [float(edge[a, b]) for edge, (a, b) in zip(true, pairwise(path), strict=True)]

    choices = covering(sizes)
    stamps = [stamped(choice) for choice in choices]
    edges, base = fit(choices, sizes, stamps, [sum(times) + 0.25 for times in stamps])
    assert base == pytest.approx(0.25)
    table = CostTable({"1": edges, "8": edges}, {"1": base, "8": base})
    for choice in itertools.product(*map(range, sizes)):
        assert table.total(choice, "1") == pytest.approx(sum(stamped(choice)) + 0.25)
    mixed = table.weighted({"1": 0.5, "8": 1.5})
    for edge, half in zip(edges, mixed, strict=True):
        np.testing.assert_allclose(np.array(half), 2 * np.array(edge))


@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=4, unique=True),
    st.floats(0.75, 1.25),
    st.floats(0, 2),
)
def test_stamps_are_scaled_to_whole_passes(totals: list[float], slope: float, rest: float) -> None:
    x = np.array(totals)
    found = line(x, slope * x + rest)
    if x.max() - x.min() > 0.05 * x.mean():
        assert found == pytest.approx((slope, rest), abs=1e-6)
    assert line(np.full(4, 2.0), np.array([2.4, 2.5, 2.6, 2.5])) == pytest.approx((1.0, 0.5))
    wild, _ = line(x, 9.0 * x)
    assert wild in (1.0, 1.0 + costs.LARGEST_SCALE)


@pytest.mark.parametrize("backend", ["onednn", "reference"])
def test_the_stamps_of_a_device(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stamps lie inside the pass, every site has some, and the cache knows them."""
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "FEWEST", 2)
    yaml = small().yaml(tmp_path / "b.yaml", out=str(tmp_path / "out"), backend=backend)
    config = load_config(yaml, {})
    bench = open_workbench(config, silent)
    splits = read_splits(config, [])
    search = bench.split(splits.search)
    modes: dict[str, Any] = plan_modes(config, bench, bench.split(splits.calibration), search)
    if "full(3)" not in modes:
        pytest.skip("no int8 on this CPU")
    full = modes["full(3)"]
    nodes = chain(3, bench.quantizable(), Recipe())
    every = [len(node.options) - 1 for node in nodes]
    assert plan_of(full, nodes, every).key() == full.key()
    assert choice_of(full, nodes) == tuple(every)
    asked = []
    table = costs.measured(
        bench, full, nodes, search, {"1": 1.0, "8": 0.5}, lambda: asked.append(1) is None
    )
    assert len(asked) == 2, "each bucket stops when the time is up"
    for bucket in ("1", "8"):
        for place, node in enumerate(nodes, start=1):
            times = np.array(table.edges[bucket][place])
            after = 1 if place == len(nodes) else len(nodes[place].options)
            assert times.shape == (len(node.options), after)
            assert (times > 0).all(), f"{node.name} was never stamped"
        assert table.total(every, bucket) > 0
    before = bench.cache.misses
    assert costs.measured(bench, full, nodes, search, {"1": 1.0, "8": 0.5}) == table
    assert bench.cache.misses == before
    bench.close()


def planted(seed: int, layers: int = 6) -> tuple[Any, CostTable, Any]:
    """Nodes, a stamped table, and what whole plans really take: another factor for each kind of
    site and precision, passes measured to a hundredth.
    """
    rng = np.random.default_rng(seed)
    nodes = chain(layers, ("qkv", "out", "ffn_in", "ffn_out", "scores", "context"), Recipe())
    counts = [1, *(len(node.options) for node in nodes), 1]
    edges = [rng.uniform(0.05, 0.3, shape) for shape in pairwise(counts)]
    factors = {
        (node.name.split(".")[2], option): rng.uniform(0.6, 1.6)
        for node in nodes
        for option in range(2)
    }

    def takes(choice: Any) -> float:
        path = (*choice, 0)
        times = [edges[0][0, choice[0]]]
        for place, node in enumerate(nodes):
            factor = factors[node.name.split(".")[2], choice[place]]
            times.append(factor * edges[place + 1][path[place], path[place + 1]])
        return float(sum(times) + 0.2)

    stamped = CostTable({"1": tuple(tuple(map(tuple, e.tolist())) for e in edges)}, {"1": 0.05})
    return nodes, stamped, takes


def test_whole_plans_correct_the_stamps() -> None:
    """Modes and a few plans between them are measured; plans that were not are foretold."""
    late_before, late_after = [], []
    for seed in range(12):
        nodes, stamped, takes = planted(seed)
        rng = np.random.default_rng(seed + 100)
        count = len(nodes)
        measured = [(0,) * count, (1,) * count]
        for layers in (2, 4):
            measured.append(tuple(int(n.layer < layers) for n in nodes))
        for layers in (3, 6):
            measured.append(tuple(int(n.layer < layers and "ffn" in n.name) for n in nodes))
        measured += [
            tuple((rng.random(count) < p).astype(int).tolist()) for p in (0.3, 0.5, 0.7, 0.9)
        ]
        whole = {"1": [takes(c) * rng.normal(1.0, 0.01) for c in measured]}
        table = costs.corrected(stamped, nodes, measured, whole)
        fresh = [
            tuple((rng.random(count) < p).astype(int).tolist()) for p in rng.uniform(0, 1, 200)
        ]
        true = np.array([takes(c) for c in fresh])
        told = np.array([stamped.total(c, "1") for c in fresh])
        # Even at the pace that suits these very plans best, the stamps are wrong by more.
        before = np.abs(told * np.median(true / told) / true - 1.0)
        after = np.abs(np.array([table.total(c, "1") for c in fresh]) / true - 1.0)
        late_before.append(np.quantile(before, 0.95))
        late_after.append(np.quantile(after, 0.95))
        # What a plan that was left out is foretold wrong by is what others are.
        found = costs.misses(stamped, nodes, measured, whole)["1"]
        assert found["plans"] == len(measured)
        assert found["median"] <= min(found["largest"], 0.06)
        assert found["stamped_median"] <= found["stamped_largest"]
    assert max(late_after) < 0.08, "where passes are known to 1%"
    assert np.mean(late_after) < 0.7 * np.mean(late_before)


def test_right_stamps_stay_as_they_are() -> None:
    """One factor for all is the machine's pace; it is all that a slower moment changes."""
    nodes, stamped, _ = planted(0)
    rng = np.random.default_rng(1)
    some = [tuple(rng.integers(0, 2, len(nodes)).tolist()) for _ in range(6)]
    whole = {"1": [3.0 * stamped.total(c, "1") for c in some]}
    table = costs.corrected(stamped, nodes, some, whole)
    for choice in [tuple(rng.integers(0, 2, len(nodes)).tolist()) for _ in range(50)]:
        assert table.total(choice, "1") == pytest.approx(3.0 * stamped.total(choice, "1"), rel=0.01)


def test_one_plan_tells_the_pace_alone() -> None:
    nodes, stamped, _ = planted(0)
    plain = (0,) * len(nodes)
    table = costs.corrected(stamped, nodes, [plain], {"1": [2.0 * stamped.total(plain, "1")]})
    ratios = [table.total(c, "1") / stamped.total(c, "1") for c in (plain, (1,) * len(nodes))]
    assert ratios == pytest.approx([2.0, 2.0], rel=0.02)
    # A table of what was not measured stays.
    assert costs.corrected(stamped, nodes, [], {}) == stamped


@given(st.integers(0, 10_000), st.floats(0.8, 1.25), st.floats(0.8, 1.25))
@settings(max_examples=25, deadline=None)
def test_plans_are_foretold_at_the_pace_of_their_turns(
    seed: int, floats: float, ints: float
) -> None:
    """Between the search and these turns fp32 and int8 change their speed, each in its own way."""
    nodes, table, _ = planted(seed, layers=3)
    count = len(nodes)

    def now(choice: costs.Choice) -> float:
        path = (*choice, 0)
        rates = [(floats, ints)[option] for option in choice]
        inside = [
            rate * table.edges["1"][place + 1][path[place]][path[place + 1]]
            for place, rate in enumerate(rates)
        ]
        return table.edges["1"][0][0][choice[0]] + sum(inside) + table.base_ms["1"]

    half = tuple(int(place % 2) for place in range(count))
    third = tuple(int(place % 3 > 0) for place in range(count))
    few, most = (tuple(int((place % 4 > 0) == much) for place in range(count)) for much in (0, 1))
    choices = {"float": (0,) * count, "few": few, "half": half, "third": third, "most": most}
    choices["full"] = (1,) * count
    measured = {name: {"1": now(choice)} for name, choice in choices.items()}
    found = costs.foretold(table, nodes, choices, measured)
    for name in choices:  # of each a neighbour is there: beyond all others foretelling is guessing
        assert found[name]["1"] == pytest.approx(measured[name]["1"], rel=0.1), name
    # Its own time is not looked at, nor that of a plan which is the same.
    twice = {**choices, "full again": choices["full"]}
    lied = {**measured, "full": {"1": 99.0}, "full again": {"1": 99.0}}
    assert costs.foretold(table, nodes, twice, lied)["full"] == found["full"]
    assert costs.foretold(table, nodes, {"float": choices["float"]}, measured) == {}


def test_variants_in_a_chain() -> None:
    """Options that are no precision's main one: their place, name, scale, and the plan back."""
    site = "layer.0.out"
    split, plain = Recipe(calibrator="mse", outliers=8), Recipe(calibrator="entropy")
    main = Recipe(calibrator="mse", outliers=4)
    some = {site: [Variant(SPLIT, split, 0.5), Variant(PLAIN, plain, 3.0)]}
    kinds = ("qkv", "out", "ffn_in", "ffn_out")
    nodes = chain(1, kinds, main, ("fp16",), (), None, some)
    by_name = {node.name: node for node in nodes}
    node = by_name[site]
    assert node.labels == ("fp32", "fp16", SPLIT, PLAIN, "int8")
    assert node.precisions == ("fp32", "fp16", "int8", "int8", "int8")
    assert by_name["layer.0.qkv"].labels == ("fp32", "fp16", "int8")
    assert node.up_to(SPLIT).labels == ("fp32", "fp16", SPLIT)
    assert node.up_to("fp8").labels == ("fp32", "fp16")
    base = replace(PLAN, scales={f"{site}.input_scale": 1.0, "layer.0.qkv.input_scale": 2.0})
    for place, (label, scale) in enumerate(
        zip(node.labels, (1.0, 1.0, 0.5, 3.0, 1.0), strict=True)
    ):
        choice = [place if n is node else len(n.options) - 1 for n in nodes]
        plan = plan_of(base, nodes, choice)
        assert plan.scales == {**base.scales, f"{site}.input_scale": scale}, label
        assert choice_of(plan, nodes) == tuple(choice)
    # A recipe that is none of them counts as the main one: plans are edited by hand.
    edited = replace(
        plan, sites={**plan.sites, site: SitePlan("int8", Recipe(calibrator="minmax"))}
    )
    assert choice_of(edited, nodes) == choice_of(plan, nodes)
