"""samp_client against a real Triton, over both protocols."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from calls import classify, counted
from conftest import Served
from forked import wait_for
from samp_client import (
    BadRequest,
    BatchTooLarge,
    Client,
    DeadlineExceeded,
    Unavailable,
    UnknownModel,
    UnknownTier,
    connect,
)

PROTOCOLS = ("grpc", "http")
NOT_UTF8 = b"a fine \xff film"


def address(served: Served, protocol: str) -> str:
    return served.grpc if protocol == "grpc" else served.http


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(served: Served, protocol: str) -> Iterator[Client]:
    with connect(address(served, protocol), protocol) as opened:
        yield opened


def test_everything_is_read_from_the_server(served: Served, client: Client) -> None:
    assert client.model() == served.model
    assert client.tiers() == tuple(sorted(served.tiers))
    assert client.labels() == tuple(served.labels)
    info = client.describe("fast")
    assert info.ensemble == f"{served.model}_fast"
    assert info.max_rows == 64
    assert info.steps == (
        f"tokenizer_{served.model}",
        f"encoder_{served.model}_fast",
        f"head_{served.model}",
    )


def test_predictions_are_the_servers_own(served: Served, client: Client) -> None:
    texts = served.texts[:20]
    raw = classify(served.grpc, f"{served.model}_exact", texts)
    found = client.predict(texts, "exact")
    assert [one.index for one in found] == list(range(20))
    assert [one.label for one in found] == [label.decode() for label in raw["LABEL"][:, 0]]
    np.testing.assert_allclose([one.scores for one in found], raw["SCORES"], atol=1e-5)
    np.testing.assert_allclose([one.score for one in found], raw["SCORE"][:, 0], atol=1e-5)
    for one in found:
        assert one.labels == tuple(served.labels)
        assert one.label == one.labels[int(np.argmax(one.scores))]
        assert one.truncated is False


def test_any_number_of_texts_keeps_its_order(served: Served, client: Client) -> None:
    texts = [served.texts[index % 50] for index in range(150)]
    found = client.predict(texts, "exact")
    assert [one.index for one in found] == list(range(150))
    for one in found[50:]:
        np.testing.assert_allclose(one.scores, found[one.index % 50].scores, atol=1e-5)
    assert client.predict([], "exact") == []


def test_bytes_and_str_are_one_text(served: Served, client: Client) -> None:
    text = "Une comédie très réussie"
    as_str, as_bytes = client.predict([text, text.encode()], "exact")
    assert as_str.scores == pytest.approx(as_bytes.scores, abs=1e-6)


def test_a_long_text_says_that_it_was_truncated(client: Client) -> None:
    short, long = client.predict(["fine", "fine " * 200_000], "fast")
    assert (short.truncated, long.truncated) == (False, True)


def test_bad_texts_are_refused_and_serving_goes_on(client: Client) -> None:
    with pytest.raises(BadRequest, match="UTF-8"):
        client.predict(["fine", NOT_UTF8], "fast")
    with pytest.raises(BadRequest, match="text 1 is int"):
        client.predict(["fine", 3], "fast")  # type: ignore[list-item]
    assert len(client.predict(["fine"], "fast")) == 1


def test_outcomes_fail_only_the_bad_texts(served: Served, client: Client) -> None:
    texts: list[str | bytes] = list(served.texts[:70])
    texts[3], texts[66] = NOT_UTF8, "lone \ud800"
    found = list(client.outcomes(texts, "exact"))
    assert [one.index for one in found] == list(range(70))
    assert [one.index for one in found if one.error is not None] == [3, 66]
    assert all(isinstance(found[index].error, BadRequest) for index in (3, 66))
    good = [text for index, text in enumerate(texts) if index not in (3, 66)]
    for one, expected in zip(
        (one.prediction for one in found if one.prediction is not None),
        client.predict(good, "exact"),
        strict=True,
    ):
        np.testing.assert_allclose(one.scores, expected.scores, atol=1e-5)


def test_unknown_names_list_what_there_is(served: Served, client: Client, protocol: str) -> None:
    with pytest.raises(UnknownTier) as caught:
        client.predict(["fine"], "slow")
    assert caught.value.tiers == tuple(sorted(served.tiers))
    assert ", ".join(sorted(served.tiers)) in str(caught.value)
    with (
        connect(address(served, protocol), protocol, model="other") as other,
        pytest.raises(UnknownModel, match=f"'other'; allowed: {served.model}"),
    ):
        other.predict(["fine"], "fast")


def test_rows_bound_the_requests(served: Served, client: Client) -> None:
    encoder = f"encoder_{served.model}_fast"
    before = counted(lambda: client.statistics()[encoder].requests)
    client.predict(served.texts[:10], "fast", rows=4)
    wait_for(lambda: client.statistics()[encoder].requests - before >= 3, 10)
    assert counted(lambda: client.statistics()[encoder].requests) - before == 3
    with pytest.raises(BatchTooLarge, match="at most 64"):
        client.predict(["fine"], "fast", rows=65)
    with pytest.raises(BadRequest, match="0 rows"):
        client.predict(["fine"], "fast", rows=0)


def test_the_servers_own_limit_is_the_same_error(served: Served, protocol: str) -> None:
    """What a client with another idea of the limit would get."""
    with connect(address(served, protocol), protocol) as opened:
        transport = opened._transport
        with pytest.raises(BatchTooLarge, match="64"):
            transport.infer(f"{served.model}_fast", {"TEXT": [b"fine"] * 65}, 10.0)


def test_the_deadline_holds_and_the_client_survives_it(served: Served, client: Client) -> None:
    client.predict(["fine"], "exact")
    texts = ["fine " * 300] * 64
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="within 0"):
        client.predict(texts, "exact", timeout_s=0.02)
    assert time.monotonic() - start < 1.0
    assert len(client.predict(["fine"], "exact")) == 1


def test_a_server_that_is_not_there(served: Served, protocol: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        connect(f"127.0.0.1:{port}", protocol) as nobody,
        pytest.raises(Unavailable, match=f"127.0.0.1:{port} over .* cannot be reached"),
    ):
        nobody.predict(["fine"], "fast")
    other = served.http if protocol == "grpc" else served.grpc
    with connect(other, protocol) as crossed, pytest.raises(Unavailable, match="have each their"):
        crossed.predict(["fine"], "fast")


def test_a_server_that_does_not_answer(protocol: str) -> None:
    """The port accepts and stays silent, as a stopped process does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with connect(f"127.0.0.1:{port}", protocol, timeout_s=0.3) as waiting:
            start = time.monotonic()
            with pytest.raises((DeadlineExceeded, Unavailable)):
                waiting.tiers()
            assert time.monotonic() - start < 2.0


