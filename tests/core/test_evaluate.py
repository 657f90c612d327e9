"""The product's statistics: against closed forms, exact enumeration, scipy and simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from samp_core import evaluate
from samp_core.evaluate import (
    DropTest,
    drop_lower_bound,
    drop_test,
    drop_upper_bound,
    examples_needed,
    fixed_sequence,
    paired_counts,
    pass_probability,
    tango_interval,
)

Z95 = stats.norm.ppf(0.95)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    n = draw(st.integers(1, 5000))
    b = draw(st.integers(0, n))
    return b, draw(st.integers(0, n - b)), n


def test_accuracy_and_counts() -> None:
    assert evaluate.accuracy([1, 0, 2, 2], [1, 1, 2, 2]) == 0.75
    control, candidate = [True, True, False, True, False], [False, True, True, False, False]
    assert paired_counts(control, candidate) == (2, 1, 5)
    with pytest.raises(ValueError, match="one length"):
        evaluate.accuracy([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="one length"):
        paired_counts([True], [True, False])


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 7), (2088, 2525), (1, 100000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(k: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert evaluate.wilson_interval(k, n, confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_nothing_changed_among_2525_still_gives_a_tenth_of_a_point() -> None:
    assert drop_upper_bound(0, 0, 2525) == pytest.approx(0.00107, abs=5e-6)
    assert drop_upper_bound(0, 0, 2525) == pytest.approx(Z95**2 / (2525 + Z95**2), rel=1e-9)


def test_tango_against_a_published_interval() -> None:
    # R's PropCIs::scoreci.mp(48, 41, 549), 90%, as quoted by its users: -1.57 and 4.14 points.
    low, high = tango_interval(48, 41, 549, confidence=0.9)
    assert (100 * low, 100 * high) == pytest.approx((-1.57, 4.14), abs=0.006)


def _score_by_search(b: int, c: int, n: int, drop: float) -> float:
    """Tango's statistic with the constrained likelihood maximised by search, not in closed form."""

    def loss(q: float) -> float:
        cells = ((b, q + drop), (c, q), (n - b - c, 1 - 2 * q - drop))
        return -sum(k * math.log(p) for k, p in cells if k)

    low, high = max(0.0, -drop), (1 - drop) / 2
    tiny = 1e-15
    q = optimize.minimize_scalar(
        loss, bounds=(low + tiny, high - tiny), method="bounded", options={"xatol": 1e-14}
    ).x
    return (b - c - n * drop) / math.sqrt(n * (2 * q + drop - drop * drop))


@pytest.mark.parametrize(
    ("b", "c", "n"), [(14, 3, 100), (3, 14, 100), (30, 21, 2525), (1, 0, 40), (25, 25, 60)]
)
def test_bound_solves_the_score_equation(b: int, c: int, n: int) -> None:
    assert _score_by_search(b, c, n, drop_upper_bound(b, c, n)) == pytest.approx(-Z95, abs=1e-4)
    assert _score_by_search(b, c, n, drop_lower_bound(b, c, n)) == pytest.approx(Z95, abs=1e-4)


@given(counts())
@settings(max_examples=150, deadline=None)
def test_bounds_bracket_mirror_and_narrow(sample: tuple[int, int, int]) -> None:
    b, c, n = sample
    low, high = drop_lower_bound(b, c, n), drop_upper_bound(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert drop_upper_bound(c, b, n) == -low
    two_sided = tango_interval(b, c, n, 0.9)
    assert two_sided == pytest.approx((low, high), abs=1e-12)
    assert tango_interval(b, c, n, 0.99).high >= high
    if b >= c:
        assert drop_upper_bound(b, c, n + 1) <= high + 1e-12


@given(counts())
@settings(max_examples=150, deadline=None)
def test_one_more_loss_never_lowers_the_bound(sample: tuple[int, int, int]) -> None:
    b, c, n = sample
    if b + c < n:
        assert drop_upper_bound(b + 1, c, n) >= drop_upper_bound(b, c, n)
        assert drop_upper_bound(b, c + 1, n) <= drop_upper_bound(b, c, n) + 1e-12
    if c:
        assert drop_upper_bound(b + 1, c - 1, n) > drop_upper_bound(b, c, n)


def test_extreme_counts() -> None:
    assert drop_upper_bound(50, 0, 50) == 1.0
    assert drop_lower_bound(0, 50, 50) == -1.0
    assert drop_upper_bound(0, 0, 1) < 1.0
    for bad in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="expected b, c"):
            drop_upper_bound(*bad)
    with pytest.raises(ValueError, match="alpha"):
        drop_upper_bound(1, 1, 10, alpha=0.0)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (10, 5), (3, 40), (700, 640)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert evaluate.mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_changes_stays_exact() -> None:
    assert evaluate.mcnemar_exact(0, 2000) == float(Fraction(2, 2**2000))


def test_verdict() -> None:
    assert evaluate.verdict(0, 0, 2525, 0.005) == "holds"
    assert evaluate.verdict(100, 10, 2525, 0.005) == "broken"
    assert evaluate.verdict(20, 14, 2525, 0.005) == "undecided"


def test_drop_test_reports_what_it_saw() -> None:
    control = np.ones(2525, dtype=bool)
    candidate = control.copy()
    candidate[:10] = False
    outcome = drop_test(control, candidate, promise=0.01)
    assert outcome == DropTest(
        10, 0, 2525, 10 / 2525, drop_upper_bound(10, 0, 2525), 0.01, 0.05, True
    )
    assert not drop_test(control, candidate, promise=0.005).passed


