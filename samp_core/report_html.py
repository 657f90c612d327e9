"""HTML by construction: whatever is not Html already is escaped on its way in."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def safe(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """One element; `cls` is its class, `data_x` its data-x, an attribute of None is left out."""
    given = {
        {"cls": "class"}.get(key, key.replace("_", "-")): value
        for key, value in attributes.items()
        if value is not None
    }
    inside = "".join(f' {key}="{safe(value)}"' for key, value in given.items())
    return Html(f"<{name}{inside}>{''.join(safe(child) for child in children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(safe(between).join(safe(part) for part in parts))


def table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str, words: int = 1
) -> Html:
    """A table whose first `words` columns are words and the others figures.

    On a phone each row becomes a block in which every cell says its heading.
    """
    kinds = ["word" if place < words else "figure" for place in range(len(headings))]
    head = [tag("th", h, scope="col", cls=k) for h, k in zip(headings, kinds, strict=True)]
    body = []
    for row in rows:
        cells = [
            tag("th", row[0], scope="row", cls="word"),
            *(
                tag("td", cell, cls=kind, data_label=heading)
                for cell, kind, heading in zip(row[1:], kinds[1:], headings[1:], strict=True)
            ),
        ]
        body.append(tag("tr", *cells))
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
    )


def pairs(rows: Sequence[tuple[str, object]]) -> Html:
    """A list of names and what they are."""
    return tag("dl", *(part for k, v in rows for part in (tag("dt", k), tag("dd", v))))


def page(
    title: str, style: str, body: Html, figures: Mapping[str, Any], scripts: Sequence[str]
) -> str:
    """The whole document; nothing but its own scripts may run, and nothing may be fetched.

    figures: element -> figure, read by the last of `scripts` from the element `figures`.
    """
    # `</script>` or `<!--` inside the data would end it early.
    data = json.dumps(figures, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{safe(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"{tag('title', title)}<style>{style}</style>"
    )
    ends = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}\n'
        f'<script type="application/json" id="figures">{data}</script>\n{ends}</body></html>\n'
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
