"""The `samp` command: parses, calls, prints. Heavy modules load inside the commands."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from samp_core import cli_calls, cli_live, cli_load
from samp_core.errors import SampError, UsageError
from samp_core.tasks import TASKS

if TYPE_CHECKING:
    from samp_client import ClientError

INTERRUPTED = 130

app = typer.Typer(
    help="Fine-tuned BERT checkpoints in, measured mixed-precision tiers out, served by Triton.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Url = Annotated[str, typer.Option(help="host:port; 8001 is gRPC's, 8000 HTTP's.")]
Http = Annotated[bool, typer.Option("--http", help="Call over HTTP instead of gRPC.")]
ModelName = Annotated[str | None, typer.Option("--name", help="Model, where several are served.")]
TASK_HELP = f"{', '.join(TASKS)}; default: classification."


@app.command()
def build(
    config: Annotated[Path | None, typer.Option("-c", "--config", help="A build.yaml.")] = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face checkpoint folder.")] = None,
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled rows: jsonl, csv or tsv.")] = None,
    exclude: Annotated[
        Path | None, typer.Option(help="Rows that trained the model; left out of --data.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name when served.")] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="NAME:drop=0.5pt,latency=8ms; either, both or neither. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: model_repository/<name>.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, onednn or reference.")
    ] = None,
    precisions: Annotated[
        str | None,
        typer.Option(help="What plans may choose, e.g. fp16,int8,fp8; default: fp16 and int8."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Encoder threads; default: all.")] = None,
    calibrator: Annotated[
        str | None, typer.Option(help="auto (by site), minmax, percentile, mse or entropy.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="Activation scales: auto, static or token.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a text, or a window of it, may have.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Entities: tokens two windows share.")] = None,
    words: Annotated[str | None, typer.Option(help="Entities: tokenizer or spaces.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Embeddings: mean or first; default: the folder's.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="milp (default), samp, greedy or lower-loss.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="Layers of SAMP's modes: first (default), last or sensitivity."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="About how long a build may take: 90s, 10m (default), 1h.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure, choose and verify plans; write the model repository."""
    from samp_core import show
    from samp_core.build import build as run
    from samp_core.config import load_config, parse_budget, parse_tier

    tiers = None
    if tier:
        named = [parse_tier(text) for text in tier]
        tiers = dict(named)
        if len(tiers) < len(named):
            given = " ".join(f"--tier {text}" for text in tier)
            raise UsageError("bad_tier", given, "each name once", "rename one of them")
    rows = {"data": data, "exclude": exclude} if data is not None else None
    if exclude is not None and data is None:
        raise UsageError("bad_config", "--exclude without --data", "both", "use the YAML's data")
    settings = load_config(
        config,
        {
            "model": model,
            "task": task,
            "data": rows,
            "name": name,
            "tiers": tiers,
            "out": out,
            "backend": backend,
            "precisions": precisions,
            "threads": threads,
            "calibrator": calibrator,
            "activation": activation,
            "max_length": max_length,
            "stride": stride,
            "words": words,
            "pooling": pooling,
            "strategy": strategy,
            "order": order,
            "budget_s": None if budget is None else parse_budget(budget),
        },
    )
    try:
        with show.progress() as progress:
            report = run(settings, progress, show.note).report
    except KeyboardInterrupt:
        show.kept_plans(settings.folder)
        raise
    _print_json(report) if as_json else show.build_table(report)
    if not all(row["met"] for row in report["tiers"]):
        raise typer.Exit(1)


@app.command()
def generate(
    plan: Annotated[list[str], typer.Option(help="TIER=FILE, or a build's plan.json. Repeatable.")],
    model: Annotated[Path, typer.Option(help="The checkpoint that the plans were made for.")],
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
    name: Annotated[str | None, typer.Option(help="The model's name when served.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to calibrate plans that carry no scales.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: model_repository/<name>.")] = None,
    threads: Annotated[int | None, typer.Option(help="Encoder threads; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Write the repository of plans that exist, without a search."""
    from samp_core import show
    from samp_core.config import load_config
    from samp_core.generate import GenerateConfig, read_plans
    from samp_core.generate import generate as run

    plans = read_plans(plan)
    settings = load_config(
        None,
        {
            "model": model,
            "task": task,
            "data": data or Path("none"),
            "name": name,
            "tiers": {},
            "out": out,
            "threads": threads,
        },
    )
    with show.progress() as progress:
        report = run(GenerateConfig(plans, settings, data is not None), progress)
    for warning in report["warnings"]:
        show.note(warning)
    if as_json:
        _print_json(report)
    else:
        rows = [(t["name"], t["plan"]) for t in report["tiers"]]
        show.table(report["repository"], ("tier", "plan"), rows)


@app.command()
def explain(
    tier: Annotated[str, typer.Argument(help="A tier of the build.")],
    folder: Annotated[Path, typer.Argument(help="A build's output folder.")],
    as_json: Json = False,
) -> None:
    """Say why each site of a tier's plan is as it is."""
    from samp_core import show
    from samp_core.explain import explain as run

    made = run(folder, tier)
    _print_json(made) if as_json else show.explained(made)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A build's output folder.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in that folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a build, for any browser, offline."""
    from samp_core.report import report as run

    made = run(folder, out)
    _print_json(made) if as_json else print(made["page"])


cli_calls.register(app)


cli_load.register(app)
cli_live.register(app)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, what is missing, which command mends it."""
    from dataclasses import asdict

    from samp_core import show
    from samp_core.doctor import examine

    with show.progress() as progress:
        checks = [asdict(check) for check in examine(progress)]
    _print_json(checks) if as_json else show.doctor_table(checks)
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)


def main() -> NoReturn:
    """Run `samp`; every expected failure is one line on stderr (with --json: one object)."""
    from samp_client.errors import ClientError

    signal.signal(signal.SIGTERM, _interrupt)
    as_json = "--json" in sys.argv
    try:
        # Commands return nothing: a number is the code of a typer.Exit, or 130 after Ctrl-C.
        code = app(standalone_mode=False) or 0
    except (SampError, ClientError) as error:
        _fail(error, as_json)
    except _usage_errors() as error:
        _usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, a folder that may not be read
        given = f"{error.filename or 'samp'}: {error.strerror or error}"
        _fail(SampError("system", given, "", "mend it there"), as_json)
    if code == INTERRUPTED:
        kept = "; what was measured is kept" if "build" in sys.argv[1:2] else ""
        print(f"samp: stopped{kept}", file=sys.stderr)
    raise SystemExit(code)


def _fail(error: SampError | ClientError, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps(error.to_json(), ensure_ascii=False))
    else:
        print(f"samp: {error}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", 1)) from None


def _usage_errors() -> tuple[type[Exception], ...]:
    # Typer brings click along, or its own copy of it, depending on its version.
    kinds: list[type[Exception]] = []
    for module in ("click.exceptions", "typer._click.exceptions"):
        try:
            found = __import__(module, fromlist=["ClickException"])
        except ImportError:
            continue
        kinds.append(found.ClickException)
    return tuple(kinds)


def _usage(error: Any, as_json: bool) -> NoReturn:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "samp"
    if not message:  # no command at all: its help is on stdout already
        raise SystemExit(2)
    problem = UsageError("usage", message, "", f"see {command} --help")
    if as_json:
        print(json.dumps(problem.to_json()))
    else:
        print(f"samp: {message}; see {command} --help", file=sys.stderr)
    raise SystemExit(2)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _default_url(http: bool) -> str:
    return "127.0.0.1:8000" if http else "127.0.0.1:8001"
