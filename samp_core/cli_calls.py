"""Commands that call a running server: predict, ab."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samp_core.errors import UsageError

if TYPE_CHECKING:
    from samp_client import Client

    from samp_core.file_job import Job
    from samp_core.rows import Text

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Url = Annotated[str, typer.Option(help="host:port; 8001 is gRPC's, 8000 HTTP's.")]
Http = Annotated[bool, typer.Option("--http", help="Call over HTTP instead of gRPC.")]
ModelName = Annotated[str | None, typer.Option("--name", help="Model, where several are served.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one request.")]
UseTls = Annotated[bool, typer.Option("--tls", help="Encrypt gRPC; so do the four below.")]
Ca = Annotated[Path | None, typer.Option(help="PEM: certificates to trust.")]
Cert = Annotated[Path | None, typer.Option(help="PEM: this client's certificate.")]
Key = Annotated[Path | None, typer.Option(help="PEM: the key to --cert.")]
ServerName = Annotated[str | None, typer.Option(help="Name in the server's certificate.")]
Header = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, sent with every request. Repeatable.")
]


@dataclass(frozen=True)
class Target:
    """How to reach the server, as the options say."""

    url: str
    protocol: Any
    options: Mapping[str, Any]

    def connect(self) -> Client:
        from samp_client import connect

        return connect(self.url, self.protocol, **self.options)


def target(
    url: str,
    http: bool,
    name: str | None,
    timeout: float,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    server_name: str | None,
    header: list[str] | None,
) -> Target:
    """UsageError for a header without its value."""
    from samp_client import Tls

    headers = read_headers(header)
    secured = Tls(ca, cert, key, server_name) if tls or ca or cert or key or server_name else None
    options = {"model": name, "timeout_s": timeout, "tls": secured, "headers": headers}
    address = url or ("127.0.0.1:8000" if http else "127.0.0.1:8001")
    return Target(address, "http" if http else "grpc", options)


def read_headers(given: list[str] | None) -> dict[str, str]:
    """UsageError for a header without its value."""
    from samp_client import BadRequest
    from samp_client.security import parse_headers

    try:
        return parse_headers(given or ())
    except BadRequest as error:
        raise UsageError("usage", error.given, error.allowed, error.fix) from None


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: standard input.")] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Second text of a pair, one for each text; in lines: after a tab."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--in", help="jsonl, csv or tsv with `text`, for pairs also `text_pair`."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write answers to --in here, as jsonl; goes on where it was stopped."),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="With --out: ask the rows that failed again.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(help="With --out: requests of up to 64 texts under way at a time.")
    ] = 8,
    tier: Annotated[str | None, typer.Option(help="Default: balanced.")] = None,
    url: Url = "",
    http: Http = False,
    name: ModelName = None,
    timeout: Timeout = 30.0,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    server_name: ServerName = None,
    header: Header = None,
    as_json: Json = False,
) -> None:
    """Ask a running server. One line a text; with --json one object a line."""
    from samp_core import questions
    from samp_core.file_job import answer_fields
    from samp_core.show import answer_line

    reached = target(url, http, name, timeout, tls, ca, cert, key, server_name, header)
    if out is not None or retry_errors:
        if file is None or out is None or texts:
            raise UsageError("usage", "--out or --retry-errors", "with --in and --out", "give both")
        _answer_file(reached, file, out, tier, concurrency, retry_errors, as_json)
        return
    failed = 0
    given = questions.read(texts, pair, file)
    with reached.connect() as client:
        chosen = tier or _default_tier(client)
        columns = len(client.describe(chosen).inputs)
        typed = not texts and file is None and sys.stdin.isatty()
        for start, chunk in questions.chunks(given, 1 if typed else 512):
            asked = [questions.fit(row, columns) for row in chunk]
            for outcome in client.outcomes(asked, chosen):
                text = asked[outcome.index]
                answer, error = outcome.answer, outcome.error
                failed += error is not None
                if as_json:
                    row = answer_fields(start + outcome.index, text, outcome)
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                elif answer is not None:
                    print(answer_line(answer, text))
                else:
                    print(f"error\t\t{error}")
    if failed:
        raise typer.Exit(1)


def _answer_file(
    reached: Target,
    file: Path,
    out: Path,
    tier: str | None,
    concurrency: int,
    retry_errors: bool,
    as_json: bool,
) -> None:
    """Begin or go on with a file of answers, and say what became of it."""
    from samp_core import show
    from samp_core.file_job import Job, survey

    with reached.connect() as client:
        chosen = tier or _default_tier(client)
        info = client.describe(chosen)
    source = survey(file)
    job = Job(source, out, info.ensemble)
    before, started = job.rows, time.monotonic()
    try:
        with _bar(f"{file.name} to {info.ensemble}", source.rows, before) as progress:
            asyncio.run(
                _answer_rows(
                    job, reached, chosen, len(info.inputs), concurrency, retry_errors, progress
                )
            )
    except KeyboardInterrupt:
        show.err.print(
            f"{job.rows} of {source.rows} rows are answered; the same command goes on",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        raise
    finally:
        job.close()
    seconds = time.monotonic() - started
    found = {
        "out": str(out), "rows": job.rows, "failed": job.failed, "before": before,
        "seconds": round(seconds, 3),
    }  # fmt: skip
    if as_json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        went_on = f", {before} of them before" if before else ""
        again = "; --retry-errors asks those again" if job.failed else ""
        show.out.print(
            f"{out}: {job.rows} rows{went_on}, {job.failed} failed{again}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    if job.failed:
        raise typer.Exit(1)


async def _answer_rows(
    job: Job,
    reached: Target,
    tier: str,
    columns: int,
    concurrency: int,
    retry_errors: bool,
    progress: Callable[[int], None],
) -> None:
    from samp_client import Retry, connect_async

    from samp_core import questions

    # A server that restarts is away for some seconds; then the job stops, and can go on.
    client = connect_async(
        reached.url,
        reached.protocol,
        concurrency=concurrency,
        retry=Retry(attempts=10, most_s=5.0),
        **reached.options,
    )

    def stream(rows: Iterable[Text | None]) -> AsyncIterator[Any]:
        fitted = (None if row is None else questions.fit(row, columns) for row in rows)
        return client.stream(fitted, tier)

    async with client:
        await job.answer(stream, progress)
        if retry_errors and job.failed:
            await job.redo(stream, progress)


@contextmanager
def _bar(title: str, rows: int, before: int) -> Iterator[Callable[[int], None]]:
    """Rows done, their rate and the time to go; one line where stderr is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from samp_core import show

    if not show.err.is_terminal:
        show.err.print(f"  {title} ({rows} rows, {before} done)", soft_wrap=True, markup=False)
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=show.err) as bars:
        task = bars.add_task(title, total=rows, completed=before, rate="")
        started = time.monotonic()

        def update(done: int) -> None:
            rate = max(0, done - before) / max(time.monotonic() - started, 1e-9)
            bars.update(task, completed=done, rate=f"{rate:,.0f} rows/s")

        yield update
        bars.update(task, completed=rows)


