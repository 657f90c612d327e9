"""Texts to logits in this process: tokenizer, encoder session, head. No server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.interface import F32, Array, Batch, Session, pack_batch

from samp_core import bio, heads
from samp_core.encoder_files import load_session
from samp_core.manifest import read_manifest
from samp_core.model_config import from_pbtxt
from samp_core.rows import Text
from samp_core.text import Encoding, TextEncoder
from samp_core.windows import Windows

BATCH_TOKENS = 2048
BATCH_ROWS = 64
GRADIENT_TOKENS = 512
"""The same of a batch with gradients, of which all that its layers compute is kept: 0.7 MB a token
with twelve layers of 768."""


@dataclass(frozen=True)
class Pipeline:
    """One tier of a build, ready to answer; a text is a pair of texts where the task says so."""

    text: TextEncoder
    session: Session
    head: heads.Head
    weights: Mapping[str, Array]
    labels: tuple[str, ...]

    def logits(self, texts: Sequence[Text]) -> F32:
        """[texts, C]; of a token head [words, C], the words of all texts in a row."""
        if self.head.rows is not None:
            rows = self.token_rows(texts)
            return np.concatenate([row.logits[bio.first_tokens(row.words)] for row in rows])
        encodings = self.text.encode(texts, offsets=False)
        return run_logits(self.session, self.head, self.weights, batches(encodings))

    def token_rows(self, texts: Sequence[Text]) -> list[heads.TokenRow]:
        """What a token head sees of each text."""
        encodings = self.text.encode(texts)
        made = run_tokens(self.session, encodings, self.text.windows)
        return [
            heads.TokenRow(logits, *_places(encoding))
            for logits, encoding in zip(made, encodings, strict=True)
        ]

    def predict(self, texts: Sequence[Text]) -> dict[str, Array]:
        """The head's outputs, as the server gives them."""
        if self.head.rows is not None:
            return heads.padded(self.head, self.head.rows(self.token_rows(texts), self.labels))
        encodings = self.text.encode(texts, offsets=False)
        batch = pack_batch([e.ids for e in encodings], [e.types for e in encodings])
        feature = self.session.run(batch, output=self.head.encoder_output)
        assert self.head.run is not None
        return self.head.run(self.weights, feature, self.labels)


def load(out: Path | str, tier: str = "", threads: int | None = None) -> Pipeline:
    """The pipeline of a tier of the current build in `out`. Raises SampError as serving would.

    Without a tier, the one that clients get by default.
    """
    from safetensors.numpy import load_file

    manifest = read_manifest(Path(out))
    entry = manifest.tiers[manifest.chosen([tier or manifest.default_tier])[0]]
    models = manifest.folder / "models"
    head = models / f"head_{manifest.model}" / "1"
    text = (models / entry.encoder / "config.pbtxt").read_text(encoding="utf-8")
    output: Any = from_pbtxt(text, entry.encoder).parameters["output"]
    return Pipeline(
        text=TextEncoder.load(models / f"tokenizer_{manifest.model}" / "1"),
        session=load_session(models / entry.encoder / "1", threads),
        head=replace(heads.load_file(head / "head.py"), encoder_output=output),
        weights=load_file(head / "weights.safetensors"),
        labels=manifest.labels,
    )


def batches(encodings: Sequence[Encoding], most: int = BATCH_TOKENS) -> list[tuple[Batch, Array]]:
    """Encodings by length into packed batches of so many tokens; each with the places of its rows.

    A longer one is a batch alone.
    """
    order = np.argsort([len(e.ids) for e in encodings], kind="stable")
    groups: list[list[int]] = [[]]
    tokens = 0
    for index in order.tolist():
        length = len(encodings[index].ids)
        if groups[-1] and (tokens + length > most or len(groups[-1]) == BATCH_ROWS):
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
    return [
        (
            pack_batch([encodings[i].ids for i in group], [encodings[i].types for i in group]),
            np.array(group),
        )
        for group in groups
        if group
    ]


def run_logits(
    session: Session,
    head: heads.Head,
    weights: Mapping[str, Array],
    packed: Sequence[tuple[Batch, Array]],
    progress: Callable[[], None] = lambda: None,
) -> F32:
    """[texts, C] of what `batches` packed, in the order of its texts."""
    rows: list[F32] = []
    places: list[Array] = []
    for batch, group in packed:
        feature = session.run(batch, output=head.encoder_output)
        rows.append(head.logits(weights, feature))
        places.append(group)
        progress()
    logits = np.concatenate(rows)
    result = np.empty_like(logits)
    result[np.concatenate(places)] = logits
    return result


def run_tokens(
    session: Session,
    encodings: Sequence[Encoding],
    windows: Windows | None,
    progress: Callable[[], None] = lambda: None,
) -> list[F32]:
    """The token logits [L, C] of each text, in their order; long ones by windows."""
    parts = pieces(encodings, windows)
    found: list[F32] = [np.empty((0, 0), np.float32)] * len(parts)
    for batch, group in batches(parts):
        tokens = session.run(batch, output="tokens")
        for index, rows in zip(group, np.split(tokens, batch.cu_seqlens[1:-1]), strict=True):
            found[index] = rows
        progress()
    queue = iter(found)
    result = []
    for encoding in encodings:
        mine = [next(queue) for _ in _cut(encoding, windows)]
        result.append(mine[0] if windows is None else windows.join(mine, len(encoding.ids)))
    return result


def pieces(encodings: Sequence[Encoding], windows: Windows | None) -> list[Encoding]:
    """What the encoder runs: the texts, longer ones as their windows, side by side."""
    return [piece for encoding in encodings for piece in _cut(encoding, windows)]


def _cut(encoding: Encoding, windows: Windows | None) -> list[Encoding]:
    if windows is None or len(encoding.ids) <= windows.length:
        return [encoding]
    ids, types = windows.cut(encoding.ids), windows.cut(encoding.types)
    return [Encoding(i, t, False, None) for i, t in zip(ids, types, strict=True)]


def _places(encoding: Encoding) -> tuple[Array, Array]:
    assert encoding.offsets is not None
    assert encoding.words is not None
    return encoding.offsets, encoding.words
