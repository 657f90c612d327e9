"""Triton's control interface over plain HTTP, the ports it gets, and what its log says."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samp_core.errors import SampError

# What a Triton without a GPU says at warning and error level, and goes on.
_HARMLESS = re.compile(
    r"pinned system memory|CUDA memory pool disabled|CudaDriverHelper|NVML|DCGM|CUDA driver version"
)
_ERROR_LINE = re.compile(r"(?:[EF]\d{4} [\d:.]+ +\d+ \S+\] *|[Ee]rror: |ERROR: )(.*)")
KEY_HEADER = "samp-key"
_LISTEN = "0A"
_TAKEN = re.compile(r"Socket '[^']*:(\d+)' already in use")
_RAISED = re.compile(r"(?:Internal: )?(?:SampError: )?(.*?)(?:\n\nAt:|$)", re.S)


class ControlError(Exception):
    """Triton refused a control call; its own words."""


@dataclass(frozen=True)
class Control:
    """The control calls of the server at `address` ("host:port").

    headers: what a server that restricts them wants to see (`restricted`).
    """

    address: str
    timeout_s: float = 180.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def index(self) -> dict[str, dict[str, str]]:
        """model -> {state, reason}; without a state where it was never loaded."""
        return {entry["name"]: entry for entry in self._request("POST", "/v2/repository/index")}

    def load(self, model: str) -> None:
        """(Re)load a model. Raises ControlError with the reason; its predecessor then stays."""
        self._request("POST", f"/v2/repository/models/{model}/load")

    def unload(self, model: str) -> None:
        self._request("POST", f"/v2/repository/models/{model}/unload")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._request("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """The JSON that answers JSON."""
        return self._request("POST", path, body)

    def text(self, path: str) -> str:
        """What stands at a path, as text."""
        return self._call("GET", path, None)[1].decode("utf-8", "replace")

    def _request(self, method: str, path: str, sent: Any = None) -> Any:
        status, body = self._call(method, path, sent)
        content = json.loads(body) if body.strip() else None
        if status != 200:
            said = content.get("error") if isinstance(content, dict) else None
            raise ControlError(said or f"HTTP status {status}")
        return content

    def _call(self, method: str, path: str, sent: Any) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=self.timeout_s)
        with contextlib.closing(connection):
            body = json.dumps(sent or {}).encode() if method == "POST" else None
            connection.request(method, path, body=body, headers=dict(self.headers))
            response = connection.getresponse()
            return response.status, response.read()


def guard(key: str) -> str:
    """Triton's option by which inference over HTTP, where a JSON shape takes memory before it is
    checked, and HTTP calls that change the server want the header KEY_HEADER: `key`.
    """
    calls = "inference,shared-memory,model-repository,trace,logging"
    return f"--http-restricted-api={calls}:{KEY_HEADER}={key}"


def restricted(options: Sequence[str]) -> dict[str, str]:
    """The headers that these options of Triton make its HTTP interface ask for."""
    headers = {}
    for index, word in enumerate(options):
        name, given, value = word.partition("=")
        if name != "--http-restricted-api":
            continue
        if not given:
            value = next(iter(options[index + 1 :]), "")
        header, _, wanted = value.partition(":")[2].partition("=")
        headers[header] = wanted
    return headers


def listens(pid: int, port: int) -> bool:
    """Whether that very process listens on a port: another one may hold it and answer."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()) in sockets:
                    return True
    return False


def stubs(triton: int) -> dict[str, list[int]]:
    """Model name -> the processes of its instances that live, among the children of a Triton."""
    found: dict[str, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            # The name, in brackets, may hold anything; after it come the state and the parent.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != triton:
                continue
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"python_backend_stub" in words[0]:
                model = Path(os.fsdecode(words[1])).parents[1].name
                found.setdefault(model, []).append(int(folder.name))
    return found


def choose_ports(host: str, wanted: Sequence[int]) -> list[int]:
    """The ports in the order given, a free one for each 0. Raises SampError on a taken one."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in wanted:
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except (OSError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                    raise taken_port(host, port) from None
                raise SampError(
                    "bad_address",
                    f"{host}:{port}: {getattr(error, 'strerror', None) or error}",
                    "an address of this machine, and a port that this user may open",
                    "choose another one",
                ) from None
            ports.append(probe.getsockname()[1])
    return ports


def taken_port(host: str, port: int) -> SampError:
    return SampError(
        "port_taken",
        f"{host}:{port} is in use by another program",
        "a free port, or 0 for any",
        "choose another port, or stop what listens there",
    )


def port_in_log(log: str) -> int | None:
    """The port that Triton found taken."""
    match = _TAKEN.search(log)
    return int(match.group(1)) if match else None


def relevant_line(log: str) -> str:
    """The last line of a Triton log that reports an error; empty if none does."""
    found = ""
    for line in log.splitlines():
        error = _ERROR_LINE.match(line)
        if (error or "error while loading shared libraries" in line) and not _HARMLESS.search(line):
            found = (error.group(1) if error else line).strip().strip('"')
    return found.split("\\n")[0]


def lost_a_lock(log: str) -> bool:
    """Whether a Triton or one of its model processes ended on a lock that was no more.

    On a starved machine Triton 24.10 gives a starting process up after a second without a sign of
    life, and frees the queues that both use (docs/reliability.md). Another start may go well.
    """
    return "boost::interprocess::lock_exception" in log


def raised_text(reason: str) -> str:
    """What a model process raised, on one line, out of Triton's reason with its trace."""
    match = _RAISED.match(reason.split("UNAVAILABLE state: ")[-1].strip())
    return " ".join(match.group(1).split()) if match else ""
