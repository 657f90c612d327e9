"""Texts in as they come, answers out in their order, and no more in memory than is in flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import TYPE_CHECKING

from samp_client import batches
from samp_client.records import Outcome, Row, rough
from samp_client.session import most_rows

if TYPE_CHECKING:
    from samp_client.aio import AsyncClient

# Answered groups wait for the one before them; twice as many as are asked at once is enough for
# one slow request not to stop the others.
_WINDOW = 2
# How long a source that gave None, and cannot be awaited, is left alone.
_PAUSE_S = 0.005


async def stream(
    client: AsyncClient,
    texts: Iterable[Row | None] | AsyncIterable[Row | None],
    tier: str | None,
    timeout_s: float | None,
    rows: int | None,
    total_s: float | None,
    first: int,
) -> AsyncIterator[Outcome]:
    """See `AsyncClient.stream`."""
    if isinstance(texts, (str, bytes)):
        batches.encode_texts(texts)  # raises
    clock = None if total_s is None else client._session.clock(total_s)
    info = await client.describe(tier, timeout_s)
    most = most_rows(info, rows)
    places = asyncio.Semaphore(_WINDOW * client.concurrency)
    # A group's answers, or None after the last.
    queue: asyncio.Queue[asyncio.Task[list[Outcome]] | None] = asyncio.Queue()
    under_way: set[asyncio.Task[list[Outcome]]] = set()

    async def produce() -> None:
        start = first
        try:
            async for group in _groups(texts, most):
                await places.acquire()
                task = asyncio.ensure_future(client.outcomes(group, tier, start, timeout_s))
                under_way.add(task)
                queue.put_nowait(task)
                start += len(group)
        finally:
            queue.put_nowait(None)

    producer = asyncio.ensure_future(produce())

    async def next_group() -> list[Outcome] | None:
        task = await queue.get()
        if task is None:
            await producer  # raises what the source raised
            return None
        found = await task
        under_way.discard(task)
        places.release()
        return found

    try:
        while True:
            reading = asyncio.ensure_future(next_group())
            try:
                await asyncio.wait({reading}, timeout=None if clock is None else clock.left())
                if clock is not None and not reading.done():
                    raise clock.over()
            finally:
                reading.cancel()
            group = await reading
            if group is None:
                return
            for outcome in group:
                yield outcome
    finally:
        for one in (producer, *under_way):
            one.cancel()
        await asyncio.gather(producer, *under_way, return_exceptions=True)


async def _groups(
    texts: Iterable[Row | None] | AsyncIterable[Row | None], most: int
) -> AsyncIterator[list[Row]]:
    """Consecutive groups of at most `most` rows and about batches.MAX_BYTES bytes."""
    group: list[Row] = []
    size = 0
    failure: Exception | None = None
    source = _rows(texts)
    try:
        while True:
            try:
                row = await source.__anext__()
            except StopAsyncIteration:
                break
            except Exception as error:  # what came before it is still answered
                failure = error
                break
            width = 0 if row is None else len(rough(row))
            if group and (row is None or size + width > batches.MAX_BYTES):
                yield group
                group, size = [], 0
            if row is None:  # the source pauses
                continue
            group.append(row)
            size += width
            if len(group) == most:
                yield group
                group, size = [], 0
        if group:
            yield group
        if failure is not None:
            raise failure
    finally:
        await source.aclose()  # type: ignore[attr-defined]


async def _rows(
    texts: Iterable[Row | None] | AsyncIterable[Row | None],
) -> AsyncIterator[Row | None]:
    """Each row, and None each time that an asynchronous source makes us wait."""
    if not isinstance(texts, AsyncIterable):
        for row in texts:
            yield row
            if row is None:
                await asyncio.sleep(_PAUSE_S)
        return
    source = texts.__aiter__()
    while True:
        # A task, so that the wait can be noticed without breaking into the source.
        coming = asyncio.ensure_future(_next(source))
        try:
            await asyncio.sleep(0)
            if not coming.done():
                await asyncio.sleep(0)
            if not coming.done():
                yield None
            found = await coming
        except BaseException:
            coming.cancel()
            with contextlib.suppress(BaseException):
                await coming
            raise
        if found is None:
            return
        yield found[0]


async def _next(source: AsyncIterator[Row | None]) -> tuple[Row | None] | None:
    """The next row, alone in a tuple: a StopAsyncIteration cannot pass through a task."""
    try:
        return (await source.__anext__(),)
    except StopAsyncIteration:
        return None
