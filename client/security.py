"""How a call proves who it is: certificates for gRPC, headers for both protocols."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from samp_client.errors import BadRequest

_NAME = re.compile(r"[a-z0-9_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")
# Each is set by the transport from what is sent; another value would break the request.
_RESERVED = frozenset(
    ("connection", "content-length", "content-type", "host", "te", "transfer-encoding")
)


@dataclass(frozen=True)
class Tls:
    """PEM files for an encrypted gRPC connection.

    ca: the certificates to trust, by default the ones that gRPC carries; cert and key: who this
    client is, where the server asks for it; server_name: the name that the server's certificate
    holds, where it is not the one that is called.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The bytes of ca, key and cert. BadRequest for half an identity or no such file."""
        if (self.cert is None) != (self.key is None):
            given = "a certificate without its key" if self.key is None else "a key alone"
            raise BadRequest(given, "both cert and key, or neither", "name the other file, too")
        return _pem("ca", self.ca), _pem("key", self.key), _pem("cert", self.cert)


def parse_headers(given: Iterable[str]) -> dict[str, str]:
    """Headers from "NAME=VALUE" each, as command lines have them. BadRequest for any other."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadRequest(f"--header {text}", "NAME=VALUE", "write both")
        found[name.strip()] = value
    return found


def check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers with lower-case names, as HTTP/2 wants them. BadRequest for what none can carry."""
    found: dict[str, str] = {}
    for name, value in (headers or {}).items():
        low = name.lower()
        if not _NAME.fullmatch(low) or low in _RESERVED or low.startswith("grpc-"):
            raise BadRequest(
                f"header name {name!r}",
                "letters, digits, '_', '.' and '-', and none that the protocol sets itself",
                "rename it",
            )
        if low.endswith("-bin") or not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise BadRequest(f"header {name} is {value!r}", "printable ASCII text", "encode it")
        found[low] = value
    return found


def _pem(what: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadRequest(f"{what} {path}: {error.strerror}", "a PEM file", "check it") from None
    if b"-----BEGIN " not in content:
        raise BadRequest(f"{what} {path} holds no PEM block", "a PEM file", "convert it")
    return content
