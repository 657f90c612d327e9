"""Labelled rows in, disjoint calibration, search and verification splits out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samp_core.errors import SampError

_FEWEST_TEXTS = 30
_FEWEST_PER_SPLIT = 8
_COLUMNS = "columns text and label"


@dataclass(frozen=True)
class Rows:
    """Texts with their labels; sha256 is of the rows, whatever format they were read from."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    source: Path
    sha256: str

    @property
    def n(self) -> int:
        return len(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


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


def make_rows(texts: Iterable[str], labels: Iterable[str], source: Path) -> Rows:
    """Rows from texts and labels of one length, hashed."""
    kept, named = tuple(texts), tuple(labels)
    if len(kept) != len(named):
        raise ValueError(f"expected one label per text, got {len(kept)} texts, {len(named)} labels")
    digest = hashlib.sha256()
    for row in zip(kept, named, strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    return Rows(kept, named, source, digest.hexdigest())


def read_rows(path: str | Path, *, labelled: bool = True) -> Rows:
    """Read jsonl, csv or tsv with the columns text and label; other columns are ignored.

    With labelled=False only the text column is needed and every label is "" (rows to predict,
    rows that trained the checkpoint). Labels are strings, or whole numbers kept as strings.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise _error(
            "data_format",
            f"{path}: unknown extension {path.suffix!r}",
            "rename or convert the file",
            allowed=", ".join(_READERS),
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _error("data_file", f"{path}: {error.strerror}", "check the path") from error
    texts: list[str] = []
    labels: list[str] = []
    for line, row in reader(path, _decode(path, content), labelled):
        text = row["text"]
        if not isinstance(text, str):
            raise _error(
                "data_text",
                f"{path}:{line}: text is {_show(text)}",
                "make it a string or remove the row",
                allowed="a string",
            )
        if not _is_unicode(text):
            raise _error(
                "data_encoding",
                f"{path}:{line}: text has an unpaired surrogate",
                "replace the broken character",
                allowed="UTF-8",
            )
        texts.append(text)
        labels.append(_label(path, line, row["label"]) if labelled else "")
    if not texts:
        raise _error("data_empty", f"{path}: no rows", "give a file with rows")
    if labelled and len(set(labels)) == 1:
        raise _error(
            "data_one_class",
            f"{path}: all {len(texts)} rows have the label {labels[0]!r}",
            "give rows of every class",
            allowed="two classes or more",
        )
    return make_rows(texts, labels, path)


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
                f"{rows.source}: labels the head lacks: {_some(unknown)}",
                f"the head's labels {_some(labels)}, or 0 to {len(labels) - 1}",
                "rename the labels, or correct id2label in the checkpoint's config.json",
            )
        names = indexes
    return np.array([names[label] for label in rows.labels], dtype=np.int64)


def _read_jsonl(path: Path, text: str, labelled: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = ("text", "label") if labelled else ("text",)
    # Not str.splitlines: it also cuts at characters that JSON allows inside a string.
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", str(error))
            raise _bad_json(f"{path}:{line}: {why}: {raw.strip()[:40]!r}") from error
        if not isinstance(row, dict):
            raise _bad_json(f"{path}:{line}: {_show(row)}")
        _check_columns(f"{path}:{line}", list(row), wanted)
        yield line, row


def _read_csv(path: Path, text: str, labelled: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    return _table(path, _cells(path, text, delimiter=",", strict=True), labelled)


def _read_tsv(path: Path, text: str, labelled: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Quoted as spreadsheets and pandas write it, else with quotes that mean nothing."""
    try:
        rows = list(_cells(path, text, delimiter="\t", strict=True))
    except SampError:
        rows = list(_cells(path, text, delimiter="\t", quoting=csv.QUOTE_NONE))
    return _table(path, rows, labelled)


def _cells(path: Path, text: str, **dialect: Any) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    limit = csv.field_size_limit(sys.maxsize)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise _error(
            "data_csv",
            f"{path}:{start}: {error}",
            "quote the field and double the quotes inside it, or use jsonl",
        ) from error
    finally:
        csv.field_size_limit(limit)


def _table(
    path: Path, rows: Iterable[tuple[int, list[str]]], labelled: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = ("text", "label") if labelled else ("text",)
    header: list[str] | None = None
    for line, cells in rows:
        if header is None:
            header = [name.strip() for name in cells]
            _check_columns(f"{path}:{line}", header, wanted)
            continue
        if len(cells) != len(header):
            raise _error(
                "data_csv",
                f"{path}:{line}: {len(cells)} fields",
                "quote fields that hold the separator",
                allowed=f"{len(header)} fields",
            )
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        if labelled and row["label"].strip().lower() == "nan":
            row["label"] = None
        yield line, row


_READERS: dict[str, Callable[[Path, str, bool], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


def _check_columns(place: str, found: list[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise _error(
            "data_columns",
            f"{place}: no column {' and no '.join(missing)}, found {_some(found)}",
            "rename the columns",
        )


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _error(
            "data_encoding",
            f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8",
            "save the file as UTF-8",
            allowed="UTF-8",
        ) from error


def _label(path: Path, line: int, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip() and _is_unicode(value):
        return value
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    shown = "empty" if empty else _show(value)
    raise _error(
        "data_label",
        f"{path}:{line}: label is {shown}",
        "label the row or remove it",
        allowed="a non-empty string or a whole number",
    )


def _is_unicode(text: str) -> bool:
    """False if the text has an unpaired surrogate, which JSON escapes can make."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _key(text: str) -> str:
    """Texts with one key are one text: they differ at most in case and white space."""
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
    return _error(
        "data_few_rows",
        f"{rows.source}: {found} distinct texts are left{why}",
        "give more labelled rows",
        allowed=f"{needed} or more",
    )


def _error(code: str, given: str, fix: str, allowed: str = _COLUMNS) -> SampError:
    return SampError(code, given, allowed, fix)


def _bad_json(given: str) -> SampError:
    return _error("data_json", given, "mend the line", allowed="one JSON object per line")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
