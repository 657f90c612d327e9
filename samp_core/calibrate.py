"""Activation ranges of every site over data, and the static scales made of them.

Two passes of the float model: the largest magnitude of each site's input, then a histogram of
magnitudes up to it. Scales are a pure function of the histograms, so that another calibrator
costs no pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from samp_kernels.interface import GEMM_SITES, LARGEST, Array, Batch, OutputKind

from samp_core.encoder import LoopSession
from samp_core.errors import SampError
from samp_core.plan import Recipe, Recipes, input_scale, recipe_of
from samp_core.reach import BINS, QMAX, reach

FP8_CALIBRATORS = ("minmax", "percentile")

Ranges = Mapping[str, Array]
"""name -> histogram [BINS] of |x| over [0, amax]; beside it `<name>.amax` [1] and
`<name>.channels`, the largest magnitude of each channel."""


Each = Callable[[Callable[[Batch], Any], Sequence[Batch]], Iterable[Any]]
"""`map` over batches, in their order."""
_T = TypeVar("_T")


def observe(
    session: LoopSession,
    batches: Sequence[Batch],
    output: OutputKind,
    to_host: Callable[[Any], Array],
    progress: Callable[[], None] = lambda: None,
    each: Each = map,
) -> dict[str, Array]:
    """Ranges of every GEMM's input, and of q, k and v of every layer, over these batches.

    each: `map`, or what does the same with several batches side by side. Raises SampError naming
    the first site whose input is not finite.
    """

    def seen(batch: Batch, visit: Callable[[str, Array], _T]) -> dict[str, _T]:
        """What `visit` makes of every input of one pass, by name."""
        made: dict[str, _T] = {}

        def observer(site: str, value: Any) -> None:
            made.update((name, visit(name, x)) for name, x in _inputs(site, value, to_host))

        session.observe(batch, output, observer)
        return made

    channels: dict[str, Array] = {}
    for made in each(lambda batch: seen(batch, _largest), batches):
        for name, most in made.items():
            channels[name] = np.maximum(channels[name], most) if name in channels else most
        progress()
    amax = {name: float(most.max(initial=0.0)) for name, most in channels.items()}
    counts: dict[str, Array] = {}

    def count(name: str, x: Array) -> Array | None:
        if amax[name] < 1e-30:  # Zeros, or so near that the scale's floor decides.
            return None
        bins = (np.abs(x).ravel() * ((BINS - 1e-3) / amax[name])).astype(np.int32)
        return np.bincount(bins, minlength=BINS)[:BINS]

    for counted in each(lambda batch: seen(batch, count), batches):
        for name, histogram in counted.items():
            if histogram is not None:
                counts[name] = counts.get(name, np.zeros(BINS, np.int64)) + histogram
        progress()
    ranges: dict[str, Array] = {}
    for name, value in amax.items():
        ranges[name] = counts.get(name, np.zeros(BINS, np.int64))
        ranges[f"{name}.amax"] = np.array([value])
        ranges[f"{name}.channels"] = channels[name].astype(np.float32)
    return ranges


def _largest(name: str, x: Array) -> Array:
    """The largest magnitude of each channel."""
    most: Array = np.abs(x).max(axis=0, initial=0.0)
    if not np.isfinite(most).all():
        raise SampError(
            "not_finite",
            f"the input of {name} holds NaN or infinity",
            "finite activations",
            "check the checkpoint and the calibration texts",
        )
    return most


def scales(ranges: Ranges, recipes: Recipes) -> dict[str, float]:
    """The static scale of every site, by stored name: how far its calibrator reaches, / 127.

    Of a mapping, those of its sites only. The channels that a recipe splits off are left out of a
    GEMM's input. See reach.py for the calibrators.
    """
    result: dict[str, float] = {}
    for name in _sites(ranges):
        site = name if _is_gemm(name) else name.rsplit(".", 1)[0]
        if not isinstance(recipes, Recipe) and site not in recipes:
            continue
        recipe = recipe_of(recipes, site)
        histogram, width, amax = _values(ranges, name, recipe)
        found = (
            amax if recipe.calibrator == "minmax" else min(reach(histogram, width, recipe), amax)
        )
        key = input_scale(name, "int8") if _is_gemm(name) else f"{name}_scale"
        result[key] = max(found, 1e-8) / QMAX
        if name.endswith(".v"):
            result[f"{site}.p_scale"] = 1.0 / QMAX  # A softmax never exceeds 1.
    return result


def fp8_scales(ranges: Ranges, recipes: Recipes) -> dict[str, float]:
    """The static scales of every GEMM's input in fp8: reach / 448.

    By `minmax` or `percentile`. The other calibrators weigh the steps of integers against what is
    clipped; e4m3's steps are relative, so that a smaller reach makes them no finer.
    """
    result: dict[str, float] = {}
    for name in filter(_is_gemm, _sites(ranges)):
        if not isinstance(recipes, Recipe) and name not in recipes:
            continue
        recipe = recipe_of(recipes, name)
        if recipe.calibrator not in FP8_CALIBRATORS:
            raise SampError(
                "unknown_calibrator", f"{name}: {recipe.calibrator} for fp8",
                ", ".join(FP8_CALIBRATORS), "choose one",
            )  # fmt: skip
        amax = float(ranges[f"{name}.amax"][0])
        found = amax if amax == 0.0 else min(reach(ranges[name], amax, recipe), amax)
        result[input_scale(name, "fp8")] = max(found, 1e-8) / LARGEST["fp8"]
    return result


def outliers(ranges: Ranges, recipes: Recipes) -> dict[str, list[int]]:
    """The channels that recipes split off of each GEMM's input, largest magnitude first."""
    found: dict[str, list[int]] = {}
    for name in filter(_is_gemm, _sites(ranges)):
        if isinstance(recipes, Recipe) or name in recipes:
            count = recipe_of(recipes, name).outliers
            largest = np.argsort(-ranges[f"{name}.channels"], kind="stable")[:count]
            if count:
                found[name] = largest.tolist()
    return found


def _values(ranges: Ranges, name: str, recipe: Recipe) -> tuple[Array, float, float]:
    """A site's histogram, the reach of BINS bins, and the largest magnitude that counts.

    Split channels do not count: nothing beyond the other channels' largest magnitude is seen.
    """
    width = float(ranges[f"{name}.amax"][0])
    if not recipe.outliers or not _is_gemm(name) or width == 0.0:
        return ranges[name], width, width
    rest = np.sort(ranges[f"{name}.channels"])[: -recipe.outliers]
    amax = float(rest.max(initial=0.0))
    return ranges[name][: int(np.ceil(BINS * amax / width))], width, amax


def _sites(ranges: Ranges) -> list[str]:
    return [name for name in ranges if not name.endswith((".amax", ".channels"))]


def _is_gemm(name: str) -> bool:
    return name.rsplit(".", 1)[1] in GEMM_SITES


def _inputs(site: str, value: Any, to_host: Callable[[Any], Array]) -> Iterable[tuple[str, Array]]:
    if not site.endswith(".attention"):
        yield site, to_host(value)
        return
    qkv, _ = value
    layer = site.removesuffix(".attention")
    q, k, v = np.split(to_host(qkv), 3, axis=1)
    yield f"{layer}.scores.q", q
    yield f"{layer}.scores.k", k
    yield f"{layer}.context.v", v
