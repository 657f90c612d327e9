"""Symmetric int8: weights per channel or per tensor, and the tensors that a plan stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from samp_kernels.interface import F32, GEMM_SITES, Array

from samp_core.errors import SampError
from samp_core.plan import HALVES, Plan, Recipe

QMAX = 127


def quantize_weight(weight: Array, recipe: Recipe) -> tuple[Array, F32]:
    """W [out, in] -> int8 [out, in] and scale [out]; q = rint(W / s), s = max|W| / 127."""
    amax = np.abs(weight).max(axis=1)
    if recipe.weight == "tensor":
        amax = np.full_like(amax, amax.max())
    scale = (amax / QMAX).astype(np.float32)
    # A row of zeros, or of values too small for a scale, is stored as zeros.
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    q = np.clip(np.rint(weight / scale[:, None]), -QMAX, QMAX).astype(np.int8)
    return q, scale


def without(weight: Array, channels: Sequence[int]) -> Array:
    """W with zeros at some input channels: they wreck no scale and add nothing."""
    if not channels:
        return weight
    rest = np.array(weight)
    rest[:, list(channels)] = 0.0
    return rest


def export_weights(
    tensors: Mapping[str, Array],
    plan: Plan,
    memo: dict[tuple[str, str], tuple[Array, F32]] | None = None,
) -> dict[str, Array]:
    """The portable tensors of one plan: int8 with scales where it says so, fp32 elsewhere.

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
            if precision != "int8" or entry.recipe is None:
                raise SampError(
                    "unsupported_precision",
                    f"{name}: {precision}",
                    "fp32, fp16, bf16, int8",
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
            key = (name, f"{entry.recipe.weight} {channels}" if channels else entry.recipe.weight)
            weight = tensors[f"{name}.weight"]
            if channels:
                stored[f"{name}.outliers"] = np.array(channels, dtype=np.int32)
                stored[f"{name}.outlier_weight"] = np.asarray(weight[:, channels], np.float32)
            if key not in memo:
                memo[key] = quantize_weight(without(weight, channels), entry.recipe)
            stored[f"{name}.weight"], stored[f"{name}.weight_scale"] = memo[key]
            if entry.recipe.activation == "static":
                stored[f"{name}.input_scale"] = _scale(plan, f"{name}.input_scale")
        for site, parts in (("scores", "qk"), ("context", "pv")):
            name = f"layer.{layer}.{site}"
            if plan.precision(name) == "int8":
                for part in parts:
                    stored[f"{name}.{part}_scale"] = _scale(plan, f"{name}.{part}_scale")
    return stored


def _scale(plan: Plan, name: str) -> F32:
    if name not in plan.scales:
        raise SampError(
            "no_scale",
            f"the plan quantizes {name.rsplit('.', 1)[0]} and has no {name}",
            "a scale for every quantized site, as samp build writes",
            "give --data, so that the scales are calibrated",
        )
    return np.array([plan.scales[name]], dtype=np.float32)
