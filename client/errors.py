"""What can go wrong in a call: the user's faults apart from the server's.

Every message says what came, what is allowed and what to do; `to_json` is the object that the
command line prints under `--json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What Triton says when rows are over max_batch_size; its status is the plain "invalid argument".
_TOO_MANY_ROWS = "batch-size must be <="

_USER_STATUSES = {
    "INVALID_ARGUMENT",
    "OUT_OF_RANGE",
    "ALREADY_EXISTS",
    "UNIMPLEMENTED",
    "400",
    "501",
}
_NOT_FOUND = {"NOT_FOUND", "404"}
_TIMED_OUT = {"DEADLINE_EXCEEDED", "CANCELLED", "408", "499", "504"}
_AWAY = {"UNAVAILABLE", "502", "503"}
_TOO_LARGE = {"RESOURCE_EXHAUSTED", "413"}
# Words that are only said before a request is begun: by us or Triton of a full queue, by Triton of
# a model that loads, of its own end; by gRPC of a connection that was never made. "Socket closed"
# is not one.
_UNSENT = re.compile(
    r"maximum queue size|overloaded: |is not ready|stopped accepting|server is stopping|"
    r"server exiting|failed to connect|connection refused|resolution failed|cannot resolve",
    re.IGNORECASE,
)
# Comes again with every attempt.
_TLS = re.compile(r"handshake|certificate|peer name|ssl_|wrong_version", re.IGNORECASE)
# A server that wants a header, over HTTP or gRPC.
_RESTRICTED = re.compile(r"is restricted, expecting header '([^']+)'")


class ClientError(Exception):
    """A call failed; `UserError` and `ServerError` say on whose side."""

    code = "client_error"

    def __init__(self, given: str, allowed: str = "", fix: str = "") -> None:
        super().__init__(given, allowed, fix)
        self.given = given
        self.allowed = allowed
        self.fix = fix

    def __str__(self) -> str:
        parts = [self.given]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.fix:
            parts.append(self.fix)
        return f"{self.code}: " + "; ".join(parts)

    def to_json(self) -> dict[str, dict[str, str]]:
        return {
            "error": {
                "code": self.code,
                "given": self.given,
                "allowed": self.allowed,
                "fix": self.fix,
            }
        }


class UserError(ClientError):
    """The request is wrong; sending it again cannot help."""


class BadRequest(UserError):
    code = "bad_request"


class BatchTooLarge(UserError):
    code = "batch_too_large"


class UnknownModel(UserError):
    code = "unknown_model"


class UnknownTier(UserError):
    """`tiers` lists the tiers that are there."""

    code = "unknown_tier"

    def __init__(self, tier: str, model: str, tiers: Sequence[str]) -> None:
        super().__init__(
            f"{model} has no tier {tier!r}",
            ", ".join(tiers) if tiers else "no tier is loaded",
            "name one of these, or load the tier in the server",
        )
        self.tier = tier
        self.model = model
        self.tiers = tuple(tiers)


class ServerError(ClientError):
    """The request may be right; the server, or the way to it, is at fault."""


class Unavailable(ServerError):
    """unsent: the server has certainly not begun with the request, so it may be sent again."""

    code = "unavailable"

    def __init__(
        self, given: str, allowed: str = "", fix: str = "", *, unsent: bool = False
    ) -> None:
        super().__init__(given, allowed, fix)
        self.unsent = unsent


class DeadlineExceeded(ServerError):
    code = "deadline_exceeded"


class ServerFault(ServerError):
    code = "server_fault"


def from_status(status: str | None, message: str, what: str) -> ClientError:
    """The typed error of a Triton answer.

    status: a gRPC code name ("INVALID_ARGUMENT", with or without "StatusCode.") or an HTTP status;
    what: the call in words, such as "demo_fast on 127.0.0.1:8001 over gRPC".
    """
    code = (status or "").removeprefix("StatusCode.")
    given = f"{what} answered: {message.strip() or 'nothing'}"
    if header := _RESTRICTED.search(message):
        fix = f"send it: headers={{{header[1]!r}: ...}}, or --header {header[1]}=..."
        return BadRequest(given, fix=fix)
    if code in _TIMED_OUT:
        return DeadlineExceeded(given, fix="allow more time with timeout_s, or send less at once")
    if code in _AWAY:
        return Unavailable(
            given,
            fix="check the address and that the server and model are ready",
            # 502 is a proxy's, whose server may have worked.
            unsent=code == "503" or _UNSENT.search(message) is not None,
        )
    if code in _NOT_FOUND:
        return UnknownModel(given, fix="list what is there with Client.tiers()")
    if _TOO_MANY_ROWS in message:
        return BatchTooLarge(given, fix="send fewer texts in one request")
    if code in _TOO_LARGE:
        return BadRequest(given, fix="send fewer or shorter texts in one request")
    if code in _USER_STATUSES:
        return BadRequest(given, fix="correct the request")
    return ServerFault(given, fix="see the server's log")


def deadline(what: str, timeout_s: float) -> DeadlineExceeded:
    """No answer within the time that the caller allowed."""
    return DeadlineExceeded(
        f"{what} did not answer within {timeout_s:.3g} s",
        fix="allow more time with timeout_s, or send less at once",
    )


def unreachable(what: str, reason: str, *, unsent: bool | None = None) -> Unavailable:
    """The connection failed; unsent: before anything was sent, by default read from `reason`."""
    tls = _TLS.search(reason) is not None
    if unsent is None:
        unsent = _UNSENT.search(reason) is not None
    fix = "check the address and port (gRPC and HTTP have each their own), and that Triton runs"
    if tls:
        fix = "check the certificates, the server's name, and whether it wants one of the client"
    return Unavailable(f"{what} cannot be reached: {reason}", fix=fix, unsent=unsent and not tls)
