"""The asynchronous client and the sticky A/B clients against a real Triton, both protocols."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Served
from samp_client import (
    ABClient,
    ABRecord,
    Arm,
    AsyncABClient,
    AsyncClient,
    BadRequest,
    DeadlineExceeded,
    JsonlSink,
    Retry,
    Unavailable,
    UnknownTier,
    connect,
    connect_async,
    sticky_arm,
)

NOT_UTF8 = b"a fine \xff film"
Work = Callable[[AsyncClient], Coroutine[Any, Any, None]]


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def run(served: Served, protocol: Any) -> Callable[..., None]:
    """Runs work with a client of the served demo, and looks for what it left behind."""

    def start(work: Work, **settings: Any) -> None:
        async def whole() -> None:
            address = served.grpc if protocol == "grpc" else served.http
            async with connect_async(address, protocol, **settings) as client:
                await work(client)
                assert client._places._value == client.concurrency, "a place was lost"
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not [task for task in left if "samp_client" in str(task.get_coro())]

        asyncio.run(whole())

    return start


def test_answers_are_those_of_the_other_client(served: Served, run: Any) -> None:
    texts = served.texts[:150]

    async def work(client: AsyncClient) -> None:
        assert await client.model() == served.model
        assert await client.tiers() == tuple(sorted(served.tiers))
        assert await client.labels() == served.labels
        assert (await client.describe("fast")).max_rows == 64
        found, other = await asyncio.gather(
            client.predict(texts, "exact"), client.answers(texts[:3], "exact", rows=1)
        )
        with connect(served.grpc) as blocking:
            expected = blocking.predict(texts, "exact")
        assert [one.index for one in found] == list(range(150))
        assert [one.label for one in found] == [one.label for one in expected]
        for one, same in zip(found, expected, strict=True):
            assert one.scores == pytest.approx(same.scores, abs=1e-5)
        assert [one.index for one in other] == [0, 1, 2]
        assert await client.predict([], "exact") == []
        before = await client.statistics()
        await client.predict(texts[:10], "fast", rows=5)
        for _ in range(100):  # Triton counts a moment after it answers
            times = await client.server_times("fast", before, await client.statistics())
            if times.steps[1].requests >= 2:
                break
            await asyncio.sleep(0.05)
        assert times.steps[1].requests == 2
        for call in (client.entities, client.active, client.scores, client.embed):
            with pytest.raises(BadRequest, match=r"call Client\.predict\(\)"):
                await call(["a"], "fast")
        with pytest.raises(UnknownTier, match="exact, fast"):
            await client.predict(["a"], "slow")
        with pytest.raises(BadRequest, match="UTF-8"):
            await client.predict(["fine", NOT_UTF8], "fast")

    run(work)


def test_no_more_requests_than_asked_for_and_one_connection(served: Served, run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        await client.predict(["warm"], "fast")
        transport: Any = client._transport
        send, now, most = transport.infer, 0, 0

        async def counted(*arguments: Any) -> Any:
            nonlocal now, most
            now, most = now + 1, max(most, now + 1)
            try:
                return await send(*arguments)
            finally:
                now -= 1

        transport.infer = counted
        await asyncio.gather(*(client.predict(served.texts[:9], "fast", rows=1) for _ in range(4)))
        assert (now, most) == (0, 3)
        assert client._transport is transport

    run(work, concurrency=3)


def test_deadlines_also_while_waiting_for_a_place(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        await client.predict(["warm"], "fast")
        long = asyncio.ensure_future(client.predict(["fine " * 90] * 128, "fast"))
        await asyncio.sleep(0.02)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
            await client.predict(["fine"], "fast", timeout_s=0.05)
        assert time.monotonic() - start < 2
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        with pytest.raises(DeadlineExceeded):
            await client.predict(["fine " * 90] * 128, "fast", timeout_s=0.05)
        assert len(await client.predict(["fine"], "fast")) == 1

    run(work, concurrency=2)


def test_cancelled_calls_leave_a_client_that_works(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        await client.predict(["warm"], "fast")
        for pause in (0, 0, 0.001, 0.01, 0.03, 0.1):
            calls = [
                asyncio.ensure_future(client.predict(["fine " * 100] * 100, "fast"))
                for _ in range(3)
            ]
            await asyncio.sleep(pause)
            for call in calls:
                call.cancel()
            assert all(
                isinstance(one, asyncio.CancelledError)
                for one in await asyncio.gather(*calls, return_exceptions=True)
            )
        assert len(await client.predict(["fine"] * 70, "fast", timeout_s=60)) == 70

    # A slow machine may still be at what was cancelled under way, and refuse for a moment.
    run(work, concurrency=4, retry=Retry(attempts=200, most_s=0.5))


def test_a_stream_keeps_order_fails_only_bad_texts_and_reads_no_further_than_it_must(
    served: Served, run: Any
) -> None:
    async def work(client: AsyncClient) -> None:
        read = 0

        def texts() -> Iterator[Any]:
            nonlocal read
            for place in range(600):
                read += 1
                yield NOT_UTF8 if place == 77 else served.texts[place % 50]

        expected = await client.predict(served.texts[:50], "exact")
        places = []
        async for outcome in client.stream(texts(), "exact", rows=8):
            places.append(outcome.index)
            # Two requests under way, as many answered and unread, one being filled.
            assert read <= outcome.index + 8 * (2 * 2 + 2)
            if outcome.index == 77:
                assert isinstance(outcome.error, BadRequest)
            else:
                assert outcome.prediction is not None
                assert outcome.prediction.label == expected[outcome.index % 50].label
        assert places == list(range(600))

    run(work, concurrency=2)


def test_a_source_that_pauses_is_answered_meanwhile(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        go_on = asyncio.Event()

        async def texts() -> AsyncIterator[str]:
            yield "one"
            yield "two"
            await go_on.wait()
            yield "three"
            raise RuntimeError("the source broke")

        async with contextlib.aclosing(client.stream(texts(), "fast")) as stream:  # type: ignore[type-var]
            assert (await stream.__anext__()).index == 0
            assert (await stream.__anext__()).index == 1
            go_on.set()
            assert (await stream.__anext__()).index == 2
            with pytest.raises(RuntimeError, match="the source broke"):
                await stream.__anext__()

        async def endless() -> AsyncIterator[str]:
            while True:
                yield "fine"

        async with contextlib.aclosing(client.stream(endless(), "fast")) as stream:  # type: ignore[type-var]
            async for outcome in stream:
                if outcome.index == 200:
                    break
        with pytest.raises(DeadlineExceeded):
            async for _ in client.stream(endless(), "fast", total_s=0.5):
                pass

    run(work, concurrency=2)


@contextlib.contextmanager
def forwarder(target: str, after_s: float) -> Iterator[str]:
    """An address that refuses connections at first, and then leads to `target`."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loop = asyncio.new_event_loop()
    host, _, to = target.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while block := await reader.read(65536):
                writer.write(block)
                await writer.drain()
        writer.close()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(to))
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async def serve() -> None:
        await asyncio.sleep(after_s)
        await asyncio.start_server(link, "127.0.0.1", port)

    def turn() -> None:
        begun = loop.create_task(serve())
        loop.run_forever()
        assert begun.done()

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    yield f"127.0.0.1:{port}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_a_server_that_comes_is_waited_for_only_if_asked(served: Served, protocol: Any) -> None:
    target = served.grpc if protocol == "grpc" else served.http
    patient = Retry(attempts=50, first_s=0.05, most_s=0.3)
    with forwarder(target, 1.0) as address:
        with connect(address, protocol) as client, pytest.raises(Unavailable) as caught:
            client.predict(["fine"], "fast")
        assert caught.value.unsent
        with connect(address, protocol, retry=patient) as client:
            assert len(client.predict(["fine"], "fast")) == 1

    async def work(address: str) -> None:
        async with connect_async(address, protocol, retry=patient) as client:
            assert len(await client.predict(["fine"], "fast")) == 1

    with forwarder(target, 0.5) as address:
        asyncio.run(work(address))


