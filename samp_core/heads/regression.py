"""One number per text or pair (reranking): the classifier's only output as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core import pooled
from samp_core.errors import SampError
from samp_core.heads import FloatArray, Head, TensorSpec, Weights


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """The pooler and a classifier of one output; see pooled.export."""
    weights = pooled.export(state_dict, config, "regression")
    outputs = len(weights["classifier.weight"])
    if outputs != 1:
        raise SampError(
            "head_task",
            f"the classifier has {outputs} outputs",
            "one output",
            "choose the classification or the multi-label head",
        )
    return weights


def run(weights: Weights, feature: FloatArray, labels: Sequence[str]) -> dict[str, NDArray[Any]]:
    """SCORE [b, 1]."""
    return {"SCORE": pooled.logits(weights, feature)}


def divergence(reference: FloatArray, logits: FloatArray) -> float:
    """Mean squared difference in units of the reference's variance."""
    spread = float(np.var(reference, dtype=np.float64))
    error = np.square(reference.astype(np.float64) - logits).mean()
    return float(error / max(spread, 1e-12))


HEAD = Head(
    name="regression",
    encoder_output="first",
    outputs=(TensorSpec("SCORE", "FP32", (1,)),),
    export=export,
    logits=pooled.logits,
    run=run,
    divergence=divergence,
)
