"""Labelled rows of every task, read from jsonl, csv and tsv."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from samp_core import bio, tasks
from samp_core.errors import SampError
from samp_core.tasks import Task

Text: TypeAlias = str | tuple[str, str]
"""What one row asks about: a text, or a pair of texts."""


@dataclass(frozen=True)
class Rows:
    """Texts with their labels; sha256 is of the rows, whatever format they were read from.

    A label is, by the task's `gold`: a string, a sorted tuple of strings, a float, or a tuple of
    (start, end, label) spans in code points.
    """

    texts: tuple[Text, ...]
    labels: tuple[Any, ...]
    source: Path
    sha256: str

    @property
    def n(self) -> int:
        return len(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


def make_rows(texts: Iterable[Text], labels: Iterable[Any], source: Path) -> Rows:
    """Rows from texts and labels of one length, hashed."""
    kept, named = tuple(texts), tuple(labels)
    if len(kept) != len(named):
        raise ValueError(f"expected one label per text, got {len(kept)} texts, {len(named)} labels")
    digest = hashlib.sha256()
    for row in zip(kept, named, strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    return Rows(kept, named, source, digest.hexdigest())


def read_rows(
    path: str | Path, *, labelled: bool = True, task: Task = tasks.TASKS["classification"]
) -> Rows:
    """Read jsonl, csv or tsv with the columns of a task; other columns are ignored.

    text, and text_pair for pairs; label, labels, score or entities. Rows of entities may be
    {tokens, tags} instead: their text is the tokens with a space between them. Rows of embeddings
    are texts alone, or pairs with the score that their cosine should follow. With
    labelled=False only texts are needed and every label is "" (rows to predict, rows that
    trained the checkpoint). Labels are strings, or whole numbers kept as strings.
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
    texts: list[Text] = []
    labels: list[Any] = []
    for line, row in reader(path, _decode(path, content), task, labelled):
        place = f"{path}:{line}"
        text: Text
        if "tokens" in row and task.gold == "entities" and "text" not in row:
            text, label = _tagged(place, row, labelled)
        else:
            text = _text(place, row, task)
            label = ""
            scored = task.gold in row or isinstance(text, tuple)
            if labelled and task.gold_optional and scored:
                _check_columns(place, list(row), ("text", "text_pair", task.gold))
            if labelled and (scored or not task.gold_optional):
                label = _GOLD[task.gold](place, row, text)
        texts.append(text)
        labels.append(label)
    if not texts:
        raise _error("data_empty", f"{path}: no rows", "give a file with rows")
    if labelled and task.gold == "label" and len(set(labels)) == 1:
        raise _error(
            "data_one_class",
            f"{path}: all {len(texts)} rows have the label {labels[0]!r}",
            "give rows of every class",
            allowed="two classes or more",
        )
    if labelled and len({label == "" for label in labels}) > 1:
        raise _error(
            "data_columns", f"{path}: only some rows have a {task.gold}", "label all rows or none"
        )
    return make_rows(texts, labels, path)


def _columns(task: Task, labelled: bool) -> tuple[str, ...]:
    pair = ("text_pair",) if task.pair else ()
    return ("text", *pair, *((task.gold,) if labelled and not task.gold_optional else ()))


