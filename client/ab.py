"""The same texts to two tiers, one by one: the raw records of an A/B comparison."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from samp_client.errors import BadRequest, ClientError
from samp_client.records import ABRecord, Row, record_of

if TYPE_CHECKING:
    from samp_client.api import Client

WARMUP = 8

Progress = Callable[[int, int], None]


def collect(
    client: Client,
    texts: Sequence[Row],
    control: str,
    candidate: str,
    *,
    seed: int = 0,
    warmup: int = WARMUP,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> list[ABRecord]:
    """Two records per text, in the order of sending; `id` is the text's place in `texts`.

    Each text goes to both arms in direct succession, so that what else the machine does meets both
    alike; which arm is first is drawn by `seed`, for half of the texts each. The first `warmup`
    texts are sent once before, unrecorded. A failing request becomes a record with its error.
    progress: called with the texts done and all texts. BadRequest for one tier twice; UnknownTier
    and Unavailable before anything is sent.
    """
    if control == candidate:
        raise BadRequest(f"both arms are {control!r}", "two different tiers", "name another tier")
    for tier in (control, candidate):
        client.describe(tier, timeout_s)
    for text in texts[:warmup]:
        for tier in (control, candidate):
            _ask(client, "", text, tier, timeout_s)
    control_first = [index % 2 == 0 for index in range(len(texts))]
    random.Random(seed).shuffle(control_first)
    records: list[ABRecord] = []
    for index, text in enumerate(texts):
        order = (control, candidate) if control_first[index] else (candidate, control)
        records += [_ask(client, str(index), text, tier, timeout_s) for tier in order]
        if progress is not None:
            progress(index + 1, len(texts))
    return records


def _ask(client: Client, name: str, text: Row, tier: str, timeout_s: float | None) -> ABRecord:
    start = time.perf_counter()
    try:
        (answer,) = client.answers([text], tier, timeout_s)
    except ClientError as error:
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return ABRecord(name, tier, None, None, elapsed_ms, str(error))
    return record_of(name, tier, answer, (time.perf_counter() - start) * 1e3)
