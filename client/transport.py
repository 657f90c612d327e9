"""What a protocol must be able to do; the modules grpc_... and http_... do it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from samp_client.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[np.generic]]

Columns: TypeAlias = Mapping[str, Sequence[bytes]]
"""Input name -> its rows."""
ProtocolName = Literal["grpc", "http"]
DEFAULT_PORTS = {"grpc": 8001, "http": 8000}

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+)(:(?P<port>\d{1,5}))?/?")


class Transport(Protocol):
    """One connection to one Triton. Times are seconds; all calls raise ClientError."""

    def infer(self, model: str, columns: Columns, timeout_s: float) -> Tensors:
        """All outputs of the model for BYTES inputs [rows, 1]."""
        ...

    def index(self, timeout_s: float) -> list[dict[str, Any]]:
        """The repository index: name, version, state, reason."""
        ...

    def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The model's configuration, as Triton's JSON."""
        ...

    def statistics(self, timeout_s: float) -> list[dict[str, Any]]:
        """The statistics of every model that is loaded, as Triton's JSON."""
        ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same, awaited, on one event loop; several calls may be under way at once."""

    def infer(self, model: str, columns: Columns, timeout_s: float) -> Awaitable[Tensors]: ...
    def index(self, timeout_s: float) -> Awaitable[list[dict[str, Any]]]: ...
    def config(self, model: str, timeout_s: float) -> Awaitable[dict[str, Any]]: ...
    def statistics(self, timeout_s: float) -> Awaitable[list[dict[str, Any]]]: ...
    async def close(self) -> None: ...


def parse_address(url: str, protocol: ProtocolName) -> str:
    """`host:port` from "host", "host:port", "http://host:port" or "grpc://host:port".

    Triton's usual port is added where none is given. BadRequest for anything else.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        scheme, rest = protocol, url
    match = _ADDRESS.fullmatch(rest)
    port = int(match["port"] or DEFAULT_PORTS[protocol]) if match else 0
    if match is None or scheme not in ("grpc", "http") or not 0 < port < 65536:
        raise BadRequest(
            f"address {url!r}",
            "host:port, optionally after http:// or grpc:// (no path; TLS by tls=...)",
            f"write for example 127.0.0.1:{DEFAULT_PORTS[protocol]}",
        )
    return f"{match['host']}:{port}"
