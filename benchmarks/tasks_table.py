"""The tables of the task benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

ONE = "1"
SERVED = (
    "tier", "strategy", "plan", "drop bound pt", "ms, all together", "foretold/measured",
    "fresh: drop pt, 95% from", "promise holds on fresh",
)  # fmt: skip


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One pair: modes by number of layers, served plans by promise and strategy, builds."""
    console = Console(width=150)
    name = rows[0]["model"]
    modes = [row for row in rows if row["kind"] == "mode"]
    base = _ms(modes[0])
    table = Table(title=f"{name}: SAMP's modes on {modes[0]['verification']['n']:,} rows")
    for head in ("mode", modes[0]["metric"], "95%", "drop pt", "ms, 1 text", "speed-up"):
        table.add_column(head, justify="right")
    for row in modes:
        found = row["verification"]
        low, high = found["ci95"]
        table.add_row(
            row["mode"], f"{100 * found['value']:.2f}", f"[{100 * low:.1f}, {100 * high:.1f}]",
            f"{100 * found['drop']:.2f}", f"{_ms(row):.3f}", f"{base / _ms(row):.2f}x",
        )  # fmt: skip
    console.print(table)
    table = Table(title=f"{name}: what each strategy serves")
    for head in SERVED:
        table.add_column(head, justify="right")
    tiers = [row for row in rows if row["kind"] == "tier" and row["name"] != "exact"]
    for row in sorted(tiers, key=lambda row: row["name"]):
        fresh, promise = row["fresh"], promised(row)
        table.add_row(
            row["name"], row["strategy"], str(row["plan"])[:40],
            f"{100 * row['verification']['upper_bound']:.2f}", f"{_ms(row):.3f}", foretold(row),
            f"{100 * fresh['drop']:.2f}, {100 * fresh['lower_bound']:.2f}",
            "-" if promise is None else "yes" if fresh["lower_bound"] <= promise else "NO",
        )  # fmt: skip
    console.print(table)
    for found in verdicts(rows):
        console.print(f"{name} {found['tier']}: milp {found['ms']:.3f} ms, {found['others']}")
    for row in rows:
        if row["kind"] == "build":
            kept = "" if row["cold"] else ", much was in the cache"
            console.print(f"{name}: build by {row['strategy']} {row['seconds']:.0f} s{kept}")
        if row["kind"] == "loss":
            for split in ("search", "verification"):
                found = row[split]
                console.print(
                    f"{name}: {row['plan']} on {split} rows, n {found['n']:,}: cross-entropy "
                    f"{found['change']:+.5f} [{found['low']:+.5f}, {found['high']:+.5f}] of "
                    f"{found['float_loss']:.5f}"
                )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each promise milp's milliseconds, and every other strategy's over them, in words."""
    found = []
    tiers = [row for row in rows if row["kind"] == "tier" and promised(row) is not None]
    for row in tiers:
        if row["strategy"] == "milp":
            same = [r for r in tiers if r["name"] == row["name"] and r["strategy"] != "milp"]
            others = (f"{r['strategy']} {_ms(r) / _ms(row):.3f} times that" for r in same)
            found.append({"tier": row["name"], "ms": _ms(row), "others": ", ".join(others)})
    return found


def promised(row: Mapping[str, Any]) -> float | None:
    """The promised drop of a tier as a fraction; its name has it in points: p0-5."""
    if not row["name"].startswith("p"):
        return None
    return float(row["name"][1:].replace("-", ".")) / 100.0


def _ms(row: Mapping[str, Any]) -> float:
    return float(row["together_ms"][ONE])


def foretold(row: Mapping[str, Any]) -> str:
    """By the build itself, in the turns that measured what it serves; samp foretells nothing."""
    told = row.get("foretold_ms", {}).get(ONE) if row["strategy"] != "samp" else None
    return f"{told / row['latency_ms'][ONE]:.2f}" if told else "-"
