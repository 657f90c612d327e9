"""All statistics of the product: accuracy, paired bounds, tests, and how many examples they need.

A paired comparison of a control and a candidate on the same n texts is three counts:
b = control right and candidate wrong, c = the reverse, and n. The drop is (b - c) / n, as a
fraction (0.005 is half a point); positive means that the candidate is worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
_Number = TypeVar("_Number", float, FloatArray)

# Far beyond any data set; a promise that needs more is as good as impossible.
_MOST_EXAMPLES = 10**8
# Mass of the binomial that pass_probability may leave out lies beyond this many deviations.
_TAIL = 9.0


class Counts(NamedTuple):
    """b = control right and candidate wrong, c = the reverse, n = texts compared."""

    b: int
    c: int
    n: int


class Interval(NamedTuple):
    low: float
    high: float


class Quantile(NamedTuple):
    """A sample quantile with its confidence interval, in the unit of the samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DropTest:
    """One test of the claim "the drop is at most `promise`"; drops are fractions."""

    b: int
    c: int
    n: int
    drop: float
    bound: float
    promise: float
    alpha: float
    passed: bool


class Passes(Protocol):
    """A test's outcome."""

    @property
    def passed(self) -> bool: ...


_Candidate = TypeVar("_Candidate")
_Test = TypeVar("_Test", bound=Passes)


@dataclass(frozen=True)
class SequenceResult(Generic[_Candidate, _Test]):
    """The tests that were run, in order, and the last candidate that passed (None: not one)."""

    tests: tuple[tuple[_Candidate, _Test], ...]
    served: _Candidate | None


