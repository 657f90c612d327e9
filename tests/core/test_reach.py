"""Calibrators against the values themselves, and what they do at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.interface import Array

from samp_core import reach
from samp_core.plan import CALIBRATORS, Recipe

RECIPES = [Recipe(calibrator=name) for name in CALIBRATORS]


def histogram_of(x: Array) -> tuple[Array, float]:
    width = float(np.abs(x).max(initial=0.0))
    found, _ = np.histogram(np.abs(x), bins=reach.BINS, range=(0.0, width or 1.0))
    return found if width else np.zeros(reach.BINS, np.int64), width


def error(x: Array, top: float) -> float:
    scale = top / 127.0
    return float(((np.clip(np.rint(x / scale), -127, 127) * scale - x) ** 2).mean())


SAMPLES = st.tuples(st.integers(1, 4000), st.floats(0.2, 5.0), st.integers(0, 2**32 - 1))


def values(count: int, tail: float, seed: int) -> Array:
    x = np.random.default_rng(seed).standard_normal(count)
    return np.sign(x) * np.abs(x) ** tail


@settings(max_examples=40, deadline=None)
@given(SAMPLES, st.sampled_from(RECIPES))
def test_a_reach_lies_within_the_values(sample: tuple[int, float, int], recipe: Recipe) -> None:
    histogram, width = histogram_of(values(*sample))
    found = reach.reach(histogram, width, recipe)
    assert 0.0 < found <= width * (1 + 1e-12)
    # It does not depend on the unit, nor on how often the data were seen.
    assert reach.reach(histogram * 3, width * 8.0, recipe) == pytest.approx(8.0 * found)


@settings(max_examples=25, deadline=None)
@given(SAMPLES)
def test_mse_is_the_least_of_a_dense_grid(sample: tuple[int, float, int]) -> None:
    x = values(sample[0] + 200, *sample[1:])
    histogram, width = histogram_of(x)
    best = reach.least_squares(histogram, width)
    grid = width * np.geomspace(0.02, 1.0, 400)
    assert error(x, best) <= 1.05 * min(error(x, top) for top in grid) + 1e-7 * width**2


def test_mse_of_known_distributions() -> None:
    """Uniform values lose by any clipping; a lone outlier is worth clipping away."""
    uniform = np.random.default_rng(0).uniform(-1, 1, 100_000)
    histogram, width = histogram_of(uniform)
    assert reach.least_squares(histogram, width) > 0.98 * width
    with_outlier = np.append(np.random.default_rng(0).standard_normal(100_000), 100.0)
    histogram, width = histogram_of(with_outlier)
    assert reach.least_squares(histogram, width) < 80


def test_entropy_keeps_a_uniform_whole_and_cuts_a_long_tail() -> None:
    uniform = np.random.default_rng(0).uniform(0, 1, 400_000)
    histogram, width = histogram_of(uniform)
    assert reach.least_divergence(histogram, width) > 0.98 * width
    tail = np.append(np.random.default_rng(0).standard_normal(400_000), [60.0])
    histogram, width = histogram_of(tail)
    assert 3.0 < reach.least_divergence(histogram, width) < 12.0


def test_the_divergence_is_that_of_the_definition() -> None:
    """12 bins and 128 levels: nothing is merged, so that only the tail in the last bin counts."""
    counts = np.array([5.0, 3.0, 0.0, 2.0])
    p = np.array([5.0, 3.0, 0.0, 2.0 + 4.0]) / 14
    q = counts / 10
    some = p > 0
    wanted = float(np.sum(p[some] * np.log(p[some] / q[some])))
    assert reach._divergence(np.append(counts, [1.0, 3.0]), 4) == pytest.approx(wanted)
    assert reach._divergence(np.array([0.0, 0.0, 7.0]), 2) == np.inf


@pytest.mark.parametrize("recipe", RECIPES, ids=CALIBRATORS)
def test_constants_zeros_and_few_values(recipe: Recipe) -> None:
    for count in (1, 2, 500):
        histogram, width = histogram_of(np.full(count, -2.5))
        assert reach.reach(histogram, width, recipe) == pytest.approx(2.5, rel=0.02)
    zeros = np.zeros(reach.BINS, np.int64)
    assert reach.reach(zeros, 3.0, recipe) == 3.0
    assert reach.reach(zeros, 0.0, recipe) == 0.0
    # One-sided values, as after GELU: the sign does not matter.
    x = np.random.default_rng(1).standard_normal(5000) ** 2
    assert reach.reach(*histogram_of(x), recipe) == reach.reach(*histogram_of(-x), recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=CALIBRATORS)
def test_a_histogram_that_is_cut(recipe: Recipe) -> None:
    """With outlier channels split off only the first bins are left."""
    histogram, width = histogram_of(values(5000, 1.0, 0))
    cut = histogram[: reach.BINS // 3]
    top = width * len(cut) / reach.BINS
    assert 0.0 < reach.reach(cut, width, recipe) <= top * (1 + 1e-9)
