"""What `samp predict` asks: texts or pairs from arguments, a file or standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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
