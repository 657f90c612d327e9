"""Which plan a tier serves: by its wish from the search split, by its tests on the other one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samp_kernels.interface import Array

from samp_core import evaluate, rivals
from samp_core.allocate import Candidate
from samp_core.config import TierSpec
from samp_core.data import make_rows
from samp_core.enough import shortage
from samp_core.metrics import Bootstrapped
from samp_core.plan import Plan
from samp_core.tiers import FLOAT, Choice, Verifier, choose, fastest, near_ones, recheck
from samp_core.workbench import Split

N = 2000


@dataclass
class Logits:
    """Where a Verifier gets logits from, with the plans that it asked for, in order.

    lost: plan -> how many of the N rows it gets wrong; float's 200 wrong ones are the last.
    """

    lost: Mapping[str, int]
    n: int = N
    asked: list[str] = field(default_factory=list)

    def logits(self, plan: Plan, split: Split, title: str) -> Array:
        name = str(plan.mode)
        self.asked.append(name)
        right = np.ones(self.n, bool)
        right[: self.lost[name]] = False
        right[-self.n // 10 :] = False
        return np.stack([right, ~right], axis=1).astype(np.float32)


def verifier(source: Logits) -> Verifier:
    texts = [str(place) for place in range(source.n)]
    rows = make_rows(texts, ["no"] * source.n, Path("rows.jsonl"))
    plans = {name: Plan("0" * 64, {"layers": 4}, "onednn", {}, {}, name) for name in source.lost}
    bench: Any = source
    return Verifier(bench, plans, Split(rows, [], np.zeros(source.n, np.int64)), 0.05)


def candidates(rows: Sequence[tuple[str, float, float]], n: int = 1000) -> dict[str, Candidate]:
    """(name, ms, texts of a thousand lost in the search); float is 10 ms and loses none."""
    made = {FLOAT: Candidate(FLOAT, 10.0, 0.9, 0, 0, n, 0.0, 0.0)}
    for name, ms, lost in rows:
        b = round(lost)
        made[name] = Candidate(name, ms, 0.9 - lost / n, b, 0, n, lost, 0.0)
    return made


LADDER = [("full(1)", 8.0, 0), ("full(2)", 6.0, 4), ("full(3)", 4.0, 10), ("full(4)", 2.0, 40)]


def names(choice: Choice) -> list[str]:
    return [name for name, _ in choice.tests]


def serve(
    spec: TierSpec, lost: Mapping[str, int], rows: Sequence[tuple[str, float, float]] = LADDER
) -> tuple[Choice, Logits]:
    source = Logits({FLOAT: 0, **lost})
    return choose("mine", spec, candidates(rows), verifier(source)), source


def test_the_fastest_that_passes_is_served_and_the_first_failure_stops() -> None:
    choice, source = serve(
        TierSpec(drop=1.0), {"full(1)": 0, "full(2)": 4, "full(3)": 40, "full(4)": 0}
    )
    # full(4) would pass, but it comes after a failure and is never looked at.
    assert names(choice) == ["full(1)", "full(2)", "full(3)"]
    assert [test.passed for _, test in choice.tests] == [True, True, False]
    assert choice.plan == "full(2)"
    assert choice.met
    assert "full(4)" not in source.asked


def test_when_the_time_is_up_only_the_first_is_run() -> None:
    lost = {FLOAT: 0, "full(1)": 0, "full(2)": 1, "full(3)": 2, "full(4)": 3}
    checked = verifier(Logits(lost))
    found = candidates(LADDER)
    spec = TierSpec(drop=5.0)
    late = choose("late", spec, found, checked, lambda: True)
    assert len(late.tests) == 1
    assert (late.plan, late.met) == (names(late)[0], True)
    rest = len(names(choose("all", spec, found, verifier(Logits(lost))))) - 1
    assert f"tier late: the time budget left {rest} faster plans untested" in late.warnings
    # What another tier has run costs nothing more.
    choose("early", spec, found, checked)
    again = choose("late", spec, found, checked, lambda: True)
    assert again.plan == "full(4)"
    assert again.warnings == ()


def test_every_test_is_what_the_verification_rows_say() -> None:
    choice, _ = serve(TierSpec(drop=1.0), {"full(1)": 2, "full(2)": 4, "full(3)": 9, "full(4)": 99})
    lost = {"full(1)": 2, "full(2)": 4, "full(3)": 9, "full(4)": 99}
    for name, test in choice.tests:
        assert (test.b, test.c, test.n) == (lost[name], 0, N)
        assert test.drop == lost[name] / N
        assert test.bound == evaluate.drop_upper_bound(lost[name], 0, N, 0.05)
        assert test.passed == (test.bound <= 0.01)
    assert choice.plan == names(choice)[-2]


def test_a_plan_that_the_search_flattered_is_not_served() -> None:
    """The search saw no loss in full(4); the verification rows do, and they decide."""
    rows = [("full(4)", 2.0, 0.0)]
    choice, _ = serve(TierSpec(drop=1.0), {"full(4)": 60}, rows)
    assert (choice.plan, choice.met, names(choice)) == (FLOAT, True, ["full(4)"])
    assert "same plan as exact; no faster plan held 1 points" in choice.warnings[-1]


def test_nothing_slower_than_float_is_tested() -> None:
    rows = [("full(1)", 11.0, 0.0), ("full(2)", 12.0, 0.0)]
    choice, source = serve(TierSpec(drop=5.0), {"full(1)": 0, "full(2)": 0}, rows)
    assert choice.plan == FLOAT
    assert choice.tests == ()
    assert set(source.asked) <= {FLOAT}


@pytest.mark.parametrize("promise", [0.05, 0.1])
def test_a_promise_that_the_rows_cannot_support(promise: float) -> None:
    """It is not met; and what is lacking is known before any row has been run."""
    spec = TierSpec(drop=promise)
    choice, _ = serve(spec, {"full(1)": 0, "full(2)": 0, "full(3)": 0, "full(4)": 0})
    assert not choice.met
    assert choice.plan == FLOAT
    assert not any(test.passed for _, test in choice.tests)
    source = Logits({FLOAT: 0})
    text = shortage("mine", spec, verifier(source)) or ""
    assert source.asked == []
    found = re.search(r"at least ([\d,]+) verification rows .* there are 2,000, enough", text)
    assert found, text
    needed = int(found[1].replace(",", ""))
    assert evaluate.drop_upper_bound(0, 0, needed, 0.05) <= promise / 100
    assert evaluate.drop_upper_bound(0, 0, needed - 1, 0.05) > promise / 100
    enough = re.search(r"enough for ([\d.]+) points", text)
    assert enough, text
    least = float(enough[1])
    assert shortage("mine", TierSpec(drop=least), verifier(source)) is None
    assert shortage("mine", TierSpec(drop=least - 0.01), verifier(source)) is not None


def test_rows_for_a_metric_that_is_bounded_by_the_bootstrap() -> None:
    """F1: what is lacking depends on float's answers, which are run once; the number is right."""

    def lacking(n: int) -> tuple[str | None, list[str]]:
        source = Logits({FLOAT: 0}, n)
        rows = make_rows(list(map(str, range(n))), ["no"] * n, Path("rows.jsonl"))
        bench: Any = source
        plans = {FLOAT: Plan("0" * 64, {"layers": 4}, "onednn", {}, {}, FLOAT)}
        metric = Bootstrapped(
            "F1", lambda logits, split: np.stack([logits[:, 0], *2 * [logits[:, 1]]], 1),
            evaluate.f1, lambda texts: (np.array([1, 0, 0]), np.array([0, 1, 1])),
            lambda texts, control: texts[:, 1],
        )  # fmt: skip
        checked = Verifier(bench, plans, Split(rows, [], np.zeros(n, np.int64)), 0.05, metric)
        return shortage("mine", TierSpec(drop=1.0), checked), source.asked

    text, asked = lacking(100)
    assert asked == [FLOAT]
    found = re.search(r"at least ([\d,]+) verification rows", text or "")
    assert found, text
    needed = int(found[1].replace(",", ""))
    assert lacking(int(0.95 * needed))[0] is not None
    assert lacking(int(1.05 * needed))[0] is None


