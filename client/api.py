"""The client: one surface over gRPC and HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

from samp_client import ab, answers, batches, discovery, errors
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
)
from samp_client.server_times import Counters, TierTimes, read_counters, tier_times
from samp_client.transport import ProtocolName, Transport, parse_address

DEFAULT_TIER = "balanced"
DEFAULT_TIMEOUT_S = 30.0
_CALLS = {
    "classification": "predict",
    "entities": "entities",
    "multi-label": "active",
    "regression": "scores",
    "embedding": "embed",
}


def connect(
    url: str,
    protocol: ProtocolName = "grpc",
    *,
    model: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Client:
    """A client of the Triton at `url` ("host:port"); nothing is sent yet.

    model: needed only where the server has several; timeout_s: for each later call, unless it
    names its own. BadRequest for a malformed address or an unknown protocol.
    """
    if protocol not in ("grpc", "http"):
        raise errors.BadRequest(f"protocol {protocol!r}", "grpc or http", "name one of these")
    _check_timeout(timeout_s)
    address = parse_address(url, protocol)
    transport: Transport
    # Imported here: each costs a tenth of a second and more, and a program needs only one.
    if protocol == "grpc":
        from samp_client.grpc_transport import GrpcTransport

        transport = GrpcTransport(address)
    else:
        from samp_client.http_transport import HttpTransport

        transport = HttpTransport(address)
    return Client(transport, f"{address} over {protocol}", model=model, timeout_s=timeout_s)


class Client:
    """Calls one model's tiers; made by `connect`, closed by `close` or a with block.

    Every call raises a ClientError: UserError where the request is wrong, ServerError where the
    server or the way to it is. Over HTTP a client belongs to one thread.
    """

    def __init__(
        self, transport: Transport, address: str, *, model: str | None, timeout_s: float
    ) -> None:
        self._transport = transport
        self._address = address
        self._wanted = model
        self._timeout_s = timeout_s
        self._closed = False
        self._model: str | None = None
        self._tiers: tuple[str, ...] = ()
        self._infos: dict[str, TierInfo] = {}
        self._labels: tuple[str, ...] | None = None

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
        if not self._closed:
            self._closed = True
            self._transport.close()

    def model(self, timeout_s: float | None = None) -> str:
        """The name of the model that this client calls."""
        clock = self._clock(timeout_s)
        if self._model is None:
            self._discover(clock)
        assert self._model is not None
        return self._model

    def tiers(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """The tiers that the server has loaded now, sorted."""
        self._discover(self._clock(timeout_s))
        return self._tiers

    def labels(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Class names in the order of `Prediction.scores`."""
        return self._read_labels(self._clock(timeout_s))

    def describe(self, tier: str | None = None, timeout_s: float | None = None) -> TierInfo:
        """A tier's ensemble, its steps and the most rows of one request. UnknownTier."""
        return self._info(tier, self._clock(timeout_s))

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

    def _call(
        self,
        kind: str | None,
        texts: Iterable[Row],
        tier: str | None,
        timeout_s: float | None,
        rows: int | None,
    ) -> list[Answer]:
        clock = self._clock(timeout_s)
        if isinstance(texts, (str, bytes)):
            batches.encode_texts(texts)  # raises: one text is no list
        given = list(texts)
        if not given:
            return []
        info = self._info(tier, clock)
        if kind not in (None, info.kind):
            raise errors.BadRequest(
                f"{info.ensemble} answers {info.kind}",
                f"a tier that answers {kind}",
                f"call Client.{_CALLS[info.kind]}(), or answers() for any",
            )
        encoded = batches.encode_rows(given, len(info.inputs))
        found: list[Answer] = []
        for group in batches.split(encoded, self._rows(info, rows)):
            found.extend(self._request(info, encoded, group, clock))
        return found

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
        single text: an unknown tier, a server that is not there at the first request.
        """
        info = self._info(tier, self._clock(timeout_s))
        for group in batches.split([_rough(text) for text in texts], self._rows(info, rows)):
            yield from self._group_outcomes(info, texts, group, timeout_s)

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
        return read_counters(self._transport.statistics(self._clock(timeout_s).left()))

    def server_times(
        self, tier: str, before: Mapping[str, Counters], after: Mapping[str, Counters]
    ) -> TierTimes:
        """Mean queue and compute milliseconds of a tier's steps between two `statistics`."""
        return tier_times(tier, self.describe(tier).steps, before, after)

    def _group_outcomes(
        self,
        info: TierInfo,
        texts: Sequence[Row],
        group: range,
        timeout_s: float | None,
    ) -> Iterator[Outcome]:
        try:
            chosen = (texts[index] for index in group)
            rows = batches.encode_rows(chosen, len(info.inputs), group.start)
            answers = self._request(info, rows, range(len(rows)), self._clock(timeout_s))
        except errors.UserError as error:
            if len(group) == 1:
                yield Outcome(group[0], None, error)
                return
            for index in group:
                yield from self._group_outcomes(info, texts, range(index, index + 1), timeout_s)
        except errors.ServerError as error:
            yield from (Outcome(index, None, error) for index in group)
        else:
            for index, answer in zip(group, answers, strict=True):
                yield Outcome(index, replace(answer, index=index), None)

    def _request(
        self, info: TierInfo, rows: Sequence[tuple[bytes, ...]], group: range, clock: _Clock
    ) -> list[Answer]:
        labels = self._read_labels(clock)
        chosen = rows[group.start : group.stop]
        columns = dict(zip(info.inputs, zip(*chosen, strict=True), strict=True))
        try:
            tensors = self._transport.infer(info.ensemble, columns, clock.left())
        except errors.UnknownModel:
            # Unloaded since it was described: say which tiers are left.
            self._infos.pop(info.tier, None)
            self._discover(clock)
            if info.tier not in self._tiers:
                raise errors.UnknownTier(info.tier, str(self._model), self._tiers) from None
            raise
        try:
            texts = [row[0] for row in chosen]
            return answers.read(info.kind, tensors, texts, group.start, labels)
        except (KeyError, ValueError, IndexError) as error:
            raise errors.ServerFault(
                f"{info.ensemble} on {self._address} answered {len(chosen)} texts with other "
                f"tensors than its configuration says: {error}",
                fix="see the server's log",
            ) from None

    def _rows(self, info: TierInfo, rows: int | None) -> int:
        if rows is None:
            return min(batches.MAX_ROWS, info.max_rows)
        if rows < 1:
            raise errors.BadRequest(f"{rows} rows in a request", "1 or more", "correct rows=...")
        if rows > info.max_rows:
            raise errors.BatchTooLarge(
                f"{rows} rows in a request",
                f"{info.ensemble} takes at most {info.max_rows}",
                "lower rows=..., or leave it out",
            )
        return rows

    def _info(self, tier: str | None, clock: _Clock) -> TierInfo:
        name = DEFAULT_TIER if tier is None else tier
        if name not in self._infos:
            if name not in self._tiers:
                self._discover(clock)
            if name not in self._tiers:
                raise errors.UnknownTier(name, self._model or "the model", self._tiers)
            config = self._transport.config(f"{self._model}_{name}", clock.left())
            self._infos[name] = discovery.read_tier(name, config)
        return self._infos[name]

    def _read_labels(self, clock: _Clock) -> tuple[str, ...]:
        if self._labels is None:
            if self._model is None:
                self._discover(clock)
            config = self._transport.config(f"head_{self._model}", clock.left())
            self._labels = discovery.read_labels(config)
        return self._labels

    def _discover(self, clock: _Clock) -> None:
        served = discovery.tiers_by_model(self._transport.index(clock.left()))
        self._model = discovery.choose_model(self._wanted, served, self._address)
        self._tiers = served[self._model]

    def _clock(self, timeout_s: float | None) -> _Clock:
        if self._closed:
            raise errors.BadRequest("the client is closed", fix="connect again")
        limit = self._timeout_s if timeout_s is None else timeout_s
        _check_timeout(limit)
        return _Clock(limit, self._address)


class _Clock:
    """What is left of a call's time."""

    def __init__(self, limit_s: float, address: str) -> None:
        self._limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._address = address

    def left(self) -> float:
        """Seconds, above 0. DeadlineExceeded when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise errors.deadline(self._address, self._limit_s)
        return left


def _rough(text: Row) -> bytes:
    """Bytes about as long as the encoded text: to split by size what may not be encodable."""
    if isinstance(text, tuple):
        return b"".join(map(_rough, text))
    if isinstance(text, bytes):
        return text
    return text.encode(errors="replace") if isinstance(text, str) else b""


def _check_timeout(timeout_s: float) -> None:
    if not timeout_s > 0:
        raise errors.BadRequest(f"timeout_s is {timeout_s}", "seconds above 0", "correct it")