def test_fixed_sequence_stops_at_the_first_failure() -> None:
    asked = []

    def test(losses: int) -> DropTest:
        asked.append(losses)
        bound = drop_upper_bound(losses, 0, 2525)
        return DropTest(losses, 0, 2525, losses / 2525, bound, 0.005, 0.05, bound <= 0.005)

    result = fixed_sequence([0, 2, 30, 1], test)
    assert asked == [0, 2, 30]
    assert result.served == 2
    assert [outcome.passed for _, outcome in result.tests] == [True, True, False]
    assert fixed_sequence([40, 0], test).served is None
    assert fixed_sequence([], test).tests == ()


@pytest.mark.parametrize(("promise", "chance"), [(0.002, 0.17), (0.005, 0.53), (0.01, 0.97)])
def test_pass_probability_at_2525(promise: float, chance: float) -> None:
    # The figures of the project's accuracy promises, given to whole points.
    assert pass_probability(2525, 0.02, 0.0, promise) == pytest.approx(chance, abs=0.015)


@pytest.mark.parametrize(
    ("n", "rate", "drop", "promise"),
    [
        (60, 0.1, 0.02, 0.08),
        (60, 0.1, -0.05, 0.05),
        (40, 0.2, 0.2, 0.3),
        (50, 0.0, 0.0, 0.06),
        (50, 1.0, 0.4, 0.7),
        (120, 0.03, 0.0, 0.01),
    ],
)
def test_pass_probability_is_the_full_sum(n: int, rate: float, drop: float, promise: float) -> None:
    lose, gain = (rate + drop) / 2, (rate - drop) / 2
    total = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            chance = stats.multinomial.pmf([b, c, n - b - c], n, [lose, gain, 1 - rate])
            total += chance * (drop_upper_bound(b, c, n) <= promise)
    assert pass_probability(n, rate, drop, promise) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(
    ("promise", "rate", "drop"),
    [(0.005, 0.02, 0.0), (0.01, 0.02, 0.002), (0.02, 0.0, 0.0), (0.002, 0.01, -0.001)],
)
def test_examples_needed_reaches_the_power(promise: float, rate: float, drop: float) -> None:
    n = examples_needed(promise, rate, drop)
    assert pass_probability(n, rate, drop, promise) >= 0.8
    assert pass_probability(int(0.9 * n), rate, drop, promise) < 0.8


def test_examples_needed_says_when_no_number_is_enough() -> None:
    with pytest.raises(ValueError, match="no number of examples"):
        examples_needed(0.005, 0.02, 0.005)
    with pytest.raises(ValueError, match="more than 100000000"):
        examples_needed(0.005, 0.02, 0.0049999)
    with pytest.raises(ValueError, match="changed_rate"):
        examples_needed(0.005, 0.001, 0.002)


def test_quantiles_have_the_bootstrap_distribution() -> None:
    rng = np.random.default_rng(1)
    samples = rng.lognormal(size=400)
    ours = evaluate.quantile_intervals(samples, resamples=20000)
    for quantile, (value, low, high) in ours.items():
        drawn = rng.choice(samples, size=(20000, samples.size))
        plain = np.quantile(np.quantile(drawn, quantile, axis=1), [0.025, 0.975])
        assert value == np.quantile(samples, quantile)
        # Both are Monte Carlo; the interval's ends move by at most about 2% of its width.
        assert (low, high) == pytest.approx(tuple(plain), abs=0.04 * (plain[1] - plain[0]))


def test_quantiles_edges() -> None:
    assert evaluate.quantile_intervals([3.0])[0.99] == (3.0, 3.0, 3.0)
    again = [evaluate.quantile_intervals([1.0, 2.0, 5.0], seed=4) for _ in range(2)]
    assert again[0] == again[1]
    assert evaluate.quantile_intervals([1.0, 2.0, 5.0], [1.0])[1.0].value == 5.0
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least one sample"):
            evaluate.quantile_intervals(bad)


BUILDS = 1000


@pytest.mark.parametrize("n", [500, 1245, 2525])
@pytest.mark.parametrize(("rate", "drop"), [(0.02, 0.0), (0.02, 0.005), (0.05, 0.01), (0.1, 0.02)])
def test_coverage_of_the_bound_over_1000_builds(n: int, rate: float, drop: float) -> None:
    rng = np.random.default_rng([n, int(1e4 * rate), int(1e4 * drop)])
    chances = [(rate + drop) / 2, (rate - drop) / 2, 1 - rate]
    drawn = rng.multinomial(n, chances, size=BUILDS)
    covered = sum(drop_upper_bound(int(b), int(c), n) >= drop for b, c, _ in drawn)
    assert 0.93 * BUILDS <= covered <= BUILDS


@pytest.mark.parametrize(
    "drops",
    [
        (0.002, 0.006),
        (0.0, 0.0051, 0.0052, 0.0053),
        (0.006, 0.004, 0.012),
        (0.0049,) * 3 + (0.0055,),
    ],
)
def test_promises_broken_by_served_plans_over_1000_builds(drops: tuple[float, ...]) -> None:
    """The plans of a build are tested on the same texts, so that their outcomes go together."""
    n, promise, rate = 2525, 0.005, 0.02
    rng = np.random.default_rng(int(1e5 * sum(drops)))
    broken = 0
    for _ in range(BUILDS):
        control = rng.random(n) < 0.83
        mood = rng.random(n)

        def test(drop: float, control: np.ndarray = control, mood: np.ndarray = mood) -> DropTest:
            lose, gain = (rate + drop) / 2 / 0.83, (rate - drop) / 2 / 0.17
            candidate = np.where(control, mood >= lose, mood < gain)
            return drop_test(control, candidate, promise)

        served = fixed_sequence(drops, test).served
        broken += served is not None and served > promise
    assert broken <= 0.07 * BUILDS
