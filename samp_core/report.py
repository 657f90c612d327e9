"""`samp report`: one self-contained HTML page about a build; it needs no network and no server."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from samp_core import report_origin
from samp_core import report_sections as sections
from samp_core.errors import UsageError
from samp_core.report_facts import Facts, read_facts
from samp_core.report_html import page, tag


def report(out: Path, file: Path | None = None) -> dict[str, Any]:
    """Write the page of the current build in `out`, beside the build by default.

    Returns `{page, bytes, missing[]}`. Raises SampError: no build, a damaged one, no place.
    """
    facts = read_facts(out)
    path = file or out / "report.html"
    content = render(facts).encode("utf-8")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            "bad_out", f"{path}: {error.strerror}", "a file that can be written", "another --out"
        ) from None
    return {"page": str(path), "bytes": len(content), "missing": list(facts.missing)}


def render(facts: Facts) -> str:
    """The page as one document."""
    from plotly.offline import get_plotlyjs

    figures: dict[str, Any] = {}
    parts = [
        section(facts, figures)
        for section in (
            sections.top, sections.front, sections.promises, sections.latency, sections.plans,
            sections.sites, sections.errors, report_origin.sizes, report_origin.origin,
        )
    ]  # fmt: skip
    body = tag("main", *parts)
    own = resources.files("samp_core")
    style = own.joinpath("report.css").read_text(encoding="utf-8")
    script = own.joinpath("report.js").read_text(encoding="utf-8")
    title = f"{facts.manifest.model}: precision tiers"
    return page(title, style, body, figures, [get_plotlyjs(), script])
