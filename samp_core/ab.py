"""Two tiers on the same texts, and what the answers say of a promise: the object of `samp ab`.

The client collects the records; the statistics are those of evaluate.py, by the task's metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from samp_kernels.interface import Array

from samp_core import ab_tasks, evaluate
from samp_core.ab_tasks import Record
from samp_core.data import Rows, Text, gold_values, make_rows, read_rows
from samp_core.errors import SampError
from samp_core.metrics import Bootstrapped
from samp_core.tasks import TASKS, Task

ALPHA = 0.05
CONFIDENCE = 0.95
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


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
    """Both arms' answers to one row: one record each, or two where a row is two texts to embed."""

    index: int
    control: tuple[Record, ...]
    candidate: tuple[Record, ...]

    @property
    def answered(self) -> bool:
        return not _error(self.control) and not _error(self.candidate)

    @property
    def failed(self) -> bool:
        """Neither arm answered: the row's fault, or the server's, but no arm's."""
        return _error(self.control) and _error(self.candidate)


@dataclass(frozen=True)
class _Drop:
    """What the answered rows say: fractions of the metric, control minus candidate.

    upper, lower: one-sided bounds that take every row which one arm alone answered as the
    candidate's loss, and as its gain; needed: rows that would decide a promise, None: no number.
    """

    values: tuple[float, float]
    ci95: tuple[float, float]
    upper: float
    lower: float
    mcnemar: dict[str, Any] | None
    needed: Callable[[float], int | None]


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

    data: jsonl, csv or tsv with the task's columns, gold where known; promise_points: the drop to
    judge by, in points, else the one that the candidate was built for; limit: only the first rows.
    SampError for what the file lacks, the client's own errors for tiers and server.
    """
    if limit is not None and limit < 1:
        raise SampError("ab_limit", f"limit {limit}", "1 or more", "raise it or leave it out")
    if not Path(data).is_file():
        read_rows(data)  # says what is wrong, without a server
    tier = client.describe(candidate)
    task = ab_tasks.task_of(tier.kind, len(tier.inputs))
    rows, labelled = _read(Path(data), task)
    rows = make_rows(rows.texts[:limit], rows.labels[:limit], rows.source)
    classes = client.labels()
    gold: Any = rows.labels if labelled else None
    _check_gold(task, gold, rows.texts, classes)
    if labelled and task.gold != "label":
        gold = gold_values(rows, task.gold, classes)
    points = tier.promise if promise_points is None else promise_points
    promise = None if points is None else points / 100
    _check_promise(promise)
    asked: Sequence[Any] = rows.texts
    if task.gold_optional and isinstance(rows.texts[0], tuple):
        asked = [text for row in rows.texts for text in row]
    step = progress(f"{control} and {candidate}", len(asked)) if progress else None
    records = client.compare(
        asked,
        control,
        candidate,
        seed=seed,
        progress=None if step is None else lambda done, of: step(),
    )
    return report(
        records,
        rows.texts,
        control=control,
        candidate=candidate,
        promise=promise,
        gold=gold,
        classes=classes,
        seed=seed,
        task=task,
    )


def report(
    records: Iterable[Record],
    texts: Sequence[Text],
    *,
    control: str,
    candidate: str,
    promise: float | None,
    gold: Any = None,
    classes: Sequence[str] = (),
    seed: int = 0,
    task: Task = TASKS["classification"],
) -> dict[str, Any]:
    """The `ab` object: agreement, accuracy, paired difference, latency, verdict, differing texts.

    promise: the largest drop of the metric that the candidate may show, a fraction (0.01 is one
    point), or None to judge by none; gold: of each row, if known: its label, or as
    data.gold_values gives it; classes: the labels that the model can answer, to catch a file that
    writes them otherwise (SampError).

    n counts the rows that both arms answered; differences are fractions, control minus candidate;
    latencies milliseconds of one-text requests. Beyond the pinned keys: the `metric` and its
    `values`, `failed` requests by arm, and the verdict's `reason`. accuracy and mcnemar are null
    where the metric is another: the difference is then bounded by the paired bootstrap over rows
    with one row added that the candidate gets wholly wrong (for a lower end: wholly right).
    Embeddings without gold are judged by their cosine to the control's. agreement: the share of
    equal answers; of scores the arms' correlation, of vectors their mean cosine, and `differing`
    is then the 20 rows farthest apart. A row that one arm alone failed counts against a verdict,
    whichever way it goes.
    """
    _check_promise(promise)
    _check_gold(task, gold, texts, classes)
    given = list(records)
    pairs = _pair(given, control, candidate, len(texts))
    answered = [pair for pair in pairs if pair.answered]
    one_sided = sum(not pair.answered and not pair.failed for pair in pairs)
    kind = ab_tasks.kind_of(task)
    apart = [kind.distance(pair.control, pair.candidate) for pair in answered]
    agreement: float | None = None
    if answered and kind.agreement is None:
        agreement = sum(gap == 0 for gap in apart) / len(answered)
    elif answered and kind.agreement is not None:
        agreement = kind.agreement([p.control for p in answered], [p.candidate for p in answered])
    differing = [place for place, gap in enumerate(apart) if gap > 0]
    if not kind.counted:
        farthest = sorted(differing, key=lambda place: apart[place], reverse=True)
        differing = sorted(farthest[: ab_tasks.MOST_SHOWN])
    arms = {
        name: [record for record in given if record.arm == name] for name in (control, candidate)
    }
    return {
        "control": control,
        "candidate": candidate,
        "n": len(answered),
        "agreement": agreement,
        **_compare(task, answered, gold, classes, one_sided, promise, seed),
        "latency_ms": {name: _latency(found, seed) for name, found in arms.items()},
        "differing": [_difference(answered[place], texts, gold, kind) for place in differing],
        "failed": {
            name: sum(record.error is not None for record in found) for name, found in arms.items()
        },
    }


def _compare(
    task: Task,
    answered: Sequence[_Pair],
    gold: Any,
    classes: Sequence[str],
    one_sided: int,
    promise: float | None,
    seed: int,
) -> dict[str, Any]:
    """metric to reason; null where there is no gold to judge by, or no answer."""
    if not answered or (gold is None and not task.gold_optional):
        why = "no labels: only agreement can be judged" if answered else "no text was answered"
        empty = dict.fromkeys(("metric", "values", "accuracy", "mcnemar", "difference"))
        return {**empty, "verdict": "undecided", "reason": why}
    metric = ab_tasks.metric_of(task, classes, gold is not None)
    chosen = gold if gold is None else _chosen(gold, [pair.index for pair in answered])
    control, candidate = (
        ab_tasks.measure(task, metric, arm, chosen, classes, [pair.control for pair in answered])
        for arm in ([p.control for p in answered], [p.candidate for p in answered])
    )
    if isinstance(metric, Bootstrapped):
        drop = _bootstrapped(metric, control, candidate, one_sided, seed)
    else:
        drop = _counted(control, candidate, one_sided)
    values = dict(zip(("control", "candidate"), drop.values, strict=True))
    verdict, reason = _judge(drop, len(answered), one_sided, promise)
    return {
        "metric": metric.name,
        "values": values,
        "accuracy": values if metric.name == "accuracy" else None,
        "mcnemar": drop.mcnemar,
        "difference": {"value": _change(drop, control, candidate), "ci95": list(drop.ci95)},
        "verdict": verdict,
        "reason": reason,
    }


def _counted(control: Array, candidate: Array, one_sided: int) -> _Drop:
    """Accuracy: Tango's score intervals of the rows that changed."""
    b, c, n = evaluate.paired_counts(control, candidate)

    def needed(promise: float) -> int | None:
        try:
            return evaluate.examples_needed(promise, (b + c) / n, max(0.0, (b - c) / n))
        except ValueError:
            return None

    return _Drop(
        (float(control.mean()), float(candidate.mean())),
        evaluate.tango_interval(b, c, n, CONFIDENCE),
        evaluate.drop_upper_bound(b + one_sided, c, n + one_sided, ALPHA),
        evaluate.drop_lower_bound(b, c + one_sided, n + one_sided, ALPHA),
        {"b": b, "c": c, "p": evaluate.mcnemar_exact(b, c)},
        needed,
    )


