"""Start and stop a Triton on the builds of one or several folders, and change builds in it.

A `Server` is one tritonserver in a session of its own, with its model processes. It ends with
`stop()`, with the process that started it, and leaves nothing in /dev/shm either way.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from samp_core import activation, fits
from samp_core.activation import Spec, Step
from samp_core.control import (
    Control,
    ControlError,
    choose_ports,
    listens,
    lost_a_lock,
    port_in_log,
    raised_text,
    relevant_line,
    restricted,
    stubs,
    taken_port,
)
from samp_core.embedded import cache_folder, find_triton
from samp_core.errors import SampError, UsageError
from samp_core.manifest import Manifest, hold, read_manifest, verify
from samp_core.shm import Regions
from samp_core.stage import Layout, Stage

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 180.0
# What a stop gives to requests in flight, to idle HTTP connections and to unloading, together.
EXIT_TIMEOUT_S = 6
# Larger files are hashed by the model that loads them.
_HASHED_AT_START = 1 << 20
_START_ATTEMPTS = 3
# Becomes Triton, and is sent SIGTERM when the process that starts it ends. No preexec_fn does this:
# it would fork this whole process, and where that has called gRPC, gRPC's own handlers end one
# child in thirty before it runs anything (grpc issue 43055). A start without one is a vfork.
_BECOME = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
for number in signal.SIGPIPE, signal.SIGXFSZ:  # which Python ignores
    signal.signal(number, signal.SIG_DFL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("its parent has ended")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{error.strerror}: {sys.argv[2]}")
"""
# A request that has read the old ensemble takes hold of its models within microseconds.
_SETTLE_S = 0.25


