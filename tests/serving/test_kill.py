"""`kill -9` at any moment of a build: what was served is served, and the next build finishes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from calls import classify
from forked import Running, forks, wait_for
from separable import random_texts, small

from samp_core import pipeline
from samp_core.manifest import read_manifest, verify
from samp_core.repository import PARTIAL
from samp_core.server import Server

KILLS = 20
# Of these so many fall into the writing of the repository, which is a small part of the time.
WHILE_WRITING = 8
WRITING = "write the model repository"
TEXTS = random_texts(8, seed=1)


def config(out: Path, path: Path, seed: int) -> Path:
    """Another seed draws other rows, so that nothing is found in the cache."""
    tiers = {"fast": {"drop": 40}, "mid": {"latency": 1000}}
    rows = {"calibration": 32, "search": 160}
    return small().yaml(path, out=str(out), seed=seed, tiers=tiers, rows=rows)


def leftovers(out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in out.rglob(f"*{PARTIAL}")]


@dataclass
class Caller:
    """Calls a server without a pause; keeps what differs from the first answer, and errors."""

    address: str
    wrong: list[object] = field(default_factory=list)
    calls: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.first = classify(self.address, "small_exact", TEXTS)["SCORES"]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                scores = classify(self.address, "small_exact", TEXTS)["SCORES"]
                if not np.array_equal(scores, self.first):
                    self.wrong.append(scores)
            except Exception as error:
                self.wrong.append(error)
            self.calls += 1
            time.sleep(0.02)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(60)


def finish(running: Running, phase: str = "", after: float = 60.0) -> dict[str, float]:
    """Wait for a build's end, or so many seconds into a phase; how long each phase took so far."""
    begin = half = time.monotonic()
    if phase != "whole":
        assert wait_for(lambda: WRITING in running.stderr or running.ended.is_set(), 60)
        half = time.monotonic()
    running.ended.wait(after)
    end = time.monotonic()
    return {"whole": end - begin, **({} if phase == "whole" else {"writing": end - half})}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Server]:
    """A build of seed 0, served."""
    out = tmp_path / "out"
    assert forks().samp("build", "-c", config(out, tmp_path / "0.yaml", 0)).code == 0
    with Server.start(out, tiers=["exact"], threads=1) as server:
        yield server


def test_kill_9_at_twenty_moments(serving: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    caller = Caller(serving.grpc)
    first = (out / "current").resolve()
    verify(read_manifest(out))

    # How long a build takes, and the writing at its end, with a server beside it.
    running = forks().start("build", "-c", config(tmp_path / "other", tmp_path / "m.yaml", 1))
    lengths = finish(running)
    assert running.wait().code == 0

    draw = random.Random(20)
    moments = [("whole", draw.random()) for _ in range(KILLS - WHILE_WRITING)]
    moments += [("writing", draw.random()) for _ in range(WHILE_WRITING)]
    draw.shuffle(moments)
    killed, seed, left = 0, 1, set()
    while moments:
        assert seed < 2 * KILLS, f"of {seed} builds only {killed} could be killed"
        seed += 1
        phase, share = moments.pop()
        calls = caller.calls
        before = (out / "current").resolve()
        running = forks().start("build", "-c", config(out, tmp_path / f"{seed}.yaml", seed))
        taken = finish(running, phase, share * lengths[phase])
        running.kill()
        code = running.wait().code
        if code == 0:  # faster than the one that was timed: the same share of this one's time
            lengths |= {name: min(lengths[name], taken[name]) for name in taken}
            moments.insert(0, (phase, share))
        else:
            assert code == -9, running.stderr
            killed += 1
        # Whatever the moment, what is current is whole; it is the old one, or all of the new one.
        manifest = read_manifest(out)
        verify(manifest)
        assert manifest.folder.parent == out / "builds"
        left |= {name.split("/")[0] for name in leftovers(out)}
        assert wait_for(lambda: caller.calls > calls + 1, 30)  # noqa: B023
        assert caller.wrong == []
    assert killed == KILLS
    assert "builds" in left, "no kill met the writing, so that this test shows too little"

    # One build in peace: it sweeps up, and what it wrote is served beside the old server.
    last = forks().samp("build", "-c", config(out, tmp_path / "last.yaml", 99), "--json")
    assert last.code == 0, last.err
    assert last.json["cache"]["misses"] > 5
    assert leftovers(out) == []
    assert (out / "current").resolve() not in (first, before)
    manifest = read_manifest(out)
    verify(manifest)
    with Server.start(out, tiers=["fast"], threads=1) as fresh:
        answer = classify(fresh.grpc, "small_fast", TEXTS)["SCORES"]
    expected = pipeline.load(out, "fast").predict(TEXTS)["SCORES"]
    np.testing.assert_allclose(answer, expected, atol=0.05)
    calls = caller.calls
    assert wait_for(lambda: caller.calls > calls + 1, 30)
    caller.stop()
    assert caller.wrong == []
    assert caller.calls > 3 * KILLS


def test_a_swap_that_was_cut_off_is_swept(tmp_path: Path) -> None:
    """What a kill leaves at each step of the writing, put there by hand."""
    out = tmp_path / "out"
    yaml = config(out, tmp_path / "0.yaml", 0)
    assert forks().samp("build", "-c", yaml).code == 0
    build = (out / "current").resolve()
    (out / "builds" / f"new-x{PARTIAL}" / "models").mkdir(parents=True)
    (out / f"current.77{PARTIAL}").symlink_to("builds/nowhere")
    (build / f"build.json{PARTIAL}").write_text("{")
    (out / "cache" / f"logits-0.77{PARTIAL}").write_bytes(b"half")
    assert len(leftovers(out)) == 4
    (out / ".lock").write_text("77\n")  # a dead build's number is no lock
    done = forks().samp("build", "-c", yaml, "--json")
    assert (done.code, done.json["forwards"]) == (0, 0)
    assert leftovers(out) == []
    assert (out / "current").resolve() == build
    verify(read_manifest(out))
