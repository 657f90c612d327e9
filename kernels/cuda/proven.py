"""What checks on hardware found of these very kernels: where one passed, backend `auto` takes them.

Notes stand in proven.json beside the cubins, where that folder may not be written in the user's
cache; SAMP_PROVEN names another file, and as /dev/null keeps `auto` from any GPU. By device:
`{sm_90a: {sources, by, passed, why, device, driver, date, checks, ...}}`. A change of any file that
launches or is compiled makes a note void.
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
FILE = "proven.json"

_remembered: dict[str, dict[str, Any]] = {}


def files() -> tuple[Path, ...]:
    """Where notes may stand; the first that can be written is."""
    named = os.environ.get("SAMP_PROVEN")
    if named:
        return (Path(named),)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return (folder() / FILE, Path(home, "samp", FILE))


def switched_off() -> bool:
    return os.environ.get("SAMP_PROVEN") == os.devnull


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


def entry(device: str) -> dict[str, Any] | None:
    """What is noted of these kernels on such a device."""
    return next((found for found in _entries(device) if found.get("sources") == sources()), None)


def unproven(device: str) -> str:
    """Why these kernels are not proven there; "" where they are."""
    found = entry(device)
    if found is None:
        changed = "; the kernels changed since an earlier check" if _entries(device) else ""
        return f"they have not been checked on {device}{changed}"
    if not found.get("passed"):
        return f"{found.get('by')} failed on {device}, {found.get('date')}: {found.get('why')}"
    return ""


def record(device: str, facts: dict[str, Any]) -> Path:
    """Note what a check found: `by`, `passed`, `why`, and more. Raises OSError where no file can be
    written; this process remembers it all the same."""
    _remembered[device] = {"sources": sources(), **facts}
    trouble: OSError | None = None
    written: Path | None = None
    for path in files():
        known = _read(path)
        if written is not None and device not in known:
            continue  # Only an older note is taken out of the others.
        known.pop(device, None)
        try:
            _write(path, {**known, device: _remembered[device]} if written is None else known)
            written = written or path
        except OSError as error:
            trouble = error
    if written is None:
        raise trouble or OSError(0, "no file")
    return written


def _entries(device: str) -> list[dict[str, Any]]:
    known = [_remembered, *(_read(path) for path in files())]
    found = [one.get(device) for one in known]
    return [one for one in found if isinstance(one, dict)]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    if path.exists() and not path.is_file():
        raise OSError(0, "no file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, path)