class Server:
    """A running Triton. `grpc`, `http` and `metrics` are "host:port"; `models` in load order."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        regions: Regions,
        stage: Stage,
        host: str,
        ports: Sequence[int],
        log: Path,
        headers: Mapping[str, str],
    ) -> None:
        host = LOOPBACK if host == "0.0.0.0" else host
        self.http, self.grpc, self.metrics = (f"{host}:{port}" for port in ports)
        self.log = log
        self.pid = process.pid
        self.notes: list[str] = []
        self._builds: dict[Path, Manifest] = {}
        self._holds: dict[Path, dict[Path, int]] = {}  # folder -> build -> descriptor
        self._view: dict[str, Spec] = {}
        self._control = Control(self.http, headers=headers)
        self._process = process
        self._regions = regions
        self._stage = stage
        self._tiers: list[str] | None = None
        self._facts: dict[str, Any] = {}
        self._keep_log = False
        self._stopping = threading.Lock()

    @property
    def models(self) -> list[str]:
        """What is loaded, in load order."""
        return list(self._view)

    @property
    def builds(self) -> dict[Path, str]:
        """The build that is served of each folder."""
        return {out: manifest.folder.name for out, manifest in self._builds.items()}

    @classmethod
    def start(
        cls,
        out: Path | Sequence[Path],
        *,
        tiers: Sequence[str] | None = None,
        host: str = LOOPBACK,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log: Path | None = None,
        threads: int | None = None,
        log_batches: bool = False,
        options: Sequence[str] = (),
        layout: Layout | None = None,
    ) -> Server:
        """Start Triton on the current build of each folder; return when every model answers.

        Port 0 is any free one. `threads` overrides the encoder threads of the build. The log goes
        to `log`, else to a file of this user's cache that a clean stop removes. `log_batches`
        writes one log line a batch of an encoder. `options` are Triton's own; `layout` sets
        instances and queue delays other than the builds'.
        Raises SampError: no build, damaged repository, a plan that cannot run here, unknown tier,
        two folders of one model, taken port, no Triton, or what Triton died of.
        """
        folders = [out] if isinstance(out, Path) else list(out)
        builds = {folder.absolute(): read_manifest(folder) for folder in folders}
        activation.check_names(builds)
        view: dict[str, Spec] = {}
        for manifest in builds.values():
            verify(manifest, models=manifest.models(tiers), largest=_HASHED_AT_START)
            view |= activation.view(manifest, tiers)
        notes = [n for where, m in builds.items() for n in fits.check(where, m, tiers, threads)]
        triton = find_triton()
        wanted = (http_port, grpc_port, metrics_port)
        for attempt in range(_START_ATTEMPTS):
            ports = choose_ports(host, wanted)
            environment = triton.environment(os.environ)
            if threads is not None:
                environment["SAMP_THREADS"] = str(threads)
            if log_batches:
                environment["SAMP_LOG_BATCHES"] = "1"
            command = [*triton.command(), *options]
            server = cls._launch(view, command, environment, host, ports, log, layout or Layout())
            try:
                server._wait_ready(list(view))
            except _PortTaken as taken:
                server.stop()
                if taken.port in wanted or attempt == _START_ATTEMPTS - 1:
                    raise taken_port(host, taken.port) from None
                continue
            except BaseException as error:
                server.stop()
                lost = isinstance(error, SampError) and lost_a_lock(server._log_text())
                if not lost or attempt == _START_ATTEMPTS - 1:
                    raise
                continue
            server._builds, server._view, server.notes = builds, view, notes
            server._holds = {
                out: {manifest.folder.resolve(): hold(manifest.folder)}
                for out, manifest in builds.items()
            }
            server._tiers = list(tiers) if tiers else None
            server.describe(started=time.time(), pid=server.pid, control=None)
            return server
        raise AssertionError

    @classmethod
    def _launch(
        cls,
        view: activation.View,
        triton: Sequence[str],
        environment: dict[str, str],
        host: str,
        ports: Sequence[int],
        log: Path | None,
        layout: Layout,
    ) -> Server:
        regions = Regions.claim(cache_folder() / "run")
        log = log or regions.log
        http_port, grpc_port, metrics_port = ports
        stage = Stage(regions.models, layout)
        for name, spec in view.items():
            stage.put(name, spec)
        command = [
            *triton,
            f"--model-repository={stage.folder.absolute()}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in view),
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
        # The kernel sends the signal when the *thread* that forked ends, so only the main one asks.
        if threading.current_thread() is threading.main_thread():
            first = [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid())]
            command = [*first, *command]
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
                )
        except OSError as error:
            regions.release()
            raise SampError(
                "no_start",
                f"{error.filename or triton[0]}: {error.strerror}",
                "a log file that can be written and a Triton that can be run",
                "choose another log file, or install Triton again",
            ) from None
        return cls(process, regions, stage, host, ports, log, restricted(triton))

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
        """Serve the current build of every folder; what `activate` says holds for each."""
        for out in list(self._builds):
            self.activate(out)
        return self.models

    def activate(
        self,
        out: Path,
        build: str | None = None,
        *,
        force: bool = False,
        again: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, Any]:
        """Serve a build of a served folder, the current one by default, while requests go on.

        No request meets models of two builds (activation.py). Whatever fails, what was served
        before is served again, and SampError is raised. A build that answers with other tensors
        or labels is refused unless `force`: clients that run would misread it. `again` loads
        what did not change too: the way back after a model process has died.
        """
        out = out.absolute()
        if (old := self._builds.get(out)) is None:
            served = ", ".join(map(str, self._builds))
            raise UsageError("not_served", f"{out} is not served here", served, "name one of them")
        new = read_manifest(out, build)
        verify(new, models=new.models(self._tiers))
        notes = fits.check(out, new, self._tiers)
        activation.check_names({**self._builds, out: new})
        if not force:
            activation.check_meaning(old, new)
        mine, after = activation.view(old, self._tiers), activation.view(new, self._tiers)
        before = {name: self._view[name] for name in mine}
        dead = self._not_ready()
        repeated = [name for name in after if again or name in dead]
        steps = activation.plan(before, after, again=repeated)
        if old.folder == new.folder and not repeated:
            steps = []  # all that is current is loaded, and ready
        held = hold(new.folder)
        try:
            self._run(steps, progress)
        except BaseException:
            os.close(held)
            raise
        self._hold_linked(out, new.folder.resolve(), held, after)
        rest = {name: spec for name, spec in self._view.items() if name not in mine}
        self._view = {**rest, **after}
        self._builds[out] = new
        self.describe()
        loads = sum(step.after is not None for step in steps)
        gone = [old.tiers[t].ensemble for t in old.tiers if old.tiers[t].ensemble not in after]
        return {
            "repository": str(out),
            "build": new.folder.name,
            "before": old.folder.name,
            "loads": loads,
            "tiers": list(new.chosen(self._tiers)),
            "gone": [name for name in gone if name in before],
            "notes": notes,
        }

    def _hold_linked(self, out: Path, build: Path, held: int, names: Iterable[str]) -> None:
        """Hold the new build, and older ones whose files models that did not change still use."""
        holds = self._holds[out]
        if build in holds:
            os.close(holds.pop(build))
        linked = self._stage.builds(names)
        for older in [folder for folder in holds if folder not in linked]:
            os.close(holds.pop(older))
        holds[build] = held

    def _run(self, steps: Sequence[Step], progress: Callable[[int, int, str], None] | None) -> None:
        count = 0

        def do(step: Step) -> None:
            nonlocal count
            count += 1
            if progress is not None:
                progress(count, len(steps), str(step))
            self._do(step)

        try:
            activation.run(steps, do)
        except activation.WayBackFailed as error:
            raise SampError(
                "mixed",
                f"{error.__cause__}; and so did the way back: {error}",
                "",
                f"start the server again; the whole log is in {self.log}",
            ) from None

    def _do(self, step: Step) -> None:
        if step.settle:
            time.sleep(_SETTLE_S)
        try:
            if step.after is None:
                self._control.unload(step.name)
                self._stage.drop(step.name)
                return
            self._stage.put(step.name, step.after)
            self._control.load(step.name)
        except (ControlError, OSError) as error:
            if step.before is None:
                self._stage.drop(step.name)
            else:
                self._stage.put(step.name, step.before)
            if self.poll() is not None:
                raise self.died() from None
            raise self._load_failure(step.name, str(error)) from None

    def _not_ready(self) -> set[str]:
        """Models whose process has ended: Triton goes on calling them ready."""
        index = self._control.index()
        alive = stubs(self.pid)
        return {
            name
            for name, spec in self._view.items()
            if index.get(name, {}).get("state") != "READY" or not (spec.parts or name in alive)
        }

    def describe(self, **facts: Any) -> None:
        """Tell other processes of this user what is served here; `facts` are kept."""
        self._facts |= facts
        addresses = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        builds = {str(out): build for out, build in self.builds.items()}
        loaded = {"models": self.models, "tiers": self._tiers, "log": str(self.log)}
        headers = {"headers": dict(self._control.headers)}
        self._regions.describe(
            {**self._facts, **addresses, "triton": self.pid, "builds": builds, **loaded, **headers}
        )

    @property
    def prefix(self) -> str:
        """The name of this server among all that this user runs; new for each."""
        return self._regions.prefix

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
            for holds in self._holds.values():
                for descriptor in holds.values():
                    os.close(descriptor)
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


class _PortTaken(Exception):
    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.port = port
