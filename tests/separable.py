"""A small random BERT classifier that tells two kinds of text apart, and labelled rows for it.

Made with transformers and read as any checkpoint is. Its labels are its own answers, a few of them
flipped; outliers in its last layers make int8 cost more, the deeper a plan goes.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LABELS = ("dull", "fine")
WORDS = tuple(a + b + c for a in "bdfgklm" for b in "aeiou" for c in "lnrs")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
FLIPPED = 0.04
UNSURE = 0.15
OUTLIERS = (1.0, 30.0, 100.0)
# float 100 ms; a layer quantized saves 10 (FFN alone) or 20.
MS = {
    "float": 100.0,
    **{f"ffn_only({k})": 100.0 - 10 * k for k in (1, 2, 3)},
    **{f"full({k})": 100.0 - 20 * k for k in (1, 2, 3)},
}
Row = dict[str, str]


@dataclass(frozen=True)
class Small:
    """A checkpoint folder, its rows, and the rows that are said to have trained it."""

    folder: Path
    checkpoint: Path
    data: Path
    trained: Path
    rows: Sequence[Row]
    trained_rows: Sequence[Row]

    def yaml(self, path: Path, **fields: Any) -> Path:
        """Write a build.yaml for this checkpoint: JSON is YAML."""
        body: dict[str, Any] = {
            "model": str(self.checkpoint),
            "name": "small",
            "data": {"data": str(self.data), "exclude": str(self.trained)},
            "rows": {"calibration": 64, "search": 400},
            "calibrator": "minmax",
            "strategy": "samp",
            "threads": 1,
        }
        path.write_text(json.dumps({**body, **fields}))
        return path


@functools.cache
def small() -> Small:
    """The same one for every test of a run; it is not to be changed."""
    kept = tempfile.TemporaryDirectory(prefix="samp-small-")
    atexit.register(kept.cleanup)
    return make_small(Path(kept.name))


def make_small(
    folder: Path, *, seed: int = 0, layers: int = 3, hidden: int = 64, rows: int = 1300
) -> Small:
    """Write a checkpoint and its rows; 40 of the rows are also in the file of training rows."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=48,
        initializer_range=1.6 / hidden**0.5, id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "vocab.txt").write_text("\n".join(VOCABULARY))
    texts = random_texts(2 * rows, seed)
    with torch.no_grad():
        for layer, factor in zip(model.bert.encoder.layer, OUTLIERS[:layers], strict=True):
            _stretch(layer.intermediate.dense, layer.output.dense, factor)
            _stretch(layer.attention.self.value, layer.attention.output.dense, factor)
        margins = _separate(model, texts)
        model.save_pretrained(checkpoint)
    # Half of the texts, those that the model is surest of and a few others.
    generator = np.random.default_rng(seed)
    sure = np.argsort(np.abs(margins) + 9.0 * (generator.random(2 * rows) < UNSURE))[rows:]
    flipped = generator.random(2 * rows) < FLIPPED
    made = [
        {"text": texts[i], "label": LABELS[int(margins[i] > 0) ^ int(flipped[i])]}
        for i in generator.permutation(sure).tolist()
    ]
    trained = [{"text": row["text"].upper()} for row in made[:40]]
    return Small(
        folder,
        checkpoint,
        write_rows(folder / "rows.jsonl", made),
        write_rows(folder / "trained.jsonl", trained),
        made,
        made[:40],
    )


def set_latencies(out: Path, ms: Mapping[str, float] = MS) -> None:
    """Overwrite what a build in `out` measured: the next one chooses by these."""
    for path in (out / "cache").glob("latency-*.json"):
        measured = json.loads(path.read_bytes()[32:])
        made = {name: {b: ms[name] * int(b) for b in found} for name, found in measured.items()}
        body = json.dumps(made).encode()
        path.write_bytes(hashlib.sha256(body).digest() + body)


def planted_build(yaml: Path, out: Path, *more: object) -> Any:
    """`samp build` decided by `MS`: what it measured is overwritten, what it then times too."""
    from forked import forks

    for _ in range(2):
        forks().samp("build", "-c", yaml)
        set_latencies(out)
    return forks().samp("build", "-c", yaml, *more)


def random_texts(count: int, seed: int) -> list[str]:
    """Different texts of 3 to 24 words."""
    generator = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choice(WORDS, generator.integers(3, 25)))] = None
    return list(found)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _stretch(before: Any, after: Any, factor: float) -> None:
    """One feature between two layers made larger by a factor: float hardly sees it, int8 does."""
    before.weight[:1] *= factor
    before.bias[:1] *= factor
    after.weight[:, :1] /= factor


def _separate(model: Any, texts: Sequence[str]) -> Any:
    """Turn the classifier along the widest direction of the pooled states, half a class each.

    Returns each text's margin of the second class, [texts].
    """
    import torch

    pooled = np.concatenate([_pooled(model, texts[i : i + 64]) for i in range(0, len(texts), 64)])
    direction = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)[2][0]
    along = pooled @ direction
    middle, gain = float(np.median(along)), 2.0 / float(along.std())
    weight = np.stack([-direction, direction]) * gain
    model.classifier.weight.copy_(torch.tensor(weight, dtype=torch.float32))
    model.classifier.bias.copy_(torch.tensor([middle, -middle]) * gain)
    return 2 * gain * (along - middle)


def _pooled(model: Any, texts: Sequence[str]) -> Any:
    import torch

    place = {word: index for index, word in enumerate(VOCABULARY)}
    rows = [[place[word] for word in ("[CLS]", *text.split(), "[SEP]")] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return model.bert(ids, attention_mask=(ids != 0).long()).pooler_output.numpy()
