"""BERT's pooler and classifier over the raw first-token state, as several heads share them.

    logits = classifier(tanh(pooler(feature)))

Each row is computed by its own matrix-vector products: BLAS picks another kernel, and other last
bits, for a batch, and a text's answer must not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core.errors import SampError

FloatArray = NDArray[np.float32]

# Ours -> the names in a BertForSequenceClassification checkpoint.
TENSORS = {
    "pooler.weight": "bert.pooler.dense.weight",
    "pooler.bias": "bert.pooler.dense.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any], problem: str
) -> dict[str, FloatArray]:
    """pooler.weight [H, H], pooler.bias [H], classifier.weight [C, H], classifier.bias [C].

    problem: the problem_type that the head answers; a checkpoint without one is taken as it.
    """
    missing = [name for name in TENSORS.values() if name not in state_dict]
    if missing:
        raise SampError(
            "head_weights",
            f"the checkpoint has no {', '.join(missing)}",
            "a BertForSequenceClassification checkpoint",
            "fine-tune and save the model with its classification head",
        )
    found = config.get("problem_type") or problem
    if found != problem:
        raise SampError(
            "head_task",
            f"the checkpoint's problem_type is {found}",
            problem,
            "choose the head of that task",
        )
    weights = {
        ours: np.ascontiguousarray(state_dict[theirs], dtype=np.float32)
        for ours, theirs in TENSORS.items()
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
                f"{TENSORS[ours]} is {list(weights[ours].shape)}",
                f"{list(shape)} by config.json (hidden_size, id2label)",
                "save the checkpoint again with its own config.json",
            )
    return weights


def logits(weights: Mapping[str, FloatArray], feature: FloatArray) -> FloatArray:
    """[b, C] from the raw first-token states [b, H]."""
    pooler, pooler_bias = weights["pooler.weight"], weights["pooler.bias"]
    classifier, classifier_bias = weights["classifier.weight"], weights["classifier.bias"]
    result = np.empty((len(feature), len(classifier)), dtype=np.float32)
    for index, row in enumerate(feature):
        pooled = np.tanh(pooler @ row + pooler_bias)
        result[index] = classifier @ pooled + classifier_bias
    return result
