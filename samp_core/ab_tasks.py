"""What an A/B comparison reads of each task's answers: sameness, and the sums of its metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from samp_kernels.interface import Array

from samp_core import evaluate, metrics
from samp_core.tasks import TASKS, Task

# The arms' numbers are never equal to the last bit: only the farthest apart are listed.
MOST_SHOWN = 20
_EQUAL = 1e-6


class Record(Protocol):
    """One text sent to one arm. id: the text's place, as a string; error: None if answered.

    answer: a record of `samp_client`; label and scores are those of a class.
    """

    @property
    def id(self) -> str: ...
    @property
    def arm(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def scores(self) -> tuple[float, ...] | None: ...
    @property
    def latency_ms(self) -> float: ...
    @property
    def error(self) -> str | None: ...


Answers = Sequence[Any]
"""One arm's records of one row: one, or two where a row is two texts to embed."""


@dataclass(frozen=True)
class Kind:
    """distance: 0 for the same answer; counted: answers are the same or not, so that agreement is

    a share; of numbers and vectors it is how near the arms are, by `agreement`.
    """

    shown: Callable[[Answers], Any]
    distance: Callable[[Answers, Answers], float]
    agreement: Callable[[Sequence[Answers], Sequence[Answers]], float] | None = None

    @property
    def counted(self) -> bool:
        return self.agreement is None


@dataclass(frozen=True)
class _Gold:
    """What a metric reads of a split."""

    gold: Any
    encodings: Sequence[Any] = ()


def task_of(kind: str, inputs: int) -> Task:
    """The task of a tier that gives this kind of answers to rows of so many texts."""
    if kind == "classification":
        return TASKS["pairs" if inputs == 2 else "classification"]
    if kind == "regression":
        return TASKS["reranking" if inputs == 2 else "regression"]
    return TASKS[kind]


def kind_of(task: Task) -> Kind:
    return _KINDS[task.head]


def metric_of(task: Task, classes: Sequence[str], scored: bool) -> metrics.Metric:
    return metrics.of(task, tuple(classes), scored)


def measure(
    task: Task,
    metric: metrics.Metric,
    rows: Sequence[Answers],
    gold: Any,
    classes: Sequence[str],
    reference: Sequence[Answers],
) -> Array:
    """What each row adds to the metric, [n, k]; gold None: by the nearness to `reference`."""
    if task.gold == "entities":
        return np.array(
            [_entity_counts(row[0].answer, one) for row, one in zip(rows, gold, strict=True)]
        )
    if task.gold == "labels":
        # The metric takes logits: a class holds where its logit is 0 or more.
        found = np.array(
            [[1.0 if c in r[0].answer.active else -1.0 for c in classes] for r in rows]
        )
        return metric.measure(found.astype(np.float32), _Gold(gold, rows))
    if task.gold == "label":
        return np.array([row[0].label == label for row, label in zip(rows, gold, strict=True)])
    if task.gold_optional:
        places = range(len(rows[0]))
        found = np.array([row[place].answer.embedding for place in places for row in rows])
        if gold is None:
            gold = np.array([row[place].answer.embedding for place in places for row in reference])
        return metric.measure(found, _Gold(gold, rows))
    found = np.array([[row[0].answer.score] for row in rows], dtype=np.float32)
    return metric.measure(found, _Gold(gold, rows))


def _entity_counts(answer: Any, gold: Any) -> tuple[int, int, int]:
    found = {(one.start, one.end, one.label) for one in answer.entities}
    hits = len(found & set(gold))
    return hits, len(found) - hits, len(gold) - hits


def _label(row: Answers) -> dict[str, Any]:
    return {"label": row[0].label, "scores": list(row[0].scores or ())}


def _fields(row: Answers) -> Any:
    return row[0].answer.fields()


def _vectors(row: Answers) -> dict[str, Any]:
    """Not the vectors themselves: of two texts, their cosine, which the score is about."""
    if len(row) == 1:
        return {}
    first, second = (one.answer.embedding.astype(np.float64) for one in row)
    return {"cosine": float(first @ second)}


def _differ(one: Answers, other: Answers) -> float:
    return float(one[0].label != other[0].label)


def _differ_spans(one: Answers, other: Answers) -> float:
    first, second = (
        {(e.start, e.end, e.label) for e in row[0].answer.entities} for row in (one, other)
    )
    return float(first != second)


def _differ_sets(one: Answers, other: Answers) -> float:
    return float(set(one[0].answer.active) != set(other[0].answer.active))


def _score_gap(one: Answers, other: Answers) -> float:
    gap = abs(one[0].answer.score - other[0].answer.score)
    return 0.0 if gap < _EQUAL else float(gap)


def _angle(one: Answers, other: Answers) -> float:
    """1 - cosine of the arms' vectors; of two texts the larger."""
    gap = max(1 - _cosine(a, b) for a, b in zip(one, other, strict=True))
    return 0.0 if gap < _EQUAL else gap


def _cosine(one: Any, other: Any) -> float:
    return float(one.answer.embedding.astype(np.float64) @ other.answer.embedding)


def _correlation(control: Sequence[Answers], candidate: Sequence[Answers]) -> float:
    x, y = (np.array([row[0].answer.score for row in arm]) for arm in (control, candidate))
    return float(evaluate.pearson(evaluate.moments(x, y).sum(axis=0)))


def _mean_cosine(control: Sequence[Answers], candidate: Sequence[Answers]) -> float:
    both = zip(control, candidate, strict=True)
    return float(np.mean([_cosine(a, b) for x, y in both for a, b in zip(x, y, strict=True)]))


_KINDS: Mapping[str, Kind] = {
    "classification": Kind(_label, _differ),
    "entities": Kind(_fields, _differ_spans),
    "multi-label": Kind(_fields, _differ_sets),
    "regression": Kind(_fields, _score_gap, _correlation),
    "embedding": Kind(_vectors, _angle, _mean_cosine),
}
