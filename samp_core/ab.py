"""Two tiers on the same texts, and what the answers say of a promise: the object of `samp ab`.

The client collects the records; the statistics are those of evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from samp_core import evaluate
from samp_core.data import Rows, Text, read_rows
from samp_core.errors import SampError
from samp_core.tasks import TASKS, Task

ALPHA = 0.05
CONFIDENCE = 0.95
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Record(Protocol):
    """One text sent to one arm. id: the text's place, as a string; error: None if answered."""

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


class Tier(Protocol):
    """promise: the largest drop in points that the tier was built for, or None; kind: of answers;
    inputs: TEXT, and for pairs TEXT_PAIR.
    """

    @property
    def promise(self) -> float | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...


class Client(Protocol):
    """What a comparison needs of a `samp_client.Client`."""

    def labels(self) -> tuple[str, ...]: ...
    def describe(self, tier: str) -> Tier: ...
    def compare(
        self,
        texts: Sequence[Any],
        control: str,
        candidate: str,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> Sequence[Record]: ...


# Told a stage's title and steps; what it returns is called after each step.
Progress = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class _Pair:
    """Both arms' answers to one text."""

    index: int
    control: Record
    candidate: Record

    @property
    def answered(self) -> bool:
        return self.control.error is None and self.candidate.error is None

    @property
    def failed(self) -> bool:
        """Neither arm answered: the text's fault, or the server's, but no arm's."""
        return self.control.error is not None and self.candidate.error is not None


def compare(
    client: Client,
    data: str | Path,
    control: str,
    candidate: str,
    *,
    promise_points: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Send the texts of a file to two tiers and report; see `report`.

    data: jsonl, csv or tsv with `text`, and `label` where known; promise_points: the drop to
    judge by, in points, else the one that the candidate was built for; limit: only the first rows.
    SampError for what the file lacks, the client's own errors for tiers and server.
    """
    if limit is not None and limit < 1:
        raise SampError("ab_limit", f"limit {limit}", "1 or more", "raise it or leave it out")
    if not Path(data).is_file():
        read_rows(data)  # says what is wrong, without a server
    rows, labelled = _read(Path(data), _task(client.describe(candidate)))
    texts = rows.texts[:limit]
    gold = rows.labels[:limit] if labelled else None
    classes = client.labels()
    _check_gold(gold, texts, classes)
    points = client.describe(candidate).promise if promise_points is None else promise_points
    promise = None if points is None else points / 100
    _check_promise(promise)
    step = progress(f"{control} and {candidate}", len(texts)) if progress else None
    records = client.compare(
        texts,
        control,
        candidate,
        seed=seed,
        progress=None if step is None else lambda done, of: step(),
    )
    return report(
        records,
        texts,
        control=control,
        candidate=candidate,
        promise=promise,
        gold=gold,
        classes=classes,
        seed=seed,
    )


def report(
    records: Iterable[Record],
    texts: Sequence[Text],
    *,
    control: str,
    candidate: str,
    promise: float | None,
    gold: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """The `ab` object: agreement, accuracy, paired difference, latency, verdict, differing texts.

    promise: the largest drop of accuracy that the candidate may show, a fraction (0.01 is one
    point), or None to judge by none; gold: the right labels of `texts`, if known; classes: the
    labels that the model can answer, to catch a file that writes them otherwise (SampError).

    n counts the texts that both arms answered; differences are fractions, control minus candidate;
    latencies milliseconds of one-text requests. Beyond the pinned keys: `failed` requests by arm,
    and the verdict's `reason`. A text that one arm alone failed counts against a verdict,
    whichever way it goes.
    """
    _check_promise(promise)
    _check_gold(gold, texts, classes)
    pairs = _pair(list(records), control, candidate)
    answered = [pair for pair in pairs if pair.answered]
    one_sided = sum(not pair.answered and not pair.failed for pair in pairs)
    same = [pair.control.label == pair.candidate.label for pair in answered]
    compared = _compare(answered, gold, one_sided, promise)
    return {
        "control": control,
        "candidate": candidate,
        "n": len(answered),
        "agreement": sum(same) / len(answered) if answered else None,
        **compared,
        "latency_ms": {
            control: _latency([pair.control for pair in pairs], seed),
            candidate: _latency([pair.candidate for pair in pairs], seed),
        },
        "differing": [
            _difference(pair, texts, gold)
            for pair, equal in zip(answered, same, strict=True)
            if not equal
        ],
        "failed": {
            control: sum(pair.control.error is not None for pair in pairs),
            candidate: sum(pair.candidate.error is not None for pair in pairs),
        },
    }


def _compare(
    answered: Sequence[_Pair], gold: Sequence[str] | None, one_sided: int, promise: float | None
) -> dict[str, Any]:
    """accuracy, mcnemar, difference, verdict, reason; null where no gold label or answer is."""
    if gold is None or not answered:
        why = "no labels: only agreement can be judged" if answered else "no text was answered"
        return {
            "accuracy": None,
            "mcnemar": None,
            "difference": None,
            "verdict": "undecided",
            "reason": why,
        }
    control_right = [pair.control.label == gold[pair.index] for pair in answered]
    candidate_right = [pair.candidate.label == gold[pair.index] for pair in answered]
    b, c, n = evaluate.paired_counts(control_right, candidate_right)
    interval = evaluate.tango_interval(b, c, n, CONFIDENCE)
    verdict, reason = _judge(b, c, n, one_sided, promise)
    return {
        "accuracy": {"control": sum(control_right) / n, "candidate": sum(candidate_right) / n},
        "mcnemar": {"b": b, "c": c, "p": evaluate.mcnemar_exact(b, c)},
        "difference": {"value": (b - c) / n, "ci95": list(interval)},
        "verdict": verdict,
        "reason": reason,
    }


def _judge(b: int, c: int, n: int, one_sided: int, promise: float | None) -> tuple[str, str]:
    """The verdict, and in words why.

    The texts that only one arm answered could have gone either way: the upper bound takes them
    all as the candidate's losses, the lower bound as its gains.
    """
    upper = evaluate.drop_upper_bound(b + one_sided, c, n + one_sided, ALPHA)
    lower = evaluate.drop_lower_bound(b, c + one_sided, n + one_sided, ALPHA)
    if promise is None:
        span = f"the drop may be {_points(lower)} to {_points(upper)}"
        return "undecided", f"{span}; no promise to judge it by"
    promised = f"the promise is at most {_points(promise)}"
    if one_sided:
        promised += f"; {one_sided} texts failed in one arm and count against the verdict"
    if upper <= promise:
        return "holds", f"the drop is at most {_points(upper)} with 95% confidence; {promised}"
    if lower > promise:
        return "broken", f"the drop is at least {_points(lower)} with 95% confidence; {promised}"
    span = f"the drop may be {_points(lower)} to {_points(upper)}; {promised}"
    try:
        needed = evaluate.examples_needed(promise, (b + c) / n, max(0.0, (b - c) / n))
    except ValueError:
        return "undecided", f"{span}; the drop seen is too near the promise to be decided"
    if needed <= n:
        return "undecided", f"{span}; another {n} texts may decide it"
    return "undecided", f"{span}; about {needed} texts would decide it"


def _pair(records: Sequence[Record], control: str, candidate: str) -> list[_Pair]:
    """Both arms' records by text, in the texts' order; ValueError if they do not match."""
    arms: dict[str, dict[int, Record]] = {control: {}, candidate: {}}
    for record in records:
        arms[record.arm][int(record.id)] = record
    first, second = arms[control], arms[candidate]
    if first.keys() != second.keys() or len(records) != len(first) + len(second):
        raise ValueError("expected one record of each arm for every text")
    return [_Pair(index, first[index], second[index]) for index in sorted(first)]


def _latency(records: Sequence[Record], seed: int) -> dict[str, Any]:
    """p50, p95, p99 and their intervals, of the requests that were answered."""
    samples = [record.latency_ms for record in records if record.error is None]
    if not samples:
        return {**dict.fromkeys(_QUANTILES), "ci95": None}
    found = evaluate.quantile_intervals(samples, tuple(_QUANTILES.values()), CONFIDENCE, seed=seed)
    marks = {name: found[quantile] for name, quantile in _QUANTILES.items()}
    return {
        **{name: round(mark.value, 3) for name, mark in marks.items()},
        "ci95": {name: [round(mark.low, 3), round(mark.high, 3)] for name, mark in marks.items()},
    }


def _difference(pair: _Pair, texts: Sequence[Text], gold: Sequence[str] | None) -> dict[str, Any]:
    return {
        "id": pair.control.id,
        "text": texts[pair.index],
        "label": None if gold is None else gold[pair.index],
        "control": {"label": pair.control.label, "scores": list(pair.control.scores or ())},
        "candidate": {"label": pair.candidate.label, "scores": list(pair.candidate.scores or ())},
    }


def _check_gold(gold: Sequence[str] | None, texts: Sequence[Text], classes: Sequence[str]) -> None:
    if gold is None:
        return
    if len(gold) != len(texts):
        raise ValueError(f"expected one label per text, got {len(gold)} for {len(texts)}")
    foreign = sorted(set(gold) - set(classes)) if classes else []
    if foreign:
        raise SampError(
            "ab_labels",
            f"labels that the model cannot answer: {', '.join(foreign[:5])}",
            ", ".join(classes),
            "write the labels as the model does, or leave the column out",
        )


def _check_promise(promise: float | None) -> None:
    if promise is not None and not 0 <= promise <= 1:
        raise SampError(
            "ab_promise",
            f"a largest drop of {100 * promise:g} points",
            "0 to 100 points",
            "correct the promise",
        )


def _task(tier: Tier) -> Task:
    """What the rows of a comparison hold. SampError where a tier answers no single label."""
    if tier.kind != "classification":
        raise SampError(
            "ab_task", f"tiers that answer {tier.kind}", "tiers that answer one label a text",
            "compare them by their own metric: samp build does",
        )  # fmt: skip
    return TASKS["pairs" if len(tier.inputs) == 2 else "classification"]


def _read(path: Path, task: Task) -> tuple[Rows, bool]:
    """The rows, and whether they are labelled; a jsonl where only some rows are is an error."""
    try:
        return read_rows(path, task=task), True
    except SampError as error:
        # A table has a column or has not; in jsonl `"label"` can only be a key or a whole value.
        if error.code != "data_columns" or (
            path.suffix.lower() == ".jsonl" and b'"label"' in path.read_bytes()
        ):
            raise
    return read_rows(path, labelled=False, task=task), False


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f} points"
