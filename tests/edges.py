"""Rounding edges: where a quantized value may lie beside the definition's, and nowhere else.

Two ways of summing the same floats differ in their last places. Between two edges that changes no
rounded value; on an edge it may, and how many values lie on one is no matter of chance: the sums
of an int8 attention are whole multiples of a step, and a scale can put one in 58 of them right in
the middle. So no share of the values is allowed to be off: each is judged by its own edge.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from samp_kernels.interface import Array

# A float32 scale, its reciprocal and the product with it: three roundings of 2^-24.
RELATIVE = 2.0**-22
# Of a probability in float32: its scores are of size 30, so 2^-24 of them is 2e-6 of it.
PROBABILITY = 2e-5


def check_steps(
    q: Array, wanted: Array, scale: Any, error: Any = 0.0, relative: float = RELATIVE
) -> None:
    """Each whole number of `q` is the rounding of some value within `error` of `wanted`, which is
    quantized with `scale` to -127 .. 127. `error` and `scale`: one, or by element."""
    scale = np.asarray(scale, dtype=np.float64)
    steps = np.clip(np.asarray(wanted, dtype=np.float64) / scale, -127, 127)
    slack = error / scale + relative * np.abs(steps)
    assert q.shape == steps.shape
    assert np.abs(q).max(initial=0) <= 127
    beyond = np.abs(q - steps) - 0.5 - slack
    if beyond.max(initial=-1.0) > 0:
        at = np.unravel_index(int(beyond.argmax()), beyond.shape)
        count = int((beyond > 0).sum())
        raise AssertionError(f"{count} wrong; {q[at]} for {steps[at]:.6f} steps at {at}")


def rounded(x: Array, scale: float) -> Array:
    """Quantized and back, in float64."""
    return np.clip(np.rint(x / scale), -127, 127) * scale


def off_edges(x: Array, scale: float) -> Array:
    """`x`, but what lies near an edge goes to the middle of its step: kernels round it alike."""
    steps = x.astype(np.float64) / scale
    near = np.abs(np.abs(steps % 1.0) - 0.5) < 1e-3
    return np.where(near, rounded(x, scale), x).astype(x.dtype)


def context_error(
    qkv: Array, bounds: Array, heads: int, precisions: tuple[str, str], scales: dict[str, float],
    position_bias: Array | None = None,
) -> Array:  # fmt: skip
    """[tokens, hidden]: how far from the reference an int8 context may lie beside float error: one
    step of each probability that lies on an edge, times its v. `qkv` keeps off the edges."""
    hidden = qkv.shape[1] // 3
    dim = hidden // heads
    allowed = np.zeros((len(qkv), hidden))
    if precisions[1] != "int8":
        return allowed
    for begin, end in pairwise(bounds):
        length = int(end - begin)
        parts = qkv[begin:end].astype(np.float64).reshape(length, 3, heads, dim)
        q, k, v = parts.transpose(1, 2, 0, 3)
        if precisions[0] == "int8":
            q, k = rounded(q, scales["q"]), rounded(k, scales["k"])
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(dim)
        if position_bias is not None:
            place = np.arange(length)
            middle = position_bias.shape[1] // 2
            scores = scores + position_bias[:, middle + place[None] - place[:, None]]
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        steps = p / p.sum(axis=-1, keepdims=True) / scales["p"]
        edge = np.abs(steps % 1.0 - 0.5) <= PROBABILITY * steps
        reach = edge.astype(np.float64) @ np.abs(rounded(v, scales["v"]))
        allowed[begin:end] = scales["p"] * reach.transpose(1, 0, 2).reshape(length, hidden)
    return allowed
