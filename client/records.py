"""What calls return."""

from __future__ import annotations

from dataclasses import dataclass

from samp_client.errors import ClientError


@dataclass(frozen=True)
class Prediction:
    """The answer to one text.

    index: its place in the texts given; score: that of `label`; scores: one per class, in the
    order of `labels`; truncated: the text was longer than the model reads.
    """

    index: int
    label: str
    score: float
    scores: tuple[float, ...]
    truncated: bool
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One text's prediction, or the error it met; exactly one of them is not None."""

    index: int
    prediction: Prediction | None
    error: ClientError | None


@dataclass(frozen=True)
class ABRecord:
    """One text sent to one arm; label and scores are None where `error` says why."""

    id: str
    arm: str
    label: str | None
    scores: tuple[float, ...] | None
    latency_ms: float
    error: str | None
