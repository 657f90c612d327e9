"""Any number of classes per text: each has its own probability, and holds from one half up.

logits = classifier(tanh(pooler(feature))),  scores = sigmoid(logits)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core import pooled
from samp_core.heads import FloatArray, Head, TensorSpec, Weights


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """The pooler and the classifier; see pooled.export."""
    return pooled.export(state_dict, config, "multi_label_classification")


def run(weights: Weights, feature: FloatArray, labels: Sequence[str]) -> dict[str, NDArray[Any]]:
    """ACTIVE bool [b, C], SCORES [b, C], both in the order of labels."""
    raw = pooled.logits(weights, feature)
    scores = np.exp(-np.logaddexp(0.0, -raw.astype(np.float64)))
    return {"ACTIVE": raw >= 0, "SCORES": scores.astype(np.float32)}


def divergence(reference: FloatArray, logits: FloatArray) -> float:
    """Mean over texts of the classes' summed Bernoulli KL to the reference, in nats."""
    a, b = reference.astype(np.float64), logits.astype(np.float64)
    yes = np.exp(-np.logaddexp(0.0, -a))
    gap = yes * (np.logaddexp(0.0, -b) - np.logaddexp(0.0, -a))
    gap += (1 - yes) * (np.logaddexp(0.0, b) - np.logaddexp(0.0, a))
    return float(gap.sum(axis=1).mean())


HEAD = Head(
    name="multi-label",
    encoder_output="first",
    outputs=(
        TensorSpec("ACTIVE", "BOOL", lambda labels: (labels,)),
        TensorSpec("SCORES", "FP32", lambda labels: (labels,)),
    ),
    export=export,
    logits=pooled.logits,
    run=run,
    divergence=divergence,
)
