"""One label per text or pair: BERT's pooler and classifier over the raw first-token state.

logits = classifier(tanh(pooler(feature))),  scores = softmax(logits)
"""

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
    """The pooler and a classifier of two classes or more; see pooled.export."""
    weights = pooled.export(state_dict, config, "single_label_classification")
    classes = len(weights["classifier.weight"])
    if classes < 2:
        raise SampError(
            "head_task",
            f"the classifier has {classes} output",
            "2 labels or more",
            "choose the regression head",
        )
    return weights


def run(weights: Weights, feature: FloatArray, labels: Sequence[str]) -> dict[str, NDArray[Any]]:
    """LABEL bytes [b, 1], SCORE [b, 1] of that label, SCORES [b, C] in the order of labels."""
    # Softmax in float64: its own rounding vanishes in the float32 that is answered.
    raw = pooled.logits(weights, feature).astype(np.float64)
    scores = np.exp(raw - raw.max(axis=1, keepdims=True))
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    best = raw.argmax(axis=1)
    encoded = np.array([label.encode() for label in labels], dtype=np.object_)
    return {
        "LABEL": encoded[best][:, None],
        "SCORE": np.take_along_axis(scores, best[:, None], axis=1),
        "SCORES": scores,
    }


HEAD = Head(
    name="classification",
    encoder_output="first",
    outputs=(
        TensorSpec("LABEL", "BYTES", (1,)),
        TensorSpec("SCORE", "FP32", (1,)),
        TensorSpec("SCORES", "FP32", lambda labels: (labels,)),
    ),
    export=export,
    logits=pooled.logits,
    run=run,
)
