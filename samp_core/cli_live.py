"""Commands around a running server: serve, activate, rollback, status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from samp_core.cli_calls import Header, Json, read_headers
from samp_core.errors import UsageError

Folder = Annotated[Path, typer.Argument(help="A build's output folder.")]
Force = Annotated[
    bool, typer.Option("--force", help="Also a build of another task or other labels.")
]


def serve(
    folders: Annotated[
        list[str],
        typer.Argument(help="Builds' output folders; after --, options of Triton itself."),
    ],
    tiers: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0: any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0: any free one.")] = 8002,
    threads: Annotated[int | None, typer.Option(help="Encoder threads.")] = None,
    queue_s: Annotated[
        float | None,
        typer.Option(help="Most seconds of work that may wait for a tier; default: the build's."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Load a folder's new build when it becomes current.")
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="HTTP: inference, and what changes the server, only with the first line of this "
            "file as header samp-key."
        ),
    ] = None,
    otlp: Annotated[
        str | None, typer.Option(help="Send OpenTelemetry traces to this collector over HTTP.")
    ] = None,
    otlp_every: Annotated[int, typer.Option(help="Trace one request of so many.")] = 1000,
    log: Annotated[Path | None, typer.Option(help="Keep Triton's log here.")] = None,
    as_json: Json = False,
) -> None:
    """Start Triton on one or several builds and print its addresses; Ctrl-C stops it."""
    from samp_core import show
    from samp_core.control import guard
    from samp_core.serve_loop import serve_forever
    from samp_core.server import Server
    from samp_core.stage import Layout

    if queue_s is not None and not 0 < queue_s < float("inf"):
        raise UsageError("usage", f"--queue-s {queue_s:g}", "seconds above 0", "correct it")
    end = next((i for i, word in enumerate(folders) if word.startswith("-")), len(folders))
    options = folders[end:]
    if otlp is not None:
        options += tracing(otlp, otlp_every)
    if key_file is not None:
        options.append(guard(read_key(key_file)))
    if not folders[:end]:
        raise UsageError("usage", "no folder", "a build's output folder", "name one")
    if not as_json:
        show.err.print("  starting Triton ...")
    server = Server.start(
        [Path(word) for word in folders[:end]],
        tiers=tiers.split(",") if tiers else None,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log=log,
        threads=threads,
        options=options,
        layout=Layout(queue_s=queue_s),
    )

    for text in server.notes:
        show.note(text)

    def ready() -> None:
        if as_json:
            print(json.dumps(server.ready_line(), ensure_ascii=False), flush=True)
            return
        parts = ("tokenizer_", "encoder_", "head_")
        names = ", ".join(name for name in server.models if not name.startswith(parts))
        show.out.print(
            f"ready: gRPC {server.grpc}  HTTP http://{server.http}  "
            f"metrics http://{server.metrics}/metrics  Triton pid {server.pid}\ntiers: {names}",
            soft_wrap=True,
        )

    serve_forever(server, ready, watch=watch)
    if not as_json:
        show.err.print("stopped")


def read_key(path: Path) -> str:
    """The first line of a file. UsageError for a key that no header can carry."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    key = lines[0].strip() if lines else ""
    if not re.fullmatch(r"[\x21-\x7e]{8,256}", key):
        raise UsageError(
            "bad_key",
            f"{path}: a first line of {len(key)} characters",
            "8 to 256 printable ASCII characters without blanks",
            f"openssl rand -hex 16 > {path}",
        )
    return key


def tracing(url: str, every: int) -> list[str]:
    """Triton's options for traces to an OTLP collector; docs/operating.md says what they hold."""
    if "://" not in url or every < 1:
        raise UsageError(
            "bad_trace",
            f"--otlp {url} --otlp-every {every}",
            "http://host:4318/v1/traces, and 1 or more",
            "correct it",
        )
    settings = ("level=TIMESTAMPS", f"rate={every}", "mode=opentelemetry")
    exporter = (f"opentelemetry,url={url}", "opentelemetry,resource=service.name=samp")
    return [f"--trace-config={setting}" for setting in (*settings, *exporter)]


def activate(
    folder: Folder,
    build: Annotated[str | None, typer.Option(help="Default: the current build.")] = None,
    force: Force = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="Load what did not change, too; mends a dead model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve a build in the running server of a folder, without a failed request."""
    from samp_core import live

    _activate(live.activate, folder, build, force, reload, as_json)


def rollback(folder: Folder, force: Force = False, as_json: Json = False) -> None:
    """Serve the build that was current before this one."""
    from samp_core import live

    _activate(live.activate, folder, live.previous(folder), force, False, as_json)


def _activate(
    run: Any, folder: Path, build: str | None, force: bool, again: bool, as_json: bool
) -> None:
    from samp_core import show

    def step(index: int, of: int, what: str) -> None:
        show.err.print(f"  {index} of {of}: {what}", soft_wrap=True)

    made = run(folder, build, force=force, again=again, step=step)
    if as_json:
        print(json.dumps(made, ensure_ascii=False), flush=True)
        return
    for server in made["servers"]:
        for text in server["notes"]:
            show.note(text)
        gone = f"; tiers gone: {', '.join(server['gone'])}" if server["gone"] else ""
        show.out.print(
            f"server {server['grpc']} (pid {server['pid']}): build {server['build']} is served, "
            f"before {server['before']}; {server['loads']} loads{gone}",
            soft_wrap=True,
        )
    if not made["servers"]:
        show.out.print("no server runs on it; the next samp serve takes it", soft_wrap=True)
    before = f", before {made['before']}" if made["before"] != made["build"] else ""
    show.out.print(f"current: {made['build']}{before}", soft_wrap=True)


def status(
    target: Annotated[
        str | None, typer.Argument(help="A served folder or HTTP host:port; default: all here.")
    ] = None,
    probe: Annotated[
        bool, typer.Option(help="Ask each tier one short text, to see that it answers.")
    ] = True,
    header: Header = None,
    as_json: Json = False,
) -> None:
    """Tiers, plans and times of the running servers; exit 1 if something there is dead."""
    from samp_core import show_live
    from samp_core.status import status as look

    found = look(target, probe=probe, headers=read_headers(header))
    if as_json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        for server in found:
            show_live.server(server)
    if not all(server["ok"] for server in found):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    for command in (serve, activate, rollback, status):
        app.command()(command)
