"""gRPC calls over one HTTP/2 connection, written frame by frame: callers that cost next to nothing.

The callers have the server's own cores, and grpcio takes 0.1 ms of them for a call, 0.4 where every
call finds cold caches. Here a call is one `send` of bytes that were made before. RFC 9113 (frames,
flow control), RFC 7541 (headers, without a dynamic table, so that equal headers are equal bytes)
and gRPC's own mapping, as far as calls of one message each way need them.
"""

from __future__ import annotations

import functools
import select
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import grpc

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
MOST_WINDOW = 2**31 - 1
WINDOW = 65_535  # of both sides until they say otherwise
MOST_FRAME = 16_384
NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class Calls:
    """One connection to `address` ("host:port"), all calls to one method; for one thread."""

    def __init__(self, address: str, method: str, seconds: int = 60) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), 10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = _request(address, method, seconds)
        self._stream = -1
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._read = bytearray()
        self._consumed = 0
        self._window = WINDOW  # bytes that the connection may still send
        self._stream_window = WINDOW
        self.open: set[int] = set()
        settings = b"\x00\x01" + bytes(4) + b"\x00\x04" + MOST_WINDOW.to_bytes(4, "big")
        more = (MOST_WINDOW - WINDOW).to_bytes(4, "big")
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(SETTINGS, 0, 0, settings)
            + _frame(WINDOW_UPDATE, 0, 0, more)
        )

    def __enter__(self) -> Calls:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, bodies: Sequence[bytes]) -> list[int]:
        """Begin a call with each serialized message; their streams, as `receive` names them."""
        streams = []
        for body in bodies:
            self._stream += 2
            streams.append(self._stream)
            self._unsent.append((self._stream, body))
        self.open.update(streams)
        self._flush()
        return streams

    def receive(self, seconds: float) -> list[tuple[int, str | None]]:
        """(stream, None or "CODE: words") of the calls that end within that time; waits for one."""
        ended: list[tuple[int, str | None]] = []
        end = time.monotonic() + seconds
        while not ended:
            if not select.select([self._socket], [], [], max(0.0, end - time.monotonic()))[0]:
                break
            new = self._socket.recv(1 << 18)
            if not new:
                raise ConnectionError("the server closed the connection")
            self._read += new
            self._frames(ended)
        return ended

    def _flush(self) -> None:
        """Send what flow control allows, all in one call."""
        out = []
        while self._unsent:
            stream, body = self._unsent[0]
            size = len(body) + 5
            if size > self._stream_window:
                raise ValueError(f"a message of {size} bytes, over the window of a stream")
            if size > self._window:
                break
            self._unsent.popleft()
            self._window -= size
            out.append(_frame(HEADERS, END_HEADERS, stream, self._headers))
            message = b"\x00" + len(body).to_bytes(4, "big") + body
            for start in range(0, size, MOST_FRAME):
                last = END_STREAM if start + MOST_FRAME >= size else 0
                out.append(_frame(DATA, last, stream, message[start : start + MOST_FRAME]))
        if out:
            self._socket.sendall(b"".join(out))

    def _frames(self, ended: list[tuple[int, str | None]]) -> None:
        read, at, reply = self._read, 0, []
        while len(read) - at >= 9:
            size = int.from_bytes(read[at : at + 3], "big")
            if len(read) - at - 9 < size:
                break
            kind, flags = read[at + 3], read[at + 4]
            stream = int.from_bytes(read[at + 5 : at + 9], "big")
            payload = bytes(read[at + 9 : at + 9 + size]) if kind != DATA else b""
            at += 9 + size
            if kind == DATA:
                self._consumed += size
            elif kind == HEADERS and flags & END_STREAM:
                if not flags & END_HEADERS or flags & ~5:
                    raise NotImplementedError("headers in several frames, or padded")
                self._end(stream, _outcome(payload), ended)
            elif kind == RST_STREAM:
                self._end(stream, f"RST_STREAM: {int.from_bytes(payload, 'big')}", ended)
            elif kind == SETTINGS and not flags & ACK:
                self._settings(payload)
                reply.append(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                reply.append(_frame(PING, ACK, 0, payload))
            elif kind == WINDOW_UPDATE and stream == 0:
                self._window += int.from_bytes(payload, "big")
            elif kind == GOAWAY:
                raise ConnectionError(f"the server goes away: {payload[8:]!r}")
        del read[:at]
        if self._consumed > 1 << 24:
            reply.append(_frame(WINDOW_UPDATE, 0, 0, self._consumed.to_bytes(4, "big")))
            self._consumed = 0
        if reply:
            self._socket.sendall(b"".join(reply))
        self._flush()

    def _end(self, stream: int, error: str | None, ended: list[tuple[int, str | None]]) -> None:
        if stream in self.open:  # a reset may follow the end
            self.open.remove(stream)
            ended.append((stream, error))

    def _settings(self, payload: bytes) -> None:
        for start in range(0, len(payload), 6):
            name = int.from_bytes(payload[start : start + 2], "big")
            if name == 4:
                self._stream_window = int.from_bytes(payload[start + 2 : start + 6], "big")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


def _request(address: str, method: str, seconds: int) -> bytes:
    """A request's header block: indexed where the static table has it, else plain literals."""

    def text(value: str) -> bytes:
        raw = value.encode()
        if len(raw) > 126:
            raise ValueError(f"{value}: over 126 bytes")
        return bytes((len(raw),)) + raw

    named = {"te": "trailers", "grpc-timeout": f"{seconds}S"}
    return (
        b"\x83\x86\x04" + text(method) + b"\x01" + text(address)  # POST, http, path, authority
        + b"\x0f\x10" + text("application/grpc")
        + b"".join(b"\x00" + text(name) + text(value) for name, value in named.items())
    )  # fmt: skip


@functools.lru_cache(4096)  # without a dynamic table equal bytes say the same
def _outcome(block: bytes) -> str | None:
    found = _headers(block)
    code = found.get("grpc-status")
    if code == "0":
        return None
    if code is None:
        return f"HTTP: {found}"
    return f"{NAMES[int(code)]}: {urllib.parse.unquote(found.get('grpc-message', ''))}"


def _headers(block: bytes) -> dict[str, str]:
    """The literals of a header block by name."""
    found: dict[str, str] = {}
    at = 0

    def number(bits: int) -> int:
        nonlocal at
        most = (1 << bits) - 1
        value = block[at] & most
        at += 1
        if value == most:
            shift, more = 0, True
            while more:
                value += (block[at] & 127) << shift
                more = bool(block[at] & 128)
                shift, at = shift + 7, at + 1
        return value

    def text() -> str:
        nonlocal at
        if block[at] & 128:
            raise NotImplementedError("a header in Huffman's code")
        size = number(7)
        at += size
        return block[at - size : at].decode()

    while at < len(block):
        first = block[at]
        if first & 128:  # indexed
            found[f"static {number(7)}"] = ""
        elif first & 0xE0 == 0x20:  # the size of the dynamic table
            if number(5):
                raise NotImplementedError("a dynamic table")
        else:
            index = number(6 if first & 64 else 4)
            name = f"static {index}" if index else text()
            found[name] = text()
    return found
