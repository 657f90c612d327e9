"""The `samp` command in processes of their own, forked from one that has imported it already.

A start with torch costs two seconds and more; the fork costs milliseconds, and from there on runs
`samp_core.cli.main` like any `samp` does. Run as a program, this file is that first process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        """What stderr holds beside the lines of progress."""
        return [line for line in self.err.splitlines() if not line.startswith("  ")]


@dataclass
class Running:
    """A forked command. `wait` may be called once."""

    pid: int
    folder: Path
    ended: threading.Event = field(default_factory=threading.Event)
    code: int = 0

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a command that has ended already is left alone."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout: float = 120.0) -> Done:
        if not self.ended.wait(timeout):
            self.kill()
            raise TimeoutError(f"samp still ran after {timeout} s: {self.stderr}")
        return Done(self.code, (self.folder / "out").read_text(errors="replace"), self.stderr)


class Forks:
    """The process that forks; `samp` starts a command, and what it returns waits for it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="samp-forks-")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        self._started: dict[str, Running] = {}
        self._answered = threading.Condition()
        self._count = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self,
        *args: object,
        stdin: bytes = b"",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Running:
        self._count += 1
        folder = Path(self._folder.name, str(self._count))
        folder.mkdir()
        (folder / "in").write_bytes(stdin)
        for name in ("out", "err"):
            (folder / name).touch()
        order = {
            "folder": str(folder),
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(env or {}),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        with self._answered:
            self._answered.wait_for(lambda: str(folder) in self._started, 60)
            return self._started[str(folder)]

    def samp(self, *args: object, **options: Any) -> Done:
        return self.start(*args, **options).wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._folder.cleanup()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._answered:
                if "pid" in said:
                    made = Running(said["pid"], Path(said["folder"]))
                    self._started[said["folder"]] = made
                else:
                    running = self._started[said["folder"]]
                    running.code = said["code"]
                    running.ended.set()
                self._answered.notify_all()


@functools.cache
def forks() -> Forks:
    """One for the whole run."""
    made = Forks()
    atexit.register(made.close)
    return made


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _serve() -> None:
    """Fork a command for each line of stdin; say its pid at once and its exit code at the end."""
    heavy = ("torch", "yaml", "scipy.special", "samp_client", "samp_core.build", "samp_core.cli")
    for name in (*heavy, "samp_core.generate", "samp_core.show", "samp_core.server"):
        importlib.import_module(name)
    children: dict[int, str] = {}
    buffer = b""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    while True:
        ready = select.select([0, reading], [], [])[0]
        if reading in ready:
            os.read(reading, 4096)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"folder": children.pop(pid), "code": code}), flush=True)
        if 0 in ready:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _command(order)
                children[pid] = order["folder"]
                print(json.dumps({"folder": order["folder"], "pid": pid}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _command(order: Mapping[str, Any]) -> NoReturn:
    from samp_core.cli import main

    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, name in ((0, "in"), (1, "out"), (2, "err")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(os.path.join(order["folder"], name), flags), number)
    sys.argv = ["samp", *order["args"]]
    code: Any = 1
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # what the interpreter would do with it
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
