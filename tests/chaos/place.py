"""The demo served for the campaign: a build of its own, a `samp serve`, clean calls."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from samp_core.control import stubs

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "chaos"
DEMO = ROOT / ".demo"
SAMP = str(Path(sys.executable).with_name("samp"))
MODEL = "film-reviews"
TIERS = ("exact", "fast")
MAX_LENGTH = 512
BESIDE = "SAMP_CHAOS_BESIDE"
"""Set in the process of a part that runs beside others."""
# Servers of the campaign are found by `samp status` apart from any other of this user.
os.environ["XDG_CACHE_HOME"] = str(WORK / ("cache-beside" if BESIDE in os.environ else "cache"))


@dataclass(frozen=True)
class Check:
    """One line of the result. ok None: it is a finding that is stated, not a promise that holds."""

    part: str
    what: str
    result: str
    ok: bool | None
    command: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def samp(*words: object, timeout: float = 300.0, first: str = "") -> Any:
    """A `samp` command in a process of its own, which runs the Python code `first` before."""
    command = [str(SAMP), *(str(word) for word in words)]
    if first:  # No preexec_fn: gRPC ends some of the children of a process that has called it.
        become = f"{first}\nimport os, sys\nos.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", become, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def demo_build() -> Path:
    """The folder of a build of tiers exact and fast, written from plans."""
    from samp_core.backends import choose_backend, open_backend
    from samp_core.checkpoint import load_checkpoint
    from samp_core.encoder import quantizable_sites
    from samp_core.plan import Plan, Recipe, mode_plan

    out = WORK / "demo"
    backend = choose_backend("auto")
    if not (DEMO / "checkpoint" / "training.json").is_file():
        raise SystemExit("chaos: there is no .demo/checkpoint; make demo-checkpoint trains it")
    checkpoint = load_checkpoint(DEMO / "checkpoint")
    base = Plan(checkpoint.sha256, checkpoint.plan_config(), backend, {}, {})
    sites = quantizable_sites(open_backend(backend, 1))
    plan = mode_plan(base, "full", checkpoint.config.layers, sites, Recipe())
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "fast.json").write_text(plan.to_json())
    done = samp(
        *("generate", "--plan", f"fast={WORK / 'fast.json'}", "--model", DEMO / "checkpoint"),
        *("--data", DEMO / "film_reviews" / "held_out.jsonl", "--name", MODEL, "--out", out),
    )
    if done.returncode:
        raise SystemExit(f"chaos: the build failed: {done.stderr}")
    return out


def demo_texts(count: int) -> list[str]:
    rows = (DEMO / "film_reviews" / "verification.jsonl").read_text("utf-8").splitlines()
    return [json.loads(row)["text"] for row in rows[:count]]


@dataclass
class Serving:
    """A running `samp serve`: its addresses and processes."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    out: Path

    @property
    def grpc(self) -> str:
        return str(self.facts["grpc"])

    @property
    def http(self) -> str:
        return str(self.facts["http"])

    @property
    def triton(self) -> int:
        return int(self.facts["pid"])

    def stubs(self) -> dict[str, list[int]]:
        return stubs(self.triton)

    def rss_mb(self) -> dict[str, float]:
        """Resident memory by process: Triton, then each model's."""
        pids = {"triton": [self.triton], **self.stubs()}
        return {
            name: sum(psutil.Process(pid).memory_info().rss for pid in found) / 1e6
            for name, found in sorted(pids.items())
        }

    def shm_mb(self) -> float:
        """What /dev/shm holds of this server."""
        total = 0
        for region in Path("/dev/shm").glob(f"{self._prefix()}*"):
            with contextlib.suppress(OSError):
                total += region.stat().st_blocks * 512
        return total / 1e6

    def _prefix(self) -> str:
        words = Path(f"/proc/{self.triton}/cmdline").read_text().split("\0")
        word = next(word for word in words if "shm-region-prefix-name=" in word)
        return word.rpartition("=")[2]

    def status(self) -> tuple[int, dict[str, Any]]:
        """Exit code and object of `samp status --json`."""
        done = samp("status", self.http, "--json")
        found = json.loads(done.stdout)
        assert isinstance(found, list), f"samp status: exit {done.returncode}: {done.stdout}"
        return done.returncode, found[0]


@contextlib.contextmanager
def serve(out: Path, *words: object, log: str = "triton.log") -> Iterator[Serving]:
    """`samp serve` on free ports; ended with SIGTERM. log: the file in WORK."""
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    command = [SAMP, "serve", str(out), *ports, "--json", "--log", str(WORK / log)]
    command += map(str, words)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"chaos: samp serve {out} ended with {process.wait()}")
    try:
        facts = json.loads(line)
        if "error" in facts:
            raise SystemExit(f"chaos: samp serve failed: {facts['error']}")
        yield Serving(process, facts, out)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


@functools.cache
def client(address: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(address)


def infer(address: str, model: str, timeout: float = 60.0, **inputs: Any) -> dict[str, Any]:
    """One clean call over gRPC; `inputs` are arrays."""
    tensors = []
    for name, array in inputs.items():
        tensors.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    result = client(address).infer(model, tensors, client_timeout=timeout)
    return {o.name: result.as_numpy(o.name) for o in result.get_response().outputs}


def ask(address: str, ensemble: str, texts: Sequence[str | bytes], timeout: float = 60.0) -> Any:
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return infer(address, ensemble, timeout, TEXT=np.array(raw, dtype=np.object_)[:, None])


def sample(address: str, model: str = MODEL, tiers: Sequence[str] = TIERS) -> dict[str, Any]:
    """The scores of 32 texts by every tier, one text a request: to be the same afterwards."""
    texts = demo_texts(32)
    return {
        tier: np.concatenate([ask(address, f"{model}_{tier}", [text])["SCORES"] for text in texts])
        for tier in tiers
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(np.array_equal(before[tier], after[tier]) for tier in before)


class Load:
    """Callers that ask one text after another without a pause; what came back, and how late."""

    def __init__(self, address: str, ensemble: str, callers: int, texts: Sequence[str]) -> None:
        self.expected = {text: ask(address, ensemble, [text])["SCORES"][0] for text in texts}
        self.answers: list[tuple[float, float]] = []  # when, seconds
        self.errors: list[tuple[float, float, str]] = []
        self.wrong = 0
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(address, ensemble, i), daemon=True)
            for i in range(callers)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, address: str, ensemble: str, index: int) -> None:
        texts = list(self.expected)
        while not self._ended.is_set():
            index += 1
            text = texts[index % len(texts)]
            begun = time.monotonic()
            try:
                scores = ask(address, ensemble, [text])["SCORES"][0]
            except Exception as error:
                now = time.monotonic()
                self.errors.append((now, now - begun, " ".join(str(error).split())))
                time.sleep(0.01)
                continue
            now = time.monotonic()
            self.answers.append((now, now - begun))
            self.wrong += not np.allclose(scores, self.expected[text], atol=0.05)

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a call hangs"
