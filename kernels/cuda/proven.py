"""Where `make gpu-check` has passed with these very kernels: there backend `auto` takes them.

proven.json stands beside the cubins (SAMP_PROVEN names another file), by architecture:
`{sm_90a: {sources, device, driver, date, checks, result}}`. A change of any file that launches or
is compiled makes it void, and so does a later check that fails.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from samp_kernels.cuda.build import folder

COMMAND = "make gpu-check"


def file() -> Path:
    return Path(os.environ.get("SAMP_PROVEN") or folder() / "proven.json")


@cache
def sources() -> str:
    """SHA-256 of all that decides what a GPU computes: not the emulator's own files."""
    here = Path(__file__).parent
    paths = [*here.glob("*.py"), *here.glob("src/*.cu"), *here.glob("src/*.cuh")]
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        if path.name not in ("emulator.py", "proven.py"):
            whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def entry(architecture: str) -> dict[str, Any] | None:
    """What is recorded of this architecture, whatever its sources."""
    found = _read().get(architecture)
    return found if isinstance(found, dict) else None


def unproven(architecture: str) -> str:
    """Why these kernels are not proven there; "" where they are."""
    found = entry(architecture)
    if found is None:
        return f"{COMMAND} has not passed on {architecture}"
    if found.get("sources") != sources():
        return f"the kernels changed since {COMMAND} passed on {architecture}"
    return ""


def record(architecture: str, facts: dict[str, Any]) -> Path:
    """Note that the check passed. Raises OSError where the file cannot be written."""
    return _write({**_read(), architecture: {"sources": sources(), **facts}})


def withdraw(architecture: str) -> None:
    """Forget an earlier pass: a check has failed."""
    known = _read()
    if known.pop(architecture, None) is not None:
        _write(known)


def _read() -> dict[str, Any]:
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(known: dict[str, Any]) -> Path:
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path