def test_how_many_rows_could_settle_it() -> None:
    """A drop below the promise whose bound is above it: more rows would do, and how many."""
    choice, _ = serve(TierSpec(drop=1.0), {"full(4)": 16}, [("full(4)", 2.0, 8.0)])
    _, test = choice.tests[-1]
    assert test.drop < 0.01 < test.bound
    note = next(w for w in choice.warnings if "could settle it" in w)
    found = re.search(r"full\(4\) was stopped .* about ([\d,]+) verification rows", note)
    assert found, note
    rows = int(found[1].replace(",", ""))
    assert evaluate.pass_probability(rows, 16 / N, 16 / N, 0.01) >= 0.8
    assert rows > N


def test_under_a_ceiling_the_most_accurate() -> None:
    nothing: dict[str, int] = {}
    choice, source = serve(TierSpec(latency=7.0), nothing)
    assert (choice.plan, choice.met, choice.tests) == ("full(2)", True, ())
    assert source.asked == []
    assert serve(TierSpec(latency=4.0), nothing)[0].plan == "full(3)"
    assert serve(TierSpec(latency=100.0), nothing)[0].plan == "full(1)"


def test_a_ceiling_under_which_there_is_nothing() -> None:
    choice, _ = serve(TierSpec(latency=1.5), {})
    assert (choice.plan, choice.met) == ("full(4)", False)
    assert choice.warnings == (
        "tier mine: no plan is under 1.5 ms; the nearest, full(4), takes 2.00 ms and is served",
    )


