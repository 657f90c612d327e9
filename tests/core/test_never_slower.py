"""milp beside samp and greedy at equal promises: what is sure, and how often the rest holds.

Sure: greedy's own steps are tested as greedy would test them, and what else is comes behind them,
so that milp is never slower than greedy. In worlds of made-up rows, noise and milliseconds it is
counted how often it is faster, and what samp serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samp_core import evaluate, rivals
from samp_core.allocate import (
    Candidate,
    drop_sequence,
    expected_changes,
    pooled,
    predicted_bound,
)
from samp_core.chain import chain
from samp_core.plan import Recipe

N, SEARCH, LAYERS = 2500, 512, 6
PROMISES = (0.005, 0.01, 0.02)
KINDS = 5  # qkv, attention, out, ffn_in, ffn_out


def made(name: str, ms: float, b: float, c: float) -> Candidate:
    return Candidate(name, ms, 0.9, round(b), round(c), 1000, b, c, kl=(b + c) / 1000)


plans = st.lists(
    st.tuples(st.floats(1, 12), st.floats(0, 40), st.floats(0, 40)), min_size=1, max_size=10
)
chances = st.lists(st.booleans(), min_size=20, max_size=20)


@settings(deadline=None)
@given(plans, plans, st.sampled_from(PROMISES), chances, st.none() | st.floats(1, 12))
def test_greedy_serves_no_faster_plan(
    own: Any, greedy: Any, promise: float, chance: Any, ceiling: float | None
) -> None:
    """Whatever plans pass."""
    exact = made("float", 10.0, 0, 0)
    theirs = [made(f"greedy{i}", ms, b, c) for i, (ms, b, c) in enumerate(greedy)]
    every = [*theirs, *(made(f"milp{i}", ms, b, c) for i, (ms, b, c) in enumerate(own))]
    passing = {c.name for c, passes in zip(every, chance, strict=False) if passes}

    def served(sequence: Sequence[Candidate]) -> float:
        result = evaluate.fixed_sequence(sequence, lambda c: Passed(c.name in passing))
        return (result.served or exact).latency_ms

    found = rivals.Found({c.name: c for c in [exact, *theirs]})
    ours = rivals.sequence(found, every, exact, promise, N, ceiling_ms=ceiling)
    steps = drop_sequence(theirs, exact, promise, N, ceiling_ms=ceiling)
    times = [c.latency_ms for c in ours]
    assert times == sorted(set(times), reverse=True), "each faster than the one before"
    assert all(ms < 10.0 and ms <= (ceiling or 12.0) for ms in times)
    if not steps:
        assert ours == drop_sequence(every, exact, promise, N, ceiling_ms=ceiling)
        return
    assert served(ours) <= served(steps)
    assert ours[: len(steps)] == steps
    able = [c for c in every if c.latency_ms <= (ceiling or 12.0)]
    likely = [c.latency_ms for c in able if predicted_bound(c, N) <= rivals.HOPE * promise]
    assert ours[-1].latency_ms * (1 - rivals.HARDLY) <= min(likely, default=12.0), "costs nothing"


def test_where_greedy_ran_out_of_time_a_safer_plan_comes_first() -> None:
    exact = made("float", 10.0, 0, 0)
    theirs = [made("greedy(0)", 2.0, 30, 5), made("greedy(1)", 3.0, 20, 5)]
    own = [made("milp-a", 6.0, 2, 1), made("milp-b", 4.0, 6, 3), made("milp-c", 2.9, 21, 6)]
    by_name = {c.name: c for c in [exact, *theirs]}

    def names(cut: bool, *more: Candidate) -> list[str]:
        found = rivals.Found(by_name | {c.name: c for c in more}, cut)
        some = [*theirs, *own, *more]
        return [c.name for c in rivals.sequence(found, some, exact, 0.02, N)]

    assert names(False) == ["greedy(1)", "greedy(0)"]
    assert names(True) == ["milp-a", "greedy(1)", "greedy(0)"]
    safe = made("greedy(2)", 5.0, 1, 1)
    assert names(True, safe) == names(False, safe) == ["greedy(2)", "greedy(1)", "greedy(0)"]
    found = rivals.Found({"float": exact})
    assert rivals.sequence(found, own, exact, 0.02, N) == drop_sequence(own, exact, 0.02, N)


def test_faster_plans_come_behind_where_they_cost_nothing() -> None:
    exact, step, last = made("float", 10.0, 0, 0), made("g1", 6.0, 8, 4), made("g0", 2.0, 30, 5)
    found = rivals.Found({c.name: c for c in (exact, step, last)})

    def names(*candidates: Candidate) -> list[str]:
        some = [step, last, *candidates]
        return [c.name for c in rivals.sequence(found, some, exact, 0.02, N)]

    assert names(made("m", 5.0, 2, 1)) == ["g1", "g0"], "however safe it is"
    keeps, may, hopeless = made("k", 1.8, 20, 10), made("h", 1.5, 40, 10), made("x", 1.0, 200, 9)
    assert names(keeps) == ["g1", "g0", "k"]
    assert names(may) == ["g1", "g0", "h"]
    assert names(keeps, may, hopeless) == ["g1", "g0", "k", "h"]
    assert names(replace(keeps, latency_ms=1.97)) == ["g1", "g0"]
    assert names(replace(keeps, timed=False)) == ["g1", "g0"]


class Passed:
    def __init__(self, passed: bool) -> None:
        self.passed = passed


# made-up worlds


PLAIN, SPLIT = 2, 3


class World:
    """Rows with a gap between two classes, nodes that add noise to it and take milliseconds.

    A choice holds 0 for float and 1 for int8, which samp and greedy know, too; PLAIN is faster and
    noisier, SPLIT slower and less noisy.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        nodes = KINDS * LAYERS
        self.ms = np.tile([3.0, 0.6, 1.0, 4.0, 4.0], LAYERS) * rng.lognormal(0, 0.15, nodes)
        part = np.tile([0.65, 0.2, 0.6, 0.7, 0.7], LAYERS) * rng.lognormal(0, 0.25, nodes)
        self.saved = self.ms * np.clip(part, -0.1, 0.85)
        scale = 10 ** rng.uniform(-1.5, -0.4) / np.sqrt(nodes)
        self.sizes = scale * rng.lognormal(0, rng.uniform(0.4, 1.2), nodes)
        self.louder = np.sqrt(1 + rng.lognormal(np.log(rng.uniform(0.2, 2.0)), 0.5, nodes))
        self.quieter = np.sqrt(
            np.clip(rng.lognormal(np.log(rng.uniform(0.5, 0.9)), 0.3, nodes), 0.1, 1)
        )
        self.quicker, self.longer = (
            self.ms * rng.uniform(0.01, top, nodes) for top in (0.05, 0.03)
        )
        self.bias = rng.normal(0, rng.uniform(0, 0.3))
        self.gap = 2 * np.abs(rng.standard_normal(SEARCH + N))
        self.right = rng.random(SEARCH + N) < 1 / (1 + np.exp(-rng.uniform(0.8, 2) * self.gap))
        self.noise = rng.standard_normal((SEARCH + N, nodes))
        self.timing = rng.uniform(0.002, 0.02)
        self.exact = self.candidate("float", np.zeros(nodes))
        self.choices: dict[str, Any] = {}
        self._tests: dict[str, evaluate.DropTest] = {}

    def logits(self, choice: Any) -> Any:
        kinds = [0 * self.sizes, 1 + 0 * self.sizes, self.louder, self.quieter]
        sizes = self.sizes * np.choose(choice.astype(int), kinds)
        z = self.gap + self.noise @ sizes - self.bias * np.sqrt((sizes**2).sum())
        return np.stack([z, np.zeros_like(z)], axis=1)

    def candidate(self, name: str, choice: Any) -> Candidate:
        """As the search split and a clock that errs a little show a plan."""
        ms = 1.0 + float(self.ms.sum() - self.saved @ (choice > 0))
        ms += float(self.longer @ (choice == SPLIT) - self.quicker @ (choice == PLAIN))
        ms *= 1.0 + self.timing * float(self.rng.standard_normal()) * bool(choice.any())
        z, right = self.logits(choice)[:SEARCH], self.right[:SEARCH]
        plain, gold = self.logits(0 * choice)[:SEARCH], np.where(right, 0, 1)
        b, c, _ = evaluate.paired_counts(right, z.argmax(axis=1) == gold)
        p, q = (1 / (1 + np.exp(-x[:, 0])) for x in (plain, z))
        kl = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
        seen = expected_changes(plain, z, gold)
        return Candidate(name, ms, 0.0, b, c, SEARCH, *seen, kl=max(float(kl), 0.0))

    def proposed(self) -> dict[str, dict[str, Candidate]]:
        """Strategy -> its plans; a plan of two strategies is one candidate."""
        nodes = np.arange(KINDS * LAYERS)
        layer, kind = nodes // KINDS, nodes % KINDS
        dear = np.argsort(-self.sizes)
        named = {
            "samp": [(layer < k) & (kind > 2) for k in range(1, LAYERS + 1)]
            + [layer < k for k in range(1, LAYERS + 1)],
            "greedy": [~np.isin(nodes, dear[:k]) for k in range(len(nodes))],
            "milp": self.staircase(),
        }
        found: dict[str, dict[str, Candidate]] = {}
        known: dict[bytes, Candidate] = {}
        for who, choices in named.items():
            for choice in choices:
                key = choice.tobytes()
                if key not in known:
                    name = f"{who}-{len(known)}"
                    self.choices[name] = choice.astype(float)
                    known[key] = self.candidate(name, self.choices[name])
                found.setdefault(who, {})[known[key].name] = known[key]
        return found

    def staircase(self) -> list[Any]:
        """With additive times and losses: step by step what saves most for its loss."""
        saves = [0 * self.saved, self.saved - self.longer, self.saved, self.saved + self.quicker]
        sizes = [0 * self.sizes, self.sizes * self.quieter, self.sizes, self.sizes * self.louder]
        options = np.array([0, SPLIT, 1, PLAIN])
        place = np.zeros(len(self.saved), int)
        found = []
        while True:
            steps = [
                ((saves[to][i] - saves[at][i]) / (sizes[to][i] ** 2 - sizes[at][i] ** 2), i, to)
                for i, at in enumerate(place.tolist())
                for to in range(at + 1, 4)
            ]
            best, node, to = max(steps, default=(0.0, 0, 0))
            if best <= 0.0:
                return found
            place[node] = to
            found.append(options[place])

    def served(self, sequence: Sequence[Candidate], promise: float) -> float:
        """Milliseconds of what the verification rows let pass."""

        def test(candidate: Candidate) -> Passed:
            name = candidate.name
            if name not in self._tests:
                right = self.right[SEARCH:]
                kept = (self.logits(self.choices[name])[SEARCH:, 0] >= 0) == right
                self._tests[name] = evaluate.drop_test(right, kept, promise)
            return Passed(self._tests[name].bound <= promise)

        result = evaluate.fixed_sequence(sequence, test)
        return (result.served or self.exact).latency_ms


