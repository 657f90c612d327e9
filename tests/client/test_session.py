"""What is sent again, when, and what never is: the client's logic, without a server."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samp_client import (
    BadRequest,
    DeadlineExceeded,
    Retry,
    ServerFault,
    Tls,
    Unavailable,
    connect,
    errors,
)
from samp_client.security import check_headers
from samp_client.session import Ask, Pause, Session

REFUSED = Unavailable("full", unsent=True)


def session(**settings: Any) -> Session:
    given = {"model": None, "timeout_s": 30.0, "request_timeout_s": None, "retry": None}
    return Session("here", **{**given, **settings})


def run(made: Session, replies: list[Any], timeout_s: float = 30.0) -> tuple[Any, list[float]]:
    """The result of one call whose attempts meet `replies`, and the pauses between them."""
    steps = made.ask(made.clock(timeout_s), "index")
    pauses: list[float] = []
    left = iter(replies)
    step = next(steps)
    while True:
        try:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                step = steps.send(None)
                continue
            assert isinstance(step, Ask)
            reply = next(left)
            if isinstance(reply, Exception):
                step = steps.throw(reply)
            else:
                step = steps.send(reply)
        except StopIteration as end:
            assert not list(left), "not every reply was asked for"
            return end.value, pauses


@given(st.integers(1, 12), st.integers(0, 12))
def test_refusals_are_sent_again_so_many_times(attempts: int, refusals: int) -> None:
    retry = Retry(attempts, first_s=0.01, most_s=0.5)
    replies: list[Any] = [REFUSED] * min(refusals, attempts)
    if refusals < attempts:
        found, pauses = run(session(retry=retry), [*replies, "answer"], 3600)
        assert found == "answer"
        assert len(pauses) == refusals
        for sent, pause in enumerate(pauses):
            longest = min(0.5, 0.01 * 2**sent)
            assert longest / 2 <= pause <= longest
    else:
        with pytest.raises(Unavailable):
            run(session(retry=retry), replies, 3600)


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("wrong"),
        ServerFault("broken"),
        DeadlineExceeded("late"),
        Unavailable("the connection broke", unsent=False),
    ],
)
def test_nothing_else_is_sent_again(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(session(retry=Retry(attempts=5)), [error])
    with pytest.raises(Unavailable):
        run(session(), [REFUSED])


def test_no_pause_reaches_beyond_the_deadline() -> None:
    retry = Retry(attempts=100, first_s=1.0, most_s=1.0)
    with pytest.raises(Unavailable):
        run(session(retry=retry), [REFUSED], timeout_s=0.4)


def test_a_request_may_have_less_time_than_its_call() -> None:
    made = session(request_timeout_s=2.0)
    assert next(made.ask(made.clock(30.0), "index")).timeout_s == 2.0  # type: ignore[union-attr]
    assert next(made.ask(made.clock(1.0), "index")).timeout_s <= 1.0  # type: ignore[union-attr]
    clock = made.clock(0.01)
    time.sleep(0.02)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
        next(made.ask(clock, "index"))


@pytest.mark.parametrize(
    ("status", "message", "unsent"),
    [
        ("UNAVAILABLE", "Exceeds maximum queue size", True),
        ("UNAVAILABLE", "Request for unknown model: 'x' is not ready", True),
        ("UNAVAILABLE", "Socket closed", False),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", False),
        ("503", "", True),
        ("502", "Bad Gateway", False),
    ],
)
def test_what_the_server_has_not_begun(status: str, message: str, unsent: bool) -> None:
    error = errors.from_status(status, message, "m")
    assert isinstance(error, Unavailable)
    assert error.unsent is unsent


def test_a_connection_that_was_never_made() -> None:
    refused = "failed to connect to all addresses; Connection refused (111)"
    assert errors.unreachable("m", refused).unsent
    assert not errors.unreachable("m", f"{refused}: Ssl handshake failed").unsent
    assert "certificates" in errors.unreachable("m", "Ssl handshake failed").fix
    assert not errors.unreachable("m", "Connection reset by peer").unsent


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"a b": "c"}, "header name 'a b'"),
        ({"Content-Length": "3"}, "header name 'Content-Length'"),
        ({"grpc-timeout": "3"}, "header name 'grpc-timeout'"),
        ({"a": "line\nline"}, "header a is"),
        ({"a": "é"}, "header a is"),
        ({"a-bin": "b"}, "header a-bin is"),
    ],
)
def test_headers_that_no_request_can_carry(headers: dict[str, str], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        connect("127.0.0.1:1", headers=headers)
    assert check_headers({"Authorization": "Bearer x"}) == {"authorization": "Bearer x"}


def test_certificates_that_are_none(tmp_path: Any) -> None:
    file = tmp_path / "file.pem"
    file.write_text("none")
    for tls, said in [
        (Tls(ca=tmp_path / "nowhere"), "nowhere: No such file"),
        (Tls(ca=file), "holds no PEM block"),
        (Tls(cert=file), "a certificate without its key"),
        (Tls(key=file), "a key alone"),
    ]:
        with pytest.raises(BadRequest, match=said):
            connect("127.0.0.1:1", tls=tls)
    with pytest.raises(BadRequest, match="TLS over gRPC"):
        connect("127.0.0.1:1", "http", tls=Tls())


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first_s": 0}, {"first_s": 3, "most_s": 2}])
def test_a_retry_makes_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="attempts of 1 or more"):
        Retry(**wrong)
