"""Start and stop a Triton on the current build of a repository folder.

A `Server` is one tritonserver in a session of its own, with its model processes. It ends with
`stop()`, with the process that started it, and leaves nothing in /dev/shm either way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from samp_core.control import (
    Control,
    ControlError,
    choose_ports,
    listens,
    port_in_log,
    raised_text,
    relevant_line,
    taken_port,
)
from samp_core.embedded import Triton, cache_folder, find_triton
from samp_core.errors import SampError
from samp_core.manifest import models_folder, read_manifest, verify
from samp_core.shm import Regions

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 180.0
# What a stop gives to requests in flight, to idle HTTP connections and to unloading, together.
EXIT_TIMEOUT_S = 6
# Larger files are hashed by the model that loads them.
_HASHED_AT_START = 1 << 20
_START_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1


class Server:
    """A running Triton. `grpc`, `http` and `metrics` are "host:port"; `models` in load order."""

    def __init__(
        self,
        out: Path,
        process: subprocess.Popen[bytes],
        regions: Regions,
        host: str,
        ports: Sequence[int],
        log: Path,
    ) -> None:
        host = LOOPBACK if host == "0.0.0.0" else host
        self.out = out
        self.models: list[str] = []
        self.http, self.grpc, self.metrics = (f"{host}:{port}" for port in ports)
        self._control = Control(self.http)
        self.log = log
        self.pid = process.pid
        self._process = process
        self._regions = regions
        self._tiers: list[str] | None = None
        self._keep_log = False
        self._stopping = threading.Lock()

    @classmethod
    def start(
        cls,
        out: Path,
        *,
        tiers: Sequence[str] | None = None,
        host: str = LOOPBACK,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log: Path | None = None,
        threads: int | None = None,
        log_batches: bool = False,
    ) -> Server:
        """Start Triton on `<out>/current/models` and return when every model answers.

        Port 0 is any free one. `threads` overrides the encoder threads of the build. The log goes
        to `log`, else to a file of this user's cache that a clean stop removes. `log_batches`
        writes one log line for every batch that an encoder runs. Raises SampError: no build,
        damaged repository, unknown tier, taken port, no Triton, or what Triton died of.
        """
        manifest = read_manifest(out)
        models = manifest.models(tiers)
        verify(manifest, models=models, largest=_HASHED_AT_START)
        triton = find_triton()
        wanted = (http_port, grpc_port, metrics_port)
        for attempt in range(_START_ATTEMPTS):
            ports = choose_ports(host, wanted)
            server = cls._launch(out, triton, models, host, ports, log, threads, log_batches)
            try:
                server._wait_ready(models)
            except _PortTaken as taken:
                server.stop()
                if taken.port in wanted or attempt == _START_ATTEMPTS - 1:
                    raise taken_port(host, taken.port) from None
                continue
            except BaseException:
                server.stop()
                raise
            server.models = models
            server._tiers = list(tiers) if tiers else None
            return server
        raise AssertionError

    @classmethod
    def _launch(
        cls,
        out: Path,
        triton: Triton,
        models: Sequence[str],
        host: str,
        ports: Sequence[int],
        log: Path | None,
        threads: int | None,
        log_batches: bool,
    ) -> Server:
        regions = Regions.claim(cache_folder() / "run")
        log = log or regions.log
        http_port, grpc_port, metrics_port = ports
        command = [
            *triton.command(),
            f"--model-repository={models_folder(out).absolute()}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models),
            "--disable-auto-complete-config",
            "--exit-on-error=false",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--http-address={host}",
            f"--http-port={http_port}",
            f"--grpc-address={host}",
            f"--grpc-port={grpc_port}",
            f"--metrics-address={host}",
            f"--metrics-port={metrics_port}",
            f"--backend-config=python,shm-region-prefix-name={regions.prefix}",
            "--backend-config=python,stub-timeout-seconds=120",
        ]
        environment = triton.environment(os.environ)
        if threads is not None:
            environment["SAMP_THREADS"] = str(threads)
        if log_batches:
            environment["SAMP_LOG_BATCHES"] = "1"
        # The kernel sends the signal when the *thread* that forked ends, so only the main one asks.
        main = threading.current_thread() is threading.main_thread()
        libc = ctypes.CDLL(None)
        try:
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(regions.descriptor,),
                    preexec_fn=(
                        (lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)) if main else None
                    ),
                )
        except OSError as error:
            regions.release()
            raise SampError(
                "no_start",
                f"{error.filename or triton.binary}: {error.strerror}",
                "a log file that can be written and a Triton that can be run",
                "choose another log file, or install Triton again",
            ) from None
        return cls(out, process, regions, host, ports, log)

    def _wait_ready(self, models: Sequence[str]) -> None:
        """Return when all of `models` are READY; raise for the first, in load order, that is not.

        Triton opens its ports when it has tried to load them all, the metrics' one last.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        port = int(self.metrics.rpartition(":")[2])
        while not listens(self.pid, port):
            if self.poll() is not None:
                taken = port_in_log(self._log_text())
                raise self.died() if taken is None else _PortTaken(taken)
            if time.monotonic() > deadline:
                raise self._failure("no_answer", f"no answer in {START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        index = self._control.index()
        for name in models:
            entry = index.get(name, {})
            if entry.get("state") != "READY":
                raise self._load_failure(name, entry.get("reason", ""))

    def reload(self) -> list[str]:
        """Serve what is the current build now: load its models in order, unload what is gone.

        A model that fails to load leaves its predecessor serving, and raises SampError.
        """
        manifest = read_manifest(self.out)
        models = manifest.models(self._tiers)
        verify(manifest, models=models, largest=_HASHED_AT_START)
        for name in models:
            try:
                self._control.load(name)
            except ControlError as error:
                raise self._load_failure(name, str(error)) from None
        for name in reversed(self.models):
            if name not in models:
                self._control.unload(name)
        self.models = models
        return models

    def ready_line(self) -> dict[str, Any]:
        """What `samp serve` prints as JSON when everything answers."""
        return {
            "grpc": self.grpc,
            "http": self.http,
            "metrics": self.metrics,
            "pid": self.pid,
            "models": self.models,
        }

    def poll(self) -> int | None:
        """Triton's exit status (minus the signal that ended it), None while it runs."""
        if self._process.returncode is not None:
            return self._process.returncode
        # Not reaped before `stop`: until then the number names no other process group.
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status

    def wait(self, timeout: float | None = None) -> int:
        """Wait until Triton has ended; its exit status. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"Triton (pid {self.pid}) still runs after {timeout} s")
            time.sleep(0.05)
        return status

    def stop(self) -> None:
        """End Triton and its model processes, and remove its shared memory. May be repeated."""
        with self._stopping:
            if self._process.returncode is not None:
                return
            if self.poll() is None:
                os.kill(self.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    self.wait(EXIT_TIMEOUT_S + 5)
            else:
                self._keep_log |= self.poll() != 0
            # Clean or not: a model process may outlive its Triton, in the same process group.
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._regions.release(keep_log=self._keep_log)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def died(self) -> SampError:
        """The error that says why a Triton that should run does not."""
        return self._failure("triton_died", f"Triton ended with status {self.poll()}")

    def _failure(self, code: str, given: str) -> SampError:
        self._keep_log = True
        line = relevant_line(self._log_text())
        return SampError(
            code, f"{given}: {line}" if line else given, "", f"the whole log is in {self.log}"
        )

    def _load_failure(self, model: str, reason: str) -> SampError:
        """One line out of what a model process raised; our own errors keep their code."""
        self._keep_log = True
        text = raised_text(reason) or relevant_line(self._log_text())
        code, _, rest = text.partition(": ")
        if not re.fullmatch(r"[a-z_]+", code):
            code, rest = "model_failed", text
        return SampError(code, f"model {model}: {rest}", "", f"the whole log is in {self.log}")

    def _log_text(self) -> str:
        with contextlib.suppress(OSError):  # a log that someone removed hides no error
            return self.log.read_text(errors="replace")
        return ""


def serve_forever(server: Server, ready: Callable[[], None] | None = None) -> None:
    """Wait until SIGINT or SIGTERM stops the server; SIGHUP reloads the current build.

    `ready` is called once the signals are handled: whoever reads "ready" may send one at once.
    Raises SampError when Triton ends by itself. For the main thread.
    """
    # Plain names: a handler that set an Event would wait for ever on the lock that wait() holds.
    asked = changed = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    def reload(_number: int, _frame: FrameType | None) -> None:
        nonlocal changed
        changed = True

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: reload}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        if ready is not None:
            ready()
        while not asked:
            time.sleep(0.1)
            if server.poll() is not None:
                raise server.died()
            if changed:
                changed = False
                try:
                    server.reload()
                except SampError as error:  # what was served before still is
                    print(error, file=sys.stderr, flush=True)
    finally:
        server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


class _PortTaken(Exception):
    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.port = port