def test_a_client_belongs_to_one_loop_and_ends(served: Served, protocol: Any) -> None:
    client = connect_async(served.grpc if protocol == "grpc" else served.http, protocol)

    async def call() -> None:
        assert len(await client.predict(["fine"], "fast")) == 1

    async def end() -> None:
        await client.close()
        with pytest.raises(BadRequest, match="the client is closed"):
            await client.predict(["fine"], "fast")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(call())
    with pytest.raises(BadRequest, match="another event loop"):
        asyncio.run(call())
    loop.run_until_complete(end())
    loop.close()


# A/B with sticky arms


def keyed(arm: str, weights: dict[str, float]) -> str:
    return next(key for key in map(str, range(1000)) if sticky_arm(key, weights) == arm)


def test_every_key_keeps_its_arm_and_leaves_records(
    served: Served, protocol: Any, tmp_path: Path
) -> None:
    address = served.grpc if protocol == "grpc" else served.http
    weights = {"exact": 1.0, "fast": 3.0}
    log = tmp_path / "records.jsonl"
    log.write_text('{"half": ')
    sink = JsonlSink(log)
    texts = list(served.texts[:40])
    with connect(address, protocol) as client:
        ab = ABClient(client, weights=weights, key=lambda row: f"user of {row!r}", record=sink)
        found = ab.predict(texts, ids=[f"request {place}" for place in range(40)])
        assert [one.index for one in found] == list(range(40))
        by_arm = {arm: client.predict(texts, arm) for arm in weights}
    sink.close()
    half, *lines = log.read_text().splitlines()
    assert half == '{"half": '
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert len(rows) == 40
    for place, (text, answer) in enumerate(zip(texts, found, strict=True)):
        row = rows[f"request {place}"]
        arm = sticky_arm(f"user of {text!r}", weights)
        assert set(row) == {"id", "arm", "label", "scores", "latency_ms", "error"}
        assert (row["arm"], row["label"], row["error"]) == (arm, answer.label, None)
        assert answer.scores == pytest.approx(by_arm[arm][place].scores, abs=0.05)
        assert row["latency_ms"] > 0
    assert {row["arm"] for row in rows.values()} == set(weights)

    async def work() -> None:
        records: list[ABRecord] = []
        async with connect_async(address, protocol) as client:
            same = AsyncABClient(
                client, weights=weights, key=lambda row: f"user of {row!r}", record=records.append
            )
            again = await same.predict(texts)
        assert [one.label for one in again] == [one.label for one in found]
        assert sorted(one.arm for one in records) == sorted(row["arm"] for row in rows.values())
        assert len({one.id for one in records}) == 40

    asyncio.run(work())


