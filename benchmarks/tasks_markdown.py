"""The tables of docs/plan_search.md: python benchmarks/tasks_markdown.py RESULT.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks_table import ONE, foretold, promised

TITLES = {
    "film-reviews": "film reviews, MiniLM",
    "banking77": "banking77, MiniLM",
    "sick": "SICK pairs, MiniLM",
    "wnut17": "WNUT-17 entities, MiniLM",
    "film-reviews-e5-small": "film reviews, multilingual-e5-small (twelve layers)",
    "film-reviews-mpnet": "film reviews, all-mpnet-base-v2 (twelve layers, hidden 768)",
}


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One pair."""
    modes = {row["mode"]: row for row in rows if row["kind"] == "mode"}
    found = modes["float"]["verification"]
    low, high = found["ci95"]
    name = rows[0]["model"]
    yield (
        f"**{TITLES.get(name, name)}**: {modes['float']['metric']} of float "
        f"{100 * found['value']:.2f}% [{100 * low:.1f}, {100 * high:.1f}] on {found['n']:,} "
        "verification rows"
    )
    yield from _modes(modes)
    yield from _served(rows)


def _modes(modes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    base = _ms(modes["float"])
    kinds = list(dict.fromkeys(name.split("(")[0] for name in modes if "(" in name))
    yield ""
    heads = (f"{kind}: drop in points [from, to] | speed-up" for kind in kinds)
    yield "| layers | " + " | ".join(heads) + " |"
    yield "|---" * (1 + 2 * len(kinds)) + "|"
    counts = [int(name.split("(")[1].rstrip(")")) for name in modes if name.startswith(kinds[0])]
    for count in counts:
        cells = []
        for kind in kinds:
            row = modes[f"{kind}({count})"]
            cells += [_drop(row["verification"]), f"{base / _ms(row):.2f}x"]
        yield f"| {count} | " + " | ".join(cells) + " |"


def _served(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield (
        "| promise | strategy | plan | drop bound | ms of one text | foretold / measured | fresh "
        "rows: drop [from, to] |"
    )
    yield "|---" * 7 + "|"
    tiers = [row for row in rows if row["kind"] == "tier" and row["name"] != "exact"]
    order = list(dict.fromkeys(row["name"] for row in tiers))
    for row in sorted(tiers, key=lambda row: order.index(row["name"])):
        wish = promised(row)
        if wish is None and row["strategy"] != "samp":  # along SAMP's modes by every strategy
            continue
        title = "recommended" if wish is None else f"{100 * wish:g}"
        yield (
            f"| {title} | {row['strategy']} | {row['plan'].removesuffix(' GEMMs')} | "
            f"{100 * row['verification']['upper_bound']:.2f} | {_ms(row):.2f} | {foretold(row)} | "
            f"{_drop(row['fresh'])} |"
        )


def _drop(found: Mapping[str, Any]) -> str:
    low, high = 100 * found["lower_bound"], 100 * found["upper_bound"]
    return f"{100 * found['drop']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _ms(row: Mapping[str, Any]) -> float:
    return float(row["together_ms"][ONE])


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"]
    for name in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == name]
        print("\n".join(lines(some)), end="\n\n")
        fresh = next(row["fresh"]["n"] for row in some if row["kind"] == "tier")
        run = next(row for row in some if row["kind"] == "run")
        builds = {r["strategy"]: r["seconds"] for r in some if r["kind"] == "build"}
        print(f"{fresh:,} fresh rows; others used {run['others_share']:.1%}; builds {builds}\n")


if __name__ == "__main__":
    main()
