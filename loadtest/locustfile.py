"""Load on a served SAMP model: `locust -f loadtest/locustfile.py --host 127.0.0.1:8001`.

Every user waits for its answer before it sends again, so the number of users is the concurrency;
with `--rate` requests are due at times drawn beforehand, and users are the most in flight.
Requests appear as `grpc:<tier>` and `http:<tier>`; at the end, and on the page's tab "Triton",
stand the milliseconds that Triton itself counted for them.
"""

from __future__ import annotations

# ruff: noqa: E402
# locust patches the standard library when it is imported, and gRPC must learn of gevent before the
# first channel: this order is needed.
import locust
from grpc.experimental import gevent as grpc_gevent  # type: ignore[import-untyped, unused-ignore]

grpc_gevent.init_gevent()

import contextlib
import itertools
import json
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import gevent
from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import MasterRunner, WorkerRunner
from locust.user.task import LOCUST_STATE_STOPPING
from samp_client import Client, ClientError, Counters, ServerError, TierTimes, Tls, connect
from samp_client.records import Row
from samp_client.security import parse_headers
from samp_client.transport import ProtocolName
from samp_loadtest.arrivals import SHAPES, Arrivals
from samp_loadtest.results import Samples, report, table
from samp_loadtest.settings import (
    check_tiers,
    find_addresses,
    fit,
    parse_mix,
    read_lengths,
    read_texts,
    with_lengths,
)

logger = logging.getLogger("samp_loadtest")

# `run.py` names a file here and reads the figures from it.
REPORT_VARIABLE = "SAMP_REPORT"
# Which of how many workers this is, "0/2": each takes its share of the rate.
WORKER_VARIABLE = "SAMP_WORKER"
_POLL_S = 2.0
# A server that refuses connections would otherwise be asked thousands of times a second.
_BACKOFF_S = 0.2
_STOP_S = 5.0
_numbers = itertools.count()


class _Test:
    """The state of the test that runs in this process, or ran last."""

    def __init__(self) -> None:
        self.mix: dict[str, float] = {}
        self.texts: tuple[Row, ...] = ()
        self.access: dict[str, Any] = {}
        self.addresses: dict[ProtocolName, str] = {}
        self.samples: dict[str, Samples] = {}
        self.watcher: Client | None = None
        self.before: dict[str, Counters] = {}
        self.times: list[TierTimes] = []
        self.polling: gevent.Greenlet | None = None
        self.options: Any = None
        self.begun = 0.0
        self.arrivals: Arrivals | None = None


test = _Test()


class TierUser(locust.User):
    """One caller that sends texts to tiers drawn by weight, over `protocol`."""

    abstract = True
    protocol: ProtocolName
    client: Client | None = None

    def on_start(self) -> None:
        options: Any = self.environment.parsed_options
        if self.protocol not in test.addresses:
            logger.error("a %s user without an address: give --%s-host", *[self.protocol] * 2)
            raise locust.exception.StopUser
        self.think_time_s: float = options.think_time
        self.rows = options.rows
        # Each user has its own order, and the same one in every run.
        self.random = random.Random(next(_numbers))
        try:
            client = _connect(self.protocol, options)
        except ClientError as error:
            logger.error("%s", error)
            raise locust.exception.StopUser from None
        try:
            # Connects and reads the metadata, so that no recorded request pays for it.
            check_tiers(client, test.mix, self.rows)
            client.labels()
            tier = next(iter(test.mix))
            texts = fit(test.texts, len(client.describe(tier).inputs) == 2)
        except ClientError as error:
            client.close()
            logger.error("%s", error)
            raise locust.exception.StopUser from None
        self.random.shuffle(texts)
        self.texts = itertools.cycle(texts)
        self.client = client

    def on_stop(self) -> None:
        if self.client is not None:
            self.client.close()

    def wait_time(self) -> float:
        return self.think_time_s

    @locust.task
    def predict(self) -> None:
        assert self.client is not None
        late = 0.0
        if test.arrivals is not None:
            due = test.begun + test.arrivals.take()
            while (left := due - time.time()) > 0:
                gevent.sleep(min(left, 0.2))
                if self._state == LOCUST_STATE_STOPPING:
                    return
            late = -left
        (tier,) = self.random.choices(list(test.mix), list(test.mix.values()))
        texts = list(itertools.islice(self.texts, self.rows))
        failure: ClientError | None = None
        # A request that no user was free for is counted from when it was due.
        started, start = time.time() - late, time.perf_counter() - late
        try:
            self.client.answers(texts, tier, rows=self.rows)
        except ClientError as error:
            failure = error
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=f"{self.protocol}:{tier}",
            response_time=(time.perf_counter() - start) * 1e3,
            response_length=0,
            exception=failure,
            context={"tier": tier},
            start_time=started,
        )
        if isinstance(failure, ServerError):
            gevent.sleep(_BACKOFF_S)


