"""Files that a benchmark makes once: build/bench/<name>-<hash of what it was made from>/."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import machine

FOLDER = machine.ROOT / "build" / "bench"


def made(name: str, key: Any, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills; it is called only where no run has filled it before.

    Written aside and renamed, so that a run that was stopped leaves nothing that looks finished.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = FOLDER / f"{name}-{digest}"
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=FOLDER))
        try:
            make(partial)
            partial.chmod(0o755)
            if not folder.is_dir():  # another run may have been faster
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
