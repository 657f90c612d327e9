"""What `samp ab` says of records whose truth is known."""

import json
from dataclasses import dataclass

import pytest

from samp_core import evaluate
from samp_core.ab import report
from samp_core.errors import SampError


@dataclass(frozen=True)
class Record:
    id: str
    arm: str
    label: str | None
    scores: tuple[float, ...] | None
    latency_ms: float
    error: str | None = None


def records(control, candidate):
    """One letter a text and arm: the label, or "!" for a failed request."""
    made = []
    for index, letters in enumerate(zip(control, candidate, strict=True)):
        for arm, letter in zip(("exact", "fast"), letters, strict=True):
            answered = letter != "!"
            made.append(
                Record(
                    str(index),
                    arm,
                    letter if answered else None,
                    (0.75, 0.25) if answered else None,
                    10.0 + index if arm == "exact" else 5.0 + index,
                    None if answered else "unavailable: gone",
                )
            )
    return made


def judge(control, candidate, gold=None, promise=0.01, **more):
    texts = [f"text {index}" for index in range(len(control))]
    return report(
        records(control, candidate),
        texts,
        control="exact",
        candidate="fast",
        promise=promise,
        gold=gold,
        **more,
    )


def test_the_pinned_object():
    found = judge("aabb", "abba", "aaba")
    assert set(found) == {
        "control",
        "candidate",
        "n",
        "agreement",
        "accuracy",
        "mcnemar",
        "difference",
        "latency_ms",
        "verdict",
        "differing",
        "reason",
        "failed",
        "metric",
        "values",
    }
    assert (found["control"], found["candidate"], found["n"]) == ("exact", "fast", 4)
    assert found["agreement"] == 0.5
    assert found["accuracy"] == {"control": 0.75, "candidate": 0.75}
    assert found["mcnemar"] == {"b": 1, "c": 1, "p": 1.0}
    assert found["difference"] == {
        "value": 0.0,
        "ci95": list(evaluate.tango_interval(1, 1, 4)),
    }
    assert [row["id"] for row in found["differing"]] == ["1", "3"]
    assert found["differing"][0] == {
        "id": "1",
        "text": "text 1",
        "label": "a",
        "control": {"label": "a", "scores": [0.75, 0.25]},
        "candidate": {"label": "b", "scores": [0.75, 0.25]},
    }
    assert json.loads(json.dumps(found)) == found


def test_latency_is_by_arm_with_intervals():
    latency = judge("a" * 101, "a" * 101)["latency_ms"]
    assert latency["exact"]["p50"] == 60.0
    assert latency["fast"]["p50"] == 55.0
    for arm in latency.values():
        for name in ("p50", "p95", "p99"):
            low, high = arm["ci95"][name]
            assert low <= arm[name] <= high
        assert arm["p50"] < arm["p95"] < arm["p99"]


def test_holds_when_the_upper_bound_is_within_the_promise():
    n = 2_525
    found = judge("a" * n, "a" * n, "a" * n, promise=0.005)
    assert found["verdict"] == "holds"
    assert found["reason"].startswith("the drop is at most 0.11 points")


def test_broken_when_the_lower_bound_is_beyond_the_promise():
    found = judge("a" * 500, "b" * 40 + "a" * 460, "a" * 500, promise=0.02)
    assert found["verdict"] == "broken"
    assert found["mcnemar"]["p"] < 1e-9
    assert found["difference"]["value"] == 0.08


def test_undecided_says_how_many_texts_would_decide():
    found = judge("a" * 100, "a" * 100, "a" * 100, promise=0.005)
    assert found["verdict"] == "undecided"
    needed = evaluate.examples_needed(0.005, 0.0)
    assert f"about {needed} texts would decide it" in found["reason"]
    assert judge("a" * needed, "a" * needed, "a" * needed, promise=0.005)["verdict"] == "holds"


def test_undecided_when_the_drop_seen_is_the_promise():
    found = judge("a" * 100, "b" + "a" * 99, "a" * 100, promise=0.01)
    assert found["verdict"] == "undecided"
    assert "too near the promise" in found["reason"]


def test_without_labels_only_agreement():
    found = judge("aabb", "abbb")
    assert found["agreement"] == 0.75
    assert (found["accuracy"], found["mcnemar"], found["difference"]) == (None, None, None)
    assert found["verdict"] == "undecided"
    assert "no labels" in found["reason"]
    assert found["differing"][0]["label"] is None


def test_without_a_promise_the_span_alone():
    found = judge("aab", "aaa", "aaa", promise=None)
    assert found["verdict"] == "undecided"
    assert "no promise" in found["reason"]
    assert found["difference"]["value"] == pytest.approx(-1 / 3)


def test_failed_requests_are_counted_and_left_out_of_the_figures():
    found = judge("a!ab!", "aa!b!", "aaaaa")
    assert found["n"] == 2
    assert found["failed"] == {"exact": 2, "fast": 2}
    assert found["accuracy"] == {"control": 0.5, "candidate": 0.5}


def test_failures_of_one_arm_cannot_help_the_verdict():
    n = 2_525
    clean = judge("a" * n, "a" * n, "a" * n, promise=0.005)
    flaky = judge("a" * n, "!" * 20 + "a" * (n - 20), "a" * n, promise=0.005)
    assert (clean["verdict"], flaky["verdict"]) == ("holds", "undecided")
    assert "20 texts failed in one arm" in flaky["reason"]
    both = judge("!" * 20 + "a" * n, "!" * 20 + "a" * n, "a" * (n + 20), promise=0.005)
    assert both["verdict"] == "holds"


def test_nothing_answered_is_no_crash():
    found = judge("!!", "!!", "ab")
    assert found["n"] == 0
    assert found["agreement"] is None
    assert found["verdict"] == "undecided"
    assert found["latency_ms"]["fast"] == {"p50": None, "p95": None, "p99": None, "ci95": None}


def test_labels_that_the_model_does_not_know_are_an_error():
    with pytest.raises(SampError, match="cannot answer: 1; allowed: a, b"):
        judge("aa", "aa", ["a", "1"], classes=("a", "b"))


@pytest.mark.parametrize("promise", [-0.1, 1.5, float("nan")])
def test_a_promise_is_a_fraction(promise):
    with pytest.raises(SampError, match="0 to 100 points"):
        judge("aa", "aa", promise=promise)


def test_records_that_do_not_match_are_refused():
    whole = records("aa", "aa")
    for broken in (whole[:-1], [*whole, whole[0]]):
        with pytest.raises(ValueError, match="one record of each arm"):
            report(broken, ["x", "y"], control="exact", candidate="fast", promise=0.01)
