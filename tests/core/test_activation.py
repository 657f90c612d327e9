"""The order of loads between two builds: at every step an ensemble's models are of one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samp_core.activation import NEXT, Spec, Step, View, WayBackFailed, plan, run

TIERS = ("exact", "high", "fast")


@st.composite
def views(draw: st.DrawFn, build: str) -> dict[str, Spec]:
    """A served view; contents are few, so that two builds often share some."""

    def spec(name: str, parts: tuple[str, ...] = ()) -> Spec:
        content = f"{name} {draw(st.sampled_from('xyz'))}"
        return Spec(content, Path(build, name), build, parts)

    tiers = draw(st.lists(st.sampled_from(TIERS), unique=True, min_size=1))
    made = {name: spec(name) for name in ("tokenizer", *(f"encoder_{t}" for t in tiers), "head")}
    for tier in tiers:
        made[tier] = spec(tier, ("tokenizer", f"encoder_{tier}", "head"))
    return made


def answers(loaded: View) -> dict[str, tuple[str, ...]]:
    """What a request of each ensemble meets: contents of the ensemble and of its models."""
    found = {}
    for name, spec in loaded.items():
        if spec.parts:
            names = [dict(spec.aliases).get(part, part) for part in spec.parts]
            found[name] = (spec.content, *(loaded[part].content for part in names))
    return found


class Server:
    """What is loaded, after each step; it refuses what Triton would."""

    def __init__(self, view: View, before: View, after: View) -> None:
        self.loaded = dict(view)
        self.allowed = [answers(before), answers(after)]
        self.always = {name for name in self.allowed[0] if name in self.allowed[1]}

    def do(self, step: Step) -> None:
        assert self.loaded.get(step.name) == step.before
        if step.after is None:
            del self.loaded[step.name]
        else:
            self.loaded[step.name] = step.after
        now = answers(self.loaded)  # raises KeyError where an ensemble misses a model
        assert self.always <= set(now)
        for name, met in now.items():
            assert met in [side.get(name) for side in self.allowed]


@given(views("a"), views("b"), st.sets(st.sampled_from(["tokenizer", "head", "exact"])))
def test_no_request_meets_two_builds(before: View, after: View, again: set[str]) -> None:
    server = Server(before, before, after)
    run(plan(before, after, again=sorted(again)), server.do)
    assert answers(server.loaded) == answers(after)
    assert set(server.loaded) == set(after)
    assert not any(spec.aliases for spec in server.loaded.values())


@given(views("a"), views("b"), st.integers(0, 30))
def test_a_step_that_fails_leads_back(before: View, after: View, bad: int) -> None:
    server = Server(before, before, after)
    count = 0

    def do(step: Step) -> None:
        nonlocal count
        count += 1
        if count == bad + 1:
            raise OSError("disk full")
        server.do(step)

    steps = plan(before, after)
    if bad >= len(steps):
        run(steps, do)
        assert answers(server.loaded) == answers(after)
    else:
        with pytest.raises(OSError, match="disk full"):
            run(steps, do)
        assert server.loaded == before


def build(name: str, **contents: str) -> dict[str, Spec]:
    parts = ("tokenizer", "encoder", "head")
    made = {part: Spec(contents.get(part, "same"), Path(name), name) for part in parts}
    return {**made, "fast": Spec("same", Path(name), name, parts)}


def test_one_changed_model_is_loaded_in_place() -> None:
    steps = [str(step) for step in plan(build("a"), build("b", encoder="new"))]
    assert steps == ["load encoder of build b", "load fast of build b"]


def test_models_that_change_together_go_by_way_of_copies() -> None:
    steps = plan(build("a"), build("b", encoder="new", head="new"))
    assert [str(step) for step in steps] == [
        f"load {NEXT}encoder of build b",
        f"load {NEXT}head of build b",
        "load fast of build b",
        "load encoder of build b",
        "load head of build b",
        "load fast of build b",
        f"unload {NEXT}encoder",
        f"unload {NEXT}head",
    ]
    assert [index for index, step in enumerate(steps) if step.settle] == [3, 6]


def test_what_is_dead_is_loaded_again() -> None:
    steps = plan(build("a"), build("a"), again=["encoder"])
    assert str(steps[0]) == "load encoder of build a"


def test_a_way_back_that_fails_is_said() -> None:
    steps = plan(build("a"), build("b", encoder="new", head="new"))
    calls = 0

    def do(step: Step) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError("no more memory")

    with pytest.raises(WayBackFailed, match=f"unload {NEXT}head"):
        run(steps, do)
