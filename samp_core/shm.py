"""The shared memory of one server: named so that it can be found again after any death.

Triton's Python backend leaves its regions in /dev/shm when it is killed. Each server has a prefix
of its own and a lock file of that name, which its processes inherit: as long as one of them lives
the lock is held, and when none does, the next start removes what is left: the regions, the
server's repository folder (stage.py) and what it said of itself (`describe`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHM = Path("/dev/shm")
PREFIX = "samp-"
_LOG_DAYS = 3


@dataclass(frozen=True)
class Regions:
    """A claimed prefix. `descriptor` is the held lock, to be inherited by the server."""

    folder: Path
    prefix: str
    descriptor: int

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.prefix}.lock"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.prefix}.log"

    @property
    def models(self) -> Path:
        """The repository folder of this server alone."""
        return self.folder / f"{self.prefix}.models"

    def describe(self, facts: Mapping[str, Any]) -> None:
        """What other processes of this user may know of the server; read by `living`."""
        path = self.folder / f"{self.prefix}.json"
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps(facts), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def claim(cls, folder: Path) -> Regions:
        """A fresh prefix; regions of servers that are dead are removed first."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep(folder)
        while True:
            prefix = PREFIX + secrets.token_hex(6)
            descriptor = os.open(folder / f"{prefix}.lock", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # A sweep of another start may come between the two calls, and takes the file away.
            if _locked(descriptor) and os.fstat(descriptor).st_nlink:
                return cls(folder, prefix, descriptor)
            os.close(descriptor)

    def release(self, *, keep_log: bool = False) -> None:
        """Remove all that is the server's; for when its processes have ended."""
        _remove(self.folder, self.prefix)
        if not keep_log:
            self.log.unlink(missing_ok=True)
        if self.lock.exists():
            self.lock.unlink()
            os.close(self.descriptor)


def sweep(folder: Path) -> None:
    """Remove what is left of every server of this user that has no process, and old logs."""
    for lock in folder.glob(f"{PREFIX}*.lock"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(lock, os.O_RDWR)
            if _locked(descriptor):
                _remove(folder, lock.stem)
                lock.unlink(missing_ok=True)
            os.close(descriptor)
    for log in folder.glob(f"{PREFIX}*.log"):
        with contextlib.suppress(FileNotFoundError):
            age_s = time.time() - log.stat().st_mtime
            if not log.with_suffix(".lock").exists() and age_s > _LOG_DAYS * 86400:
                log.unlink()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def living(folder: Path) -> list[dict[str, Any]]:
    """What the living servers of this user said of themselves, oldest first."""
    found = []
    for path in folder.glob(f"{PREFIX}*.json"):
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR)
            try:
                if not _locked(descriptor):
                    found.append(json.loads(path.read_text(encoding="utf-8")))
            finally:
                os.close(descriptor)
    return sorted(found, key=lambda facts: float(facts["started"]))


def _remove(folder: Path, prefix: str) -> None:
    shutil.rmtree(folder / f"{prefix}.models", ignore_errors=True)
    for name in (f"{prefix}.json", f"{prefix}.json.partial"):
        (folder / name).unlink(missing_ok=True)
    for region in SHM.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            region.unlink()
