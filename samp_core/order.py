"""The rows of a packed batch in another order or number, and back: results never depend on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from samp_kernels.interface import F32, Array, Batch, OutputKind


def sort_by_length(batch: Batch) -> tuple[Batch, Array | None]:
    """The same sequences, equal lengths side by side; `order` gives each one's old place."""
    lengths = np.diff(batch.cu_seqlens)
    if len(lengths) == 1 or bool((lengths[1:] >= lengths[:-1]).all()):
        return batch, None
    order = np.argsort(lengths, kind="stable")
    rows = np.concatenate(
        [np.arange(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in order.tolist()]
    )
    cu_seqlens = np.zeros_like(batch.cu_seqlens)
    np.cumsum(lengths[order], out=cu_seqlens[1:])
    return (
        Batch(
            batch.ids[rows],
            batch.types[rows],
            batch.positions[rows],
            cu_seqlens,
            batch.max_seqlen,
        ),
        order,
    )


def round_up(batch: Batch, tokens: int) -> Batch:
    """The same sequences with rows of id 0 behind them, which belong to none and are never read."""
    extra = tokens - batch.tokens
    if extra <= 0:
        return batch
    ids, types, positions = (
        np.concatenate([x, np.zeros(extra, x.dtype)])
        for x in (batch.ids, batch.types, batch.positions)
    )
    return replace(batch, ids=ids, types=types, positions=positions)


def restore_order(y: F32, cu_seqlens: Array, order: Array | None, output: OutputKind) -> F32:
    """Undo sort_by_length on pooled rows [B, H] or on tokens [T, H]."""
    if order is None:
        return y
    if output != "tokens":
        restored = np.empty_like(y)
        restored[order] = y
        return restored
    pieces: list[F32] = [y[:0]] * len(order)
    for place, old in enumerate(order.tolist()):
        pieces[old] = y[cu_seqlens[place] : cu_seqlens[place + 1]]
    return np.concatenate(pieces)
