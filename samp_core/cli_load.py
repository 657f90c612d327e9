"""The command `samp loadtest`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from samp_core import cli_calls
from samp_core.errors import SampError


def loadtest(
    tier: Annotated[str, typer.Option(help="One tier, or a mix: fast=3,exact=1.")] = "balanced",
    users: Annotated[
        int | None,
        typer.Option(help="Concurrent callers (8); with a rate the most in flight (64)."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long (15); with --slo one step (5).")
    ] = None,
    rows: Annotated[int, typer.Option(help="Texts in one request.")] = 1,
    texts: Annotated[Path | None, typer.Option(help="A .jsonl or plain text file.")] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="Mix of text lengths: lines of words and weight.")
    ] = None,
    workers: Annotated[int, typer.Option(help="So many locust processes, and a master.")] = 0,
    rate: Annotated[
        float, typer.Option(help="Requests a second, offered whatever the server does.")
    ] = 0.0,
    shape: Annotated[str, typer.Option(help="Of the rate: constant, ramp or bursts.")] = "constant",
    slo: Annotated[
        str | None, typer.Option(help="p95=50ms: find the highest rate within it.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds that --slo may search.")] = 180.0,
    png: Annotated[
        Path | None, typer.Option(help="Curve of --slo; default: loadtest-<tier>.png.")
    ] = None,
    url: cli_calls.Url = "",
    http: cli_calls.Http = False,
    name: cli_calls.ModelName = None,
    timeout: cli_calls.Timeout = 30.0,
    tls: cli_calls.UseTls = False,
    ca: cli_calls.Ca = None,
    cert: cli_calls.Cert = None,
    key: cli_calls.Key = None,
    server_name: cli_calls.ServerName = None,
    header: cli_calls.Header = None,
    as_json: cli_calls.Json = False,
) -> None:
    """Load a running server with locust, headless; --slo finds its highest rate."""
    from samp_loadtest.run import run_loadtest

    from samp_core import show

    reached = cli_calls.target(url, http, name, timeout, tls, ca, cert, key, server_name, header)
    address = reached.url
    common: dict[str, Any] = {
        "protocol": reached.protocol,
        "texts": texts,
        "rows": rows,
        "lengths": lengths,
        "workers": workers,
        **reached.options,
    }
    if slo is not None:
        most, step_s = 64 if users is None else users, 5.0 if seconds is None else seconds
        _search(slo, address, tier, most, step_s, budget, png, common, as_json)
        return
    seconds = 15.0 if seconds is None else seconds
    count = (64 if rate else 8) if users is None else users
    with show.progress() as progress:
        total = int(seconds)
        offered = f", {rate:g}/s {shape}" if rate else ""
        step = progress(f"load test: {tier}, {count} users{offered}", total)
        shown = 0

        def tick(gone: float, _all: float) -> None:
            nonlocal shown
            while shown < min(int(gone), total):
                shown += 1
                step()

        result = run_loadtest(
            address,
            tier,
            users=count,
            seconds=seconds,
            rate=rate,
            shape=shape,
            progress=tick,
            **common,
        )
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        show.load_table(result)


def _search(
    slo: str,
    address: str,
    tier: str,
    users: int,
    step_s: float,
    budget_s: float,
    png: Path | None,
    common: dict[str, Any],
    as_json: bool,
) -> None:
    from samp_loadtest.run import run_loadtest
    from samp_loadtest.settings import parse_mix
    from samp_loadtest.slo import Target, draw, find_rate

    from samp_core import show

    target = Target.parse(slo)
    if len(parse_mix(tier)) != 1:
        raise SampError("bad_tier", f"--slo with the mix {tier}", "one tier", "name one")
    if importlib.util.find_spec("matplotlib") is None:
        raise SampError(
            "no_matplotlib", "matplotlib is not installed", "the extra `loadtest`",
            "pip install 'samp-triton[loadtest]'",
        )  # fmt: skip

    def trial(rate: float, seconds: float) -> dict[str, Any]:
        warm = min(1.5, seconds / 2)
        made = run_loadtest(
            address,
            tier,
            users=users,
            spawn_rate=users,
            seconds=seconds + warm,
            warm_s=warm,
            rate=rate,
            **common,
        )
        return made[tier]

    show.err.print(f"  search: {tier}, {target}, {budget_s:.0f} s")
    alone = run_loadtest(address, tier, users=max(1, common["workers"]), seconds=3.0, **common)
    first = max(1.0, alone[tier]["rps"] / 2)
    found = find_rate(
        trial,
        target,
        first=first,
        step_s=step_s,
        budget_s=budget_s,
        say=lambda line: show.err.print(f"  {line}"),
    )
    path = png or Path(f"loadtest-{tier}.png")
    draw(found, target, path, f"{tier}: {found['target']}", ("p50", "p95", "p99"))
    found = {"tier": tier, **found, "alone": alone[tier], "png": str(path)}
    if as_json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        keys = ("rate", "rps", "requests", "failures", "p50", "p95", "p99")
        points = sorted(found["points"], key=lambda p: float(p["rate"]))
        rows = []
        for point in points:
            state = ("holds" if point["holds"] else "broken") + " *" * point["confirms"]
            cells = [point[key] for key in keys]
            rows.append((state, *(f"{c:.1f}" if isinstance(c, float) else c for c in cells)))
        headings = ("", "offered/s", "answered/s", "requests", "failures", "p50 ms")
        show.table(f"{tier}, {found['target']} (* confirms)", (*headings, "p95 ms", "p99 ms"), rows)
        state = "confirmed" if found["confirmed"] else "NOT confirmed"
        rate = f"{found['rate']:g} requests/s, {state}" if found["rate"] else "none found"
        show.out.print(f"highest rate: {rate}; curve: {path}", soft_wrap=True)
    if not found["confirmed"]:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command()(loadtest)
