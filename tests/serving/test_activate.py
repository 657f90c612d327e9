"""Builds that change in a running server, under load: no failed request, no mixed answer."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as over_http
from calls import classify, text_rows
from forked import Done, Running, forks, wait_for
from test_server import _rehash
from tiny import write_tiny

from samp_core import pipeline
from samp_core.control import Control, stubs
from samp_core.manifest import read_manifest

# Longer than the second build reads, so that a tokenizer of the wrong build shows.
TEXTS = ("a b c d e f g h i j k l m n o p q r s t u v w", "abc", "x y z")


@dataclass
class Served:
    """A `samp serve` of its own and the addresses that it printed."""

    process: Running
    facts: dict[str, Any]

    @property
    def grpc(self) -> str:
        return str(self.facts["grpc"])

    @property
    def http(self) -> str:
        return str(self.facts["http"])

    def answer(self, ensemble: str) -> Any:
        return classify(self.grpc, ensemble, TEXTS)["SCORES"]


@pytest.fixture
def serve() -> Iterator[Any]:
    started: list[Running] = []

    def start(*words: object) -> Served:
        ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", 0)]
        process = forks().start("serve", *ports, "--json", *words)
        started.append(process)
        out = process.folder / "out"
        assert wait_for(lambda: out.read_text().endswith("\n") or process.ended.is_set(), 60)
        assert not process.ended.is_set(), process.stderr
        return Served(process, json.loads(out.read_text()))

    yield start
    for process in started:
        process.kill(signal.SIGTERM)
    for process in started:
        process.ended.wait(30)


@dataclass
class Caller:
    """Asks one ensemble without a pause over one protocol; keeps answers and what failed."""

    protocol: str
    served: Served
    ensemble: str
    answers: list[Any] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        client = over_http.InferenceServerClient(self.served.http)
        tensor = over_http.InferInput("TEXT", [len(TEXTS), 1], "BYTES")
        tensor.set_data_from_numpy(text_rows(TEXTS))
        while not self.ended.is_set():
            try:
                if self.protocol == "grpc":
                    self.answers.append(self.served.answer(self.ensemble))
                else:
                    self.answers.append(client.infer(self.ensemble, [tensor]).as_numpy("SCORES"))
            except Exception as error:
                self.failures.append(str(error))
            time.sleep(0.001)

    def stop(self) -> None:
        self.ended.set()
        self.thread.join(30)


def expected(out: Path, build: Path, tier: str = "exact") -> Any:
    """What a build answers without a server."""
    before = os.readlink(out / "current")
    try:
        link = out / "current.new"
        link.symlink_to(build.relative_to(out))
        link.replace(out / "current")
        return pipeline.load(out, tier).predict(TEXTS)["SCORES"]
    finally:
        link.symlink_to(before)
        link.replace(out / "current")


def samp(*words: object) -> Done:
    return forks().samp(*words)


def near(answer: Any, sides: Sequence[Any]) -> list[bool]:
    return [bool(np.allclose(answer, side, atol=1e-5)) for side in sides]


def test_builds_in_turn_under_load(tmp_path: Path, serve: Any) -> None:
    """Tokenizer (max_length), encoder and head differ, one tier goes and one comes."""
    out = tmp_path / "out"
    a = write_tiny(out, seed=1, tiers=("exact", "fast"))
    b = write_tiny(out, seed=2, tiers=("exact", "high"), max_length=16)
    sides = [expected(out, build) for build in (a, b)]
    assert not np.allclose(*sides, atol=0.01)
    assert samp("rollback", out).code == 0  # no server runs yet: the link alone
    assert (out / "current").resolve() == a

    served = serve(out)
    callers = [Caller(protocol, served, "tiny_exact") for protocol in ("grpc", "grpc", "http")]
    for turn in range(4):
        calls = [len(caller.answers) for caller in callers]
        assert wait_for(lambda: all(len(c.answers) > n + 3 for c, n in zip(callers, calls)), 30)  # noqa: B023, B905
        build = (b, a)[turn % 2]
        words = ("activate", out, "--build", build.name) if turn < 3 else ("rollback", out)
        done = samp(*words, "--json")
        assert done.code == 0, done.err
        (made,) = done.json["servers"]
        assert (made["build"], done.json["before"]) == (build.name, (a, b)[turn % 2].name)
        assert made["gone"] == [("tiny_fast", "tiny_high")[turn % 2]]
        assert (out / "current").resolve() == build
        assert near(served.answer("tiny_exact"), sides) == [build == a, build == b]
        assert served.answer(("tiny_high", "tiny_fast")[turn % 2]).shape == (3, 2)
    for caller in callers:
        caller.stop()
    assert [caller.failures for caller in callers] == [[], [], []]
    found = np.array([near(answer, sides) for caller in callers for answer in caller.answers])
    assert (found.sum(axis=1) == 1).all(), f"{(found.sum(axis=1) != 1).sum()} mixed answers"
    assert found[:, 0].sum() > 10
    assert found[:, 1].sum() > 10
    index = Control(served.http).index()
    ready = [name for name, entry in index.items() if entry.get("state") == "READY"]
    assert sorted(ready) == sorted(read_manifest(out).models())

    # Damage that hashes show, and a plan that only the model's process refuses: A goes on.
    weights = b / "models/encoder_tiny_exact/1/weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = samp("activate", out, "--build", b.name)
    assert (done.code, len(done.lines)) == (1, 1)
    assert "damaged_repository: model encoder_tiny_exact" in done.lines[0]
    weights.write_bytes(good)
    plan = b / "models/encoder_tiny_exact/1/plan.json"
    plan.write_text(plan.read_text().replace('"fp32"', '"bf16"', 1))
    _rehash(b, plan.parent)
    caller = Caller("grpc", served, "tiny_exact")
    done = samp("activate", out, "--build", b.name)
    assert done.code == 1
    assert len(done.lines) == 1
    assert "encoder_tiny_exact" in done.lines[0]
    assert "bf16" in done.lines[0]
    caller.stop()
    assert caller.failures == []
    assert all(near(answer, sides) == [True, False] for answer in caller.answers)
    assert (out / "current").resolve() == a
    assert not [n for n, e in Control(served.http).index().items() if "next." in n and "state" in e]


def test_two_models_are_watched_and_a_dead_process_is_shown(tmp_path: Path, serve: Any) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_tiny(one, seed=1, model="one")
    write_tiny(two, seed=2, model="two")
    served = serve(one, two, "--watch")
    assert served.facts["models"] == [*read_manifest(one).models(), *read_manifest(two).models()]
    before = [served.answer("one_exact"), served.answer("two_exact")]
    assert not np.allclose(*before, atol=0.01)
    caller = Caller("grpc", served, "two_exact")
    watched = [Caller(protocol, served, "one_exact") for protocol in ("grpc", "http")]
    build = write_tiny(one, seed=3, model="one")
    assert wait_for(lambda: f"build {build.name} is served" in served.process.stderr, 60)
    after = expected(one, build)
    np.testing.assert_allclose(served.answer("one_exact"), after, atol=1e-5)
    for other in watched:
        other.stop()
        assert other.failures == []
        found = np.array([near(answer, (before[0], after)) for answer in other.answers])
        assert (found.sum(axis=1) == 1).all()
        assert found.any(axis=0).all(), "it was not called before and after"
    caller.stop()
    assert caller.failures == []
    assert all(near(answer, before) == [False, True] for answer in caller.answers)

    # What callers would misread is refused: by the watcher, and by the command without --force.
    renamed = write_tiny(one, seed=3, model="other")
    assert wait_for(lambda: "other_meaning" in served.process.stderr, 30)
    refused = samp("activate", one, "--build", renamed.name)
    assert refused.code == 1
    assert "model other" in refused.lines[0]
    assert samp("rollback", one).code == 0

    # kill -9 of a model's process: status shows it, and the way back is one command.
    healthy = samp("status", one, "--json")
    assert healthy.code == 0, healthy.out
    (facts,) = healthy.json
    assert facts["http"] == served.http
    tiers = {tier["ensemble"]: tier for tier in facts["tiers"]}
    assert set(tiers) == {"one_exact", "two_exact"}
    assert tiers["one_exact"]["build"] == build.name
    assert tiers["one_exact"]["answers"] is True
    assert tiers["one_exact"]["plan"] == "float: 4/4 fp32 GEMMs"
    steps = [m["compute_ms"] for m in facts["models"] if m["name"] in tiers["one_exact"]["steps"]]
    assert tiers["one_exact"]["tokenizer_share"] == pytest.approx(steps[0] / sum(steps), abs=1e-3)
    assert set(tiers["one_exact"]["executed"]) == {"fp32"}
    models = {model["name"]: model for model in facts["models"]}
    two_encoder = models["encoder_two_exact"]
    assert two_encoder["requests"] > 0
    assert two_encoder["compute_ms"] > 0
    assert two_encoder["instances"] == len(two_encoder["processes"]) == 1
    (pid,) = stubs(served.facts["pid"])["encoder_two_exact"]
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: "encoder_two_exact" not in stubs(served.facts["pid"]), 10)
    ill = samp("status", served.http, "--json")
    assert ill.code == 1
    (facts,) = ill.json
    models = {model["name"]: model for model in facts["models"]}
    assert models["encoder_two_exact"]["state"] == "DEAD"
    assert [t["answers"] for t in sorted(facts["tiers"], key=lambda t: t["model"])] == [True, False]
    shown = samp("status")
    assert shown.code == 1
    assert "encoder_two_exact: DEAD" in shown.out
    assert samp("activate", two, "--reload").code == 0
    np.testing.assert_allclose(served.answer("two_exact"), before[1], atol=1e-5)
    assert samp("status").code == 0


def test_what_cannot_be_activated_is_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = write_tiny(out, seed=1)
    for words, code, said in (
        (("activate", out, "--build", "nope"), 1, f"unknown_build: {out} holds no build 'nope'"),
        (("activate", tmp_path), 1, "no_build"),
        (("rollback", out), 2, "one build only"),
        (("status", out), 1, "no server of this user serves"),
        (("status", "127.0.0.1:1"), 1, "no Triton answers at 127.0.0.1:1"),
        (("serve", out, out / "..", "--http-port", 0), 1, "no_build"),
    ):
        done = samp(*words)
        assert (done.code, len(done.lines)) == (code, 1), done
        assert said in done.lines[0]
    assert first.name in samp("activate", out, "--build", "nope").lines[0]
    twice = samp("serve", out, out / ".." / "out")
    assert twice.code == 2
    assert "same_model" in twice.lines[0]
