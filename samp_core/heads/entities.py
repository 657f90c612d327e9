"""Entities of a text (BIO): a label a word from its first token, words grouped into spans.

Offsets are code points. An entity's score is the mean, over its words, of the probability that
the word's first token gives to the word's label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core import bio, pooled
from samp_core.errors import SampError
from samp_core.heads import FloatArray, Head, TensorSpec, TokenRow, Weights

_TENSORS = ("classifier.weight", "classifier.bias")


def encoder_tensors(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """classifier.weight [C, H] and .bias [C], which the encoder applies to every token."""
    missing = [name for name in _TENSORS if name not in state_dict]
    if missing:
        raise SampError(
            "head_weights",
            f"the checkpoint has no {', '.join(missing)}",
            "a BertForTokenClassification checkpoint",
            "fine-tune and save the model with its classification head",
        )
    tensors = {name: np.ascontiguousarray(state_dict[name], dtype=np.float32) for name in _TENSORS}
    names = config.get("id2label")
    classes = len(names) if names else len(tensors["classifier.bias"])
    shape = (classes, pooled.width(config))
    if tensors["classifier.weight"].shape != shape or tensors["classifier.bias"].shape != shape[:1]:
        raise SampError(
            "head_weights",
            f"classifier.weight is {list(tensors['classifier.weight'].shape)}",
            f"{list(shape)} by config.json (id2label, hidden_size)",
            "save the checkpoint again with its own config.json",
        )
    if "O" not in (names or {}).values():
        raise SampError(
            "head_task",
            f"labels {', '.join(map(str, (names or {}).values()))}",
            "BIO labels: O, B-x and I-x",
            "name the labels in config.json's id2label",
        )
    return tensors


def export(
    state_dict: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """Nothing: the encoder has the weights."""
    return {}


def logits(weights: Weights, feature: FloatArray) -> FloatArray:
    """[T, C]: the encoder's token logits as they are."""
    return feature


def rows(texts: Sequence[TokenRow], labels: Sequence[str]) -> list[dict[str, NDArray[Any]]]:
    """ENTITY_LABEL, ENTITY_SCORE, ENTITY_START, ENTITY_END [entities], ENTITY_COUNT [1]."""
    found = []
    for text in texts:
        words = text.logits[bio.first_tokens(text.words)].astype(np.float64)
        starts, ends = bio.word_spans(text.offsets, text.words)
        best = words.argmax(axis=1)
        top = np.exp(words - words.max(axis=1, keepdims=True))
        sure = top.max(axis=1) / top.sum(axis=1)
        groups = bio.groups([labels[index] for index in best])
        found.append(
            {
                "ENTITY_LABEL": np.array([g[2].encode() for g in groups], dtype=np.object_),
                "ENTITY_SCORE": np.array(
                    [sure[first : last + 1].mean() for first, last, _ in groups], dtype=np.float32
                ),
                "ENTITY_START": np.array([starts[g[0]] for g in groups], dtype=np.int32),
                "ENTITY_END": np.array([ends[g[1]] for g in groups], dtype=np.int32),
                "ENTITY_COUNT": np.array([len(groups)], dtype=np.int32),
            }
        )
    return found


HEAD = Head(
    name="entities",
    encoder_output="tokens",
    outputs=(
        TensorSpec("ENTITY_LABEL", "BYTES", (-1,)),
        TensorSpec("ENTITY_SCORE", "FP32", (-1,)),
        TensorSpec("ENTITY_START", "INT32", (-1,)),
        TensorSpec("ENTITY_END", "INT32", (-1,)),
        TensorSpec("ENTITY_COUNT", "INT32", (1,)),
    ),
    export=export,
    logits=logits,
    rows=rows,
    encoder_tensors=encoder_tensors,
)
