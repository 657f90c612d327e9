"""What the command line shows of running servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samp_core import show


def server(facts: Mapping[str, Any]) -> None:
    """One server of `samp status`: a table of tiers, one of models, what is wrong in lines."""
    age = "" if facts["age_s"] is None else f", up {_ago(facts['age_s'])}"
    pid = "" if facts["pid"] is None else f", pid {facts['pid']}"
    addresses = [f"HTTP {facts['http']}"]
    addresses += [f"{kind} {facts[key]}" for kind, key in (("gRPC", "grpc"),) if facts[key]]
    rows: list[tuple[Any, ...]] = []
    for tier in facts["tiers"]:
        ran = tier["executed"]
        executed = ", ".join(f"{n} {p}" for p, n in sorted(ran.items())) if ran else "-"
        answers = {True: "yes", False: "NO", None: "-"}[tier["answers"]]
        share = "-" if tier["tokenizer_share"] is None else f"{tier['tokenizer_share']:.0%}"
        known = (tier["plan"] or "-", executed, tier["threads"] or "-", share, tier["build"] or "-")
        rows.append((tier["ensemble"], answers, *known))
    headings = ("tier", "answers", "plan", "sites that ran", "threads", "tokenizer", "build")
    title = f"Triton {facts['triton']}: {', '.join(addresses)}{pid}{age}"
    show.table(title, headings, rows)
    rows = []
    for model in facts["models"]:
        times = (model["texts_a_batch"], model["queue_ms"], model["compute_ms"])
        ages = (_ago(model["age_s"]), _ago(model["last_request_s"]))
        cells = ["-" if cell is None else cell for cell in (model["instances"], *times)]
        instances, batch, queue, compute = cells
        counts = (model["requests"], model["failures"])
        rows.append(
            (model["name"], model["state"], instances, *counts, batch, queue, compute, *ages)
        )
    names = ("model", "state", "instances", "requests", "failures", "texts/batch")
    more = ("queue ms", "compute ms", "age", "last request")
    show.table("Models, means since each was loaded", (*names, *more), rows)
    for build in facts["builds"]:
        current = (build["current"] or ["none"])[0]
        state = "" if build["served"] == current else f"; current is {current}: samp activate"
        older = ", ".join(build["older"]) or "none"
        show.out.print(
            f"{build['repository']}: serves {build['served']}{state}; others: {older}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    for tier in facts["tiers"]:
        if tier["error"]:
            show.out.print(f"{tier['ensemble']}: {tier['error']}", soft_wrap=True, markup=False)
    for model in facts["models"]:
        if not model["ok"]:
            reason = model["reason"] or "its process has ended"
            show.out.print(
                f"{model['name']}: {model['state']}: {reason}; samp activate --reload FOLDER",
                soft_wrap=True, markup=False,
            )  # fmt: skip


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
