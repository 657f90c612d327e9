"""A mix of requests read from a sample of texts: the shapes to measure, and how often each comes.

`mix: texts.jsonl` names rows {"text": ..., "text_pair"?: ..., "batch"?: 8}, or a .txt a line each;
`batch` is how many texts come in one request with it, 1 where a row does not say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.interface import pack_batch

from samp_core import latency
from samp_core.errors import UsageError
from samp_core.latency import Bucket
from samp_core.rows import Text
from samp_core.text import Encoding

MOST = 64
PARTS = 3
"""Requests of one text are shared among so many lengths: short, middling, long."""


@dataclass(frozen=True)
class Mix:
    """The buckets of a sample, and the share of requests of each; shares add up to 1."""

    buckets: tuple[Bucket, ...]
    shares: Mapping[str, float]


def read_sample(path: Path) -> list[tuple[Text, int]]:
    """(text or pair, batch) of every row. Raises UsageError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _bad(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _bad(f"{path}: no UTF-8 at byte {error.start}") from None
    if path.suffix not in (".jsonl", ".txt"):
        raise _bad(f"{path}: extension {path.suffix!r}")
    found: list[tuple[Text, int]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append((line, 1) if path.suffix == ".txt" else _row(f"{path}:{number}", line))
    if not found:
        raise _bad(f"{path}: no texts")
    if len({isinstance(text, tuple) for text, _ in found}) > 1:
        raise _bad(f"{path}: only some rows have a text_pair")
    return found


def mix_of(encodings: Sequence[Encoding], batches: Sequence[int], position_offset: int = 0) -> Mix:
    """Shapes and shares of a sample; batch sizes are rounded to powers of two.

    A shape is named by its texts and tokens, `8x211`. n rows of batch b are n / b requests, of
    texts spread evenly over the lengths of those rows.
    """
    sizes = np.array([2 ** round(log2(batch)) for batch in batches])
    shapes: dict[str, Bucket] = {}
    weights: dict[str, float] = {}
    for size in np.unique(sizes).tolist():
        places = np.flatnonzero(sizes == size).tolist()
        ordered = sorted((encodings[i] for i in places), key=lambda e: len(e.ids))
        for part in np.array_split(np.arange(len(ordered)), PARTS if size == 1 else 1):
            if not len(part):
                continue
            spread = part[((np.arange(size) + 0.5) / size * len(part)).astype(int)]
            chosen = [ordered[i] for i in spread.tolist()]
            batch = pack_batch(
                [e.ids for e in chosen], [e.types for e in chosen], position_offset=position_offset
            )
            name = f"{size}x{batch.tokens}"
            shapes[name] = Bucket(name, batch, latency.rounds(size))
            weights[name] = weights.get(name, 0.0) + len(part) / size
    total = sum(weights.values())
    return Mix(tuple(shapes.values()), {name: w / total for name, w in weights.items()})


def _row(place: str, line: str) -> tuple[Text, int]:
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise _bad(f"{place}: it is not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise _bad(f"{place}: no text")
    batch, other = row.get("batch", 1), row.get("text_pair")
    if type(batch) is not int or not 1 <= batch <= MOST:
        raise _bad(f"{place}: batch {batch!r}")
    if other is not None and not isinstance(other, str):
        raise _bad(f"{place}: text_pair {other!r}")
    return (row["text"] if other is None else (row["text"], other)), batch


def _bad(given: str) -> UsageError:
    return UsageError(
        "bad_mix",
        given,
        f'a .txt of one text a line, or .jsonl of {{"text", "batch": 1 to {MOST}}}',
        "correct it, or weigh batch sizes: mix: {1: 3, 32: 1}",
    )
