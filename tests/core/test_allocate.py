"""The choice of plans: pure functions on made-up measurements, against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from samp_core import allocate, evaluate
from samp_core.allocate import (
    SAFE,
    STEP,
    Candidate,
    decay_aware,
    drop_sequence,
    expected_changes,
    falling,
    front,
    most_accurate_under,
    pooled,
    predicted_bound,
)

N = 1000


def candidate(name: str, ms: float, b: float, c: float = 0.0, n: int = N) -> Candidate:
    return Candidate(name, ms, 0.9 - (b - c) / n, round(b), round(c), n, float(b), float(c))


FLOAT = candidate("float", 10.0, 0.0)

changes = st.integers(0, 40)
candidate_lists = st.lists(
    st.tuples(st.integers(1, 14), changes, changes), min_size=1, max_size=12
).map(lambda rows: [candidate(f"p{i}", float(ms), b, c) for i, (ms, b, c) in enumerate(rows)])


def bound(c: Candidate) -> float:
    return predicted_bound(c, N)


# predicted bounds


def test_the_bound_of_a_plan_that_changed_nothing_shrinks_with_the_texts() -> None:
    bounds = [predicted_bound(candidate("p", 1, 0), n) for n in (100, 1000, 10_000)]
    assert bounds == [evaluate.drop_upper_bound(0, 0, n) for n in (100, 1000, 10_000)]
    assert bounds[0] > bounds[1] > bounds[2] > 0


def test_the_bound_scales_rates_to_the_texts_to_come() -> None:
    plan = candidate("p", 1, 8, 5)
    assert predicted_bound(plan, N) == evaluate.drop_upper_bound(8, 5, N)
    assert predicted_bound(plan, 3 * N) == evaluate.drop_upper_bound(24, 15, 3 * N)
    assert predicted_bound(plan, N, 0.01) == evaluate.drop_upper_bound(8, 5, N, 0.01)


def test_a_gain_is_not_predicted() -> None:
    """More texts mended than broken is luck that fresh texts will not repeat."""
    lucky = candidate("p", 1, 4, 30)
    assert predicted_bound(lucky, N) == evaluate.drop_upper_bound(4, 4, N) > 0


@given(changes, changes, changes)
def test_the_bound_grows_with_what_is_broken(b: int, more: int, c: int) -> None:
    assert bound(candidate("p", 1, b, c)) <= bound(candidate("q", 1, b + more, c)) + 1e-12


# expected changes


def test_nothing_changes_under_the_same_logits() -> None:
    logits = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    gold = logits.argmax(axis=1)
    assert expected_changes(logits, logits, gold) == (0.0, 0.0)
    # A shift of both classes alike is no noise on their gap.
    assert expected_changes(logits, logits + 5, gold)[0] < 0.5


def simulate(seed: int, n: int = 400) -> tuple[tuple[float, float], tuple[int, int]]:
    """Two classes, noise on the gap, float surer where it is wide: expected and seen changes."""
    rng = np.random.default_rng(seed)
    gap = rng.standard_normal(n)
    float_logits = np.stack([gap / 2, -gap / 2], axis=1)
    noise = 0.08 * rng.standard_normal(n)
    logits = float_logits + np.stack([noise / 2, -noise / 2], axis=1)
    best = float_logits.argmax(axis=1)
    sure = 1 / (1 + np.exp(-4 * np.abs(gap)))
    gold = np.where(rng.random(n) < sure, best, 1 - best)
    right = logits.argmax(axis=1) == gold
    b, c, _ = evaluate.paired_counts(best == gold, right)
    return expected_changes(float_logits, logits, gold), (b, c)


def test_expected_changes_are_those_seen_but_steadier() -> None:
    runs = [simulate(seed) for seed in range(150)]
    expected, seen = (np.array([run[i] for run in runs], float) for i in (0, 1))
    for kind in (0, 1):
        assert expected[:, kind].mean() == pytest.approx(seen[:, kind].mean(), rel=0.12)
        assert expected[:, kind].std() < 0.8 * seen[:, kind].std()
    assert seen[:, 0].mean() > seen[:, 1].mean() > 1


def test_a_class_that_is_neither_first_nor_second_cannot_be_gained() -> None:
    reference = np.tile(np.array([[3.0, 2.9, 0.0]]), (50, 1))
    logits = reference + np.array([[-1.0, 1.0, 0.0]])
    assert expected_changes(reference, logits, np.full(50, 0)) == (50.0, 0.0)
    assert expected_changes(reference, logits, np.full(50, 1)) == (0.0, 50.0)
    assert expected_changes(reference, logits, np.full(50, 2)) == (0.0, 0.0)


# the front


def dominates(a: Candidate, b: Candidate) -> bool:
    return bound(a) <= bound(b) and a.latency_ms <= b.latency_ms


@settings(deadline=None)
@given(candidate_lists)
def test_the_front_is_what_nothing_dominates(plans: list[Candidate]) -> None:
    kept = front(plans, N)
    assert all(p in plans for p in kept)
    for slow, fast in pairwise(kept):
        assert bound(slow) < bound(fast)
        assert slow.latency_ms > fast.latency_ms
    for plan in plans:
        assert any(dominates(k, plan) for k in kept)
        for k in kept:
            assert not dominates(plan, k) or dominates(k, plan)


# the sequence for a promise


@settings(deadline=None)
@given(
    candidate_lists,
    st.sampled_from([0.002, 0.005, 0.01, 0.02]),
    st.none() | st.floats(1, 12),
    st.randoms(),
)
def test_the_sequence(
    plans: list[Candidate], promise: float, ceiling: float | None, random: np.random.RandomState
) -> None:
    sequence = drop_sequence(plans, FLOAT, promise, N, ceiling_ms=ceiling)
    allowed = [
        p for p in plans if p.latency_ms < FLOAT.latency_ms and p.latency_ms <= (ceiling or 99)
    ]
    best = front(allowed, N)
    places = [best.index(p) for p in sequence]
    assert places == sorted(set(places)), "safest first, each once, all from the front"
    assert bool(sequence) == bool(best)
    if not best:
        return
    least = min(bound(FLOAT), promise)
    safe = [p for p in best if bound(p) <= least + SAFE * (promise - least)]
    assert sequence[0] == (safe[-1] if safe else best[0])
    assert sequence[-1] == best[-1], "a failure of the last costs nothing"
    for slow, fast in pairwise(sequence[:-1]):
        assert fast.latency_ms < (1 - STEP) * slow.latency_ms
    for p in best[places[0] :]:
        last = min(q.latency_ms for q in sequence if q.latency_ms >= p.latency_ms)
        assert p in sequence or p.latency_ms >= (1 - STEP) * last
    shuffled = [p for p in plans if len({q.latency_ms for q in plans}) == len(plans)]
    random.shuffle(shuffled)
    if shuffled:
        assert drop_sequence(shuffled, FLOAT, promise, N, ceiling_ms=ceiling) == sequence


def test_small_steps_are_left_out_but_for_the_last() -> None:
    """Each test in between may end the sequence: it has to bring a tenth."""
    plans = [candidate(f"p{i}", ms, i) for i, ms in enumerate((9.0, 8.8, 8.7, 8.0, 7.99, 7.9))]
    assert [c.name for c in front(plans, N)] == [f"p{i}" for i in range(6)]
    sequence = drop_sequence(plans, FLOAT, bound(plans[1]), N)
    assert [c.name for c in sequence] == ["p0", "p3", "p5"]


def test_a_plan_that_was_not_timed_is_not_tested() -> None:
    plans = [candidate("slow", 9.0, 1), replace(candidate("fast", 2.0, 2), timed=False)]
    assert [c.name for c in drop_sequence(plans, FLOAT, 0.02, N)] == ["slow"]


def ladder() -> list[Candidate]:
    """full(1) .. full(8): each faster, each with three more broken texts and one more mended."""
    return [FLOAT, *(candidate(f"full({k})", 10.0 - k, 3 * k, k) for k in range(1, 9))]


def test_a_sequence_by_hand() -> None:
    names = [c.name for c in drop_sequence(ladder(), FLOAT, 0.04, N)]
    bounds = {c.name: bound(c) for c in ladder()}
    assert bounds["full(2)"] <= 0.3 * 0.04 < bounds["full(3)"]
    assert names == [f"full({k})" for k in range(2, 9)]


# changes as the KL of all plans foretells them


def family(share: float, power: float, seed: int, noise: float) -> list[Candidate]:
    """Plans whose true changes follow their KL, as counts of N texts with this much noise."""
    rng = np.random.default_rng(seed)
    plans = []
    for index, kl in enumerate(np.geomspace(1e-5, 1e-2, 12)):
        changes = 2000.0 * kl**power * np.exp(noise * rng.standard_normal())
        b, c = changes * (1 + share) / 2, changes * (1 - share) / 2
        plans.append(replace(candidate(f"p{index}", 9.0 - index / 2, b, c), kl=float(kl)))
    return plans


@given(st.floats(0, 0.9), st.floats(0.2, 1.0), st.integers(0, 99))
def test_pooling_leaves_what_follows_its_kl(share: float, power: float, seed: int) -> None:
    plans = [FLOAT, *family(share, power, seed, 0.0)]
    for before, after in zip(plans, pooled(plans), strict=True):
        assert after.expected_b == pytest.approx(before.expected_b, rel=1e-6)
        assert after.expected_c == pytest.approx(before.expected_c, rel=1e-6, abs=1e-9)
        assert (after.b, after.c, after.name) == (before.b, before.c, before.name)


def test_pooling_is_nearer_to_the_truth_and_never_foretells_a_gain() -> None:
    def error(some: Sequence[Candidate], true: Sequence[Candidate]) -> float:
        logs = [np.log(a.expected_b / b.expected_b) for a, b in zip(some, true, strict=True)]
        return float(np.sqrt(np.mean(np.square(logs))))

    true = family(0.1, 0.5, 0, 0.0)
    for seed in range(20):
        seen = family(0.1, 0.5, seed, 0.4)
        assert error(pooled(seen), true) < 0.75 * error(seen, true)
        bounds = [bound(c) for c in pooled(seen)]
        assert bounds == sorted(bounds), "what diverges more is never called safer"
    lucky = pooled(family(-0.5, 0.5, 0, 0.1))
    assert all(c.expected_b == pytest.approx(c.expected_c) for c in lucky)


def test_pooling_needs_several_plans_apart() -> None:
    few = family(0.1, 0.5, 1, 0.4)[:4]
    close = [replace(c, kl=1e-3 * (1 + i / 10)) for i, c in enumerate(family(0.1, 0.5, 1, 0.4))]
    unknown = [replace(c, kl=0.0) for c in close]
    falling_kl = [replace(c, kl=1 / c.kl) for c in family(0.1, 0.5, 1, 0.1)]
    for plans in (few, close, unknown, falling_kl, []):
        assert pooled(plans) == plans


def test_pooling_of_a_metric_with_noise() -> None:
    plans = [
        replace(c, lost=0.2 * c.expected_b / N, noise=float(np.sqrt(c.expected_b / N)), worst=1.0)
        for c in family(0.0, 0.5, 0, 0.0)
    ]
    for before, after in zip(plans, pooled(plans), strict=True):
        assert after.noise == pytest.approx(before.noise)
        assert after.lost == pytest.approx(before.lost)


def test_a_plan_that_does_not_pay_is_never_tested() -> None:
    slow = [replace(c, latency_ms=FLOAT.latency_ms + i) for i, c in enumerate(ladder()[1:])]
    assert drop_sequence([FLOAT, *slow], FLOAT, 0.05, N) == []


def test_a_ceiling_leaves_only_what_is_under_it() -> None:
    sequence = drop_sequence(ladder(), FLOAT, 0.02, N, ceiling_ms=6.0)
    assert [c.latency_ms for c in sequence] == [6.0, 5.0, 4.0, 3.0, 2.0]
    assert drop_sequence(ladder(), FLOAT, 0.02, N, ceiling_ms=1.0) == []


@pytest.mark.parametrize(
    ("holds", "served", "tested"),
    [(2, "full(2)", 2), (4, "full(4)", 4), (8, "full(8)", 7), (0, None, 1)],
)
def test_the_first_failure_ends_it(holds: int, served: str | None, tested: int) -> None:
    """The plans that come after the first failure are not looked at, whatever they hold."""
    sequence = [c.name for c in drop_sequence(ladder(), FLOAT, 0.04, N)]
    asked: list[str] = []

    def test(name: str) -> evaluate.DropTest:
        asked.append(name)
        good = int(name[5]) <= holds or name == "full(8)"
        control = np.ones(N, bool)
        broken = control.copy()
        broken[: 0 if good else 100] = False
        return evaluate.drop_test(control, broken, 0.04)

    result = evaluate.fixed_sequence(sequence, test)
    assert asked == sequence[:tested]
    assert result.served == served


# under a latency ceiling


@settings(deadline=None)
@given(candidate_lists, st.floats(0.5, 15))
def test_most_accurate_under(plans: list[Candidate], ceiling: float) -> None:
    best = most_accurate_under(plans, ceiling, N)
    under = [p for p in plans if p.latency_ms <= ceiling]
    if best is None:
        assert not under
        return
    assert best in under
    assert all((bound(best), best.latency_ms) <= (bound(p), p.latency_ms) for p in under)


# the decay-aware rule


def curve(drops: Sequence[float], ms: Sequence[float] | None = None) -> list[Candidate]:
    """float and full(1) .. full(L) that lose so many points of accuracy, 1 ms gained a layer."""
    ms = [12.0 - k for k in range(len(drops))] if ms is None else ms
    plans = []
    for k, (drop, latency) in enumerate(zip(drops, ms, strict=True)):
        b = max(drop, 0.0) * N + 5 * (k > 0)
        c = b - drop * N
        plan = candidate(f"full({k})" if k else "float", latency, b, c)
        plans.append(replace(plan, accuracy=0.9 - drop))
    return plans


@pytest.mark.parametrize("knee", [1, 2, 5, 7])
def test_a_sharp_knee(knee: int) -> None:
    drops = [0.0005 * k if k <= knee else 0.0005 * knee + 0.02 * (k - knee) for k in range(9)]
    assert decay_aware(curve(drops)).name == f"full({knee})"


@pytest.mark.parametrize("seed", range(8))
def test_noise_does_not_hide_the_knee(seed: int) -> None:
    """Accuracies that rise here and there by a few texts."""
    noise = np.random.default_rng(seed).normal(0, 0.001, 13)
    drops = [0.0 if k == 0 else 0.03 * max(k - 8, 0) + float(noise[k]) for k in range(13)]
    assert decay_aware(curve(drops)).name in ("full(7)", "full(8)")


def test_a_lucky_layer_does_not_win() -> None:
    """Only smoothed accuracies tell the knee at 5 from a rise at 1 that the next layers lose."""
    drops = [0.0, -0.03, 0.008, 0.012, 0.016, 0.02, 0.04, 0.06, 0.08]
    assert decay_aware(curve(drops)).name == "full(5)"


def test_no_drop_quantizes_everything() -> None:
    assert decay_aware(curve([0.0] * 7)).name == "full(6)"
    assert decay_aware(curve([0.0, 0.001, -0.002, 0.001, 0.0, 0.002, 0.001])).name == "full(6)"
    assert decay_aware(curve([-0.01 * k for k in range(7)])).name == "full(6)"


def test_a_linear_drop_quantizes_everything() -> None:
    """No layer costs more than another, so there is nowhere to stop."""
    assert decay_aware(curve([0.01 * k for k in range(7)])).name == "full(6)"


def test_a_drop_that_comes_first_quantizes_everything() -> None:
    assert decay_aware(curve([0.0, *([0.05] * 6)])).name == "full(6)"


def test_what_does_not_pay_is_not_recommended() -> None:
    flat, slower = [5.0] * 7, [5.0 + k for k in range(7)]
    for drops in ([0.02 * k for k in range(7)], [0.0] * 7):
        assert decay_aware(curve(drops, flat)).name == "float"
        assert decay_aware(curve(drops, slower)).name == "float"
    # Slower at first, faster in the end: what is slower than float is passed over.
    ms = [5.0, 5.5, 6.0, 4.0, 3.0, 2.0]
    drops = [0.0, 0.0, 0.0, 0.0, 0.04, 0.08]
    assert decay_aware(curve(drops, ms)).name == "full(3)"


def test_float_alone() -> None:
    assert decay_aware([FLOAT]) is FLOAT


def test_the_recommendation_has_no_unit() -> None:
    """Milliseconds or microseconds, the choice is the same."""
    drops = [0.0, 0.001, 0.002, 0.004, 0.015, 0.04, 0.08]
    plans = curve(drops)
    micro = [replace(p, latency_ms=p.latency_ms * 1000) for p in plans]
    assert decay_aware(plans).name == decay_aware(micro).name == "full(4)"


@given(st.lists(st.integers(-5, 60), min_size=1, max_size=10))
def test_the_recommendation_pays(lost: list[int]) -> None:
    plans = curve([0.0, *(x / N for x in lost)])
    chosen = decay_aware(plans)
    assert chosen in plans[1:]
    assert chosen.latency_ms < plans[0].latency_ms


# isotonic regression


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_falling_is_isotonic_regression(values: list[float]) -> None:
    got = falling(values)
    assert np.allclose(got, isotonic_regression(values, increasing=False).x, atol=1e-8)
    assert (np.diff(got) <= 1e-9).all()
    assert got.sum() == pytest.approx(sum(values), abs=1e-6)


def test_falling_leaves_what_falls() -> None:
    assert falling([3.0, 2.0, 2.0, -1.0]).tolist() == [3.0, 2.0, 2.0, -1.0]
    assert falling([1.0, 2.0]).tolist() == [1.5, 1.5]
    assert allocate.falling([1.0, 1.0, 4.0, 0.0]).tolist() == [2.0, 2.0, 2.0, 0.0]
