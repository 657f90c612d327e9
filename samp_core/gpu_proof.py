"""Whether backend `auto` may take the GPU: what was noted, else a short check of its own.

The check is every op and tile and whole encoders beside the float64 reference (kernels/cuda/
checks.py, gpu_checks.py), in a child process with a limit: a fault of the device or a hang ends the
child and leaves this process on the CPU. The result is noted (kernels/cuda/proven.py), so it runs
once for an architecture and these kernels. `make gpu-check` is the full proof and wins over it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samp_kernels import cuda
from samp_kernels.cuda import proven

LIMIT_S = 60.0
EMULATED_LIMIT_S = 1200.0
"""The emulator is thousands of times slower, and compiles first."""
TITLE = f"check the GPU's kernels, once (at most {LIMIT_S:.0f} s)"
NAME = "the short check"

Progress = Callable[[str, int], Callable[[], None]]
"""workbench.Progress: a title and its steps to what is called at each."""


def silent(title: str, steps: int) -> Callable[[], None]:
    return lambda: None


def why_not(
    head_dim: int | None = None,
    progress: Progress = silent,
    *,
    again: bool = False,
    limit_s: float | None = None,
) -> str:
    """Why `auto` leaves the GPU alone; "" where it takes it. Checks what nobody has checked yet.

    again: also what an earlier short check found wrong.
    """
    why = cuda.unfit(head_dim)
    if why:
        return why
    device = cuda.device_key()
    noted = proven.entry(device)
    failed = noted is not None and noted.get("by") == NAME and not noted.get("passed")
    if noted is None or (again and failed):
        step = progress(TITLE, 1)
        wrong, facts = check(limit_s or (EMULATED_LIMIT_S if cuda.emulated() else LIMIT_S))
        step()
        try:
            proven.record(device, {"by": NAME, "passed": not wrong, "why": wrong, **facts})
        except OSError as error:
            file = proven.files()[-1]
            print(f"samp: {file}: {error.strerror}; {NAME} is not noted", file=sys.stderr)
    return cuda.not_automatic(head_dim)


def check(limit_s: float) -> tuple[str, dict[str, Any]]:
    """What the check finds wrong ("" for nothing), and what is to be noted of it."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="samp-gpu-") as folder:
        part, log = Path(folder, "part.json"), Path(folder, "log")
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "samp_core.gpu_proof", str(part)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    _end(process)
        try:
            found = json.loads(part.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    checks = found.pop("checks", [])
    last = checks[-1] if checks else "its start"
    wrong = str(found.pop("wrong", ""))
    if not wrong and code is None:
        wrong = f"it did not end within {limit_s:.0f} s, after {last}"
    elif not wrong and not found.pop("ended", False):
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        wrong = f"it died ({how}) after {last}" + (f": {said[-1][:200]}" if said else "")
    found.pop("ended", None)
    seconds = round(time.monotonic() - begun, 1)
    date = time.strftime("%Y-%m-%d")
    return wrong, {**found, "date": date, "checks": len(checks), "seconds": seconds}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and what it started. One that is stuck in a driver call is left where it is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)


@dataclass
class Found:
    """What the child tells its parent, after every check. The first that fails ends it."""

    path: Path
    facts: dict[str, Any] = field(default_factory=lambda: {"checks": []})

    def check(self, name: str, fine: bool, detail: str) -> None:
        self.facts["checks"].append(name)
        if not fine:
            self.facts["wrong"] = f"{name}: {detail}"
        self.save()
        if not fine:
            raise SystemExit(1)

    def attempt(self, name: str, step: Any, *arguments: Any) -> None:
        try:
            step(self, *arguments)
        except Exception as error:
            self.check(name, False, f"{type(error).__name__}: {error}"[:300])

    def save(self) -> None:
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.facts), encoding="utf-8")
        os.replace(aside, self.path)


def main(path: Path) -> None:
    """The child: small shapes, and on a GPU one layer of BERT-base's width."""
    from samp_kernels.cuda import checks

    from samp_core import gpu_checks

    found = Found(path)
    emulated = cuda.emulated()

    def steps(report: Found) -> None:
        b = checks.poisoned(emulated)
        report.facts["device"] = b.device_facts()["gpu"]
        checks.check_ops(report, b, True)
        gpu_checks.check_near(report, b, bool(emulated))
        gpu_checks.check_session(report, b, gpu_checks.SMALL, 64)

    found.attempt("open the device", steps)
    found.facts["ended"] = True
    found.save()


if __name__ == "__main__":
    code = 1
    try:
        main(Path(sys.argv[1]))
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # What a faulty device does to the interpreter's end is not waited for.
