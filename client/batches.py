"""Texts in, request-sized groups of UTF-8 rows out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from samp_client.errors import BadRequest
from samp_client.records import Row

MAX_ROWS = 64
# Far below gRPC's 2 GiB and the 64 MiB body limit of newer Triton HTTP front ends.
MAX_BYTES = 16 * 2**20


def encode_texts(texts: Iterable[str | bytes], first: int = 0) -> list[bytes]:
    """UTF-8 of every text; bytes pass as they are, the server judges them.

    BadRequest names the first text that is neither str nor bytes, or has a lone surrogate;
    they are counted from `first`.
    """
    if isinstance(texts, (str, bytes)):
        raise BadRequest(
            f"texts is one {type(texts).__name__}", "a list of texts", "write predict([text])"
        )
    rows: list[bytes] = []
    for index, text in enumerate(texts, first):
        if isinstance(text, bytes):
            rows.append(text)
        elif isinstance(text, str):
            try:
                rows.append(text.encode())
            except UnicodeEncodeError as error:
                raise BadRequest(
                    f"text {index} has a lone surrogate at character {error.start}",
                    "text that UTF-8 can carry",
                    "decode the source as UTF-8, or with errors='replace'",
                ) from None
        else:
            raise BadRequest(
                f"text {index} is {type(text).__name__}", "str, or bytes of UTF-8", "convert it"
            )
    return rows


def encode_rows(rows: Iterable[Row], columns: int, first: int = 0) -> list[tuple[bytes, ...]]:
    """UTF-8 of every row: of a text, or of both texts of a pair.

    BadRequest names the first row that is not what the tier takes; they are counted from `first`.
    """
    if columns == 1:
        return [(text,) for text in encode_texts(rows, first)]  # type: ignore[arg-type]
    if isinstance(rows, (str, bytes)):
        raise BadRequest("texts is one text", "a list of pairs", "write predict([(text, pair)])")
    encoded: list[tuple[bytes, ...]] = []
    for index, row in enumerate(rows, first):
        if isinstance(row, (str, bytes)) or not isinstance(row, Sequence) or len(row) != columns:
            kind = type(row).__name__
            raise BadRequest(
                f"text {index} is {kind}", "(text, text_pair)", "give two texts for each row"
            )
        parts: list[Any] = list(row)
        encoded.append(tuple(text for part in parts for text in encode_texts([part], index)))
    return encoded


def split(
    rows: Sequence[bytes | tuple[bytes, ...]],
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
) -> list[range]:
    """Consecutive index ranges of at most max_rows rows and, where possible, max_bytes bytes.

    A row that is larger than max_bytes by itself gets a range of its own.
    """
    if max_rows < 1 or max_bytes < 1:
        raise ValueError(f"expected limits >= 1, got {max_rows} rows, {max_bytes} bytes")
    groups: list[range] = []
    start = size = 0
    for index, row in enumerate(rows):
        width = len(row) if isinstance(row, bytes) else sum(len(part) for part in row)
        if index > start and (index - start == max_rows or size + width > max_bytes):
            groups.append(range(start, index))
            start, size = index, 0
        size += width
    if start < len(rows):
        groups.append(range(start, len(rows)))
    return groups
