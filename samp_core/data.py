"""Disjoint calibration, search and verification splits of labelled rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core.errors import SampError
from samp_core.rows import Rows, Text, make_rows, read_rows, some
from samp_core.tasks import Gold

__all__ = [
    "Rows",
    "Splits",
    "Text",
    "combine_splits",
    "gold_values",
    "label_ids",
    "make_rows",
    "read_rows",
    "split_rows",
]

_FEWEST_TEXTS = 30
_FEWEST_PER_SPLIT = 8


@dataclass(frozen=True)
class Splits:
    """Three sets of rows that share no text, and how many rows were left out for that.

    in_training: rows whose text trained the checkpoint; overlapping: rows whose text a later
    split holds; unused: rows beyond the sizes asked for.
    """

    calibration: Rows
    search: Rows
    verification: Rows
    in_training: int = 0
    overlapping: int = 0
    unused: int = 0


def split_rows(
    rows: Rows,
    calibration: int = 256,
    search: int = 1024,
    verification: int | None = None,
    seed: int = 0,
    exclude: Rows | None = None,
) -> Splits:
    """Three disjoint splits of one file; sizes are targets, in rows.

    Rows are ordered by a hash of seed and text, so a row's split hardly depends on the others.
    Rows of one text (up to case and white space) stay together. Without a size for verification
    it takes the rest, and at least about half: the other two shrink in proportion when rows are
    few. With one, all three shrink. Fewer than 30 distinct texts is an error.
    """
    groups, in_training = _groups(rows, seed, exclude)
    total = _count(groups)
    if len(groups) < _FEWEST_TEXTS:
        raise _too_few(rows, len(groups), in_training, _FEWEST_TEXTS)
    wanted = calibration + search
    shrink = min(1.0, total / (2 * wanted if verification is None else wanted + verification))
    sizes = [max(_FEWEST_PER_SPLIT, int(size * shrink)) for size in (calibration, search)]
    rest = max(_FEWEST_PER_SPLIT, total - sum(sizes))
    sizes.append(rest if verification is None or shrink < 1 else verification)
    parts = _take(groups, sizes)
    if len(parts[2]) < _FEWEST_PER_SPLIT:  # a text repeated so often that it fills a split
        raise _too_few(rows, len(groups), in_training, _FEWEST_TEXTS)
    first, second, third = (_subset(rows, part) for part in parts)
    used = len(first) + len(second) + len(third)
    return Splits(first, second, third, in_training, unused=total - used)


def combine_splits(
    calibration: Rows,
    search: Rows | None,
    verification: Rows,
    exclude: Rows | None = None,
    *,
    calibration_size: int = 256,
    search_size: int = 1024,
    seed: int = 0,
) -> Splits:
    """Splits from separate files, as disjoint as those of `split_rows`.

    A text in several files stays in the last of calibration, search, verification, and rows that
    trained the checkpoint are dropped from all. With search None the first file is cut into
    both, in proportion when it is small. Verification keeps all its rows.
    """
    last, in_training = _groups(verification, seed, exclude)
    first, trained = _groups(calibration, seed, exclude)
    in_training += trained
    before = _count(first)
    first = {key: group for key, group in first.items() if key not in last}
    if search is None:
        source, available = calibration, _count(first)
        overlapping = before - available
        shrink = min(1.0, available / (calibration_size + search_size))
        size = max(_FEWEST_PER_SPLIT, int(calibration_size * shrink))
        ranges, chosen = _take(first, [size, min(search_size, available - size)])
    else:
        source = search
        second, trained = _groups(search, seed, exclude)
        in_training += trained
        before += _count(second)
        second = {key: group for key, group in second.items() if key not in last}
        first = {key: group for key, group in first.items() if key not in second}
        available = _count(first) + _count(second)
        overlapping = before - available
        ranges, chosen = *_take(first, [calibration_size]), *_take(second, [search_size])
    kept = list(chain.from_iterable(last.values()))
    for rows, part in ((calibration, ranges), (source, chosen), (verification, kept)):
        if len(part) < _FEWEST_PER_SPLIT:
            raise _too_few(rows, len(part), in_training + overlapping, _FEWEST_PER_SPLIT)
    return Splits(
        _subset(calibration, ranges),
        _subset(source, chosen),
        _subset(verification, kept),
        in_training,
        overlapping,
        available - len(ranges) - len(chosen),
    )


def label_ids(rows: Rows, labels: Sequence[str]) -> NDArray[np.int64]:
    """The class index of every row, [n]: by name, else by index when all labels are indexes."""
    present = set(rows.labels)
    names = {label: index for index, label in enumerate(labels)}
    if not present <= names.keys():
        indexes = {str(index): index for index in range(len(labels))}
        if not present <= indexes.keys():
            unknown = sorted(present - names.keys())
            raise SampError(
                "data_labels",
                f"{rows.source}: labels the head lacks: {some(unknown)}",
                f"the head's labels {some(labels)}, or 0 to {len(labels) - 1}",
                "rename the labels, or correct id2label in the checkpoint's config.json",
            )
        names = indexes
    return np.array([names[label] for label in rows.labels], dtype=np.int64)


def gold_values(rows: Rows, gold: Gold, labels: Sequence[str]) -> Any:
    """What the metric of a kind of gold reads: class indexes [n], sets of classes as bool [n, C],
    numbers [n], or a set of (start, end, label) a text; None for rows without gold.
    """
    if "" in rows.labels:
        return None
    if gold == "label":
        return label_ids(rows, labels)
    if gold == "score":
        return np.array(rows.labels, dtype=np.float64)
    known = set(labels)
    if gold == "entities":
        known = {label.partition("-")[2] or label for label in labels}
    found = {label if gold == "labels" else label[2] for row in rows.labels for label in row}
    if not found <= known:
        raise SampError(
            "data_labels",
            f"{rows.source}: labels the head lacks: {some(sorted(found - known))}",
            f"the head's labels {some(sorted(known))}",
            "rename the labels, or correct id2label in the checkpoint's config.json",
        )
    if gold == "labels":
        return np.array([[label in row for label in labels] for row in map(set, rows.labels)])
    return [frozenset(row) for row in rows.labels]


def _key(text: Text) -> str:
    """Texts with one key are one text: they differ at most in case and white space."""
    if isinstance(text, tuple):
        return "\0".join(map(_key, text))
    return " ".join(text.split()).casefold()


def _groups(rows: Rows, seed: int, exclude: Rows | None) -> tuple[dict[str, list[int]], int]:
    """Row indexes by text, in hash order, and how many rows `exclude` took away."""
    trained = {_key(text) for text in exclude.texts} if exclude is not None else set()
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(rows.texts):
        if (key := _key(text)) not in trained:
            groups.setdefault(key, []).append(index)
    ordered = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    return {key: groups[key] for key in ordered}, len(rows) - _count(groups)


def _count(groups: dict[str, list[int]]) -> int:
    return sum(map(len, groups.values()))


def _take(groups: dict[str, list[int]], sizes: Sequence[int]) -> list[list[int]]:
    """Whole groups in order: each part takes groups until it has its size in rows."""
    parts: list[list[int]] = []
    queue = iter(groups.values())
    for size in sizes:
        part: list[int] = []
        while len(part) < size and (group := next(queue, None)) is not None:
            part += group
        parts.append(part)
    return parts


def _subset(rows: Rows, indexes: Iterable[int]) -> Rows:
    order = list(indexes)
    return make_rows((rows.texts[i] for i in order), (rows.labels[i] for i in order), rows.source)


def _too_few(rows: Rows, found: int, dropped: int, needed: int) -> SampError:
    why = f" after dropping {dropped} rows seen in training or in another split" if dropped else ""
    return SampError(
        "data_few_rows",
        f"{rows.source}: {found} distinct texts are left{why}",
        f"{needed} or more",
        "give more labelled rows",
    )
