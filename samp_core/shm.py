"""The shared memory of one server: named so that it can be found again after any death.

Triton's Python backend leaves its regions in /dev/shm when it is killed. Each server has a prefix
of its own and a lock file of that name, which its processes inherit: as long as one of them lives
the lock is held, and when none does, the next start removes what is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

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
        """Remove the regions and the lock; for when the server's processes have ended."""
        _remove_regions(self.prefix)
        if not keep_log:
            self.log.unlink(missing_ok=True)
        if self.lock.exists():
            self.lock.unlink()
            os.close(self.descriptor)


def sweep(folder: Path) -> None:
    """Remove the regions of every server of this user that has no process left, and old logs."""
    for lock in folder.glob(f"{PREFIX}*.lock"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(lock, os.O_RDWR)
            if _locked(descriptor):
                _remove_regions(lock.stem)
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


def _remove_regions(prefix: str) -> None:
    for region in SHM.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            region.unlink()
