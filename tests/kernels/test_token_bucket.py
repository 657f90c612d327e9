"""Flat runs are rounded up for oneDNN; the rows added change no answer and reach no output."""

from __future__ import annotations

import numpy as np
import pytest
from samp_kernels.interface import Batch, pack_batch
from samp_kernels.onednn import OneDnnBackend

from samp_core.order import round_up


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 80, 81, 512, 513, 4096])
def test_buckets_are_few_and_near(tokens: int) -> None:
    bucket = OneDnnBackend().token_bucket(tokens)
    assert tokens <= bucket <= tokens * 1.25
    assert OneDnnBackend().token_bucket(bucket) == bucket


def test_all_lengths_of_a_server_fit_the_primitive_cache() -> None:
    """Four GEMMs a bucket, and up to 64 pooled rows for the last layer's three."""
    backend = OneDnnBackend()
    buckets = {backend.token_bucket(tokens) for tokens in range(1, 4097)}
    assert 4 * len(buckets) + 3 * 64 <= 1024


def batch(lengths: list[int]) -> Batch:
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    return pack_batch(ids, [np.zeros(n, np.int32) for n in lengths])


def test_rows_are_added_behind_the_sequences() -> None:
    rounded = round_up(batch([3, 5]), 16)
    assert rounded.tokens == 16
    np.testing.assert_array_equal(rounded.cu_seqlens, [0, 3, 8])
    assert not rounded.ids[8:].any()
    assert round_up(rounded, 16) is rounded