class TritonGrpcUser(TierUser):
    protocol = "grpc"


class TritonHttpUser(TierUser):
    protocol = "http"


_USERS: tuple[type[TierUser], ...] = (TritonGrpcUser, TritonHttpUser)


def add_options(parser: LocustArgumentParser) -> None:
    """Options of the command line, of the environment and of the page's start form."""
    parser.add_argument(
        "--tiers",
        env_var="SAMP_TIERS",
        default="balanced",
        help="tier, or a mix: fast=3,exact=1",
    )
    parser.add_argument(
        "--model", env_var="SAMP_MODEL", default="", help="needed if the server has several"
    )
    parser.add_argument(
        "--texts",
        env_var="SAMP_TEXTS",
        default="",
        help=".jsonl with `text`, or a file with one text per line; default: a few sentences",
    )
    parser.add_argument(
        "--rows", env_var="SAMP_ROWS", type=int, default=1, help="texts in one request"
    )
    parser.add_argument(
        "--grpc-host", env_var="SAMP_GRPC_HOST", default="", help="host:port of gRPC"
    )
    parser.add_argument(
        "--http-host", env_var="SAMP_HTTP_HOST", default="", help="host:port of HTTP"
    )
    parser.add_argument(
        "--request-timeout", env_var="SAMP_REQUEST_TIMEOUT", type=float, default=30.0, help="s"
    )
    parser.add_argument(
        "--rate",
        env_var="SAMP_RATE",
        type=float,
        default=0.0,
        help="requests a second, offered whatever the server does; 0: each user when it is free",
    )
    parser.add_argument(
        "--shape", env_var="SAMP_SHAPE", default="constant", choices=SHAPES, help="of the rate"
    )
    parser.add_argument(
        "--lengths", env_var="SAMP_LENGTHS", default="", help="file of lines: words weight"
    )
    parser.add_argument(
        "--warm", env_var="SAMP_WARM", type=float, default=0.0, help="seconds not counted"
    )
    # Not on the page: whoever sees it could read them.
    unseen: dict[str, Any] = {"include_in_web_ui": False}
    parser.add_argument(
        "--header",
        env_var="SAMP_HEADER",
        action="append",
        help="NAME=VALUE, sent with every request; repeatable, in the variable a line each",
        **unseen,
    )
    parser.add_argument(
        "--tls", env_var="SAMP_TLS", action="store_true", help="encrypt gRPC", **unseen
    )
    for name, what in (
        ("ca", "PEM: certificates to trust"),
        ("cert", "PEM: this client's certificate"),
        ("key", "PEM: the key to --cert"),
        ("server-name", "name in the server's certificate"),
    ):
        variable = f"SAMP_{name.upper().replace('-', '_')}"
        parser.add_argument(f"--{name}", env_var=variable, default="", help=what, **unseen)
    parser.add_argument(
        "--think-time",
        env_var="SAMP_THINK_TIME",
        type=float,
        default=0.0,
        help="seconds between an answer and the user's next request",
    )


