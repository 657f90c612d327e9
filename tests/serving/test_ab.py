"""An A/B comparison of two served tiers, from the first request to the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calls import counted
from conftest import Served
from forked import wait_for
from samp_client import BadRequest, Client, Unavailable, UnknownTier, connect
from samp_client.ab import collect

from samp_core.ab import compare, report
from samp_core.errors import SampError

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
    before = counted(lambda: client.statistics()[encoder].requests)
    assert len(collect(client, served.texts[:10], *ARMS, warmup=4)) == 20
    wait_for(lambda: client.statistics()[encoder].requests - before >= 14, 10)
    assert counted(lambda: client.statistics()[encoder].requests) - before == 14


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


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_file_is_compared_from_end_to_end(served: Served, client: Client, tmp_path: Path) -> None:
    rows = [
        {"text": text, "label": label}
        for text, label in zip(served.texts[:40], served.gold[:40], strict=True)
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    stages: list[tuple[str, int]] = []
    steps: list[None] = []

    def progress(title: str, count: int) -> Callable[[], None]:
        stages.append((title, count))
        return lambda: steps.append(None)

    found = compare(client, data, *ARMS, promise_points=50, limit=30, progress=progress)
    assert stages == [("exact and fast", 30)]
    assert len(steps) == 30
    assert found["n"] == 30
    assert found["accuracy"] is not None
    assert found["verdict"] == "holds"
    texts_only = write(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in rows[:5]])
    unlabelled = compare(client, texts_only, *ARMS)
    assert (unlabelled["n"], unlabelled["accuracy"]) == (5, None)


def test_files_that_cannot_be_compared(client: Client, tmp_path: Path) -> None:
    foreign = write(
        tmp_path / "a.jsonl", [{"text": "x", "label": "0"}, {"text": "y", "label": "1"}]
    )
    with pytest.raises(SampError, match="cannot answer: 0, 1; allowed: "):
        compare(client, foreign, *ARMS)
    half = write(tmp_path / "b.jsonl", [{"text": "x", "label": client.labels()[0]}, {"text": "y"}])
    with pytest.raises(SampError, match="no column label"):
        compare(client, half, *ARMS)
    with pytest.raises(SampError, match="1 or more"):
        compare(client, half, *ARMS, limit=0)
    whole = write(
        tmp_path / "c.jsonl", [{"text": label, "label": label} for label in client.labels()]
    )
    with pytest.raises(SampError, match="0 to 100 points"):
        compare(client, whole, *ARMS, promise_points=101)
