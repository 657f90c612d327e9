"""What gpu_check.py finds: lines for the reader, and JSON that is written after every line; and how
it runs what may hang."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE_S = 5.0
"""After a kill; who is stuck in the driver even then is left behind."""
PROVING = ("ops", "encoder", "serving")
"""Steps that must have been made before backend `auto` takes the kernels on such a GPU."""


@dataclass
class Report:
    """`failed` decides the exit status; `deadline` is time.monotonic()'s."""

    path: Path
    deadline: float
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def check(self, name: str, fine: bool, detail: str) -> None:
        fine = bool(fine)
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {detail}", flush=True)
        self.facts.setdefault("checks", []).append({"name": name, "ok": fine, "detail": detail})
        if not fine:
            self.failed.append(name)
        self.save()

    def note(self, name: str, value: Any) -> None:
        """A fact that is no check."""
        self.facts[name] = value
        self.save()

    def skip(self, name: str, why: str) -> None:
        """What was left out, and why."""
        print(f"     {name}: left out, {why}", flush=True)
        self.facts.setdefault("left_out", {})[name] = why
        self.save()

    def attempt(self, name: str, step: Any, *arguments: Any) -> None:
        """A step whose failure must not keep the others from running."""
        try:
            step(self, *arguments)
        except Exception as error:
            self.facts.setdefault("traces", {})[name] = traceback.format_exc()[-2000:]
            self.check(name, False, f"{type(error).__name__}: {error}")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        write_json(self.path, self.facts)


def run(
    command: list[str], seconds: float, more: dict[str, str] | None = None, show: bool = False
) -> tuple[int | None, str]:
    """Exit status (None: stopped after `seconds`) and output; `show`: to the terminal instead."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **(more or {})},
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=max(seconds, 1.0))
        return process.returncode, said or ""
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        said, _ = process.communicate(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        said = ""
    return None, said or ""


def unproven(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a run does not prove the kernels on its GPU; "" where it does: all of PROVING were made,
    every step came to its end and every check passed."""
    for name in PROVING:
        if not steps.get(name, {}).get("checks"):
            return f"step {name} was not made"
    for name, step in steps.items():
        if not step.get("ended"):
            return f"step {name} did not come to its end"
        for check in step.get("checks", ()):
            if not check["ok"]:
                return f"{check['name']} failed"
    return ""


def failed(steps: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a run speaks against the kernels: a check failed, a step died, or one of PROVING did
    not come to its end. One that was stopped at its limit while it took times says nothing."""
    bad = any(not check["ok"] for step in steps.values() for check in step.get("checks", ()))
    return bad or any(
        not step.get("ended") and (name in PROVING or step.get("exit_status") is not None)
        for name, step in steps.items()
    )


def write_json(path: Path, facts: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