def _bootstrapped(
    metric: Bootstrapped, control: Array, candidate: Array, one_sided: int, seed: int
) -> _Drop:
    """F1, correlation, cosine: the paired bootstrap, with a row that stretches each end."""
    good, bad = (np.asarray(row, np.float64) for row in metric.worst(control))

    def drops(one: Array, other: Array, extra: int) -> Array:
        first, second = (
            np.concatenate([np.asarray(arm, np.float64), np.tile(row, (extra, 1))])
            for arm, row in ((control, one), (candidate, other))
        )
        return evaluate.paired_bootstrap(first, second, metric.statistic, (one, other), seed=seed)

    def ends(extra: int) -> tuple[Array, Array]:
        return drops(bad, good, extra), drops(good, bad, extra)

    tail = (1 - CONFIDENCE) / 2
    low, high = ends(0)
    interval = float(np.quantile(low, tail)), float(np.quantile(high, 1 - tail))
    if one_sided:
        low, high = ends(one_sided)

    def needed(promise: float) -> int | None:
        test = metric.test(control, candidate, promise, ALPHA)
        said = metric.needed(test, control, candidate).replace(",", "")
        return int(said) if said.isdigit() else None

    return _Drop(
        (metric.value(control), metric.value(candidate)),
        interval,
        float(np.quantile(high, 1 - ALPHA)),
        float(np.quantile(low, ALPHA)),
        None,
        needed,
    )