def test_a_tier_that_was_unloaded_is_unknown(served: Served, protocol: str) -> None:
    name = f"{served.model}_exact"
    control = triton.InferenceServerClient(served.grpc)
    with connect(address(served, protocol), protocol) as opened:
        opened.predict(["fine"], "exact")
        control.unload_model(name)
        try:
            end = time.monotonic() + 10
            while control.is_model_ready(name) and time.monotonic() < end:
                time.sleep(0.05)
            with pytest.raises(UnknownTier) as caught:
                opened.predict(["fine"], "exact")
            assert "exact" not in caught.value.tiers
            assert len(opened.predict(["fine"], "fast")) == 1
        finally:
            control.load_model(name)
            control.close()
        assert len(opened.predict(["fine"], "exact")) == 1


def test_a_closed_client_says_so(served: Served, protocol: str) -> None:
    opened = connect(address(served, protocol), protocol)
    opened.predict(["fine"], "fast")
    opened.close()
    opened.close()
    with pytest.raises(BadRequest, match="closed"):
        opened.predict(["fine"], "fast")


def test_threads_share_a_grpc_client(served: Served) -> None:
    texts = served.texts[:40]
    with connect(served.grpc) as opened, ThreadPoolExecutor(8) as pool:
        alone = [opened.predict([text], "exact")[0].scores for text in texts]
        together = pool.map(lambda text: opened.predict([text], "exact")[0].scores, texts)
        np.testing.assert_allclose(list(together), alone, atol=1e-5)


def _requests(client: Client, before: Any) -> list[int]:
    return [
        step.requests for step in client.server_times("exact", before, client.statistics()).steps
    ]


def test_server_times_are_of_the_requests_between_two_readings(
    served: Served, client: Client
) -> None:
    client.predict(["fine"], "exact")
    time.sleep(0.2)  # a step's counters come a moment after its answer
    before = client.statistics()
    start = time.perf_counter()
    for text in served.texts[:12]:
        client.predict([text], "exact")
    # The last one's, too: on a busy machine that moment can be long.
    assert wait_for(lambda: _requests(client, before) == [12, 12, 12], 10)
    elapsed_ms = (time.perf_counter() - start) * 1e3 / 12
    times = client.server_times("exact", before, client.statistics())
    assert times.queue_ms is not None
    assert times.compute_ms is not None
    assert times.compute_ms > 0.1
    # An instance computes one request after the other, so that these times do not overlap. Those of
    # two steps may, and a queue with the request before: its answer leaves before it has ended.
    for step in times.steps:
        assert 0 < (step.compute_ms or 0) < elapsed_ms
        assert 0 < (step.queue_ms or 0) < elapsed_ms
    idle = client.server_times("fast", before, client.statistics())
    assert idle.steps[1].requests == 0
    assert idle.steps[1].compute_ms is None