def accuracy(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Share of equal entries of two vectors of the same length, at least one."""
    got, want = np.asarray(predicted), np.asarray(gold)
    if got.shape != want.shape or got.ndim != 1 or got.size == 0:
        raise ValueError(f"expected two vectors of one length >= 1, got {got.shape}, {want.shape}")
    return float(np.mean(got == want))


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided score interval of a proportion k / n (Wilson 1927)."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"expected 0 <= k <= n and n >= 1, got k={k}, n={n}")
    z = _two_sided_z(confidence)
    share, spread = k / n, z * z / n
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low = 0.0 if k == 0 else (centre - half) / (1 + spread)
    high = 1.0 if k == n else (centre + half) / (1 + spread)
    return Interval(low, high)


def paired_counts(control_correct: ArrayLike, candidate_correct: ArrayLike) -> Counts:
    """(b, c, n) from two boolean vectors over the same texts."""
    control = np.asarray(control_correct, dtype=bool)
    candidate = np.asarray(candidate_correct, dtype=bool)
    if control.shape != candidate.shape or control.ndim != 1:
        raise ValueError(
            f"expected two vectors of one length, got {control.shape}, {candidate.shape}"
        )
    b = int(np.count_nonzero(control & ~candidate))
    c = int(np.count_nonzero(candidate & ~control))
    return Counts(b, c, control.size)


def tango_interval(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided score interval of the paired difference (b - c) / n (Tango 1998)."""
    z = _two_sided_z(confidence)
    return Interval(-_upper(c, b, n, z), _upper(b, c, n, z))


def drop_upper_bound(b: float, c: float, n: int, alpha: float = 0.05) -> float:
    """Upper end of the one-sided (1 - alpha) Tango interval of the drop (b - c) / n."""
    return _upper(b, c, n, _one_sided_z(alpha))


def drop_lower_bound(b: int, c: int, n: int, alpha: float = 0.05) -> float:
    """Lower end of the one-sided (1 - alpha) Tango interval of the drop (b - c) / n."""
    return -_upper(c, b, n, _one_sided_z(alpha))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of "b and c are equally likely": a binomial(b + c, 1/2) tail."""
    if b < 0 or c < 0:
        raise ValueError(f"expected counts >= 0, got b={b}, c={c}")
    total = b + c
    term = tail = 1  # binomial coefficients, exact in whole numbers
    for k in range(min(b, c)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**total))


def drop_test(
    control_correct: ArrayLike, candidate_correct: ArrayLike, promise: float, alpha: float = 0.05
) -> DropTest:
    """Does the candidate hold the promise: is the drop's upper bound at most `promise`?"""
    b, c, n = paired_counts(control_correct, candidate_correct)
    bound = drop_upper_bound(b, c, n, alpha)
    return DropTest(b, c, n, (b - c) / n, bound, promise, alpha, bound <= promise)


def verdict(
    b: int, c: int, n: int, promise: float, alpha: float = 0.05
) -> Literal["holds", "broken", "undecided"]:
    """What paired counts say of a promised largest drop, each side at error alpha."""
    if drop_upper_bound(b, c, n, alpha) <= promise:
        return "holds"
    if drop_lower_bound(b, c, n, alpha) > promise:
        return "broken"
    return "undecided"


def fixed_sequence(
    candidates: Iterable[_Candidate], test: Callable[[_Candidate], _Test]
) -> SequenceResult[_Candidate, _Test]:
    """Test candidates in the order given, safest first, and stop at the first failure.

    The order is fixed before the data are seen, so that each test may spend the whole alpha and
    the chance of serving any candidate that breaks its promise is still at most alpha
    (fixed-sequence procedure, Maurer, Hothorn and Lehmacher 1995).
    """
    tests: list[tuple[_Candidate, _Test]] = []
    served: _Candidate | None = None
    for candidate in candidates:
        outcome = test(candidate)
        tests.append((candidate, outcome))
        if not outcome.passed:
            break
        served = candidate
    return SequenceResult(tuple(tests), served)


def pass_probability(
    n: int, changed_rate: float, true_drop: float, promise: float, alpha: float = 0.05
) -> float:
    """Chance that n texts show a drop bound of at most `promise`.

    changed_rate is the share of texts whose correctness changes, (b + c) / n in expectation; it
    is at least |true_drop|. Exact up to the far tails: b + c is binomial(n, changed_rate), and b
    given b + c is binomial too.
    """
    _check_rates(changed_rate, true_drop, promise)
    if n < 1:
        raise ValueError(f"expected n >= 1, got {n}")
    from scipy.special import bdtr, gammaln  # type: ignore[import-untyped,unused-ignore]

    z = _one_sided_z(alpha)
    mean, spread = n * changed_rate, math.sqrt(n * changed_rate * (1 - changed_rate))
    reach = _TAIL * (spread + 1) + _TAIL**2 / 2
    changed = np.arange(max(0, int(mean - reach)), min(n, int(mean + reach)) + 1, dtype=np.float64)
    # The score falls with the drop, so "bound <= promise" is "score at the promise <= -z": find
    # by bisection, for each b + c, the largest b that passes (-1: none does).
    low, high = np.full_like(changed, -1.0), changed.copy()
    while np.any(low < high):
        middle = np.ceil((low + high) / 2)
        passes = _score(middle, changed - middle, n, promise) <= -z
        low, high = np.where(passes, middle, low), np.where(passes, high, middle - 1)
    if changed_rate in (0.0, 1.0):
        weight = (changed == mean).astype(np.float64)
        share = 0.5 if changed_rate == 0.0 else (1 + true_drop) / 2
    else:
        share = min(1.0, max(0.0, (1 + true_drop / changed_rate) / 2))
        weight = np.exp(
            gammaln(n + 1)
            - gammaln(changed + 1)
            - gammaln(n - changed + 1)
            + changed * math.log(changed_rate)
            + (n - changed) * math.log1p(-changed_rate)
        )
    held = np.where(low < 0, 0.0, bdtr(np.maximum(low, 0.0), changed.astype(np.int64), share))
    return float(min(1.0, np.sum(weight * held)))


def examples_needed(
    promise: float,
    changed_rate: float,
    true_drop: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int:
    """About the fewest texts with which the promise is met with probability `power`.

    The probability climbs with n in small saw teeth (b and c are whole numbers): the answer
    reaches `power`, and may lie one tooth above the very smallest n. ValueError if no number of
    texts up to 10^8 is enough, as when the true drop is not below the promise.
    """
    _check_rates(changed_rate, true_drop, promise)
    if not 0 < power < 1:
        raise ValueError(f"expected 0 < power < 1, got {power}")
    if true_drop >= promise:
        raise ValueError(f"no number of examples shows a drop of {true_drop} to be <= {promise}")
    return _fewest(lambda n: pass_probability(n, changed_rate, true_drop, promise, alpha) >= power)


def quantile_intervals(
    samples: ArrayLike,
    quantiles: Sequence[float] = (0.5, 0.95, 0.99),
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[float, Quantile]:
    """Sample quantiles (NumPy's linear rule) with percentile-bootstrap intervals.

    Instead of drawing whole resamples, it draws the two order statistics that a quantile reads:
    the k-th smallest of n uniform draws is beta(k, n - k + 1), and the next one follows it by a
    scaled beta(1, n - k). The distribution is the bootstrap's own; the cost is free of n.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64).ravel())
    n = ordered.size
    if n == 0 or not np.all(np.isfinite(ordered)):
        raise ValueError(f"expected at least one sample and all finite, got {n} samples")
    tail = (1 - confidence) / 2
    rng = np.random.default_rng(seed)
    result: dict[float, Quantile] = {}
    for quantile in quantiles:
        if not 0 <= quantile <= 1:
            raise ValueError(f"expected quantiles in [0, 1], got {quantile}")
        place = quantile * (n - 1)
        k = int(place) + 1
        first = rng.beta(k, n - k + 1, size=resamples)
        values = _at(ordered, first)
        if k < n:
            second = first + (1 - first) * rng.beta(1, n - k, size=resamples)
            values += (place - int(place)) * (_at(ordered, second) - values)
        low, high = np.quantile(values, [tail, 1 - tail])
        result[quantile] = Quantile(float(np.quantile(ordered, quantile)), float(low), float(high))
    return result


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Quantile:
    """Mean with its interval by the normal law, for hundreds of values and more."""
    found = np.asarray(values, np.float64)
    half = _two_sided_z(confidence) * float(found.std(ddof=1)) / math.sqrt(found.size)
    mean = float(found.mean())
    return Quantile(mean, mean - half, mean + half)


def paired_bootstrap(
    control: ArrayLike,
    candidate: ArrayLike,
    statistic: Callable[[FloatArray], FloatArray],
    worst: tuple[ArrayLike, ArrayLike] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> FloatArray:
    """Drops statistic(control) - statistic(candidate) over resampled texts, [resamples].

    control, candidate: what each text adds to the sums of which `statistic` is a function,
    [n, k]; both are drawn by the same texts. worst: one text more, as both arms would have it if
    the candidate changed it wholly. Without it a sample that shows no change would bound the
    drop by 0; with it by about three such texts in n, the rule of three.
    """
    both = np.stack([np.asarray(control, np.float64), np.asarray(candidate, np.float64)], axis=1)
    if worst is not None:
        extra = np.stack([np.asarray(arm, np.float64) for arm in worst])[None]
        both = np.concatenate([both, extra])
    sums = _resampled(both.reshape(len(both), -1), resamples, seed)
    arms = sums.reshape(resamples, 2, -1)
    return statistic(arms[:, 0]) - statistic(arms[:, 1])


def bootstrap_interval(
    texts: ArrayLike,
    statistic: Callable[[FloatArray], FloatArray],
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Two-sided percentile interval of a statistic of the texts' sums, [n, k]."""
    found = statistic(_resampled(np.asarray(texts, np.float64), 2000, seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(low), float(high))


def f1(sums: FloatArray) -> FloatArray:
    """F1 from true positives, false positives and false negatives, [..., 3]; 1 if all are 0."""
    hit, extra, missed = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    total = 2 * hit + extra + missed
    return np.asarray(np.where(total > 0, 2 * hit / np.maximum(total, 1e-300), 1.0))


def pearson(sums: FloatArray) -> FloatArray:
    """Correlation from the sums of 1, x, y, xx, yy, xy, [..., 6]; 0 without any spread."""
    one, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    spread = (one * xx - x * x) * (one * yy - y * y)
    known = spread > 1e-12 * one * xx * one * yy
    shared = one * xy - x * y
    return np.asarray(np.where(known, shared / np.sqrt(np.where(known, spread, 1.0)), 0.0))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation; equal values share their mean rank."""
    first, second = _ranks(np.asarray(x, np.float64)), _ranks(np.asarray(y, np.float64))
    return float(pearson(moments(first, second).sum(axis=0)))


def moments(x: ArrayLike, y: ArrayLike) -> FloatArray:
    """What each pair adds to the sums that `pearson` reads, [n, 6]."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=-1)


def expected_bound(lost: float, noise: float, worst: float, n: int, alpha: float = 0.05) -> float:
    """The bootstrap bound to expect on n fresh texts.

    lost: the drop seen; noise: its standard deviation times the root of its texts; worst: what
    one wholly changed text costs, times its texts.
    """
    spread = math.sqrt(noise * noise / n + (worst / n) ** 2)
    return max(lost, 0.0) + worst / n + _one_sided_z(alpha) * spread


def expected_floor(lost: float, noise: float, n: int, alpha: float = 0.05) -> float:
    """Lower end of the two-sided (1 - alpha) interval of a drop; noise as in expected_bound."""
    return lost - _two_sided_z(1 - alpha) * noise / math.sqrt(n)


def examples_for_bound(
    promise: float, lost: float, noise: float, worst: float, alpha: float = 0.05
) -> int:
    """About the fewest texts whose `expected_bound` is at most the promise. ValueError: none.

    Without noise the bootstrap draws the worst text a Poisson number of times, of mean 1.
    """
    from scipy.special import pdtr

    draws = next(k for k in range(99) if pdtr(k, 1.0) >= 1.0 - alpha)

    def bound(n: int) -> float:
        seen = expected_bound(lost, noise, worst, n, alpha)
        return seen if noise else max(lost, 0.0) + draws * worst / n

    return _fewest(lambda n: bound(n) <= promise)


def _fewest(able: Callable[[int], bool]) -> int:
    """By doubling and halves, about the fewest examples that are enough. ValueError: none."""
    enough = 1
    while not able(enough):
        enough *= 2
        if enough > _MOST_EXAMPLES:
            raise ValueError(f"more than {_MOST_EXAMPLES} examples are needed")
    few = enough // 2
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if able(middle) else (middle, enough)
    return enough


def _resampled(texts: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Sums over n texts drawn with replacement, [resamples, k] of [n, k]."""
    n = len(texts)
    # Texts that add the same are drawn together: of counts there are few different ones.
    kinds, counts = np.unique(texts, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, texts.shape[1]))
    for start in range(0, resamples, 100):
        part = sums[start : start + 100]
        part[:] = rng.multinomial(n, counts / n, size=len(part)) @ kinds
    return sums


def _ranks(values: FloatArray) -> FloatArray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: FloatArray = (ends - (counts - 1) / 2.0)[places]
    return middle


def _at(ordered: FloatArray, uniform: FloatArray) -> FloatArray:
    """The samples that uniform draws in [0, 1) pick."""
    index = np.minimum((uniform * ordered.size).astype(np.int64), ordered.size - 1)
    picked: FloatArray = ordered[index]
    return picked


def _score(b: _Number, c: _Number, n: int, drop: float) -> Any:
    """Tango's score statistic of the hypothesis "the true difference is `drop`", -1 < drop < 1.

    With the constrained maximum-likelihood estimate q of P(control wrong, candidate right) as the
    larger root of 2n q^2 + B q - c drop (1 - drop) = 0 (Tango 1998, section 2). The root's
    cancellation is harmless: its error is an ulp of `drop`, which is added to it.
    """
    linear = (2 * n - b + c) * drop - b - c
    root = abs(linear * linear + 8 * n * c * drop * (1 - drop)) ** 0.5
    q = (root - linear) / (4 * n)
    return (b - c - n * drop) / (n * (2 * q + drop * (1 - drop))) ** 0.5


def _upper(b: float, c: float, n: int, z: float) -> float:
    """The drop above (b - c) / n at which the score falls to -z; the safe end of a bisection."""
    if n < 1 or b < 0 or c < 0 or b + c > n:
        raise ValueError(f"expected b, c >= 0 and b + c <= n, n >= 1, got b={b}, c={c}, n={n}")
    low, high = (b - c) / n, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _score(float(b), float(c), n, middle) <= -z:
            high = middle
        else:
            low = middle
    return high


def _one_sided_z(alpha: float) -> float:
    if not 0 < alpha < 0.5:
        raise ValueError(f"expected 0 < alpha < 0.5, got {alpha}")
    return NormalDist().inv_cdf(1 - alpha)


def _two_sided_z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_rates(changed_rate: float, true_drop: float, promise: float) -> None:
    if not abs(true_drop) <= changed_rate <= 1:
        raise ValueError(
            f"expected |true_drop| <= changed_rate <= 1, got {true_drop}, {changed_rate}"
        )
    if not 0 < promise < 1:
        raise ValueError(f"expected 0 < promise < 1, got {promise}")
