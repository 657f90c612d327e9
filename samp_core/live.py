"""Builds of a folder and the servers that run: which serves what, and changing it from outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from samp_core import repository
from samp_core.embedded import cache_folder
from samp_core.errors import SampError, UsageError
from samp_core.manifest import read_manifest, verify
from samp_core.serve_loop import send
from samp_core.shm import living

Step = Callable[[int, int, str], None]


def servers(out: Path | None = None) -> list[dict[str, Any]]:
    """The servers of this user that run, oldest first; only those that serve a folder, if given.

    Each as Server.describe wrote it: addresses, pid, builds by folder, models, control.
    """
    found = living(cache_folder() / "run")
    if out is None:
        return found
    name = str(out.absolute())
    return [server for server in found if name in server["builds"]]


def activate(
    out: Path,
    build: str | None = None,
    *,
    force: bool = False,
    again: bool = False,
    step: Step = lambda i, of, what: None,
) -> dict[str, Any]:
    """Serve a build, the current one by default, in every server of the folder; then make it the
    current one, which the next start serves.

    Returns repository, build, before (what was current), servers. Where one server cannot load
    it, those that could go back, nothing on disk changes, and SampError is raised.
    """
    before = read_manifest(out)
    wanted = before if build is None else read_manifest(out, build)
    verify(wanted)
    order = {"out": str(out.absolute()), "build": wanted.folder.name, "force": force}
    running = servers(out)
    for server in running:
        if server["control"] is None:
            raise SampError(
                "not_reachable",
                f"{out} is served by process {server['pid']}, which takes no orders",
                "a server started by samp serve",
                "call Server.activate in that process",
            )
    changed: list[dict[str, Any]] = []
    results = []
    for server in running:
        try:
            result = send(server["control"], {**order, "again": again}, step)
        except SampError:
            for done in changed:
                was = done["builds"][order["out"]]
                send(done["control"], {**order, "build": was, "force": True}, step)
            raise
        changed.append(server)
        results.append({key: server[key] for key in ("pid", "grpc", "http")} | result)
    if wanted.folder != (out / "current").resolve() or build is not None:
        repository.activate(out, out / "builds" / wanted.folder.name)
    return {
        "repository": str(out),
        "build": wanted.folder.name,
        "before": before.folder.name,
        "servers": results,
    }


def previous(out: Path) -> str:
    """The build that was current before the current one. Raises UsageError: there is none."""
    read_manifest(out)
    older = repository.builds_by_age(out)[1:]
    if not older:
        raise UsageError(
            "no_build", f"{out} holds one build only", "two", "build another one first"
        )
    return older[0].name