def on_init(environment: Environment, **_: Any) -> None:
    hub = gevent.get_hub()
    # gevent counts the run time from its loop's last turn, which was before the imports.
    hub.loop.update_now()
    # locust logs a StopTest in one line; gevent would print its traceback before that.
    hub.NOT_ERROR = (*hub.NOT_ERROR, StopTest)
    options: Any = environment.parsed_options
    if environment.stop_timeout in (None, 0):
        # Requests under way at the end are answered and counted, not cut off.
        environment.stop_timeout = min(_STOP_S, options.request_timeout)
    if isinstance(environment.runner, MasterRunner) and (
        environment.host or options.grpc_host or options.http_host
    ):
        # A master takes its users before the test starts, and later changes are not seen.
        with contextlib.suppress(ClientError):  # the test's start says it
            _find(environment)
            _choose_users(environment)
    if environment.web_ui is not None:
        _add_tab(environment.web_ui)


def on_test_start(environment: Environment, **_: Any) -> None:
    """Check everything that was given before the first user starts."""
    options: Any = environment.parsed_options
    test.samples, test.times, test.before, test.options = {}, [], {}, options
    environment.process_exit_code = None
    try:
        test.mix = parse_mix(options.tiers)
        test.texts = read_texts(options.texts)
        if options.lengths:
            test.texts = with_lengths(test.texts, read_lengths(options.lengths))
        _find(environment)
        if not isinstance(environment.runner, (MasterRunner, WorkerRunner)):
            _choose_users(environment)
        if not isinstance(environment.runner, WorkerRunner):
            _start_watching(options)
        test.begun, test.arrivals = time.time(), None
        if options.rate > 0:
            index, _, count = os.environ.get(WORKER_VARIABLE, "0/1").partition("/")
            planned = os.environ.get("SAMP_SECONDS") or options.run_time or 60
            seconds = float(planned)
            test.arrivals = Arrivals(
                options.shape, options.rate / int(count), seconds, seed=int(index)
            )
    except (ClientError, ValueError) as error:
        environment.process_exit_code = 2
        raise StopTest(str(error)) from None


def on_request(
    name: str,
    response_time: float,
    exception: Exception | None = None,
    start_time: float | None = None,
    **_: Any,
) -> None:
    started = time.time() - response_time / 1e3 if start_time is None else start_time
    options: Any = test.options
    if options is None or started - test.begun >= options.warm:
        test.samples.setdefault(name, Samples()).add(started, response_time, exception)


def on_report_to_master(client_id: str, data: dict[str, Any]) -> None:
    """A worker hands over what it has; only the master keeps it."""
    data["samp"] = {name: samples.to_json() for name, samples in test.samples.items()}
    test.samples = {}


def on_worker_report(client_id: str, data: dict[str, Any]) -> None:
    for name, sent in data.get("samp", {}).items():
        test.samples.setdefault(name, Samples()).join(Samples.from_json(sent))


