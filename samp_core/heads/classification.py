"""One label per text: BERT's pooler and classifier over the raw first-token state.

    logits = classifier(tanh(pooler(feature))),  scores = softmax(logits)

Each row is computed by its own matrix-vector products: BLAS picks another kernel, and other last
bits, for a batch, and a text's answer must not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core.errors import SampError
from samp_core.heads import FloatArray, Head, TensorSpec, Weights

# Ours -> the names in a BertForSequenceClassification checkpoint.
_TENSORS = {
    "pooler.weight": "bert.pooler.dense.weight",
    "pooler.bias": "bert.pooler.dense.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """pooler.weight [H, H], pooler.bias [H], classifier.weight [C, H], classifier.bias [C]."""
    missing = [name for name in _TENSORS.values() if name not in state_dict]
    if missing:
        raise SampError(
            "head_weights",
            f"the checkpoint has no {', '.join(missing)}",
            "a BertForSequenceClassification checkpoint",
            "fine-tune and save the model with its classification head",
        )
    problem = config.get("problem_type") or "single_label_classification"
    if problem != "single_label_classification":
        raise SampError(
            "head_task",
            f"the checkpoint's problem_type is {problem}",
            "single_label_classification",
            "choose the head of that task",
        )
    weights = {
        ours: np.ascontiguousarray(state_dict[theirs], dtype=np.float32)
        for ours, theirs in _TENSORS.items()
    }
    hidden = int(config["hidden_size"])
    named = config.get("id2label")
    classes = len(named) if named else weights["classifier.weight"].shape[0]
    expected = {
        "pooler.weight": (hidden, hidden),
        "pooler.bias": (hidden,),
        "classifier.weight": (classes, hidden),
        "classifier.bias": (classes,),
    }
    for ours, shape in expected.items():
        if weights[ours].shape != shape:
            raise SampError(
                "head_weights",
                f"{_TENSORS[ours]} is {list(weights[ours].shape)}",
                f"{list(shape)} by config.json (hidden_size, id2label)",
                "save the checkpoint again with its own config.json",
            )
    if classes < 2:
        raise SampError(
            "head_task",
            f"the classifier has {classes} output",
            "2 labels or more",
            "choose the regression head",
        )
    return weights


def logits(weights: Weights, feature: FloatArray) -> FloatArray:
    """[b, C] from the raw first-token states [b, H]."""
    pooler, pooler_bias = weights["pooler.weight"], weights["pooler.bias"]
    classifier, classifier_bias = weights["classifier.weight"], weights["classifier.bias"]
    result = np.empty((len(feature), len(classifier)), dtype=np.float32)
    for index, row in enumerate(feature):
        pooled = np.tanh(pooler @ row + pooler_bias)
        result[index] = classifier @ pooled + classifier_bias
    return result


def run(weights: Weights, feature: FloatArray, labels: Sequence[str]) -> dict[str, NDArray[Any]]:
    """LABEL bytes [b, 1], SCORE [b, 1] of that label, SCORES [b, C] in the order of labels."""
    # Softmax in float64: its own rounding vanishes in the float32 that is answered.
    raw = logits(weights, feature).astype(np.float64)
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
    logits=logits,
    run=run,
)
