"""Texts to logits in this process: tokenizer, encoder session, head. No server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from samp_kernels.interface import F32, Array, Batch, Session, pack_batch

from samp_core import heads
from samp_core.encoder import load_session
from samp_core.manifest import read_manifest
from samp_core.text import Encoding, TextEncoder

BATCH_TOKENS = 2048
BATCH_ROWS = 64


@dataclass(frozen=True)
class Pipeline:
    """One tier of a build, ready to answer."""

    text: TextEncoder
    session: Session
    head: heads.Head
    weights: Mapping[str, Array]
    labels: tuple[str, ...]

    def logits(self, texts: Sequence[str]) -> F32:
        """[texts, C]"""
        encodings = self.text.encode(texts, offsets=False)
        return run_logits(self.session, self.head, self.weights, batches(encodings))

    def predict(self, texts: Sequence[str]) -> dict[str, Array]:
        """The head's outputs, as the server gives them."""
        encodings = self.text.encode(texts, offsets=False)
        batch = pack_batch([e.ids for e in encodings], [e.types for e in encodings])
        feature = self.session.run(batch, output=self.head.encoder_output)
        return self.head.run(self.weights, feature, self.labels)


def load(out: Path, tier: str, threads: int | None = None) -> Pipeline:
    """The pipeline of a tier of the current build in `out`. Raises SampError as serving would."""
    from safetensors.numpy import load_file

    manifest = read_manifest(out)
    entry = manifest.tiers[manifest.chosen([tier])[0]]
    models = manifest.folder / "models"
    head = models / f"head_{manifest.model}" / "1"
    return Pipeline(
        text=TextEncoder.load(models / f"tokenizer_{manifest.model}" / "1"),
        session=load_session(models / entry.encoder / "1", threads),
        head=heads.load_file(head / "head.py"),
        weights=load_file(head / "weights.safetensors"),
        labels=manifest.labels,
    )


def batches(encodings: Sequence[Encoding]) -> list[tuple[Batch, Array]]:
    """Encodings by length into packed batches; each with the places of its rows."""
    order = np.argsort([len(e.ids) for e in encodings], kind="stable")
    groups: list[list[int]] = [[]]
    tokens = 0
    for index in order.tolist():
        length = len(encodings[index].ids)
        if groups[-1] and (tokens + length > BATCH_TOKENS or len(groups[-1]) == BATCH_ROWS):
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
