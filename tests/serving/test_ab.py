"""An A/B comparison of two served tiers, from the first request to the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from conftest import Served
from samp_client import BadRequest, Client, Unavailable, UnknownTier, connect
from samp_client.ab import collect

from samp_core.ab import report

ARMS = ("exact", "fast")


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with connect(served.grpc) as opened:
        yield opened


def test_both_arms_get_every_text_in_turn(served: Served, client: Client) -> None:
    texts = served.texts[:60]
    done: list[tuple[int, int]] = []
    records = collect(client, texts, *ARMS, seed=3, progress=lambda *step: done.append(step))
    assert done == [(count, 60) for count in range(1, 61)]
    assert [record.id for record in records] == [str(place // 2) for place in range(120)]
    pairs = list(zip(records[::2], records[1::2], strict=True))
    assert all({first.arm, second.arm} == set(ARMS) for first, second in pairs)
    assert sum(first.arm == "exact" for first, _ in pairs) == 30
    again = collect(client, texts[:60], *ARMS, seed=3, warmup=0)
    assert [record.arm for record in again] == [record.arm for record in records]
    assert [record.label for record in again] == [record.label for record in records]
    assert all(record.latency_ms > 0 and record.error is None for record in records)


def test_the_warm_up_is_sent_and_not_recorded(served: Served, client: Client) -> None:
    encoder = f"encoder_{served.model}_fast"
    before = client.statistics()[encoder].requests
    assert len(collect(client, served.texts[:10], *ARMS, warmup=4)) == 20
    assert client.statistics()[encoder].requests - before == 14


def test_the_report_of_two_real_tiers(served: Served, client: Client) -> None:
    texts, gold = served.texts[:200], served.gold[:200]
    records = collect(client, texts, *ARMS)
    found = report(
        records,
        texts,
        control="exact",
        candidate="fast",
        promise=0.5,
        gold=gold,
        classes=client.labels(),
    )
    assert json.loads(json.dumps(found)) == found
    assert found["n"] == 200
    exact = [one.label for one in client.predict(texts, "exact")]
    right = sum(label == want for label, want in zip(exact, gold, strict=True))
    assert found["accuracy"]["control"] == right / 200
    # The demo checkpoint has 0.82 on this split; half of that is the coin.
    assert found["accuracy"]["control"] > 0.7
    assert found["agreement"] == 1 - len(found["differing"]) / 200
    counts = found["mcnemar"]
    assert found["difference"]["value"] == (counts["b"] - counts["c"]) / 200
    low, high = found["difference"]["ci95"]
    assert low <= found["difference"]["value"] <= high
    assert found["verdict"] == "holds", "a promise of 50 points is kept by any tier"
    for row in found["differing"]:
        assert row["control"]["label"] != row["candidate"]["label"]
        assert row["text"] == texts[int(row["id"])]
    for arm in ARMS:
        marks = found["latency_ms"][arm]
        assert 0 < marks["p50"] <= marks["p95"] <= marks["p99"]


def test_a_text_that_fails_is_a_record_and_the_run_goes_on(served: Served, client: Client) -> None:
    texts = [*served.texts[:5], b"\xff", *served.texts[5:10]]
    records = collect(client, texts, *ARMS)
    failed = [record for record in records if record.error is not None]
    assert [record.id for record in failed] == ["5", "5"]
    assert all("UTF-8" in str(record.error) for record in failed)
    assert all(record.label is None and record.scores is None for record in failed)
    shown = [str(text) for text in texts]
    found = report(records, shown, control="exact", candidate="fast", promise=0.02)
    assert found["n"] == 10
    assert found["failed"] == {"exact": 1, "fast": 1}
    assert found["verdict"] == "undecided"


def test_what_cannot_be_compared_is_said_before_anything_is_sent(
    served: Served, client: Client
) -> None:
    with pytest.raises(BadRequest, match="both arms are 'fast'"):
        collect(client, served.texts[:3], "fast", "fast")
    with pytest.raises(UnknownTier, match="exact, fast"):
        collect(client, served.texts[:3], "exact", "slow")
    with connect("127.0.0.1:1") as nobody, pytest.raises(Unavailable):
        collect(nobody, served.texts[:3], *ARMS)
