"""What a client does, without waiting for anything: the one place for both kinds of client.

Each operation is a generator. It yields what to ask the server or how long to pause, is sent the
reply or thrown the error, and returns its result; api.py drives it with blocking calls, aio.py
with awaited ones.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

from samp_client import answers, batches, discovery, errors
from samp_client.discovery import TierInfo
from samp_client.records import Answer, Outcome, Row
from samp_client.retry import ONCE, Retry

DEFAULT_TIER = "balanced"
_CALLS = {
    "classification": "predict",
    "entities": "entities",
    "multi-label": "active",
    "regression": "scores",
    "embedding": "embed",
}


@dataclass(frozen=True)
class Ask:
    """One call of the transport: a method, its arguments, and the seconds that it may take."""

    method: Literal["infer", "index", "config", "statistics"]
    arguments: tuple[Any, ...]
    timeout_s: float


@dataclass(frozen=True)
class Pause:
    seconds: float


_Result = TypeVar("_Result")
Steps: TypeAlias = Generator["Ask | Pause", Any, _Result]


class Clock:
    """What is left of a call's time."""

    def __init__(self, limit_s: float, address: str) -> None:
        self._limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._address = address

    def left(self) -> float:
        """Seconds, above 0. DeadlineExceeded when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.over()
        return left

    def over(self) -> errors.DeadlineExceeded:
        return errors.deadline(self._address, self._limit_s)


class Session:
    """What one client knows of its server. All errors are ClientErrors."""

    def __init__(
        self,
        address: str,
        *,
        model: str | None,
        timeout_s: float,
        request_timeout_s: float | None,
        retry: Retry | None,
    ) -> None:
        for limit in (timeout_s, request_timeout_s):
            check_timeout(limit)
        self.address = address
        self.closed = False
        self.model: str | None = None
        self.tiers: tuple[str, ...] = ()
        self._wanted = model
        self._timeout_s = timeout_s
        self._request_timeout_s = request_timeout_s
        self._retry = retry or ONCE
        self._infos: dict[str, TierInfo] = {}
        self._labels: tuple[str, ...] | None = None

    def clock(self, timeout_s: float | None = None) -> Clock:
        if self.closed:
            raise errors.BadRequest("the client is closed", fix="connect again")
        check_timeout(timeout_s)
        return Clock(self._timeout_s if timeout_s is None else timeout_s, self.address)

    def ask(self, clock: Clock, method: Any, *arguments: Any) -> Steps[Any]:
        """One call, sent again where that is safe and there is time."""
        sent = 0
        while True:
            left = clock.left()
            limit = self._request_timeout_s or left
            try:
                return (yield Ask(method, arguments, min(left, limit)))
            except errors.Unavailable as error:
                sent += 1
                pause = self._retry.pause(sent, clock.left()) if error.unsent else None
                if pause is None:
                    raise
            yield Pause(pause)

    def discover(self, clock: Clock) -> Steps[None]:
        """Which model to call and what tiers it has."""
        index = yield from self.ask(clock, "index")
        served = discovery.tiers_by_model(index)
        self.model = discovery.choose_model(self._wanted, served, self.address)
        self.tiers = served[self.model]

    def known(self, tier: str | None) -> bool:
        """Whether a call of this tier needs no more metadata."""
        return self._labels is not None and (tier or DEFAULT_TIER) in self._infos

    def info(self, tier: str | None, clock: Clock) -> Steps[TierInfo]:
        """A tier as the server describes it."""
        name = DEFAULT_TIER if tier is None else tier
        if name not in self._infos:
            if name not in self.tiers:
                yield from self.discover(clock)
            if name not in self.tiers:
                raise errors.UnknownTier(name, self.model or "the model", self.tiers)
            config = yield from self.ask(clock, "config", f"{self.model}_{name}")
            self._infos[name] = discovery.read_tier(name, config)
        return self._infos[name]

    def labels(self, clock: Clock) -> Steps[tuple[str, ...]]:
        """Class names in the order of `scores`."""
        if self._labels is None:
            if self.model is None:
                yield from self.discover(clock)
            config = yield from self.ask(clock, "config", f"head_{self.model}")
            self._labels = discovery.read_labels(config)
        return self._labels

    def begin(self, tier: str | None, clock: Clock) -> Steps[TierInfo]:
        """All metadata that requests to a tier read."""
        info = yield from self.info(tier, clock)
        yield from self.labels(clock)
        return info

    def groups(
        self, info: TierInfo, kind: str | None, given: Sequence[Row], rows: int | None
    ) -> tuple[list[tuple[bytes, ...]], list[range]]:
        """The encoded rows, and which of them make a request together. BadRequest."""
        if kind not in (None, info.kind):
            raise errors.BadRequest(
                f"{info.ensemble} answers {info.kind}",
                f"a tier that answers {kind}",
                f"call Client.{_CALLS[info.kind]}(), or answers() for any",
            )
        encoded = batches.encode_rows(given, len(info.inputs))
        return encoded, batches.split(encoded, most_rows(info, rows))

    def call(
        self,
        kind: str | None,
        texts: Iterable[Row],
        tier: str | None,
        rows: int | None,
        clock: Clock,
    ) -> Steps[list[Answer]]:
        """All texts, one request after the other."""
        given = listed(texts)
        if not given:
            return []
        info = yield from self.info(tier, clock)
        encoded, groups = self.groups(info, kind, given, rows)
        found: list[Answer] = []
        for group in groups:
            found += yield from self.request(info, encoded, group, clock)
        return found

    def request(
        self, info: TierInfo, rows: Sequence[tuple[bytes, ...]], group: range, clock: Clock
    ) -> Steps[list[Answer]]:
        """The answers to `group` of the rows, in one request."""
        labels = yield from self.labels(clock)
        chosen = rows[group.start : group.stop]
        columns = dict(zip(info.inputs, zip(*chosen, strict=True), strict=True))
        try:
            tensors = yield from self.ask(clock, "infer", info.ensemble, columns)
        except errors.UnknownModel:
            # Unloaded since it was described: say which tiers are left.
            self._infos.pop(info.tier, None)
            yield from self.discover(clock)
            if info.tier not in self.tiers:
                raise errors.UnknownTier(info.tier, str(self.model), self.tiers) from None
            raise
        try:
            texts = [row[0] for row in chosen]
            return answers.read(info.kind, tensors, texts, group.start, labels)
        except (KeyError, ValueError, IndexError) as error:
            raise errors.ServerFault(
                f"{info.ensemble} on {self.address} answered {len(chosen)} texts with other "
                f"tensors than its configuration says: {error}",
                fix="see the server's log",
            ) from None

    def outcomes(
        self, info: TierInfo, texts: Sequence[Row], first: int, timeout_s: float | None
    ) -> Steps[list[Outcome]]:
        """Each text's answer or error, counted from `first`, in one request if the server takes it.

        Where it refuses them together they go one by one. timeout_s: for each request.
        """
        try:
            rows = batches.encode_rows(texts, len(info.inputs), first)
            clock = self.clock(timeout_s)
            found = yield from self.request(info, rows, range(len(rows)), clock)
        except errors.UserError as error:
            if len(texts) == 1:
                return [Outcome(first, None, error)]
            outcomes: list[Outcome] = []
            for place, text in enumerate(texts, first):
                outcomes += yield from self.outcomes(info, [text], place, timeout_s)
            return outcomes
        except errors.ServerError as error:
            return [Outcome(first + place, None, error) for place in range(len(texts))]
        return [
            Outcome(first + place, replace(answer, index=first + place), None)
            for place, answer in enumerate(found)
        ]


def most_rows(info: TierInfo, rows: int | None) -> int:
    """Rows of one request. BadRequest, BatchTooLarge."""
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


def listed(texts: Iterable[Row]) -> list[Row]:
    """The texts of a call. BadRequest for one text in place of a list."""
    if isinstance(texts, (str, bytes)):
        batches.encode_texts(texts)  # raises
    return list(texts)


def check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None and not timeout_s > 0:
        raise errors.BadRequest(f"timeout_s is {timeout_s}", "seconds above 0", "correct it")