def _judge(drop: _Drop, n: int, one_sided: int, promise: float | None) -> tuple[str, str]:
    """The verdict, and in words why."""
    if promise is None:
        span = f"the drop may be {_points(drop.lower)} to {_points(drop.upper)}"
        return "undecided", f"{span}; no promise to judge it by"
    promised = f"the promise is at most {_points(promise)}"
    if one_sided:
        promised += f"; {one_sided} texts failed in one arm and count against the verdict"
    if drop.upper <= promise:
        reason = f"the drop is at most {_points(drop.upper)} with 95% confidence; {promised}"
        return "holds", reason
    if drop.lower > promise:
        reason = f"the drop is at least {_points(drop.lower)} with 95% confidence; {promised}"
        return "broken", reason
    span = f"the drop may be {_points(drop.lower)} to {_points(drop.upper)}; {promised}"
    needed = drop.needed(promise)
    if needed is None:
        return "undecided", f"{span}; the drop seen is too near the promise to be decided"
    if needed <= n:
        return "undecided", f"{span}; another {n} texts may decide it"
    return "undecided", f"{span}; about {needed} texts would decide it"


def _pair(records: Sequence[Record], control: str, candidate: str, rows: int) -> list[_Pair]:
    """Both arms' records by row, in the rows' order; ValueError if they do not match."""
    arms: dict[str, dict[int, Record]] = {control: {}, candidate: {}}
    for record in records:
        arms[record.arm][int(record.id)] = record
    first, second = arms[control], arms[candidate]
    if first.keys() != second.keys() or len(records) != len(first) + len(second):
        raise ValueError("expected one record of each arm for every text")
    width = 2 if len(first) == 2 * rows else 1
    places = sorted(first)
    return [
        _Pair(
            places[start] // width,
            tuple(first[place] for place in places[start : start + width]),
            tuple(second[place] for place in places[start : start + width]),
        )
        for start in range(0, len(places), width)
    ]


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


def _difference(
    pair: _Pair, texts: Sequence[Text], gold: Any, kind: ab_tasks.Kind
) -> dict[str, Any]:
    return {
        "id": str(pair.index),
        "text": texts[pair.index],
        "label": None if gold is None else _plain(gold[pair.index]),
        "control": kind.shown(pair.control),
        "candidate": kind.shown(pair.candidate),
    }


def _plain(gold: Any) -> Any:
    """Gold as JSON has it."""
    if isinstance(gold, (frozenset, set)):
        return [{"start": start, "end": end, "label": label} for start, end, label in sorted(gold)]
    return gold.tolist() if isinstance(gold, (np.ndarray, np.generic)) else gold


def _chosen(gold: Any, places: Sequence[int]) -> Any:
    if isinstance(gold, np.ndarray):
        return gold[np.asarray(places)]
    return [gold[place] for place in places]


def _change(drop: _Drop, control: Array, candidate: Array) -> float:
    if drop.mcnemar is not None:  # exact in whole counts
        return float((drop.mcnemar["b"] - drop.mcnemar["c"]) / len(control))
    return drop.values[0] - drop.values[1]


def _error(records: Sequence[Record]) -> bool:
    return any(record.error is not None for record in records)


def _check_gold(task: Task, gold: Any, texts: Sequence[Text], classes: Sequence[str]) -> None:
    if gold is None:
        return
    if len(gold) != len(texts):
        raise ValueError(f"expected one label per text, got {len(gold)} for {len(texts)}")
    foreign = sorted(set(gold) - set(classes)) if classes and task.gold == "label" else []
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


def _read(path: Path, task: Task) -> tuple[Rows, bool]:
    """The rows, and whether they have gold; a jsonl where only some rows have is an error."""
    try:
        rows = read_rows(path, task=task)
        return rows, "" not in rows.labels
    except SampError as error:
        # A table has a column or has not; in jsonl `"label"` can only be a key or a whole value.
        key = f'"{task.gold}"'.encode()
        tags = task.gold == "entities" and b'"tags"' in path.read_bytes()
        found = path.suffix.lower() == ".jsonl" and (tags or key in path.read_bytes())
        if error.code != "data_columns" or found:
            raise
    return read_rows(path, labelled=False, task=task), False


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f} points"
