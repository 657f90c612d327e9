"""A headless load test in a process of its own: locust patches the one that it runs in."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samp_client import BadRequest, ClientError, Tls, connect
from samp_client.security import check_headers
from samp_client.transport import ProtocolName
from samp_loadtest.arrivals import SHAPES
from samp_loadtest.settings import check_tiers, format_mix, parse_mix, read_lengths, read_texts

MAX_USERS = 5_000
MAX_SECONDS = 24 * 3600
# What locust needs beyond the run itself: imports before it, the last answers after it.
_START_S = 60.0
_USERS = {"grpc": "TritonGrpcUser", "http": "TritonHttpUser"}

Progress = Callable[[float, float], None]


class LocustMissing(ClientError):
    code = "locust_missing"


class LoadTestFailed(ClientError):
    code = "loadtest_failed"


def run_loadtest(
    url: str,
    tiers: str | Mapping[str, float],
    *,
    protocol: ProtocolName = "grpc",
    users: int = 4,
    seconds: float = 10.0,
    texts: Sequence[str] | str | Path | None = None,
    rows: int = 1,
    model: str | None = None,
    spawn_rate: float | None = None,
    think_time_s: float = 0.0,
    timeout_s: float = 30.0,
    progress: Progress | None = None,
    workers: int = 0,
    rate: float = 0.0,
    shape: str = "constant",
    lengths: str | Path | None = None,
    warm_s: float = 0.0,
    tls: Tls | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Load one tier ("fast") or a mix ("fast=3,exact=1") with `users` concurrent callers.

    Returns by tier: requests, failures, rps (answered requests per second), p50, p95, p99,
    server_queue_ms and server_compute_ms, all times in milliseconds, percentiles of the raw times.
    texts: a list, or a .jsonl or plain file; rows: texts in one request; progress: called about
    twice a second with the seconds gone and the seconds of the run. workers: so many processes
    that call, and one that counts; rate: requests a second offered in `shape` (arrivals.py), with
    `users` as the most in flight; lengths: a file of words and weights; warm_s: of the run, not
    counted; tls, headers: as for `connect`. Whatever happens, no process is left behind. Raises
    ClientError: BadRequest, UnknownTier, Unavailable, LocustMissing, and LoadTestFailed, also when
    not one request was answered.
    """
    mix = parse_mix(tiers if isinstance(tiers, str) else format_mix(tiers))
    _check_limits(users, seconds, rows, spawn_rate)
    _check_rate(rate, shape, warm_s, seconds, workers, users)
    if lengths is not None:
        read_lengths(str(lengths))
    if importlib.util.find_spec("locust") is None:
        raise LocustMissing(
            "locust is not installed",
            "the extra `loadtest`",
            "pip install 'samp-triton[loadtest]'",
        )
    options: dict[str, Any] = {"model": model, "timeout_s": timeout_s}
    with connect(url, protocol, tls=tls, headers=headers, **options) as client:
        check_tiers(client, mix, rows)
    with tempfile.TemporaryDirectory(prefix="samp-loadtest-") as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "locust"),
            *("-f", str(Path(__file__).with_name("locustfile.py"))),
            _USERS[protocol],
            *("--headless", "--only-summary", "--exit-code-on-error", "0"),
            *("--stop-timeout", str(math.ceil(timeout_s))),
            *("-u", str(users), "-r", str(spawn_rate or min(users, 100))),
            *("-t", f"{math.ceil(seconds)}s", f"--{protocol}-host", url),
            *("--tiers", format_mix(mix), "--texts", _texts_file(texts, Path(folder))),
            *("--rows", str(rows), "--model", model or ""),
            *("--think-time", str(think_time_s), "--request-timeout", str(timeout_s)),
            *("--rate", repr(rate), "--shape", shape, "--warm", str(warm_s)),
            *("--lengths", "" if lengths is None else str(Path(lengths).resolve())),
            *_tls_options(tls),
        ]
        # A header may be a secret, and every user of the machine can read a command line.
        secrets = "\n".join(f"{name}={value}" for name, value in check_headers(headers).items())
        variables = {"SAMP_REPORT": str(report), "SAMP_SECONDS": str(math.ceil(seconds))}
        if secrets:
            variables["SAMP_HEADER"] = secrets
        log = _run(command, report, variables, math.ceil(seconds), timeout_s, progress, workers)
        try:
            written: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise LoadTestFailed(
                f"locust ended without figures: {_last_error(log)}",
                fix="run it by itself: locust -f loadtest/locustfile.py --host " + url,
            ) from None
        figures: dict[str, dict[str, Any]] = written["tiers"]
        sent = sum(one["requests"] for one in figures.values())
        failed = sum(one["failures"] for one in figures.values())
        if 0 < sent == failed:
            said = next(iter(written["errors"].values()))
            raise LoadTestFailed(f"all {sent} requests failed, the first with: {said}")
        return figures


