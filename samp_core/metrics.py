"""The metric of each task: from logits and gold to what is shown, promised and tested.

A metric sees a split's logits as the workbench gives them and reduces each text to the numbers
that it adds to the metric's sums; the statistics on them are those of evaluate.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from samp_kernels.interface import F32, Array

from samp_core import bio, evaluate
from samp_core.allocate import Candidate, expected_changes
from samp_core.errors import SampError
from samp_core.evaluate import Counts, DropTest, Interval
from samp_core.tasks import Task


class Measurable(Protocol):
    """What a metric needs of a workbench.Split."""

    @property
    def gold(self) -> Any: ...
    @property
    def encodings(self) -> Any: ...


class Metric(Protocol):
    """`measure` gives [n, ...], a row for each text; the others take what it gave."""

    @property
    def name(self) -> str: ...
    def measure(self, logits: F32, split: Measurable) -> Array: ...
    def value(self, texts: Array) -> float: ...
    def ci95(self, texts: Array) -> Interval: ...
    def changed(self, control: Array, candidate: Array) -> Counts: ...
    def test(self, control: Array, candidate: Array, promise: float, alpha: float) -> DropTest: ...
    def unchanged(self, n: int, promise: float, alpha: float) -> DropTest | None:
        """The test on n texts of a plan that changes nothing; None where only float's answers
        tell it."""
        ...

    def candidate(
        self, name: str, ms: float, reference: F32, logits: F32, split: Measurable
    ) -> Candidate: ...
    def needed(self, test: DropTest, control: Array, candidate: Array) -> str: ...
    def check(self, logits: F32, split: Measurable) -> None:
        """SampError where the float model is no better than a guess: the labels disagree."""
        ...


class Accuracy:
    """Share of texts whose class of highest score is the gold one; bounds are Tango's."""

    name = "accuracy"

    def measure(self, logits: F32, split: Measurable) -> Array:
        return np.asarray(logits.argmax(axis=1) == split.gold)

    def value(self, texts: Array) -> float:
        return float(texts.mean())

    def ci95(self, texts: Array) -> Interval:
        return evaluate.wilson_interval(int(texts.sum()), len(texts))

    def changed(self, control: Array, candidate: Array) -> Counts:
        return evaluate.paired_counts(control, candidate)

    def test(self, control: Array, candidate: Array, promise: float, alpha: float) -> DropTest:
        return evaluate.drop_test(control, candidate, promise, alpha)

    def unchanged(self, n: int, promise: float, alpha: float) -> DropTest:
        bound = evaluate.drop_upper_bound(0, 0, n, alpha)
        return DropTest(0, 0, n, 0.0, bound, promise, alpha, bound <= promise)

    def candidate(
        self, name: str, ms: float, reference: F32, logits: F32, split: Measurable
    ) -> Candidate:
        right = self.measure(logits, split)
        b, c, n = evaluate.paired_counts(self.measure(reference, split), right)
        expected = expected_changes(reference, logits, split.gold)
        return Candidate(name, ms, float(right.mean()), b, c, n, *expected)

    def needed(self, test: DropTest, control: Array, candidate: Array) -> str:
        rate, drop = (test.b + test.c) / test.n, max(test.drop, 0.0)
        try:
            rows = evaluate.examples_needed(test.promise, max(rate, drop), drop, 0.8, test.alpha)
        except ValueError:
            return "more than 100,000,000"
        return f"{rows:,}"

    def check(self, logits: F32, split: Measurable) -> None:
        gold = split.gold
        right = self.measure(logits, split).mean()
        floor = float(np.bincount(gold).max() / len(gold))
        if right <= floor and len(gold) >= 100:
            raise SampError(
                "labels_disagree",
                f"the float model is right on {right:.1%} of the search rows; always "
                f"answering the most frequent label would be right on {floor:.1%}",
                "labels that the checkpoint was trained for",
                "check id2label in config.json against the labels in the data",
            )


