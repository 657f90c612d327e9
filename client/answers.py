"""From a tier's output tensors to records; which task it is shows in the tensors' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from samp_client.records import (
    Answer,
    EmbeddingPrediction,
    Entity,
    EntityPrediction,
    LabelsPrediction,
    Prediction,
    Row,
    ScorePrediction,
    text_of,
)

if TYPE_CHECKING:
    from samp_client.transport import Tensors

# By the outputs that only this task has; the first that fits.
KINDS: Mapping[str, tuple[str, ...]] = {
    "entities": ("ENTITY_LABEL", "ENTITY_SCORE", "ENTITY_START", "ENTITY_END", "ENTITY_COUNT"),
    "embedding": ("EMBEDDING",),
    "multi-label": ("ACTIVE", "SCORES"),
    "classification": ("LABEL", "SCORE", "SCORES"),
    "regression": ("SCORE",),
}


def kind_of(outputs: Sequence[str]) -> str | None:
    """The kind of answers that an ensemble with these outputs gives; None for a foreign one."""
    for kind, names in KINDS.items():
        if {*names, "TRUNCATED"} <= set(outputs):
            return kind
    return None


def read(
    kind: str, tensors: Tensors, rows: Sequence[Row], first: int, labels: tuple[str, ...]
) -> list[Answer]:
    """One answer for each row, counted from `first`. KeyError and ValueError for wrong tensors."""
    count = len(rows)
    cut = [bool(value) for value in tensors["TRUNCATED"].reshape(count)]
    found: list[Answer] = []
    if kind == "entities":
        names, scores, starts, ends = (
            tensors[f"ENTITY_{part}"].reshape(count, -1)
            for part in ("LABEL", "SCORE", "START", "END")
        )
        counts = tensors["ENTITY_COUNT"].reshape(count)
        for i, row in enumerate(rows):
            text = text_of(row)
            spans = []
            for j in range(int(counts[i])):
                start, end = int(starts[i, j]), int(ends[i, j])
                name, score = names[i, j].decode(), float(scores[i, j])
                spans.append(Entity(name, score, start, end, text[start:end]))
            found.append(EntityPrediction(first + i, tuple(spans), cut[i]))
    elif kind == "embedding":
        vectors = tensors["EMBEDDING"].reshape(count, -1)
        found += [EmbeddingPrediction(first + i, vectors[i], cut[i]) for i in range(count)]
    elif kind == "multi-label":
        active = tensors["ACTIVE"].reshape(count, -1)
        table = tensors["SCORES"].reshape(count, -1)
        for i in range(count):
            holds = tuple(name for name, on in zip(labels, active[i], strict=True) if on)
            found.append(
                LabelsPrediction(first + i, holds, tuple(table[i].tolist()), cut[i], labels)
            )
    elif kind == "classification":
        label, best = (tensors[name].reshape(count) for name in ("LABEL", "SCORE"))
        table = tensors["SCORES"].reshape(count, -1)
        for i in range(count):
            name, all_scores = label[i].decode(), tuple(table[i].tolist())
            found.append(Prediction(first + i, name, float(best[i]), all_scores, cut[i], labels))
    else:
        values = tensors["SCORE"].reshape(count)
        found += [ScorePrediction(first + i, float(values[i]), cut[i]) for i in range(count)]
    return found