def test_an_arm_that_fails_raises_or_falls_back_as_was_said(served: Served, protocol: Any) -> None:
    address = served.grpc if protocol == "grpc" else served.http
    weights = {"control": 1.0, "trial": 1.0}
    key = keyed("trial", weights)
    records: list[ABRecord] = []
    with connect(address, protocol) as here, connect("127.0.0.1:1", protocol) as away:
        arms = {"control": Arm(here, "exact"), "trial": Arm(away, "fast")}
        with pytest.raises(Unavailable):
            ABClient(weights=weights, arms=arms, key=key, record=records.append).predict(["a"])
        ab = ABClient(
            weights=weights, arms=arms, key=key, record=records.append, fallback="control"
        )
        assert ab.predict(["a"])[0].label == here.predict(["a"], "exact")[0].label
        assert [(one.arm, one.label) for one in records] == [("trial", None)] * 2
        assert all("unavailable" in str(one.error) for one in records)
        with pytest.raises(BadRequest, match="UTF-8"):
            ab.predict([NOT_UTF8], key=keyed("control", weights))
        for wrong in ({"trial": -1.0}, {"other": 1.0}, {}):
            with pytest.raises(BadRequest):
                ABClient(weights=wrong, arms=arms)

    async def work() -> None:
        async with (
            connect_async(address, protocol) as here,
            connect_async("127.0.0.1:1", protocol) as away,
        ):
            both = {"control": Arm(here, "exact"), "trial": Arm(away, "fast")}
            ab = AsyncABClient(weights=weights, arms=both, key=key, fallback="control")
            assert len(await ab.predict(["a", "b"], timeout_s=20.0)) == 2
            with pytest.raises(Unavailable):
                await AsyncABClient(weights=weights, arms=both, key=key).predict(["a"])

    asyncio.run(work())