def _read_jsonl(
    path: Path, text: str, task: Task, labelled: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = _columns(task, labelled)
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
        tagged = task.gold == "entities" and "tokens" in row and "text" not in row
        needed = ("tokens", "tags")[: 1 + labelled] if tagged else wanted
        _check_columns(f"{path}:{line}", list(row), needed)
        yield line, row


def _read_csv(
    path: Path, text: str, task: Task, labelled: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    return _table(path, _cells(path, text, delimiter=",", strict=True), task, labelled)


def _read_tsv(
    path: Path, text: str, task: Task, labelled: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Quoted as spreadsheets and pandas write it, else with quotes that mean nothing."""
    try:
        rows = list(_cells(path, text, delimiter="\t", strict=True))
    except SampError:
        rows = list(_cells(path, text, delimiter="\t", quoting=csv.QUOTE_NONE))
    return _table(path, rows, task, labelled)


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
    path: Path, rows: Iterable[tuple[int, list[str]]], task: Task, labelled: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = _columns(task, labelled)
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
        if labelled and task.gold in ("labels", "entities"):
            row[task.gold] = _cell_json(f"{path}:{line}", task.gold, row[task.gold])
        elif labelled and row.get(task.gold, "").strip().lower() == "nan":
            row[task.gold] = None
        yield line, row


_READERS: dict[str, Callable[[Path, str, Task, bool], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


def _check_columns(place: str, found: list[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise _error(
            "data_columns",
            f"{place}: no column {' and no '.join(missing)}, found {some(found)}",
            "rename the columns",
            allowed=f"columns {' and '.join(wanted)}",
        )


def _cell_json(place: str, column: str, cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        raise _bad_json(
            f"{place}: {column} is {_show(cell)}", "a JSON list in this column"
        ) from None


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


def _text(place: str, row: Mapping[str, Any], task: Task) -> Text:
    first = _string(place, "text", row["text"])
    if task.gold_optional and "text_pair" in row:
        return first, _string(place, "text_pair", row["text_pair"])
    return (first, _string(place, "text_pair", row["text_pair"])) if task.pair else first


def _string(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _error(
            "data_text",
            f"{place}: {name} is {_show(value)}",
            "make it a string or remove the row",
            allowed="a string",
        )
    if not _is_unicode(value):
        raise _error(
            "data_encoding",
            f"{place}: {name} has an unpaired surrogate",
            "replace the broken character",
            allowed="UTF-8",
        )
    return value


def _label(place: str, row: Mapping[str, Any], text: Text) -> str:
    return _class(place, row["label"])


def _class(place: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip() and _is_unicode(value):
        return value
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    shown = "empty" if empty else _show(value)
    raise _error(
        "data_label",
        f"{place}: label is {shown}",
        "label the row or remove it",
        allowed="a non-empty string or a whole number",
    )


def _labels(place: str, row: Mapping[str, Any], text: Text) -> tuple[str, ...]:
    value = row["labels"]
    if not isinstance(value, list):
        raise _error(
            "data_label", f"{place}: labels is {_show(value)}", "write a list", allowed="a list"
        )
    return tuple(sorted({_class(place, name) for name in value}))


def _score(place: str, row: Mapping[str, Any], text: Text) -> float:
    value = row["score"]
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _error(
            "data_label",
            f"{place}: score is {_show(value)}",
            "score the row or remove it",
            allowed="a finite number",
        )
    return number


def _entities(place: str, row: Mapping[str, Any], text: Text) -> tuple[bio.Span, ...]:
    """Spans of {start, end, label}, sorted; overlapping ones are an error."""
    value = row["entities"]
    spans: list[bio.Span] = []
    for entry in value if isinstance(value, list) else [value]:
        try:
            start, end, label = entry["start"], entry["end"], entry["label"]
            if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise _error(
                "data_label",
                f"{place}: entity {_show(entry)} of a text of {len(text)} characters",
                "correct it",
                allowed="{start, end, label} with 0 <= start < end <= the text's characters",
            ) from None
        spans.append((start, end, _class(place, label)))
    spans.sort()
    for one, other in itertools.pairwise(spans):
        if other[0] < one[1]:
            raise _error(
                "data_label", f"{place}: entities {one} and {other} overlap", "keep one of them",
                allowed="entities that share no character",
            )  # fmt: skip
    return tuple(spans)


def _tagged(place: str, row: Mapping[str, Any], labelled: bool) -> tuple[str, Any]:
    """{tokens, tags} -> the tokens joined by spaces, and the spans that the BIO tags mark."""
    tokens, tags = row["tokens"], row.get("tags")
    if not isinstance(tokens, list) or not tokens:
        raise _error(
            "data_text", f"{place}: tokens is {_show(tokens)}", "write the words", allowed="a list"
        )
    words = [_string(place, "a token", token) for token in tokens]
    if not labelled:
        return " ".join(words), ""
    if not isinstance(tags, list) or len(tags) != len(words):
        count = len(tags) if isinstance(tags, list) else _show(tags)
        raise _error(
            "data_label",
            f"{place}: {len(words)} tokens and tags {count}",
            "tag every token",
            allowed="one tag for each token",
        )
    ends: list[int] = []
    for word in words:
        ends.append((ends[-1] + 1 if ends else 0) + len(word))
    names = [_class(place, tag) for tag in tags]
    spans = [
        (ends[first] - len(words[first]), ends[last], label)
        for first, last, label in bio.groups(names)
    ]
    return " ".join(words), tuple(span for span in spans if span[0] < span[1])


_GOLD: Mapping[str, Callable[[str, Mapping[str, Any], Text], Any]] = {
    "label": _label,
    "labels": _labels,
    "score": _score,
    "entities": _entities,
}


def _is_unicode(text: str) -> bool:
    """False if the text has an unpaired surrogate, which JSON escapes can make."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _error(code: str, given: str, fix: str, allowed: str = "columns text and label") -> SampError:
    return SampError(code, given, allowed, fix)


def _bad_json(given: str, allowed: str = "one JSON object per line") -> SampError:
    return _error("data_json", given, "mend the line", allowed=allowed)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def some(names: Sequence[str]) -> str:
    """The first ten names, quoted."""
    shown = ", ".join(map(repr, names[:10]))
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