def _run(
    command: Sequence[str],
    report: Path,
    variables: Mapping[str, str],
    seconds: int,
    timeout_s: float,
    progress: Progress | None,
    workers: int,
) -> str:
    """Run locust to its end and return its log; it is stopped if the caller is interrupted."""
    # locust's own variables, a locust.conf in the working folder and the options that plain locust
    # takes from the environment would change the run.
    foreign = ("LOCUST_", "SAMP_HEADER", "SAMP_TLS", "SAMP_CA", "SAMP_CERT", "SAMP_KEY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment.update(variables)
    log_path = report.with_name("log")
    commands = [(list(command), environment)]
    if workers:
        place = ("--master-host", "127.0.0.1", "--master-port", str(_free_port()))
        bind = ("--master-bind-host", place[1], "--master-bind-port", place[3])
        expect = ("--expect-workers", str(workers), "--expect-workers-max-wait", str(int(_START_S)))
        commands = [([*command, "--master", *bind, *expect], environment)]
        file = command[command.index("-f") + 1]
        user = command[command.index("-f") + 2]
        worker = [*command[:3], "-f", file, user, "--worker", *place]
        for index in range(workers):
            commands.append((worker, {**environment, "SAMP_WORKER": f"{index}/{workers}"}))
    processes: list[subprocess.Popen[bytes]] = []
    with log_path.open("wb") as log:
        try:
            for words, its_own in commands:
                processes.append(
                    subprocess.Popen(
                        words,
                        cwd=report.parent,
                        env=its_own,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            _wait(processes, seconds, timeout_s, progress)
        finally:
            for process in processes:
                _stop(process)
    return log_path.read_text(encoding="utf-8", errors="replace")


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    seconds: int,
    timeout_s: float,
    progress: Progress | None,
) -> None:
    """Until the first process, which counts, has ended; a worker that fails ends the wait."""
    start = time.monotonic()
    end = start + seconds + timeout_s + _START_S
    while processes[0].poll() is None and time.monotonic() < end:
        if any(worker.poll() for worker in processes[1:]):
            return
        if progress is not None:
            progress(min(time.monotonic() - start, seconds), seconds)
        try:
            processes[0].wait(0.5)
        except subprocess.TimeoutExpired:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tls_options(tls: Tls | None) -> list[str]:
    """What the locustfile takes for this; its working folder is another one."""
    if tls is None:
        return []
    files = {"--ca": tls.ca, "--cert": tls.cert, "--key": tls.key}
    named = [(option, str(Path(path).resolve())) for option, path in files.items() if path]
    if tls.server_name:
        named.append(("--server-name", tls.server_name))
    return ["--tls", *(word for pair in named for word in pair)]


def _texts_file(texts: Sequence[str] | str | Path | None, folder: Path) -> str:
    if texts is None:
        return ""
    if isinstance(texts, (str, Path)):
        read_texts(str(texts))
        return str(Path(texts).resolve())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequest(
            "an empty list of texts" if not texts else "a text that is no string",
            "at least one text, all str",
            "correct the list, or leave it out",
        )
    path = folder / "texts.jsonl"
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def _check_limits(users: int, seconds: float, rows: int, spawn_rate: float | None) -> None:
    for name, value, most in (("users", users, MAX_USERS), ("seconds", seconds, MAX_SECONDS)):
        if not 1 <= value <= most:
            raise BadRequest(f"{name} is {value}", f"1 to {most}", "correct it")
    if rows < 1:
        raise BadRequest(f"rows is {rows}", "1 or more", "correct it")
    if spawn_rate is not None and not spawn_rate > 0:
        raise BadRequest(f"spawn_rate is {spawn_rate}", "users per second above 0", "correct it")


def _check_rate(
    rate: float, shape: str, warm_s: float, seconds: float, workers: int, users: int
) -> None:
    if not (rate >= 0 and math.isfinite(rate)):
        raise BadRequest(f"rate is {rate}", "requests a second, 0 or more", "correct it")
    if shape not in SHAPES:
        raise BadRequest(f"shape {shape!r}", ", ".join(SHAPES), "name one of these")
    if shape != "constant" and not rate:
        raise BadRequest(f"shape {shape} without a rate", "both", "give a rate")
    if not 0 <= warm_s < seconds:
        raise BadRequest(f"{warm_s} s of warm-up in {seconds} s", "less", "correct it")
    if not 0 <= workers <= min(users, 64):
        raise BadRequest(f"{workers} workers, {users} users", "a user each, at most 64", "lower it")


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "/ERROR/" in line or "Error" in line]
    return (errors or lines or ["it said nothing"])[-1]