def test_drop_and_ceiling_together() -> None:
    lost = {"full(1)": 0, "full(2)": 4, "full(3)": 8, "full(4)": 80}
    choice, source = serve(TierSpec(drop=1.0, latency=7.0), lost)
    assert (choice.plan, choice.met) == ("full(3)", True)
    assert "full(1)" not in source.asked
    # Only full(4) is fast enough, and it loses too much.
    choice, _ = serve(TierSpec(drop=1.0, latency=3.0), lost)
    assert (choice.plan, choice.met, names(choice)) == (FLOAT, False, ["full(4)"])
    note = choice.warnings[-1]
    assert "no plan holds 1 points within 3 ms" in note
    bound = 100 * evaluate.drop_upper_bound(80, 0, N)
    assert f"nearest is full(4): 2.00 ms, and its bound of {bound:.2f} points" in note
    assert f"misses the promise by {bound - 1:.2f}" in note
    assert "exact takes 10.00 ms" in note
    # Nothing is fast enough.
    choice, _ = serve(TierSpec(drop=1.0, latency=1.5), lost)
    assert (choice.plan, choice.met, names(choice)) == (FLOAT, False, [])
    note = choice.warnings[-1]
    assert "nearest is full(4), the fastest: 2.00 ms miss the ceiling by 0.50" in note
    # Where float itself is fast enough, float is the answer.
    choice, _ = serve(TierSpec(drop=1.0, latency=20.0), {**lost, "full(1)": 80})
    assert (choice.plan, choice.met) == (FLOAT, True)


def test_without_a_wish_the_plan_before_the_fall() -> None:
    """A_k = 0.9, 0.899, 0.897, 0.891, 0.75 at equal steps of time: the chord falls faster."""
    rows = [("full(1)", 8.0, 1), ("full(2)", 6.0, 3), ("full(3)", 4.0, 9), ("full(4)", 2.0, 150)]
    rows += [(f"ffn_only({k})", 10.0 - k, 0.5 * k) for k in range(1, 5)]
    choice, source = serve(TierSpec(), {}, rows)
    assert (choice.plan, choice.met, choice.tests) == ("full(3)", True, ())
    assert source.asked == []


