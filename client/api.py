"""The client: one surface over gRPC and HTTP. aio.py has the same to await."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from samp_client import ab, batches, errors
from samp_client.discovery import TierInfo
from samp_client.records import (
    ABRecord,
    Answer,
    EmbeddingPrediction,
    EntityPrediction,
    LabelsPrediction,
    Outcome,
    Prediction,
    Row,
    ScorePrediction,
    Text,
    rough,
)
from samp_client.retry import Retry
from samp_client.security import Tls, check_headers
from samp_client.server_times import Counters, TierTimes, read_counters, tier_times
from samp_client.session import DEFAULT_TIER as DEFAULT_TIER
from samp_client.session import Pause, Session, Steps, most_rows
from samp_client.transport import ProtocolName, Transport, parse_address

if TYPE_CHECKING:
    from samp_client.session import Ask

DEFAULT_TIMEOUT_S = 30.0


def connect(
    url: str,
    protocol: ProtocolName = "grpc",
    *,
    model: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    request_timeout_s: float | None = None,
    retry: Retry | None = None,
    tls: Tls | None = None,
    headers: Mapping[str, str] | None = None,
) -> Client:
    """A client of the Triton at `url` ("host:port"); nothing is sent yet.

    model: needed only where the server has several; timeout_s: for each later call as a whole,
    unless it names its own; request_timeout_s: for each single request of it. retry: by default
    nothing is sent twice. tls: certificates, gRPC only; headers: sent with every request.
    BadRequest for a malformed address, an unknown protocol, or files that are none.
    """
    address, sent = check_target(url, protocol, tls, headers)
    name = f"{address} over {protocol}"
    session = Session(
        name, model=model, timeout_s=timeout_s, request_timeout_s=request_timeout_s, retry=retry
    )
    transport: Transport
    # Imported here: each costs a tenth of a second and more, and a program needs only one.
    if protocol == "grpc":
        from samp_client.grpc_transport import GrpcTransport

        transport = GrpcTransport(address, headers=sent, tls=tls)
    else:
        from samp_client.http_transport import HttpTransport

        transport = HttpTransport(address, headers=sent)
    return Client(transport, session)


class Client:
    """Calls one model's tiers; made by `connect`, closed by `close` or a with block.

    Every call raises a ClientError: UserError where the request is wrong, ServerError where the
    server or the way to it is. Over HTTP a client belongs to one thread.
    """

    def __init__(self, transport: Transport, session: Session) -> None:
        self._transport = transport
        self._session = session

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._session.closed:
            self._session.closed = True
            self._transport.close()

    def model(self, timeout_s: float | None = None) -> str:
        """The name of the model that this client calls."""
        clock = self._session.clock(timeout_s)
        if self._session.model is None:
            self._drive(self._session.discover(clock))
        return str(self._session.model)

    def tiers(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """The tiers that the server has loaded now, sorted."""
        self._drive(self._session.discover(self._session.clock(timeout_s)))
        return self._session.tiers

    def labels(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Class names in the order of `Prediction.scores`."""
        found: tuple[str, ...] = self._drive(self._session.labels(self._session.clock(timeout_s)))
        return found

    def describe(self, tier: str | None = None, timeout_s: float | None = None) -> TierInfo:
        """A tier's ensemble, its steps and the most rows of one request. UnknownTier."""
        found: TierInfo = self._drive(self._session.info(tier, self._session.clock(timeout_s)))
        return found

    def predict(
        self,
        texts: Iterable[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[Prediction]:
        """One class per text, or per pair (text, text_pair), in their order.

        timeout_s: for the whole call; rows: texts per request, by default as many as the tier
        takes (64). The first failing request raises; `outcomes` goes on instead. A tier of
        another task is a BadRequest that names its call.
        """
        return self._call("classification", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    def entities(
        self,
        texts: Iterable[Text],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[EntityPrediction]:
        """The entities of each text, as `predict`."""
        return self._call("entities", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    def active(
        self,
        texts: Iterable[Text],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[LabelsPrediction]:
        """All classes that hold for each text (multi-label), as `predict`."""
        return self._call("multi-label", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    def scores(
        self,
        texts: Iterable[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[ScorePrediction]:
        """The score of each text or pair (regression, reranking), as `predict`."""
        return self._call("regression", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    def embed(
        self,
        texts: Iterable[Text],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[EmbeddingPrediction]:
        """The vector of each text, as `predict`."""
        return self._call("embedding", texts, tier, timeout_s, rows)  # type: ignore[return-value]

    def answers(
        self,
        texts: Iterable[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> list[Answer]:
        """Whatever the tier's task answers to each text, as `predict`."""
        return self._call(None, texts, tier, timeout_s, rows)

    def outcomes(
        self,
        texts: Sequence[Row],
        tier: str | None = None,
        timeout_s: float | None = None,
        rows: int | None = None,
    ) -> Iterator[Outcome]:
        """Each text's prediction or error, in order, as requests are answered.

        Where the server refuses a request of several texts, they are sent again one by one, so
        that only the bad ones fail. timeout_s: for each request. Raises only what concerns no
        single text: an unknown tier, a server that is away from the start.
        """
        session = self._session
        info = self._drive(session.info(tier, session.clock(timeout_s)))
        sizes = [rough(text) for text in texts]
        for group in batches.split(sizes, most_rows(info, rows)):
            chosen = texts[group.start : group.stop]
            yield from self._drive(session.outcomes(info, chosen, group.start, timeout_s))

    def compare(
        self,
        texts: Sequence[Row],
        control: str,
        candidate: str,
        *,
        seed: int = 0,
        warmup: int = ab.WARMUP,
        timeout_s: float | None = None,
        progress: ab.Progress | None = None,
    ) -> list[ABRecord]:
        """Two records per text, one of each tier; see `samp_client.ab.collect`."""
        return ab.collect(
            self,
            texts,
            control,
            candidate,
            seed=seed,
            warmup=warmup,
            timeout_s=timeout_s,
            progress=progress,
        )

    def statistics(self, timeout_s: float | None = None) -> dict[str, Counters]:
        """Triton's counters of every loaded model; two readings make `server_times`."""
        clock = self._session.clock(timeout_s)
        return read_counters(self._drive(self._session.ask(clock, "statistics")))

    def server_times(
        self, tier: str, before: Mapping[str, Counters], after: Mapping[str, Counters]
    ) -> TierTimes:
        """Mean queue and compute milliseconds of a tier's steps between two `statistics`."""
        return tier_times(tier, self.describe(tier).steps, before, after)

    def _call(
        self,
        kind: str | None,
        texts: Iterable[Row],
        tier: str | None,
        timeout_s: float | None,
        rows: int | None,
    ) -> list[Answer]:
        clock = self._session.clock(timeout_s)
        found: list[Answer] = self._drive(self._session.call(kind, texts, tier, rows, clock))
        return found

    def _drive(self, steps: Steps[Any]) -> Any:
        """Do what an operation asks for until it returns."""
        try:
            step = next(steps)
            while True:
                try:
                    reply = self._do(step)
                except errors.ClientError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            return end.value

    def _do(self, step: Ask | Pause) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return getattr(self._transport, step.method)(*step.arguments, step.timeout_s)


def check_target(
    url: str, protocol: str, tls: Tls | None, headers: Mapping[str, str] | None
) -> tuple[str, dict[str, str]]:
    """The address and headers to use. BadRequest."""
    if protocol not in ("grpc", "http"):
        raise errors.BadRequest(f"protocol {protocol!r}", "grpc or http", "name one of these")
    if tls is not None and protocol == "http":
        raise errors.BadRequest(
            "tls over http", "TLS over gRPC: Triton's HTTP has none", "call over gRPC"
        )
    return parse_address(url, protocol), check_headers(headers)  # type: ignore[arg-type]