@dataclass(frozen=True)
class Bootstrapped:
    """A function of sums over texts, bounded by the paired bootstrap with one worst text added.

    texts(logits, split) -> [n, k]; statistic: sums -> value; worst(texts of the control) -> the
    two arms of a text that the candidate changed wholly; loss(texts, control) -> [n], by which
    texts are counted as better or worse; rank: Spearman's correlation, shown beside Pearson's.
    """

    name: str
    texts: Callable[[F32, Measurable], Array]
    statistic: Callable[[Array], Array]
    worst: Callable[[Array], tuple[Array, Array]]
    loss: Callable[[Array, Array], Array]
    least: float = 0.0
    rank: Callable[[Array], float] | None = None

    def measure(self, logits: F32, split: Measurable) -> Array:
        return self.texts(logits, split)

    def value(self, texts: Array) -> float:
        return float(self.statistic(texts.sum(axis=0)))

    def ci95(self, texts: Array) -> Interval:
        return evaluate.bootstrap_interval(texts, self.statistic)

    def changed(self, control: Array, candidate: Array) -> Counts:
        change = self.loss(candidate, control) - self.loss(control, control)
        b, c = np.count_nonzero(change > 1e-9), np.count_nonzero(change < -1e-9)
        return Counts(int(b), int(c), len(control))

    def test(self, control: Array, candidate: Array, promise: float, alpha: float) -> DropTest:
        drops = self._drops(control, candidate)
        bound = float(np.quantile(drops, 1 - alpha))
        b, c, n = self.changed(control, candidate)
        drop = self.value(control) - self.value(candidate)
        return DropTest(b, c, n, drop, bound, promise, alpha, bound <= promise)

    def unchanged(self, n: int, promise: float, alpha: float) -> None:
        """What one worst text costs depends on what float has right."""

    def candidate(
        self, name: str, ms: float, reference: F32, logits: F32, split: Measurable
    ) -> Candidate:
        control, texts = self.texts(reference, split), self.texts(logits, split)
        b, c, n = self.changed(control, texts)
        value = self.value(texts)
        lost, noise, worst = self._spread(control, texts)
        return Candidate(name, ms, value, b, c, n, float(b), float(c), lost, noise, worst)

    def needed(self, test: DropTest, control: Array, candidate: Array) -> str:
        lost, noise, worst = self._spread(control, candidate)
        try:
            rows = evaluate.examples_for_bound(
                test.promise, max(lost, 0.0), noise, worst, test.alpha
            )
        except ValueError:
            return "more than 100,000,000"
        return f"{rows:,}"

    def check(self, logits: F32, split: Measurable) -> None:
        value = self.value(self.texts(logits, split))
        if not value > self.least and len(split.encodings) >= 100:
            raise SampError(
                "labels_disagree",
                f"the float model's {self.name} on the search rows is {100 * value:.1f}%",
                f"above {100 * self.least:g}%: labels that the checkpoint was trained for",
                "check id2label in config.json against the labels in the data",
            )

    def _drops(self, control: Array, candidate: Array) -> Array:
        worst = self.worst(control)
        return evaluate.paired_bootstrap(control, candidate, self.statistic, worst)

    def _spread(self, control: Array, candidate: Array) -> tuple[float, float, float]:
        """The drop, its noise and the price of a worst text, as evaluate.expected_bound takes."""
        n = len(control)
        plain = evaluate.paired_bootstrap(control, candidate, self.statistic)
        one, other = self.worst(control)
        sums = control.sum(axis=0)
        price = float(self.statistic(sums + one) - self.statistic(sums + other))
        lost = self.value(control) - self.value(candidate)
        return lost, float(plain.std()) * math.sqrt(n), price * n


