"""A vector per text: the mean of the token states, or the first one, scaled to length 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core.heads import HIDDEN, FloatArray, Head, TensorSpec, Weights


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """Nothing: the encoder's output is the embedding."""
    return {}


def logits(weights: Weights, feature: FloatArray) -> FloatArray:
    """[b, H] of length 1; a row of zeros stays one."""
    wide = feature.astype(np.float64)
    length = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return np.asarray(wide / np.maximum(length, 1e-12), dtype=np.float32)


def run(weights: Weights, feature: FloatArray, labels: Sequence[str]) -> dict[str, NDArray[Any]]:
    """EMBEDDING [b, H]."""
    return {"EMBEDDING": logits(weights, feature)}


def divergence(reference: FloatArray, vectors: FloatArray) -> float:
    """Mean of 1 - cosine to the reference."""
    return float(1.0 - (reference.astype(np.float64) * vectors).sum(axis=1).mean())


HEAD = Head(
    name="embedding",
    encoder_output="mean",
    outputs=(TensorSpec("EMBEDDING", "FP32", (HIDDEN,)),),
    export=export,
    logits=logits,
    run=run,
    divergence=divergence,
)
