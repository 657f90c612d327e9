"""A real Triton on the real demo checkpoint, once for the session, and small ones on demand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from samp_kernels.interface import Backend, pack_batch

from samp_core import calibrate, encoder, heads, quantize
from samp_core.backends import open_backend
from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.repository import TierFiles, build_lock, write_build
from samp_core.server import Server
from samp_core.text import TextEncoder

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / ".demo"
MODEL = "film-reviews"
MAX_LENGTH = 128


@dataclass(frozen=True)
class Served:
    """The demo, served. Addresses are "host:port"; `gold` are the labels of `texts`."""

    server: Server
    out: Path
    checkpoint: Path
    model: str
    tiers: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    gold: tuple[str, ...]
    log: Path

    @property
    def grpc(self) -> str:
        return self.server.grpc

    @property
    def http(self) -> str:
        return self.server.http

    @property
    def metrics(self) -> str:
        return self.server.metrics


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Logs, locks and the assembled backend go to this session's folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The checkpoint that examples/film_reviews/train.py makes; minutes at first, then cached."""
    folder = DEMO / "checkpoint"
    if not (folder / "training.json").is_file():
        subprocess.run([sys.executable, ROOT / "examples/film_reviews/train.py"], check=True)
    return folder


@pytest.fixture(scope="session")
def served(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Tiers `exact` (fp32) and `fast` (every GEMM int8) of the demo on a Triton of this session."""
    out = tmp_path_factory.mktemp("served")
    rows = [
        json.loads(line)
        for line in (DEMO / "film_reviews/verification.jsonl").read_text("utf-8").splitlines()
    ]
    checkpoint = load_checkpoint(demo_checkpoint)
    write_demo(out, checkpoint)
    log = out / "triton.log"
    with Server.start(out, log=log, log_batches=True) as server:
        yield Served(
            server=server,
            out=out,
            checkpoint=demo_checkpoint,
            model=MODEL,
            tiers=("exact", "fast"),
            labels=checkpoint.labels,
            texts=tuple(row["text"] for row in rows),
            gold=tuple(row["label"] for row in rows),
            log=log,
        )


def write_demo(out: Path, checkpoint: Checkpoint) -> Path:
    """A build of two plans made without a search: this folder tests serving, not choosing."""
    text = TextEncoder.load(checkpoint.folder, MAX_LENGTH)
    backend = open_backend("onednn", 2)
    base = Plan(checkpoint.sha256, checkpoint.plan_config(), "onednn", {}, {})
    exact = mode_plan(base, "float", 0, (), Recipe())
    sites = encoder.quantizable_sites(backend)
    fast = mode_plan(base, "full", checkpoint.config.layers, sites, Recipe())
    fast = replace(fast, scales=_scales(checkpoint, text, exact, backend))
    tiers = {
        name: TierFiles(plan, quantize.export_weights(checkpoint.tensors, plan))
        for name, plan in (("exact", exact), ("fast", fast))
    }
    with build_lock(out):
        return write_build(
            out,
            model=MODEL,
            task="classification",
            head="classification",
            labels=checkpoint.labels,
            max_length=MAX_LENGTH,
            text=text,
            head_weights=heads.get("classification").export(checkpoint.state, checkpoint.hf_config),
            encoder_config=checkpoint.config,
            tiers=tiers,
            default_tier="fast",
            build={},
            threads=2,
        )


def _scales(
    checkpoint: Checkpoint, text: TextEncoder, plan: Plan, backend: Backend
) -> dict[str, float]:
    """Min-max scales over texts that are in neither test nor training."""
    rows = (DEMO / "film_reviews/held_out.jsonl").read_text("utf-8").splitlines()[:128]
    encodings = text.encode([json.loads(row)["text"] for row in rows], offsets=False)
    parts = [encodings[start : start + 32] for start in range(0, len(encodings), 32)]
    batches = [pack_batch([e.ids for e in part], [e.types for e in part]) for part in parts]
    session = encoder.prepare(backend, checkpoint.config, checkpoint.tensors, plan)
    assert isinstance(session, encoder.LoopSession)
    ranges = calibrate.observe(session, batches, "first", backend.to_host)
    return calibrate.scales(ranges, Recipe())
