"""How far int8 shall reach at a site: calibrators as pure functions of a histogram of magnitudes.

A histogram holds counts of |x| in bins of `width / BINS`; it may be cut: the first of BINS bins.
Every reach lies in (0, width]; larger values are clipped to it. scale = reach / 127.
"""

from __future__ import annotations

import numpy as np
from samp_kernels.interface import Array

from samp_core.errors import SampError
from samp_core.plan import CALIBRATORS, Recipe

BINS = 8192
QMAX = 127.0
_LEVELS = 128
_COARSE = 4
_STEP = 8


def reach(histogram: Array, width: float, recipe: Recipe) -> float:
    """The reach of a recipe's calibrator. Raises SampError for an unknown one."""
    if recipe.calibrator == "minmax" or not histogram.any():
        return width * len(histogram) / BINS
    if recipe.calibrator == "percentile":
        return percentile(histogram, width, recipe.percentile or 99.99)
    if recipe.calibrator == "mse":
        return least_squares(histogram, width)
    if recipe.calibrator == "entropy":
        return least_divergence(histogram, width)
    raise SampError("unknown_calibrator", recipe.calibrator, ", ".join(CALIBRATORS), "choose one")


def percentile(histogram: Array, width: float, percent: float) -> float:
    """The magnitude that `percent` of the values do not exceed; a bin's upper edge.

    Wu et al. 2020, "Integer quantization for deep learning inference", arXiv 2004.09602, 3.3.
    """
    total = int(histogram.sum())
    if total == 0:
        return width
    index = int(np.searchsorted(np.cumsum(histogram), total * percent / 100.0))
    return width * (min(index, BINS - 1) + 1) / BINS


def squared_error(histogram: Array, width: float, reach: float) -> float:
    """Mean of (x - s clip(rint(x / s)))^2, s = reach / 127, every value in its bin's middle."""
    middles = (np.arange(len(histogram)) + 0.5) * (width / BINS)
    scale = reach / QMAX
    kept = np.minimum(np.rint(middles / scale), QMAX) * scale
    return float(histogram @ (middles - kept) ** 2 / max(histogram.sum(), 1))


def least_squares(histogram: Array, width: float) -> float:
    """The reach of the least mean squared quantization error.

    Choukroun et al. 2019, "Low-bit quantization of neural networks for efficient inference", arXiv
    1902.06822 (OMSE). A grid of ratios first, then a finer one about its best: fine enough to find
    where the levels of few values happen to meet them.
    """
    top = width * len(histogram) / BINS
    ratios = np.geomspace(0.02, 1.0, 40)
    best = _best(histogram, width, top * ratios)
    near = float(ratios[1] / ratios[0])
    return _best(histogram, width, np.minimum(best * np.geomspace(1 / near, near, 65), top))


def _best(histogram: Array, width: float, reaches: Array) -> float:
    errors = [squared_error(histogram, width, float(reach)) for reach in reaches]
    # Of equals the largest: nothing is clipped for nothing.
    return float(max(r for r, e in zip(reaches, errors, strict=True) if e == min(errors)))


def least_divergence(histogram: Array, width: float) -> float:
    """The reach whose 128 levels keep most of the distribution: least KL(P || Q), as TensorRT.

    Migacz, "8-bit inference with TensorRT", GTC 2017: P is the histogram up to the reach with all
    beyond it in its last bin, Q the same without the tail, in 128 levels, each spread over those
    of its bins that are not empty. 2,048 bins, every eighth as a reach.
    """
    padded = np.pad(histogram, (0, -len(histogram) % _COARSE))
    counts = padded.reshape(-1, _COARSE).sum(axis=1).astype(np.float64)
    top = width * len(histogram) / BINS
    ends = range(min(_LEVELS, len(counts)), len(counts) + 1, _STEP)
    # Of equals the largest: nothing is clipped for nothing.
    _, end = min((_divergence(counts, end), -end) for end in {*ends, len(counts)})
    return float(min(-end * _COARSE * width / BINS, top))


def _divergence(counts: Array, end: int) -> float:
    """KL(P || Q) in nats for a reach of `end` bins; infinite where nothing lies below it."""
    inside = counts[:end]
    if not inside.any():
        return np.inf
    p = inside.copy()
    p[-1] += counts[end:].sum()
    levels = min(_LEVELS, end)
    starts = (np.arange(levels) * end) // levels
    filled = inside > 0
    sums = np.add.reduceat(inside, starts)
    sizes = np.add.reduceat(filled.astype(np.float64), starts)
    each = np.repeat(sums / np.maximum(sizes, 1.0), np.diff(np.append(starts, end)))
    q = np.where(filled, each, 0.0)
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-9)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