def ab(
    data: Annotated[Path, typer.Option(help="Texts, labelled or not: jsonl, csv or tsv.")],
    control: Annotated[str, typer.Option(help="The arm to compare with.")] = "exact",
    candidate: Annotated[str, typer.Option(help="The arm on trial.")] = "fast",
    promise: Annotated[
        float | None, typer.Option(help="Largest drop in points; default: the tier's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many texts.")] = None,
    url: Url = "",
    http: Http = False,
    name: ModelName = None,
    timeout: Timeout = 30.0,
    seed: Annotated[int, typer.Option(help="Draws which arm goes first.")] = 0,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    server_name: ServerName = None,
    header: Header = None,
    as_json: Json = False,
) -> None:
    """Send the same texts to two tiers, interleaved; exit 1 if the promise is broken."""
    from samp_core import show
    from samp_core.ab import compare

    reached = target(url, http, name, timeout, tls, ca, cert, key, server_name, header)
    with reached.connect() as client, show.progress() as progress:
        result = compare(
            client,
            data,
            control,
            candidate,
            promise_points=promise,
            limit=limit,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        show.ab_table(result)
    if result["verdict"] == "broken":
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    for command in (predict, ab):
        app.command()(command)


def _default_tier(client: Client) -> str:
    """`balanced` where it is served, else the only tier there is, else an error with the list."""
    tiers = client.tiers()
    return tiers[0] if len(tiers) == 1 else "balanced"
