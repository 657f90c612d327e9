"""The campaign's cheap gRPC caller against grpcio's own server."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))

from http2 import Calls

METHOD = "/a.Service/Call"
WORDS = "overloaded: 0.8 s of work, 100% of héllo\nworld"


class Handler(grpc.GenericRpcHandler):
    """Echoes; refuses what begins with "no", sleeps for what begins with "late"."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def service(self, details: Any) -> Any:
        if details.method != METHOD:
            return None

        def call(body: bytes, context: Any) -> bytes:
            self.seen.append(body)
            if body.startswith(b"no"):
                context.abort(grpc.StatusCode.UNAVAILABLE, WORDS)
            if body.startswith(b"late"):
                time.sleep(2)
            return body

        return grpc.unary_unary_rpc_method_handler(call)


@pytest.fixture
def served() -> Iterator[tuple[str, Handler]]:
    handler = Handler()
    server = grpc.server(ThreadPoolExecutor(8), handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", handler
    server.stop(None)


def drain(calls: Calls, seconds: float = 20) -> dict[int, str | None]:
    ended: dict[int, str | None] = {}
    end = time.monotonic() + seconds
    while calls.open and time.monotonic() < end:
        ended.update(calls.receive(1))
    return ended


def test_every_call_ends_once_and_says_how(served: tuple[str, Handler]) -> None:
    address, handler = served
    bodies = [b"no" if index % 3 == 0 else b"%d" % index for index in range(600)]
    with Calls(address, METHOD) as calls:
        streams = [
            stream for start in range(0, 600, 7) for stream in calls.send(bodies[start:][:7])
        ]
        ended = drain(calls)
    assert sorted(ended) == streams == list(range(1, 1201, 2))
    for body, stream in zip(bodies, streams, strict=True):
        assert ended[stream] == (f"UNAVAILABLE: {WORDS}" if body == b"no" else None)
    assert sorted(handler.seen) == sorted(bodies)


def test_more_than_any_window_holds_arrives_whole(served: tuple[str, Handler]) -> None:
    address, handler = served
    bodies = [bytes((index,)) * 50_000 for index in range(200)]  # 10 MB each way
    with Calls(address, METHOD) as calls:
        calls.send(bodies)
        assert list(drain(calls).values()) == [None] * 200
        with pytest.raises(ValueError, match="over the window"):
            calls.send([bytes(1 << 26)])
    assert sorted(handler.seen) == bodies


def test_deadlines_and_unknown_methods(served: tuple[str, Handler]) -> None:
    address, _ = served
    with Calls(address, METHOD, seconds=1) as calls:
        (stream,) = calls.send([b"late"])
        assert calls.receive(0.1) == []
        assert (drain(calls)[stream] or "").startswith(("DEADLINE_EXCEEDED", "RST_STREAM"))
    with Calls(address, "/a.Service/Other") as calls:
        (stream,) = calls.send([b"a"])
        assert (drain(calls)[stream] or "").startswith("UNIMPLEMENTED")


def test_a_connection_that_ends_is_an_error(served: tuple[str, Handler]) -> None:
    address, _ = served
    with Calls(address, METHOD) as calls:
        calls.send([b"late"])
        calls._socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionError):
            drain(calls)
