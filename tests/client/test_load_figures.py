"""The parts of a load test that need neither a server nor locust."""

import numpy as np
import pytest
from samp_client import BadRequest, StepTime, TierTimes
from samp_loadtest.results import Samples, report, summarize, table
from samp_loadtest.run import run_loadtest
from samp_loadtest.settings import (
    SAMPLE_TEXTS,
    find_addresses,
    format_mix,
    parse_mix,
    read_texts,
)


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("fast", {"fast": 1.0}),
        ("fast=3,exact=1", {"fast": 3.0, "exact": 1.0}),
        (" fast = 0.5 , my-tier ", {"fast": 0.5, "my-tier": 1.0}),
    ],
)
def test_mixes(text, mix):
    assert parse_mix(text) == mix
    assert parse_mix(format_mix(mix)) == mix


@pytest.mark.parametrize(
    "text", ["", "fast=", "fast=0", "fast=-1", "fast=x", "fast=inf", "Fast", "a,,b", "a=1,a=2"]
)
def test_mixes_that_mean_nothing(text):
    with pytest.raises(BadRequest, match="allowed: tier"):
        parse_mix(text)


def test_texts_from_jsonl_and_plain_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "é", "label": "x"}\n\n{"text": ""}\n', "utf-8")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", "utf-8")
    assert read_texts(str(tmp_path / "a.jsonl")) == ("é", "")
    assert read_texts(str(tmp_path / "a.txt")) == ("one", "two")
    assert read_texts(None) == read_texts("") == SAMPLE_TEXTS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "a.jsonl:2 has no string `text`"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1 has no string `text`"),
        ("a.jsonl", b"plain\n", "a.jsonl:1"),
        ("a.txt", b"\n\n", "holds no text"),
        ("a.txt", b"\xff\n", "decode"),
    ],
)
def test_text_files_that_cannot_be_used(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest, match=said):
        read_texts(str(tmp_path / name))
    with pytest.raises(BadRequest, match="nowhere"):
        read_texts(str(tmp_path / "nowhere.txt"))


def test_addresses_without_asking_a_server():
    assert find_addresses("triton", None, None) == {"grpc": "triton:8001", "http": "triton:8000"}
    assert find_addresses("triton", "other:9", None) == {"grpc": "other:9", "http": "triton:8000"}
    assert find_addresses(None, None, "h:1") == {"http": "h:1"}
    with pytest.raises(BadRequest, match="no address"):
        find_addresses(None, "", "")


def test_percentiles_are_those_of_the_raw_times():
    rng = np.random.default_rng(0)
    times = rng.gamma(2.0, 3.0, 997)
    samples = Samples()
    for index, time_ms in enumerate(times):
        samples.add(100.0 + index * 0.01, float(time_ms), None)
    figures = summarize(samples)
    assert figures["requests"] == 997
    assert figures["failures"] == 0
    for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert figures[name] == pytest.approx(np.quantile(times, quantile), abs=1e-3)
    span = 9.96 + times[-1] / 1e3
    assert figures["rps"] == pytest.approx(997 / span, rel=0.01)


def test_failures_count_as_sent_and_not_as_answered():
    samples = Samples()
    samples.add(10.0, 1000.0, None)
    samples.add(11.0, 1000.0, ValueError("first"))
    samples.add(11.5, 500.0, ValueError("second"))
    assert summarize(samples) == {
        "requests": 3,
        "failures": 2,
        "rps": 0.5,
        "p50": 1000.0,
        "p95": 1000.0,
        "p99": 1000.0,
    }
    assert samples.error == "first"


def test_nothing_sent_is_no_crash():
    assert summarize(Samples())["rps"] == 0.0
    assert summarize(Samples())["p99"] is None


def test_what_workers_send_joins_to_the_same():
    whole, parts = Samples(), [Samples(), Samples()]
    for index in range(10):
        failure = ValueError("gone") if index == 7 else None
        for one in (whole, parts[index % 2]):
            one.add(float(index), 2.0 * index, failure)
    joined = Samples()
    for part in parts:
        joined.join(Samples.from_json(part.to_json()))
    assert summarize(joined) == summarize(whole)
    assert joined.error == "gone"


def test_the_pinned_object_and_the_table():
    samples = Samples()
    samples.add(0.0, 4.0, None)
    steps = (StepTime("tokenizer_m", 1, 0.5, 0.25), StepTime("encoder_m_fast", 1, 0.25, 2.0))
    times = TierTimes("fast", steps)
    found = report({"fast": samples, "exact": Samples()}, {"fast": times})
    assert list(found["fast"]) == [
        "requests",
        "failures",
        "rps",
        "p50",
        "p95",
        "p99",
        "server_queue_ms",
        "server_compute_ms",
    ]
    assert (found["fast"]["server_queue_ms"], found["fast"]["server_compute_ms"]) == (0.75, 2.25)
    assert found["exact"]["server_queue_ms"] is None
    printed = table({"grpc:fast": samples}, [times])
    assert "grpc:fast" in printed
    assert "encoder_m_fast" in printed
    assert all(len(line) <= 100 for line in printed.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        {"users": 0},
        {"users": 10**6},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"seconds": 10**9},
        {"rows": 0},
        {"spawn_rate": 0.0},
        {"tiers": ""},
    ],
)
def test_limits_are_checked_before_anything_is_sent(arguments):
    with pytest.raises(BadRequest):
        run_loadtest("127.0.0.1:9", **{"tiers": "fast", **arguments})
