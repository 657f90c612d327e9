"""What the command line shows a person: progress on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from samp_core.workbench import Progress

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


@contextlib.contextmanager
def progress(enabled: bool = True) -> Iterator[Progress]:
    """A bar for each stage; where stderr is no terminal, one line a stage."""
    if not enabled:
        yield lambda title, steps: lambda: None
        return
    if not err.is_terminal:

        def line(title: str, steps: int) -> Callable[[], None]:
            err.print(f"  {title} ({steps} steps)", soft_wrap=True)
            return lambda: None

        yield line
        return
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=err) as bars:

        def stage(title: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(title, total=steps)
            return lambda: bars.advance(task)

        yield stage


def note(text: str) -> None:
    """What the user may act on while the work goes on, above the bars on stderr."""
    err.print(f"  note: {text}", soft_wrap=True, markup=False)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, wide enough for its cells where stdout is no terminal."""
    made = Table(header_style="bold")
    for index, heading in enumerate(headings):
        words = index == 0 or (index == 1 and any(isinstance(row[1], str) for row in rows))
        made.add_column(heading, justify="left" if words else "right", no_wrap=index == 0)
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    console = out if out.is_terminal else Console(highlight=False, width=170)
    console.print(title, style="italic", markup=False, soft_wrap=True)
    console.print(made)


def promise(wish: Mapping[str, float], met: bool) -> str:
    """`<= 0.5 pt, <= 8 ms`, with a mark when it is not met."""
    parts = [f"≤ {wish['drop']:g} pt"] if "drop" in wish else []
    parts += [f"≤ {wish['latency']:g} ms"] if "latency" in wish else []
    return (", ".join(parts) or "-") + ("" if met else " NOT MET")


def kept_plans(out: Path) -> None:
    """Where a stopped build left its best plans so far, if it had come to any."""
    plans = sorted((out / "best").glob("*.json"))
    if plans:
        named = " ".join(f"--plan {path}" for path in plans)
        err.print(f"best so far, not verified: samp generate {named} --model ...", soft_wrap=True)


def build_table(report: Mapping[str, Any]) -> None:
    """The tiers of a build."""
    exact = next(t for t in report["tiers"] if t["name"] == "exact")["latency_ms"]
    rows = []
    for tier in report["tiers"]:
        low, high = tier["ci95"]
        latency = tier["latency_ms"]
        many = list(latency)[-1]
        rows.append(
            (
                tier["name"],
                tier["plan"],
                f"{tier['value']:.2f} [{low:.1f}, {high:.1f}]",
                promise(tier["promise"], tier["met"]),
                f"{tier['drop_bound']:.2f}",
                f"{tier['size_mb']:.1f}",
                f"{latency['1']:.2f}",
                f"{exact['1'] / latency['1']:.2f}x",
                f"{exact[many] / latency[many]:.2f}x",
            )
        )
    metric = report["tiers"][0]["metric"]
    headings = ("tier", "plan", f"{metric} % [95%]", "promise", "drop bound pt", "MB")
    many = list(exact)[-1]
    table(
        f"{report['repository']}: {metric} on rows that the search never saw",
        (*headings, "ms, 1 text", "ratio to exact", f"ratio, {many} texts"),
        rows,
    )
    for warning in report["warnings"]:
        out.print(f"note: {warning}", soft_wrap=True, markup=False)
    kept = report["cache"]
    out.print(f"{report['seconds']:.0f} s; cache: {kept['hits']} found, {kept['misses']} made")


