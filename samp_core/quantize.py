"""Symmetric int8 and fp8 (E4M3): weights per channel or per tensor, and the tensors of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from samp_kernels.e4m3 import E4M3, to_e4m3
from samp_kernels.interface import CODES, F32, GEMM_SITES, LARGEST, Array

from samp_core.errors import SampError
from samp_core.plan import HALVES, Plan, Recipe, input_scale

QMAX = 127

Memo = dict[tuple[str, str], tuple[Array, F32]]
"""Quantized matrices and their scales, for the next plan or pass over the same tensors."""


def quantize_weight(weight: Array, recipe: Recipe, precision: str = "int8") -> tuple[Array, F32]:
    """W [out, in] -> int8 or codes of e4m3 [out, in] and scale [out], s = max|W| / 127 or 448.

    q = rint(W / s), or the e4m3 number nearest to W / s.
    """
    amax = np.abs(weight).max(axis=1)
    if recipe.weight == "tensor":
        amax = np.full_like(amax, amax.max())
    scale = (amax / LARGEST[precision]).astype(np.float32)
    # A row of zeros, or of values too small for a scale, is stored as zeros.
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    if precision == "fp8":
        return to_e4m3(np.asarray(weight / scale[:, None])), scale
    q = np.clip(np.rint(weight / scale[:, None]), -QMAX, QMAX).astype(np.int8)
    return q, scale


def restored(q: Array, scale: F32) -> F32:
    """The floats that quantized weights stand for."""
    values = E4M3[q] if q.dtype == CODES["fp8"] else q.astype(np.float32)
    return np.asarray(values * scale[:, None], dtype=np.float32)


def without(weight: Array, channels: Sequence[int]) -> Array:
    """W with zeros at some input channels: they wreck no scale and add nothing."""
    if not channels:
        return weight
    rest = np.array(weight)
    rest[:, list(channels)] = 0.0
    return rest


def quantized(
    tensors: Mapping[str, Array],
    site: str,
    recipe: Recipe,
    apart: Sequence[int],
    precision: str,
    memo: Memo,
) -> tuple[Array, F32]:
    """`quantize_weight` of a site's weight without the input channels `apart`; kept in the memo."""
    key = (site, f"{precision} {recipe.weight} {list(apart)}")
    if key not in memo:
        memo[key] = quantize_weight(without(tensors[f"{site}.weight"], apart), recipe, precision)
    return memo[key]


def rounded_weight(
    tensors: Mapping[str, Array],
    site: str,
    recipe: Recipe,
    apart: Sequence[int],
    precision: str,
    memo: Memo,
) -> F32:
    """[out, in]: the floats that `quantized` leaves; the channels `apart` are what they are."""
    made = restored(*quantized(tensors, site, recipe, apart, precision, memo))
    made[:, list(apart)] = tensors[f"{site}.weight"][:, list(apart)]
    return made


def export_weights(
    tensors: Mapping[str, Array],
    plan: Plan,
    memo: Memo | None = None,
) -> dict[str, Array]:
    """The portable tensors of one plan: int8 or e4m3 with scales where it says so, else fp32.

    `memo` keeps quantized matrices for the next plan of the same tensors. Raises SampError for a
    precision that has no stored form, or a static scale that the plan lacks.
    """
    memo = {} if memo is None else memo
    stored: dict[str, Array] = {
        name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()
    }
    for layer in range(plan.layers):
        for site in GEMM_SITES:
            name = f"layer.{layer}.{site}"
            precision = plan.precision(name)
            if precision in ("fp32", *HALVES):  # Stored as fp32; a backend packs what it runs.
                continue
            entry = plan.sites[name]
            if precision not in CODES or entry.recipe is None:
                raise SampError(
                    "unsupported_precision",
                    f"{name}: {precision}",
                    ", ".join(("fp32", *HALVES, *CODES)),
                    "edit the plan",
                )
            if entry.recipe.smooth is not None or entry.recipe.rounding != "nearest":
                raise SampError(
                    "unsupported_recipe",
                    f"{name}: smooth {entry.recipe.smooth}, rounding {entry.recipe.rounding!r}",
                    "no smoothing, rounding 'nearest'",
                    "edit the plan",
                )
            channels = plan.split_channels(name)
            if channels:
                weight = tensors[f"{name}.weight"]
                stored[f"{name}.outliers"] = np.array(channels, dtype=np.int32)
                stored[f"{name}.outlier_weight"] = np.asarray(weight[:, channels], np.float32)
            stored[f"{name}.weight"], stored[f"{name}.weight_scale"] = quantized(
                tensors, name, entry.recipe, channels, precision, memo
            )
            if entry.recipe.activation == "static":
                stored[f"{name}.input_scale"] = _scale(plan, input_scale(name, precision))
        for site, parts in (("scores", "qk"), ("context", "pv")):
            name = f"layer.{layer}.{site}"
            if plan.precision(name) == "int8":
                for part in parts:
                    stored[f"{name}.{part}_scale"] = _scale(plan, f"{name}.{part}_scale")
    return stored


def needed_scales(plan: Plan) -> list[str]:
    """The static scales that the plan's quantized sites read, by stored name."""
    found = []
    for site, entry in plan.sites.items():
        kind = site.rsplit(".", 1)[1]
        parts = {"scores": "qk", "context": "pv"}.get(kind)
        if entry.precision in CODES and parts is not None:
            found += [f"{site}.{part}_scale" for part in parts]
        elif entry.recipe is not None and entry.precision in CODES:
            static = entry.recipe.activation == "static"
            found += [input_scale(site, entry.precision)] if static else []
    return found


def _scale(plan: Plan, name: str) -> F32:
    if name not in plan.scales:
        raise SampError(
            "no_scale",
            f"the plan quantizes {name.rsplit('.', 1)[0]} and has no {name}",
            "a scale for every quantized site, as samp build writes",
            "give --data, so that the scales are calibrated",
        )
    return np.array([plan.scales[name]], dtype=np.float32)
