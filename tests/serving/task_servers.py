"""A Triton for each task, on a small checkpoint built by `samp build`, and on the shared ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_tasks
from forked import forks
from small_tasks import SmallTask

from samp_core.server import Server

SHARED = Path(__file__).resolve().parents[3] / "shared"


@dataclass(frozen=True)
class ServedTask:
    """`made` served: tiers `exact` and `fast` (everything int8) of the model `small`."""

    made: SmallTask
    out: Path
    server: Server

    def address(self, protocol: str) -> str:
        return self.server.grpc if protocol == "grpc" else self.server.http


@contextlib.contextmanager
def serve_small(task: str, folder: Path, *more: object, **options: Any) -> Iterator[ServedTask]:
    """Build a small checkpoint of a task and serve it."""
    made = small_tasks.make(task, folder / "made", **options)
    out = folder / "out"
    done = forks().samp(*made.command(out, "--tier", "fast:latency=1000", *more))
    assert done.code == 0, done.err
    with Server.start(out, threads=1, log=out / "triton.log") as server:
        yield ServedTask(made, out, server)
