"""Texts in, request-sized groups of UTF-8 rows out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from samp_client.errors import BadRequest

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


def split(
    rows: Sequence[bytes], max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES
) -> list[range]:
    """Consecutive index ranges of at most max_rows rows and, where possible, max_bytes bytes.

    A row that is larger than max_bytes by itself gets a range of its own.
    """
    if max_rows < 1 or max_bytes < 1:
        raise ValueError(f"expected limits >= 1, got {max_rows} rows, {max_bytes} bytes")
    groups: list[range] = []
    start = size = 0
    for index, row in enumerate(rows):
        if index > start and (index - start == max_rows or size + len(row) > max_bytes):
            groups.append(range(start, index))
            start, size = index, 0
        size += len(row)
    if start < len(rows):
        groups.append(range(start, len(rows)))
    return groups
