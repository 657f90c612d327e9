"""A/B on live traffic: each key always has the same arm, and every answer leaves a record."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from samp_client.aio import AsyncClient, together
from samp_client.api import Client
from samp_client.errors import BadRequest, ClientError, ServerError
from samp_client.records import ABRecord, Answer, Row, record_of
from samp_client.session import listed
from samp_client.sticky import sticky_arm

Key: TypeAlias = "str | bytes"
Keys: TypeAlias = "Key | Callable[[Row], Key]"
Sink: TypeAlias = Callable[[ABRecord], None]
_Caller = TypeVar("_Caller", Client, AsyncClient)


@dataclass(frozen=True)
class Arm(Generic[_Caller]):
    """A tier of the model that `client` calls: another server or model is another client."""

    client: _Caller
    tier: str


class JsonlSink:
    """Appends each record to a file as one JSON line, in one write: processes may share it."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # ends the half line of a writer that was killed

    def __call__(self, record: ABRecord) -> None:
        line = (json.dumps(record.fields(), ensure_ascii=False) + "\n").encode(errors="replace")
        if os.write(self._file, line) != len(line):
            raise OSError("the record did not fit on the disk")

    def close(self) -> None:
        os.close(self._file)


class _Experiment(Generic[_Caller]):
    """What both clients share: who gets which arm, and what is recorded."""

    def __init__(
        self,
        client: _Caller | None = None,
        *,
        weights: Mapping[str, float],
        key: Keys | None = None,
        arms: Mapping[str, Arm[_Caller]] | None = None,
        record: Sink | None = None,
        fallback: str | None = None,
    ) -> None:
        """weights: arm -> share on any scale; arms: by default the tiers of `client` by that name.

        key: one for all calls, or the function from a row to its key (a user's id, say); without
        one each call names its own, or the text is its key. record: told each ABRecord; what it
        raises comes out of the call. fallback: the arm that answers where another one's server
        fails; without it such a call raises. A wrong request always raises. BadRequest for
        weights and arms that do not fit.
        """
        if arms is None:
            if client is None:
                raise BadRequest("neither client nor arms", "one of them", "give client=...")
            named = {*weights, *filter(None, [fallback])}
            arms = {name: Arm(client, name) for name in named}
        try:
            sticky_arm("", weights)
        except ValueError as error:
            raise BadRequest(f"weights {dict(weights)}: {error}", fix="correct them") from None
        unknown = {*weights, *filter(None, [fallback])} - arms.keys()
        if unknown:
            raise BadRequest(
                f"no arm {', '.join(sorted(unknown))}", ", ".join(arms), "name one of these"
            )
        self.weights = dict(weights)
        self.arms: dict[str, Arm[_Caller]] = dict(arms)
        self.fallback = fallback
        self._key = key
        self._record = record

    def arm_of(self, key: Key) -> str:
        """The arm that this key always gets: see `sticky_arm`."""
        return sticky_arm(key, self.weights)

    def _shares(self, rows: Sequence[Row], key: Keys | None) -> dict[str, list[int]]:
        """Places of the rows by arm."""
        chosen = self._key if key is None else key
        shares: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            if chosen is None:
                own: Key = json.dumps(row) if isinstance(row, tuple) else row
            else:
                own = chosen(row) if callable(chosen) else chosen
            shares.setdefault(self.arm_of(own), []).append(place)
        return shares

    def _answered(
        self, arm: str, names: Sequence[str], answers: Sequence[Answer], start: float
    ) -> None:
        elapsed_ms = (time.perf_counter() - start) * 1e3
        if self._record is not None:
            for name, answer in zip(names, answers, strict=True):
                self._record(record_of(name, arm, answer, elapsed_ms))

    def _instead(
        self,
        arm: str,
        names: Sequence[str],
        error: ClientError,
        start: float,
        timeout_s: float | None,
    ) -> tuple[Arm[_Caller], float | None]:
        """Record the error; the arm that is to answer, and the seconds it has. Else the error.

        Its answers are served, not recorded: they would add to the control's sample just the
        texts that the candidate failed.
        """
        elapsed_s = time.perf_counter() - start
        if self._record is not None:
            for name in names:
                self._record(ABRecord(name, arm, None, None, elapsed_s * 1e3, str(error)))
        left = None if timeout_s is None else timeout_s - (time.perf_counter() - start)
        if self.fallback is None or self.fallback == arm or not isinstance(error, ServerError):
            raise error
        if left is not None and left <= 0:
            raise error
        return self.arms[self.fallback], left