def answer_line(answer: Any, row: Any) -> str:
    """One answer of `samp predict`: what the task answers, then the text, tabs between them."""
    text = " / ".join((row,) if isinstance(row, str) else row)
    fields = answer.fields()
    if "label" in fields:
        parts = [fields["label"], f"{fields['score']:.4f}"]
    elif "entities" in fields:
        found = (f"{e['label']}={e['text']!r} {e['score']:.4f}" for e in fields["entities"])
        parts = [", ".join(found) or "-"]
    elif "active" in fields:
        parts = [", ".join(fields["active"]) or "-"]
    elif "embedding" in fields:
        first = ", ".join(f"{x:.4f}" for x in fields["embedding"][:4])
        parts = [f"[{first}, ...] {len(fields['embedding'])}"]
    else:
        parts = [f"{fields['score']:.4f}"]
    mark = " (truncated)" if answer.truncated else ""
    return "\t".join((*parts, " ".join(text.split())[:100] + mark))


def explained(made: Mapping[str, Any]) -> None:
    """A tier's plan in words, a line for each site."""
    out.print(f"{made['tier']}: {made['plan']}", style="bold", soft_wrap=True)
    for fact in made["facts"]:
        out.print(f"  {fact}", soft_wrap=True, markup=False)
    width = max((len(site["site"]) for site in made["sites"]), default=0)
    for site in made["sites"]:
        out.print(f"{site['site']:<{width}}  {site['why']}", soft_wrap=True, markup=False)


def ab_table(result: Mapping[str, Any]) -> None:
    """An A/B comparison."""
    rows = []
    for arm in (result["control"], result["candidate"]):
        times = result["latency_ms"][arm]
        right = result["values"][_side(result, arm)] if result["values"] else None
        cells = []
        for mark in ("p50", "p95", "p99"):
            if times[mark] is None:
                cells.append("-")
                continue
            low, high = times["ci95"][mark]
            cells.append(f"{times[mark]:.2f} [{low:.2f}, {high:.2f}]")
        rows.append((arm, "-" if right is None else f"{right * 100:.2f}", *cells))
    metric = f"{result['metric'] or 'metric'} %"
    headings = ("arm", metric, "p50 ms [95%]", "p95 ms [95%]", "p99 ms [95%]")
    table(f"A/B over {result['n']} texts", headings, rows)
    if result["agreement"] is not None:
        differ = f"{len(result['differing'])} differ" if result["mcnemar"] else ""
        out.print(f"agreement {result['agreement'] * 100:.2f}%{', ' if differ else ''}{differ}")
    if result["difference"] is not None:
        low, high = (100 * end for end in result["difference"]["ci95"])
        m = result["mcnemar"]
        test = f"; McNemar b={m['b']} c={m['c']} p={m['p']:.3g}" if m else ""
        value = result["difference"]["value"] * 100
        out.print(f"difference {value:.2f} points [{low:.2f}, {high:.2f}]{test}")
    out.print(f"verdict: {result['verdict']} ({result['reason']})", soft_wrap=True)


def _side(result: Mapping[str, Any], arm: str) -> str:
    return "control" if arm == result["control"] else "candidate"


def load_table(result: Mapping[str, Mapping[str, Any]]) -> None:
    """A load test, by tier."""
    keys = ("requests", "failures", "rps", "p50", "p95", "p99", "server_queue_ms")
    rows = []
    for tier, facts in result.items():
        cells = [facts[key] for key in (*keys, "server_compute_ms")]
        rows.append((tier, *(f"{c:.2f}" if isinstance(c, float) else c for c in cells)))
    headings = ("tier", "requests", "failures", "requests/s", "p50 ms", "p95 ms", "p99 ms")
    table("Load test", (*headings, "server queue ms", "server compute ms"), rows)


def doctor_table(checks: Sequence[Mapping[str, Any]]) -> None:
    """What this machine has; what is missing; which command mends it."""
    rows = [(c["item"], c["found"], "ok" if c["ok"] else "MISSING", c["fix"]) for c in checks]
    made = Table(header_style="bold")
    for heading in ("item", "found", "", "to mend or gain"):
        made.add_column(heading)
    for row in rows:
        made.add_row(*map(str, row))
    console = out if out.is_terminal else Console(highlight=False, width=150)
    console.print(made)
