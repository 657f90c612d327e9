"""Building again beside a running `samp serve`: what is served changes when it is told to."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import classify
from forked import Done, forks, wait_for
from safetensors.numpy import load_file, save_file
from separable import planted_build, random_texts, set_latencies, small

from samp_core.control import Control
from samp_core.manifest import read_manifest

TEXTS = random_texts(16, seed=1)
TIERS = {"fast": {"latency": 50}}


@dataclass(frozen=True)
class Place:
    """One output folder, and a `samp serve` on it."""

    folder: Path
    process: subprocess.Popen[str]
    line: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def build(self, **fields: Any) -> Done:
        yaml = small().yaml(
            self.folder / "b.yaml", **{"out": str(self.out), "tiers": TIERS, **fields}
        )
        return forks().samp("build", "-c", yaml, "--json")

    def scores(self, tier: str) -> Any:
        return classify(self.line["grpc"], f"small_{tier}", TEXTS)["SCORES"]

    def reload(self) -> None:
        """SIGHUP, and wait until Triton has loaded what is current now, and nothing else."""
        before = self.loaded()
        self.process.send_signal(signal.SIGHUP)
        wanted = set(read_manifest(self.out).models())
        assert wait_for(lambda: self.loaded().keys() == wanted, 60)
        head = "head_small"
        assert wait_for(lambda: self.loaded()[head] != before[head], 60)

    def loaded(self) -> dict[str, int]:
        """model -> how often it was loaded, as Triton's log has it."""
        ready = [
            name
            for name, entry in Control(self.line["http"]).index().items()
            if entry.get("state") == "READY"
        ]
        log = (self.folder / "triton.log").read_text(errors="replace")
        return {name: log.count(f"successfully loaded '{name}'") for name in ready}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("repeat")
    yaml = small().yaml(folder / "b.yaml", out=str(folder / "out"), tiers=TIERS)
    assert planted_build(yaml, folder / "out").code == 0
    samp = str(Path(sys.executable).with_name("samp"))
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [samp, "serve", str(folder / "out"), *ports, "--json", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--log", str(folder / "triton.log")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield Place(folder, process, json.loads(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_nothing_changed(place: Place) -> None:
    current = (place.out / "current").resolve()
    before = {tier: place.scores(tier) for tier in ("exact", "fast")}
    assert np.abs(before["fast"] - before["exact"]).max() > 1e-3
    done = place.build()
    assert done.code == 0
    assert done.json["forwards"] == 0
    assert done.json["cache"]["misses"] == 0
    assert (place.out / "current").resolve() == current
    loaded = place.loaded()
    place.process.send_signal(signal.SIGHUP)
    time.sleep(2.0)
    assert place.loaded() == loaded  # what is served already is not loaded again
    for tier, scores in before.items():
        np.testing.assert_array_equal(place.scores(tier), scores)


def test_other_tiers(place: Place) -> None:
    """One tier goes, one comes; the search is not done again."""
    exact, fast = place.scores("exact"), place.scores("fast")
    place.build(tiers={"new": {"latency": 95}})
    set_latencies(place.out)
    done = place.build(tiers={"new": {"latency": 95}})
    assert done.code == 0
    assert "search:" not in done.err
    assert "calibrate" not in done.err
    np.testing.assert_array_equal(place.scores("fast"), fast)  # until the reload
    place.reload()
    np.testing.assert_array_equal(place.scores("exact"), exact)
    assert 0 < np.abs(place.scores("new") - exact).max() < np.abs(fast - exact).max()
    gone = forks().samp("predict", "--url", place.line["grpc"], "--tier", "fast", "bal")
    assert gone.code == 1
    assert "allowed: exact, new" in gone.lines[0]


def test_another_checkpoint(place: Place) -> None:
    checkpoint = place.folder / "checkpoint"
    shutil.copytree(small().checkpoint, checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    state["classifier.weight"] = 0.5 * state["classifier.weight"]
    state["classifier.bias"] = 0.5 * state["classifier.bias"]
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    before = place.scores("exact")
    done = place.build(model=str(checkpoint), tiers={"fast": {"latency": 1000}})
    assert done.code == 0, done.err
    assert done.json["forwards"] > 100
    np.testing.assert_array_equal(place.scores("exact"), before)
    place.reload()
    half = np.sqrt(before) / np.sqrt(before).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(place.scores("exact"), half, atol=1e-4)


def test_a_failed_build_changes_nothing(place: Place) -> None:
    current = (place.out / "current").resolve()
    before, loaded = place.scores("exact"), place.loaded()
    done = place.build(data=str(place.folder / "none.jsonl"))
    assert done.code == 1
    assert done.json["error"]["code"] == "data_file"
    assert (place.out / "current").resolve() == current
    place.process.send_signal(signal.SIGHUP)
    np.testing.assert_array_equal(place.scores("exact"), before)
    assert place.loaded() == loaded
