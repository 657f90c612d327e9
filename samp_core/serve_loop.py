"""What `samp serve` does while its Triton runs: signals, orders of other commands, watching.

Orders come over a socket of the abstract namespace (no file that could be left behind), named
after the server and open to this user only: one line of JSON in, lines of JSON out, the last with
`result` or `error`. One activation runs at a time, and the loop goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from samp_core.errors import SampError
from samp_core.server import Server

Say = Callable[[dict[str, Any]], None]
_POLL_S = 0.1
_WATCH_S = 0.5
_LINE = 1 << 16


def serve_forever(
    server: Server, ready: Callable[[], None] | None = None, *, watch: bool = False
) -> None:
    """Wait until SIGINT or SIGTERM stops the server; SIGHUP loads the current builds.

    `ready` is called once the signals are handled: whoever reads "ready" may send one at once.
    watch: load a folder's current build whenever it changes. Raises SampError when Triton ends by
    itself. For the main thread.
    """
    # Plain names: a handler that set an Event would wait for ever on the lock that wait() holds.
    asked = changed = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    def reload(_number: int, _frame: FrameType | None) -> None:
        nonlocal changed
        changed = True

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: reload}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    orders = Orders(server)
    seen = {out: _current(out) for out in server.builds}
    looked = time.monotonic()
    try:
        orders.listen()
        if ready is not None:
            ready()
        while not asked:
            time.sleep(_POLL_S)
            if server.poll() is not None:
                raise server.died()
            if changed:
                changed = False
                for out in seen:
                    orders.later(out)
            if watch and time.monotonic() - looked > _WATCH_S:
                looked = time.monotonic()
                for out, build in seen.items():
                    if (now := _current(out)) not in (build, None):
                        seen[out] = now
                        orders.later(out)
    finally:
        server.stop()
        orders.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _current(out: Path) -> str | None:
    """The current build's name; None in the moment when there is none."""
    with contextlib.suppress(OSError):
        return (out / "current").readlink().name
    return None


class Orders:
    """Activations of one server, one after another, each in a thread that answers its sender."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._one = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._closed = False

    def listen(self) -> None:
        """Take orders from now on, and say where."""
        name = f"samp/{self._server.prefix}"
        self._socket.bind("\0" + name)
        self._socket.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        self._server.describe(pid=os.getpid(), control=name)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def later(self, out: Path) -> None:
        """Load a folder's current build; what goes wrong is a line on stderr."""

        def say(line: dict[str, Any]) -> None:
            if "error" in line and not self._closed:
                error = SampError(**line["error"])
                print(
                    f"samp: {error}; what was served before still is", file=sys.stderr, flush=True
                )
            elif "result" in line and line["result"]["loads"]:
                made = line["result"]
                for text in made["notes"]:
                    print(f"  note: {text}", file=sys.stderr)
                print(f"  {made['repository']}: build {made['build']} is served", file=sys.stderr)
                sys.stderr.flush()

        threading.Thread(target=self._obey, args=({"out": str(out)}, say), daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", peer)[1] not in (os.getuid(), 0):
                return
            order = json.loads(connection.makefile("rb").readline(_LINE))

            def say(line: dict[str, Any]) -> None:
                # Who asked may have gone: what was begun is finished all the same.
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps(line).encode() + b"\n")

            self._obey(order, say)

    def _obey(self, order: dict[str, Any], say: Say) -> None:
        try:
            with self._one:
                result = self._server.activate(
                    Path(order["out"]),
                    order.get("build"),
                    force=bool(order.get("force")),
                    again=bool(order.get("again")),
                    progress=lambda i, of, what: say({"step": i, "of": of, "what": what}),
                )
        except SampError as error:
            say(error.to_json())
        except Exception as error:  # a server that stops, a disk that is full
            say(SampError("activation", f"{type(error).__name__}: {error}", "", "").to_json())
        else:
            say({"result": result})


def send(control: str, order: dict[str, Any], step: Callable[[int, int, str], None]) -> Any:
    """Send an order to the server that listens at `control`; its result.

    Raises the server's own error, and SampError when it has gone.
    """
    gone = SampError("server_gone", "the server ended meanwhile", "", "samp serve starts it again")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect("\0" + control)
            connection.sendall(json.dumps(order).encode() + b"\n")
            for raw in connection.makefile("rb"):
                line = json.loads(raw)
                if "step" in line:
                    step(line["step"], line["of"], line["what"])
                elif "error" in line:
                    raise SampError(**line["error"])
                else:
                    return line["result"]
    except OSError:
        raise gone from None
    raise gone
