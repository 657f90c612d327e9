"""The layer and classifier over the raw first-token state that several heads share.

    logits = classifier(tanh(pooler(feature))),  DistilBERT: classifier(relu(pre_classifier(x)))

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

_PARTS = ("weight", "bias")
_ROBERTA = {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}
# Ours -> the layers of a ...ForSequenceClassification checkpoint, by model_type.
_LAYERS = {
    "bert": {"pooler": "bert.pooler.dense", "classifier": "classifier"},
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), _ROBERTA),
    "distilbert": {"pre_classifier": "pre_classifier", "classifier": "classifier"},
}


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any], problem: str
) -> dict[str, FloatArray]:
    """pooler.weight [H, H], pooler.bias [H], classifier.weight [C, H], classifier.bias [C].

    The first two are pre_classifier.* for DistilBERT. problem: the problem_type that the head
    answers; a checkpoint without one is taken as it.
    """
    layers = _LAYERS.get(str(config.get("model_type")), _LAYERS["bert"])
    names = {f"{our}.{p}": f"{their}.{p}" for our, their in layers.items() for p in _PARTS}
    missing = [name for name in names.values() if name not in state_dict]
    if missing:
        raise SampError(
            "head_weights",
            f"the checkpoint has no {', '.join(missing)}",
            "a BertForSequenceClassification checkpoint, or that of its family",
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
        for ours, theirs in names.items()
    }
    hidden = width(config)
    named = config.get("id2label")
    classes = len(named) if named else weights["classifier.weight"].shape[0]
    for ours, theirs in names.items():
        rows = classes if ours.startswith("classifier.") else hidden
        shape = (rows, hidden) if ours.endswith(".weight") else (rows,)
        if weights[ours].shape != shape:
            raise SampError(
                "head_weights",
                f"{theirs} is {list(weights[ours].shape)}",
                f"{list(shape)} by config.json (hidden_size, id2label)",
                "save the checkpoint again with its own config.json",
            )
    return weights


def width(config: Mapping[str, Any]) -> int:
    """The features of a state by config.json; DistilBERT calls them dim."""
    return int(config["dim" if "dim" in config else "hidden_size"])


def logits(weights: Mapping[str, FloatArray], feature: FloatArray) -> FloatArray:
    """[b, C] from the raw first-token states [b, H]."""
    name = "pooler" if "pooler.weight" in weights else "pre_classifier"
    layer, layer_bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    classifier, classifier_bias = weights["classifier.weight"], weights["classifier.bias"]
    result = np.empty((len(feature), len(classifier)), dtype=np.float32)
    for index, row in enumerate(feature):
        pooled = layer @ row + layer_bias
        pooled = np.tanh(pooled) if name == "pooler" else np.maximum(pooled, 0.0)
        result[index] = classifier @ pooled + classifier_bias
    return result