def of(task: Task, labels: tuple[str, ...] = (), scored: bool = True) -> Metric:
    """The metric of a task; scored: whether its rows have gold, where that is optional."""
    gold = task.gold
    if gold == "entities":
        return Bootstrapped(
            "entity F1",
            lambda logits, split: entity_counts(logits, split, labels),
            evaluate.f1,
            _worst_count,
            lambda texts, control: texts[:, 1] + texts[:, 2],
        )
    if gold == "labels":
        return Bootstrapped(
            "micro F1",
            lambda logits, split: _label_counts(logits, split.gold),
            evaluate.f1,
            _worst_count,
            lambda texts, control: texts[:, 1] + texts[:, 2],
        )
    if gold == "score" and not scored:
        return Bootstrapped(
            "cosine to float",
            lambda logits, split: _cosines(logits, split.gold),
            _mean,
            lambda control: (np.array([1.0, 1.0]), np.array([1.0, 0.0])),
            lambda texts, control: -texts[:, 1],
        )
    if gold == "score":
        pairs = task.gold_optional
        return Bootstrapped(
            "Pearson of cosine" if pairs else "Pearson",
            lambda logits, split: evaluate.moments(
                _pair_cosines(logits) if pairs else logits[:, 0], split.gold
            ),
            evaluate.pearson,
            _reversed,
            _residual,
            rank=lambda texts: evaluate.spearman(texts[:, 1], texts[:, 2]),
        )
    return Accuracy()


def _mean(sums: Array) -> Array:
    return np.asarray(sums[..., 1] / sums[..., 0])


def _label_counts(logits: F32, gold: Array) -> Array:
    """Right, invented and missed classes of each text, [n, 3]."""
    found = logits >= 0
    counts = [(found & gold).sum(1), (found & ~gold).sum(1), (~found & gold).sum(1)]
    return np.asarray(np.stack(counts, axis=1), dtype=np.float64)


def _cosines(vectors: F32, reference: F32) -> Array:
    """1 and the cosine of each text's vector to its reference, [n, 2]."""
    cosine = (vectors.astype(np.float64) * reference).sum(axis=1)
    return np.stack([np.ones(len(cosine)), cosine], axis=1)


def _pair_cosines(vectors: F32) -> Array:
    """[n] of [2n, D]: all first texts stand before all second ones."""
    first, second = np.split(vectors.astype(np.float64), 2)
    return np.asarray((first * second).sum(axis=1))


def _reversed(control: Array) -> tuple[Array, Array]:
    """A row one deviation above the mean in gold, and in float; one below it in the plan."""
    x, y = control[:, 1], control[:, 2]
    high, low, gold = x.mean() + x.std(), x.mean() - x.std(), y.mean() + y.std()
    both = evaluate.moments([high, low], [gold, gold])
    return both[0], both[1]


def _residual(texts: Array, control: Array) -> Array:
    """How far each score is from its gold on float's scale."""
    x, y = control[:, 1], control[:, 2]
    scale = x.std() / max(float(y.std()), 1e-12)
    return np.asarray(np.abs(texts[:, 1] - (x.mean() + (texts[:, 2] - y.mean()) * scale)))


def entity_counts(logits: F32, split: Measurable, labels: tuple[str, ...]) -> Array:
    """Right, invented and missed entities of each text, [n, 3]; an entity is right if its span
    and label are. logits: [words, C], the words of all texts in a row.
    """
    best = logits.argmax(axis=1)
    counts = np.zeros((len(split.encodings), 3))
    begin = 0
    for row, encoding, gold in zip(counts, split.encodings, split.gold, strict=True):
        starts, ends = bio.word_spans(encoding.offsets, encoding.words)
        tags = [labels[index] for index in best[begin : begin + len(starts)]]
        found = {(int(starts[a]), int(ends[b]), name) for a, b, name in bio.groups(tags)}
        hits = len(found & gold)
        row[:] = hits, len(found) - hits, len(gold) - hits
        begin += len(starts)
    return counts


def _worst_count(control: Array) -> tuple[Array, Array]:
    """A text of the usual number of gold items that float has right and the plan all wrong."""
    gold = control[:, 0] + control[:, 2]
    usual = math.ceil(gold[gold > 0].mean()) if (gold > 0).any() else 1
    return np.array([usual, 0, 0]), np.array([0, usual, usual])
