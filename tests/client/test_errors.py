"""Whose fault a failed call is."""

import pytest
from samp_client import errors


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("StatusCode.INVALID_ARGUMENT", "unexpected shape for input 'TEXT'", errors.BadRequest),
        ("INVALID_ARGUMENT", "unexpected shape for input 'TEXT'", errors.BadRequest),
        ("400", "TEXT: row 0 is not UTF-8", errors.BadRequest),
        ("400", "batch-size must be <= 64 for 'm_fast'", errors.BatchTooLarge),
        ("INVALID_ARGUMENT", "batch-size must be <= 64 for 'm_fast'", errors.BatchTooLarge),
        ("RESOURCE_EXHAUSTED", "Received message larger than max", errors.BadRequest),
        ("413", "Request Entity Too Large", errors.BadRequest),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", errors.UnknownModel),
        ("404", "Request for unknown model: 'x' is not found", errors.UnknownModel),
        ("UNAVAILABLE", "Request for unknown model: 'x' is not ready", errors.Unavailable),
        ("503", "Exceeds maximum queue size", errors.Unavailable),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", errors.DeadlineExceeded),
        ("504", "", errors.DeadlineExceeded),
        ("INTERNAL", "Stub process is not healthy", errors.ServerFault),
        ("500", "Stub process is not healthy", errors.ServerFault),
        (None, "odd", errors.ServerFault),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x-y'", errors.BadRequest),
        (None, "This API is restricted, expecting header 'samp-key'", errors.BadRequest),
    ],
)
def test_a_status_becomes_its_error(status, message, kind):
    error = errors.from_status(status, message, "m_fast on 127.0.0.1:8001 over gRPC")
    assert type(error) is kind
    assert "m_fast on 127.0.0.1:8001 over gRPC" in str(error)
    assert message in str(error)
    assert error.fix


def test_the_two_sides_are_apart():
    user = {errors.BadRequest, errors.BatchTooLarge, errors.UnknownModel, errors.UnknownTier}
    server = {errors.Unavailable, errors.DeadlineExceeded, errors.ServerFault}
    assert all(issubclass(kind, errors.UserError) for kind in user)
    assert all(issubclass(kind, errors.ServerError) for kind in server)
    assert not issubclass(errors.UserError, errors.ServerError)
    codes = [kind.code for kind in user | server]
    assert len(set(codes)) == len(codes)


def test_an_unknown_tier_lists_those_there():
    error = errors.UnknownTier("slow", "reviews", ("balanced", "fast"))
    assert error.tiers == ("balanced", "fast")
    assert str(error).startswith(
        "unknown_tier: reviews has no tier 'slow'; allowed: balanced, fast"
    )


def test_the_json_of_the_command_line():
    error = errors.BadRequest("came", "may come", "do this")
    assert error.to_json() == {
        "error": {
            "code": "bad_request",
            "given": "came",
            "allowed": "may come",
            "fix": "do this",
        }
    }
