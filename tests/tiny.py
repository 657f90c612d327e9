"""A build small enough to write in milliseconds: one random layer, an alphabet for a vocabulary.

Real in every part that is served; only its size is made up. It runs on the reference backend, if
no other is named.
"""

from __future__ import annotations

import string
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from samp_kernels.interface import Array, EncoderConfig

from samp_core import heads
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.repository import TierFiles, build_lock, write_build
from samp_core.text import TextEncoder

LABELS = ("no", "yes")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase)
VOCABULARY = (*WORDS, *(f"##{letter}" for letter in string.ascii_lowercase))
CONFIG = EncoderConfig("bert", 1, 16, 2, 32, len(VOCABULARY), 32, 2, 1e-12)
MAX_LENGTH = 32


def write_tiny(
    out: Path,
    *,
    seed: int = 0,
    model: str = "tiny",
    tiers: Sequence[str] = ("exact",),
    default_tier: str = "exact",
    head: str = "classification",
    backend: str = "reference",
    device: Mapping[str, Any] | None = None,
    max_length: int = MAX_LENGTH,
) -> Path:
    """Write a build of random weights made from `seed` and make it the current one."""
    weights = tiny_weights(seed)
    plan = mode_plan(
        Plan(
            f"{seed:064x}", {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32}, backend,
            device or {}, {},
        ),
        "float", 0, (), Recipe(),
    )  # fmt: skip
    with build_lock(out):
        return write_build(
            out,
            model=model,
            task="classification",
            head=head,
            labels=LABELS,
            max_length=max_length,
            text=tiny_text(max_length),
            head_weights=tiny_head(seed) if head == "classification" else {},
            encoder_config=CONFIG,
            tiers={name: TierFiles(plan, weights) for name in tiers},
            default_tier=default_tier,
            build={"seed": seed},
            threads=1,
        )


def tiny_text(max_length: int = MAX_LENGTH) -> TextEncoder:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(VOCABULARY))
        return TextEncoder.load(folder, max_length)


def tiny_weights(seed: int) -> dict[str, Array]:
    """The encoder's portable tensors."""
    rng = np.random.default_rng(seed)
    hidden, ffn = CONFIG.hidden, CONFIG.ffn
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word": (CONFIG.vocab, hidden),
        "embeddings.position": (CONFIG.positions, hidden),
        "embeddings.type": (CONFIG.types, hidden),
    }
    gemms = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "ffn_in": (ffn, hidden)}
    for site, shape in {**gemms, "ffn_out": (hidden, ffn)}.items():
        shapes[f"layer.0.{site}.weight"] = shape
        shapes[f"layer.0.{site}.bias"] = shape[:1]
    for name in ("embeddings.ln", "layer.0.attention_ln", "layer.0.output_ln"):
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def tiny_head(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed + 1)
    classes, hidden = len(LABELS), CONFIG.hidden
    state = {
        "bert.pooler.dense.weight": rng.normal(size=(hidden, hidden)),
        "bert.pooler.dense.bias": rng.normal(size=hidden),
        "classifier.weight": rng.normal(size=(classes, hidden)),
        "classifier.bias": rng.normal(size=classes),
    }
    names = dict(enumerate(LABELS))
    return dict(
        heads.get("classification").export(state, {"hidden_size": hidden, "id2label": names})
    )