def test_without_a_wish_and_without_a_loss_the_fastest() -> None:
    rows = [("full(1)", 8.0, 0), ("full(2)", 6.0, 0), ("ffn_only(1)", 9.0, 0)]
    assert serve(TierSpec(), {}, rows)[0].plan == "full(2)"
    slower = [("full(1)", 11.0, 0), ("full(2)", 12.0, 0), ("ffn_only(1)", 10.5, 0)]
    assert serve(TierSpec(), {}, slower)[0].plan == FLOAT


def test_of_those_that_passed_the_fastest_when_measured_again() -> None:
    """Times that noise put in the wrong order are put right; what did not pass stays out."""
    rows = [("full(1)", 8.0, 0), ("full(2)", 4.4, 4), ("full(3)", 3.9, 10), ("full(4)", 2.0, 40)]
    choice, _ = serve(
        TierSpec(drop=1.0), {"full(1)": 0, "full(2)": 2, "full(3)": 4, "full(4)": 99}, rows
    )
    assert (choice.plan, names(choice)[-1]) == ("full(3)", "full(4)")
    assert near_ones(choice, candidates(rows)) == ["full(2)", "full(3)"]
    again = {"full(2)": 3.7, "full(3)": 3.8, "full(4)": 1.0, FLOAT: 10.0}
    assert fastest(choice, again).plan == "full(2)"
    assert fastest(choice, {**again, "full(2)": 3.9}) is choice
    assert fastest(choice, again, rivals.Found({})).plan == "full(2)"
    theirs = rivals.Found({"full(3)": candidates(rows)["full(3)"]})
    hardly = {**again, "full(2)": 3.76}
    assert fastest(choice, hardly, theirs) is choice, "a clock shall not part the two"
    assert fastest(choice, again, theirs).plan == "full(2)"
    assert fastest(choice, {**again, "full(2)": 3.5}, theirs).plan == "full(2)"
    other = rivals.Found({"full(2)": candidates(rows)["full(2)"]})
    assert fastest(choice, {**again, "full(2)": 3.86}, other).plan == "full(2)"
    assert fastest(choice, {**again, "full(2)": 4.1}, other) is choice
    without, _ = serve(TierSpec(), {}, rows)
    assert fastest(without, {**again, without.plan: 5.0}) is without


def test_measured_again_above_the_ceiling_is_not_met() -> None:
    choice, _ = serve(TierSpec(latency=7.0), {})
    assert recheck(choice, 7.0) is choice
    slower = recheck(choice, 7.5)
    assert (slower.plan, slower.met) == ("full(2)", False)
    assert slower.warnings == (
        "tier mine: full(2) was under 7 ms in the search and takes 7.50 ms when measured again",
    )
    without, _ = serve(TierSpec(), {})
    assert recheck(without, 1e9) is without


def test_no_faster_than_float_when_measured_again() -> None:
    lost = {"full(1)": 0, "full(2)": 4, "full(3)": 9, "full(4)": 99}
    choice, _ = serve(TierSpec(drop=1.0), lost)
    assert choice.plan == "full(3)"
    assert recheck(choice, 5.0, 5.1) is choice
    slower = recheck(choice, 5.1, 5.1)
    assert (slower.plan, slower.met, slower.tests) == (FLOAT, True, choice.tests)
    assert slower.warnings[-1] == (
        f"tier mine: same plan as exact; {choice.plan} takes 5.10 ms when measured again, "
        "exact 5.10 ms"
    )
    under, _ = serve(TierSpec(latency=7.0), {})
    assert recheck(under, 9.0, 8.0).met is False
    assert recheck(under, 9.0, 6.5).met is True


def test_what_is_shown_of_a_tier() -> None:
    checked = verifier(Logits({FLOAT: 0, "full(1)": 6}))
    facts = checked.measured("full(1)", {"1": 3.0})
    assert facts.accuracy == (N - N // 10 - 6) / N
    assert facts.counts == (6, 0, N)
    assert facts.drop_bound == evaluate.drop_upper_bound(6, 0, N, 0.05)
    assert facts.ci95[0] < facts.accuracy < facts.ci95[1]