def rows_of(world: World) -> list[tuple[float, float, float, float]]:
    """At each promise milliseconds of milp, samp, greedy, and milp by its own steps alone."""
    found = world.proposed()

    def together(some: Mapping[str, Candidate]) -> dict[str, Candidate]:
        return {c.name: c for c in pooled([world.exact, *some.values()])}

    union = together({name: c for some in found.values() for name, c in some.items()})
    samp, greedy = (together(found[who]) for who in ("samp", "greedy"))
    every, exact = list(union.values()), world.exact
    rows = []
    for promise in PROMISES:
        sequences = [
            rivals.sequence(rivals.Found(greedy), every, exact, promise, N),
            *(drop_sequence(list(some.values()), exact, promise, N) for some in (samp, greedy)),
            drop_sequence(every, exact, promise, N),
        ]
        rows.append(tuple(world.served(s, promise) / exact.latency_ms for s in sequences))
    return rows  # type: ignore[return-value]


def test_in_worlds_of_noise_it_is_often_faster() -> None:
    milp, samp, greedy, alone = np.array(
        [row for seed in range(40) for row in rows_of(World(seed))]
    ).T
    best = np.minimum(samp, greedy)
    print(
        f"{len(milp)} cases: milp faster than greedy {np.mean(milp < greedy - 1e-9):.3f}, slower "
        f"{np.mean(milp > greedy + 1e-9):.3f}; faster than samp {np.mean(milp < samp - 1e-9):.3f}, "
        f"slower {np.mean(milp > samp + 1e-9):.3f} (by its own steps than greedy "
        f"{np.mean(alone > greedy + 1e-9):.3f}, than samp {np.mean(alone > samp + 1e-9):.3f}); "
        f"faster than both {np.mean(milp < best - 1e-9):.3f}; mean of float's time: milp "
        f"{milp.mean():.3f}, samp {samp.mean():.3f}, greedy {greedy.mean():.3f}, its own steps "
        f"{alone.mean():.3f}"
    )
    assert not np.any(milp > greedy + 1e-9)
    assert np.mean(milp < greedy - 1e-9) >= 0.4
    assert np.mean(milp < samp - 1e-9) >= 0.5
    assert milp.mean() < greedy.mean()
    assert milp.mean() <= 0.9 * samp.mean()


@pytest.mark.parametrize(("layers", "plans", "stride"), [(6, 31, 1), (12, 31, 2), (24, 31, 4)])
def test_greedys_path_in_strides(layers: int, plans: int, stride: int) -> None:
    """The dearest first, each plan of `stride` nodes more in float, the last of them all."""
    nodes = chain(layers, ("qkv", "scores", "context", "out", "ffn_in", "ffn_out"), Recipe())
    kl = {node.name: float(place) for place, node in enumerate(nodes)}
    path = rivals.reverted(kl, nodes, 0)
    assert len(path) == plans
    for place, (name, choice) in enumerate(path):
        back = place * stride
        assert name == f"greedy({back})"
        assert choice == (1,) * (len(nodes) - back) + (0,) * back


def test_the_last_step_of_a_path_in_strides_is_all_float() -> None:
    nodes = chain(7, ("qkv", "scores", "context", "out", "ffn_in", "ffn_out"), Recipe())
    path = rivals.reverted({node.name: 1.0 for node in nodes}, nodes, 0)
    assert [name for name, _ in path][-2:] == ["greedy(34)", "greedy(35)"]
    assert path[-1][1] == (0,) * 35
