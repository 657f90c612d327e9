"""What calls return: one record a text, by the task that the tier serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from samp_client.errors import ClientError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Text: TypeAlias = "str | bytes"
Row: TypeAlias = "Text | tuple[Text, Text]"
"""What one row asks about: a text, or a pair of texts where the tier takes pairs."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one text or pair.

    index: its place in the texts given; score: that of `label`; scores: one per class, in the
    order of `labels`; truncated: the text was longer than the model reads.
    """

    index: int
    label: str
    score: float
    scores: tuple[float, ...]
    truncated: bool
    labels: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The answer's own fields, as `samp predict --json` prints them."""
        return {"label": self.label, "score": self.score, "scores": list(self.scores)}


@dataclass(frozen=True)
class Entity:
    """A span of the text: start and end in its characters (code points), end exclusive."""

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class EntityPrediction:
    """The entities of one text, in its order."""

    index: int
    entities: tuple[Entity, ...]
    truncated: bool

    def fields(self) -> dict[str, Any]:
        return {"entities": [vars(entity) for entity in self.entities]}


@dataclass(frozen=True)
class LabelsPrediction:
    """The classes that hold for one text; scores: one per class, in the order of `labels`."""

    index: int
    active: tuple[str, ...]
    scores: tuple[float, ...]
    truncated: bool
    labels: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        return {"active": list(self.active), "scores": list(self.scores)}


@dataclass(frozen=True)
class ScorePrediction:
    """The number that a regression gives one text or pair."""

    index: int
    score: float
    truncated: bool

    def fields(self) -> dict[str, Any]:
        return {"score": self.score}


@dataclass(frozen=True, eq=False)
class EmbeddingPrediction:
    """One text's vector of length 1: the scalar product of two is their cosine."""

    index: int
    embedding: NDArray[np.float32]
    truncated: bool

    def fields(self) -> dict[str, Any]:
        return {"embedding": self.embedding.tolist()}


Answer: TypeAlias = (
    "Prediction | EntityPrediction | LabelsPrediction | ScorePrediction | EmbeddingPrediction"
)


@dataclass(frozen=True)
class Outcome:
    """One text's answer, or the error it met; exactly one of `answer` and `error` is not None."""

    index: int
    answer: Answer | None
    error: ClientError | None

    @property
    def prediction(self) -> Prediction | None:
        """The answer of a classification tier."""
        return self.answer if isinstance(self.answer, Prediction) else None


@dataclass(frozen=True)
class ABRecord:
    """One text sent to one arm; `error` says why there is no answer.

    label and scores: of a class; scores alone of several classes or of a number. `answer` has
    what the task answered besides.
    """

    id: str
    arm: str
    label: str | None
    scores: tuple[float, ...] | None
    latency_ms: float
    error: str | None
    answer: Answer | None = None

    def fields(self) -> dict[str, Any]:
        """As JSON has it: the answer's own fields where label and scores are not all of it."""
        found: dict[str, Any] = {
            "id": self.id,
            "arm": self.arm,
            "label": self.label,
            "scores": None if self.scores is None else list(self.scores),
            "latency_ms": round(self.latency_ms, 3),
            "error": self.error,
        }
        if self.answer is not None and not isinstance(self.answer, Prediction):
            found["answer"] = self.answer.fields()
        return found


def record_of(name: str, arm: str, answer: Answer, latency_ms: float) -> ABRecord:
    """The record of a text that was answered."""
    label = answer.label if isinstance(answer, Prediction) else None
    scores: tuple[float, ...] | None = None
    if isinstance(answer, (Prediction, LabelsPrediction)):
        scores = answer.scores
    elif isinstance(answer, ScorePrediction):
        scores = (answer.score,)
    return ABRecord(name, arm, label, scores, latency_ms, None, answer)


def text_of(row: Row) -> str:
    """The (first) text as characters."""
    text = row if isinstance(row, (str, bytes)) else row[0]
    return text if isinstance(text, str) else text.decode(errors="replace")


def shown(row: Row | Sequence[Text]) -> Any:
    """A row as JSON has it: a string, or two."""
    return text_of(row) if isinstance(row, (str, bytes)) else [text_of(part) for part in row]


def rough(row: Any) -> bytes:
    """Bytes about as long as the encoded row: to split by size what may not be encodable."""
    if isinstance(row, (tuple, list)):
        return b"".join(map(rough, row))
    if isinstance(row, bytes):
        return row
    return row.encode(errors="replace") if isinstance(row, str) else b""