class ABClient(_Experiment[Client]):
    """Calls like `Client`, each text to its key's arm. Latencies are those of whole calls."""

    def answers(
        self,
        texts: Iterable[Row],
        *,
        key: Keys | None = None,
        ids: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Answer]:
        """Any task's answers, in the texts' order. ids: of the records, by default drawn."""
        return self._ask("answers", texts, key, ids, timeout_s)

    def predict(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        """Classes, as `Client.predict`; options as of `answers`."""
        return self._ask("predict", texts, **_options(options))

    def entities(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return self._ask("entities", texts, **_options(options))

    def active(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return self._ask("active", texts, **_options(options))

    def scores(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return self._ask("scores", texts, **_options(options))

    def embed(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return self._ask("embed", texts, **_options(options))

    def _ask(
        self,
        call: str,
        texts: Iterable[Row],
        key: Keys | None = None,
        ids: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        rows = listed(texts)
        names = _names(ids, len(rows))
        found: dict[int, Answer] = {}
        for arm, places in self._shares(rows, key).items():
            chosen, own = [rows[place] for place in places], [names[place] for place in places]
            start = time.perf_counter()
            try:
                answers = getattr(self.arms[arm].client, call)(
                    chosen, self.arms[arm].tier, timeout_s=timeout_s
                )
            except ClientError as error:
                spare, left = self._instead(arm, own, error, start, timeout_s)
                answers = getattr(spare.client, call)(chosen, spare.tier, timeout_s=left)
            else:
                self._answered(arm, own, answers, start)
            found.update(zip(places, answers, strict=True))
        return _ordered(found)


class AsyncABClient(_Experiment[AsyncClient]):
    """Calls like `AsyncClient`, each text to its key's arm; the arms of a call work together."""

    async def answers(
        self,
        texts: Iterable[Row],
        *,
        key: Keys | None = None,
        ids: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Answer]:
        """Any task's answers, in the texts' order. ids: of the records, by default drawn."""
        return await self._ask("answers", texts, key, ids, timeout_s)

    async def predict(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        """Classes, as `AsyncClient.predict`; options as of `answers`."""
        return await self._ask("predict", texts, **_options(options))

    async def entities(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return await self._ask("entities", texts, **_options(options))

    async def active(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return await self._ask("active", texts, **_options(options))

    async def scores(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return await self._ask("scores", texts, **_options(options))

    async def embed(self, texts: Iterable[Row], **options: Any) -> list[Any]:
        return await self._ask("embed", texts, **_options(options))

    async def _ask(
        self,
        call: str,
        texts: Iterable[Row],
        key: Keys | None = None,
        ids: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        rows = listed(texts)
        names = _names(ids, len(rows))

        async def share(arm: str, places: list[int]) -> list[Answer]:
            chosen, own = [rows[place] for place in places], [names[place] for place in places]
            start = time.perf_counter()
            answers: list[Answer]
            try:
                answers = await getattr(self.arms[arm].client, call)(
                    chosen, self.arms[arm].tier, timeout_s=timeout_s
                )
            except ClientError as error:
                spare, left = self._instead(arm, own, error, start, timeout_s)
                answers = await getattr(spare.client, call)(chosen, spare.tier, timeout_s=left)
            else:
                self._answered(arm, own, answers, start)
            return answers

        shares = self._shares(rows, key)
        parts = await together([share(arm, places) for arm, places in shares.items()])
        return _ordered(
            {
                place: answer
                for places, answers in zip(shares.values(), parts, strict=True)
                for place, answer in zip(places, answers, strict=True)
            }
        )


def _options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = options.keys() - {"key", "ids", "timeout_s"}
    if unknown:
        raise TypeError(f"no option {', '.join(sorted(unknown))}: key, ids, timeout_s")
    return options


def _names(ids: Sequence[str] | None, count: int) -> Sequence[str]:
    if ids is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if len(ids) != count:
        raise BadRequest(f"{len(ids)} ids for {count} texts", "one for each text", "correct ids")
    return ids


def _ordered(found: Mapping[int, Answer]) -> list[Answer]:
    """Answers by their places in the call, `index` among them."""
    return [replace(found[place], index=place) for place in sorted(found)]