def on_test_stop(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    # The last figures of a master's workers come after this, and before it quits.
    if not (isinstance(environment.runner, MasterRunner) and options.headless):
        _finish()


def on_quitting(**_: Any) -> None:
    _finish()


def _finish() -> None:
    """Read the server's counters a last time, print both sides, write the report."""
    if test.watcher is None:
        return
    if test.polling is not None:
        test.polling.kill()
        test.polling = None
    try:
        _read_times()
    except ClientError as error:
        logger.error("no statistics of the server: %s", error)
    test.watcher.close()
    test.watcher = None
    print(f"\n{table(test.samples, test.times)}\n", flush=True)
    path = os.environ.get(REPORT_VARIABLE)
    if path:
        by_tier: dict[str, Samples] = {tier: Samples() for tier in test.mix}
        for name, samples in test.samples.items():
            by_tier.setdefault(name.partition(":")[2], Samples()).join(samples)
        figures = report(by_tier, {times.tier: times for times in test.times})
        errors = {tier: samples.error for tier, samples in by_tier.items() if samples.error}
        content = json.dumps({"tiers": figures, "errors": errors})
        Path(path).write_text(content, encoding="utf-8")


def _find(environment: Environment) -> None:
    """How calls prove who they are, and where they go."""
    options: Any = environment.parsed_options
    lines = [line for given in options.header or () for line in given.splitlines()]
    files = (options.ca, options.cert, options.key, options.server_name)
    tls = Tls(*(name or None for name in files)) if options.tls or any(files) else None
    test.access = {"tls": tls, "headers": parse_headers(lines)}
    hosts = (environment.host, options.grpc_host, options.http_host)
    test.addresses = find_addresses(*hosts, **test.access)


def _connect(protocol: ProtocolName, options: Any) -> Client:
    return connect(
        test.addresses[protocol],
        protocol,
        model=options.model or None,
        timeout_s=options.request_timeout,
        **test.access,
    )


def _choose_users(environment: Environment) -> None:
    """Leave out the users whose protocol has no address."""
    options: Any = environment.parsed_options
    named = set(options.user_classes or ())
    wanted = [user for user in _USERS if not named or user.__name__ in named]
    able = [user for user in wanted if user.protocol in test.addresses]
    others = [user for user in environment.user_classes if not issubclass(user, TierUser)]
    if not able and not others:
        raise ValueError(
            f"{', '.join(user.__name__ for user in wanted)} without an address; "
            "give --grpc-host or --http-host"
        )
    for user in wanted:
        if user not in able:
            logger.warning("%s left out: no --%s-host", user.__name__, user.protocol)
    environment.user_classes[:] = [*others, *able]


def _start_watching(options: Any) -> None:
    """One client that reads the server's counters, now and until the end."""
    protocol: ProtocolName = "grpc" if "grpc" in test.addresses else "http"
    watcher = _connect(protocol, options)
    try:
        check_tiers(watcher, test.mix, options.rows)
        test.before = watcher.statistics()
    except ClientError:
        watcher.close()
        raise
    test.watcher = watcher
    test.polling = gevent.spawn(_poll)


def _poll() -> None:
    while True:
        gevent.sleep(_POLL_S)
        try:
            _read_times()
        except ClientError as error:
            logger.warning("no statistics of the server: %s", error)


def _read_times() -> None:
    assert test.watcher is not None
    now = test.watcher.statistics()
    test.times = [test.watcher.server_times(tier, test.before, now) for tier in test.mix]


def _add_tab(web_ui: Any) -> None:
    """A tab of locust's page with the server's times, refreshed with the page's statistics."""
    columns = {
        "name": "Tier and its steps",
        "requests": "# Requests",
        "queue": "Queue (ms)",
        "compute": "Compute (ms)",
    }
    structure = [{"key": key, "title": title} for key, title in columns.items()]
    web_ui.template_args["extended_tabs"] = [{"title": "Triton", "key": "triton"}]
    web_ui.template_args["extended_tables"] = [{"key": "triton", "structure": structure}]

    @web_ui.app.after_request  # type: ignore[untyped-decorator, unused-ignore]
    def add_times(response: Any) -> Any:
        from flask import request

        if request.path.endswith("/stats/requests") and response.is_json:
            extended = [{"key": "triton", "data": _rows()}]
            response.set_data(json.dumps({**response.json, "extended_stats": extended}))
        return response


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for times in test.times:
        rows.append(_row(times.tier, None, times.queue_ms, times.compute_ms))
        for step in times.steps:
            name = f"{times.tier}: {step.model}"
            rows.append(_row(name, step.requests, step.queue_ms, step.compute_ms))
    return rows


def _row(
    name: str, requests: int | None, queue_ms: float | None, compute_ms: float | None
) -> dict[str, Any]:
    return {
        "name": name,
        "safe_name": name,
        "requests": "" if requests is None else requests,
        "queue": None if queue_ms is None else round(queue_ms, 3),
        "compute": None if compute_ms is None else round(compute_ms, 3),
    }


def _listen(hooks: Any) -> None:
    hooks.init_command_line_parser.add_listener(add_options)
    hooks.init.add_listener(on_init)
    hooks.test_start.add_listener(on_test_start)
    hooks.request.add_listener(on_request)
    hooks.report_to_master.add_listener(on_report_to_master)
    hooks.worker_report.add_listener(on_worker_report)
    hooks.test_stop.add_listener(on_test_stop)
    hooks.quitting.add_listener(on_quitting)


_listen(events)
