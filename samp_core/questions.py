"""What `samp predict` asks: texts or pairs from arguments, a file or standard input."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from samp_core.errors import SampError, UsageError
from samp_core.rows import Text, read_rows
from samp_core.tasks import TASKS


def read(
    texts: Sequence[str] | None, pair: Sequence[str] | None, file: Path | None
) -> Iterator[Text]:
    """The rows of the arguments, the file or standard input; mistakes are found at once."""
    if texts and file is not None:
        raise UsageError("usage", "texts and --in", "one of them", "drop one")
    if pair and len(pair) != len(texts or ()):
        given = f"{len(texts or ())} texts and {len(pair)} --pair"
        raise UsageError("usage", given, "one --pair for each text", "give as many")
    if file is not None:
        return iter(_rows(file))
    # Bytes that are no UTF-8 arrive in arguments as lone surrogates.
    if texts:
        first = _utf8(map(os.fsencode, texts), "text")
        return zip(first, _utf8(map(os.fsencode, pair), "pair"), strict=True) if pair else first
    return _utf8(sys.stdin.buffer, "line")


def fit(row: Text, columns: int) -> Text:
    """A row as the tier takes it: of a line for a pair, the second text stands after a tab."""
    if columns == 1:
        return row if isinstance(row, str) else row[0]
    if isinstance(row, str) and row.count("\t") == 1:
        first, second = row.split("\t")
        return first, second
    return row


def chunks(values: Iterator[Text], size: int) -> Iterator[tuple[int, list[Text]]]:
    """Up to `size` rows at a time, each time with the number of rows before them."""
    start = 0
    chunk: list[Text] = []
    for value in values:
        chunk.append(value)
        if len(chunk) == size:
            yield start, chunk
            start += size
            chunk = []
    if chunk:
        yield start, chunk


def rows_of(path: Path, skip: int = 0) -> Iterator[Text | SampError]:
    """The rows of a jsonl, csv or tsv file of any length, one at a time, or what is wrong there.

    The first `skip` rows are passed over, of jsonl without reading what they hold.
    Raises only what concerns the whole file: no such file, no column `text`, quotes that never
    end. Blank lines are no rows, as in rows.read_rows.
    """
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".csv", ".tsv"):
        raise SampError(
            "data_format", f"{path}: unknown extension {path.suffix!r}", ".jsonl, .csv, .tsv",
            "rename or convert the file",
        )  # fmt: skip
    try:
        if ending == ".jsonl":
            yield from _json_rows(path, skip)
        else:
            yield from islice(_table_rows(path, "," if ending == ".csv" else "\t"), skip, None)
    except OSError as error:
        raise SampError(
            "data_file", f"{path}: {error.strerror}", "a file of rows", "check the path"
        ) from None


def count_rows(path: Path) -> int:
    """How many rows `rows_of` will give."""
    if path.suffix.lower() != ".jsonl":
        return sum(1 for _ in rows_of(path))
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip(_BLANK))


_BLANK = b" \t\r\n\x0b\x0c\xef\xbb\xbf"


def _json_rows(path: Path, skip: int) -> Iterator[Text | SampError]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip(_BLANK):
                continue
            if skip:
                skip -= 1
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                byte = line[error.start]
                yield _bad(place, "data_encoding", f"byte {byte:#04x} is not UTF-8", "UTF-8")
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", str(error))
                yield _bad(place, "data_json", why, "one JSON object per line")
            else:
                yield _text(place, row)


def _table_rows(path: Path, delimiter: str) -> Iterator[Text | SampError]:
    """Quotes mean what they do in csv; in tsv nothing, where they do not add up."""
    strict: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    if delimiter == "\t":
        try:
            for _ in _cells(path, **strict):
                pass
        except csv.Error:
            strict = {"delimiter": delimiter, "quoting": csv.QUOTE_NONE}
    names: list[str] | None = None
    try:
        for number, cells in _cells(path, **strict):
            place = f"{path}:{number}"
            if names is None:
                names = cells
                if "text" not in names:
                    given = f"no column text, found {', '.join(names[:10])}"
                    raise _bad(place, "data_columns", given, "a column text")
            elif len(cells) != len(names):
                given = f"{len(cells)} cells and {len(names)} columns"
                yield _bad(place, "data_csv", given, "a cell for each column")
            else:
                yield _text(place, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise _bad(str(path), "data_csv", str(error), "quotes in pairs") from None


def _cells(path: Path, **dialect: Any) -> Iterator[tuple[int, list[str]]]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # What is no UTF-8 becomes lone surrogates, which `_text` finds in their row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, **dialect)
            start = 1
            for cells in reader:
                if cells:
                    yield start, cells
                start = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _text(place: str, row: Any) -> Text | SampError:
    """{text, text_pair?}, or {tokens} joined by spaces."""
    if not isinstance(row, Mapping):
        return _bad(place, "data_json", f"a {type(row).__name__}", "one JSON object per line")
    tokens = row.get("tokens")
    if "text" in row:
        parts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
    elif isinstance(tokens, list) and all(isinstance(word, str) for word in tokens):
        parts = [" ".join(tokens)]
    else:
        return _bad(place, "data_columns", "no column text", "a column text")
    for part in parts:
        if not isinstance(part, str):
            return _bad(place, "data_text", f"a text is {type(part).__name__}", "a string")
        try:
            part.encode()
        except UnicodeEncodeError:
            return _bad(place, "data_encoding", "a text is not Unicode", "UTF-8")
    return (parts[0], parts[1]) if len(parts) == 2 else str(parts[0])


def _bad(place: str, code: str, given: str, allowed: str) -> SampError:
    return SampError(code, f"{place}: {given}", allowed, "mend the row or remove it")


def _rows(file: Path) -> Sequence[Text]:
    """Pairs where the file has both columns, else texts, or tokens joined by spaces."""
    try:
        return read_rows(file, labelled=False, task=TASKS["pairs"]).texts
    except SampError as error:
        if error.code != "data_columns":
            raise
    return read_rows(file, labelled=False, task=TASKS["entities"]).texts


def _utf8(values: Iterable[bytes], kind: str) -> Iterator[str]:
    for place, value in enumerate(values, start=1):
        try:
            yield value.decode().rstrip("\r\n" if kind == "line" else "")
        except UnicodeDecodeError as error:
            given = f"{kind} {place}: byte {value[error.start]:#04x} is not UTF-8"
            raise UsageError("data_encoding", given, "UTF-8", "convert it") from None
