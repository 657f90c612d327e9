"""The client to await: the same calls and answers as api.py, many requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from samp_client import errors
from samp_client.api import DEFAULT_TIMEOUT_S, check_target
from samp_client.discovery import TierInfo
from samp_client.records import (
    Answer,
    EmbeddingPrediction,
    EntityPrediction,
    LabelsPrediction,
    Outcome,
    Prediction,
    Row,
    ScorePrediction,
    Text,
)
from samp_client.retry import Retry
from samp_client.security import Tls
from samp_client.server_times import Counters, TierTimes, read_counters, tier_times
from samp_client.session import Clock, Pause, Session, Steps, listed
from samp_client.stream import stream
from samp_client.transport import AsyncTransport, ProtocolName

if TYPE_CHECKING:
    from samp_client.session import Ask

DEFAULT_CONCURRENCY = 16
_Result = TypeVar("_Result")


def connect_async(
    url: str,
    protocol: ProtocolName = "grpc",
    *,
    model: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    request_timeout_s: float | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
    retry: Retry | None = None,
    tls: Tls | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncClient:
    """As `connect`, to await. concurrency: most requests of this client under way at any time."""
    address, sent = check_target(url, protocol, tls, headers)
    if tls is not None:
        tls.read()  # the first call would find it; here it is found at once
    if concurrency < 1:
        raise errors.BadRequest(f"concurrency {concurrency}", "1 or more", "correct it")
    session = Session(
        f"{address} over {protocol}",
        model=model,
        timeout_s=timeout_s,
        request_timeout_s=request_timeout_s,
        retry=retry,
    )
    return AsyncClient(session, protocol, address, sent, tls, concurrency)


class AsyncClient:
    """Calls one model's tiers; made by `connect_async`, closed by `close` or an async with block.

    For one event loop, which the first call chooses. A call that is cancelled takes its requests
    with it, and the client goes on. Errors are those of `Client`.
    """

    def __init__(
        self,
        session: Session,
        protocol: ProtocolName,
        address: str,
        headers: Mapping[str, str],
        tls: Tls | None,
        concurrency: int,
    ) -> None:
        self._session = session
        self._protocol = protocol
        self._address = address
        self._headers = headers
        self._tls = tls
        self.concurrency = concurrency
        # Both belong to an event loop, so the first call makes them.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: AsyncTransport | None = None
        self._places = asyncio.Semaphore(concurrency)
        self._reading = asyncio.Lock()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Requests that are under way fail."""
        self._session.closed = True
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    async def model(self, timeout_s: float | None = None) -> str:
        """The name of the model that this client calls."""
        clock = self._session.clock(timeout_s)
        if self._session.model is None:
            await self._drive(self._session.discover(clock), clock)
        return str(self._session.model)

    async def tiers(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """The tiers that the server has loaded now, sorted."""
        clock = self._session.clock(timeout_s)
        await self._drive(self._session.discover(clock), clock)
        return self._session.tiers

    async def labels(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Class names in the order of `Prediction.scores`."""
        clock = self._session.clock(timeout_s)
        return await self._drive(self._session.labels(clock), clock)

    async def describe(self, tier: str | None = None, timeout_s: float | None = None) -> TierInfo:
        """A tier's ensemble, its steps and the most rows of one request. UnknownTier."""
        return await self._begin(tier, self._session.clock(timeout_s))

    async def predict(
        self,
        texts: Iterable[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[Prediction]:
        """As `Client.predict`; requests of one call are sent together, `concurrency` at a time."""
        return await self._call("classification", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    async def entities(
        self,
        texts: Iterable[Text],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[EntityPrediction]:
        """The entities of each text, as `predict`."""
        return await self._call("entities", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    async def active(
        self,
        texts: Iterable[Text],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[LabelsPrediction]:
        """All classes that hold for each text (multi-label), as `predict`."""
        return await self._call("multi-label", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    async def scores(
        self,
        texts: Iterable[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[ScorePrediction]:
        """The score of each text or pair (regression, reranking), as `predict`."""
        return await self._call("regression", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    async def embed(
        self,
        texts: Iterable[Text],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[EmbeddingPrediction]:
        """The vector of each text, as `predict`."""
        return await self._call("embedding", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    async def answers(
        self,
        texts: Iterable[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[Answer]:
        """Whatever the tier's task answers to each text, as `predict`."""
        return await self._call(None, texts, tier, timeout_s, rows)

    def stream(
        self,
        texts: Iterable[Row | None] | AsyncIterable[Row | None],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
        *,
        total_s: float | None = None,
        first: int = 0,
    ) -> AsyncIterator[Outcome]:
        """Each text's answer or error, in the order of the texts, which need never end.

        At most twice `concurrency` requests of texts are held at a time: a slow reader slows the
        source down. When an asynchronous source pauses, or any gives None, what has come so far
        is sent. timeout_s: for each request; total_s: for all of it, DeadlineExceeded; first: the
        index of the first text.
        Wrap it in contextlib.aclosing where you may stop before its end.
        """
        return stream(self, texts, tier, timeout_s, rows, total_s, first)

    async def outcomes(
        self, texts: Sequence[Row], tier: str | None, first: int, timeout_s: float | None
    ) -> list[Outcome]:
        """Each text's answer or error, counted from `first`, in one request if it may be."""
        clock = self._session.clock(timeout_s)
        info = await self._begin(tier, clock)
        return await self._drive(self._session.outcomes(info, texts, first, timeout_s), None)

    async def statistics(self, timeout_s: float | None = None) -> dict[str, Counters]:
        """Triton's counters of every loaded model; two readings make `server_times`."""
        clock = self._session.clock(timeout_s)
        return read_counters(await self._drive(self._session.ask(clock, "statistics"), clock))

    async def server_times(
        self, tier: str, before: Mapping[str, Counters], after: Mapping[str, Counters]
    ) -> TierTimes:
        """Mean queue and compute milliseconds of a tier's steps between two `statistics`."""
        return tier_times(tier, (await self.describe(tier)).steps, before, after)

    async def _begin(self, tier: str | None, clock: Clock) -> TierInfo:
        if not self._session.known(tier):
            async with self._reading:  # many first calls at once read the metadata once
                return await self._drive(self._session.begin(tier, clock), clock)
        return await self._drive(self._session.begin(tier, clock), clock)

    async def _call(
        self,
        kind: str | None,
        texts: Iterable[Row],
        tier: str | None,
        timeout_s: float | None,
        rows: int | None,
    ) -> list[Answer]:
        clock = self._session.clock(timeout_s)
        given = listed(texts)
        if not given:
            return []
        info = await self._begin(tier, clock)
        encoded, groups = self._session.groups(info, kind, given, rows)
        requests = [
            self._drive(self._session.request(info, encoded, group, clock), clock)
            for group in groups
        ]
        return [answer for found in await together(requests) for answer in found]

    async def _drive(self, steps: Steps[_Result], clock: Clock | None) -> _Result:
        """Do what an operation asks for until it returns; `clock` also bounds the wait for a place.

        None: each request of the operation has a clock of its own, which starts with a place.
        """
        try:
            step = next(steps)
            while True:
                try:
                    reply = await self._do(step, clock)
                except errors.ClientError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            found: _Result = end.value
            return found

    async def _do(self, step: Ask | Pause, clock: Clock | None) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        transport = self._opened()
        async with self._place(clock):
            left = step.timeout_s if clock is None else min(step.timeout_s, clock.left())
            return await getattr(transport, step.method)(*step.arguments, left)

    @contextlib.asynccontextmanager
    async def _place(self, clock: Clock | None) -> AsyncIterator[None]:
        """One of the `concurrency` places. DeadlineExceeded if none came free in time."""
        if clock is None or not self._places.locked():
            await self._places.acquire()
        else:
            # Not wait_for: cancelled at the wrong moment it would keep the place for ever.
            waiting = asyncio.ensure_future(self._places.acquire())
            try:
                await asyncio.wait({waiting}, timeout=clock.left())
            except BaseException:
                if not waiting.cancel():  # it has the place
                    self._places.release()
                raise
            if waiting.cancel():
                raise clock.over()
        try:
            yield
        finally:
            self._places.release()

    def _opened(self) -> AsyncTransport:
        if self._session.closed:
            raise errors.BadRequest("the client is closed", fix="connect again")
        loop = asyncio.get_running_loop()
        if self._transport is None:
            self._loop = loop
            if self._protocol == "grpc":
                from samp_client.grpc_aio import GrpcAioTransport

                self._transport = GrpcAioTransport(
                    self._address, headers=self._headers, tls=self._tls
                )
            else:
                from samp_client.http_aio import HttpAioTransport

                self._transport = HttpAioTransport(
                    self._address, headers=self._headers, connections=self.concurrency
                )
        if loop is not self._loop:
            raise errors.BadRequest(
                "the client is used on another event loop",
                "the loop of its first call",
                "connect once for each loop",
            )
        return self._transport


async def together(work: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """All results; when one fails, or this is cancelled, the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
