"""The model families as data: what each calls its sizes and weights, and in what it differs.

All map onto one encoder. What differs is settled when a checkpoint is read: a position table loses
the rows before its first position, and a family that ignores token types gets the same row for
both of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from samp_kernels.interface import F32

_BERT_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "act": "hidden_act",
}
_BERT_LAYER = {
    "qkv": tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    "out": ("attention.output.dense",),
    "ffn_in": ("intermediate.dense",),
    "ffn_out": ("output.dense",),
    "attention_ln": ("attention.output.LayerNorm",),
    "output_ln": ("output.LayerNorm",),
}


@dataclass(frozen=True)
class Family:
    """One family's names.

    prefix: of the encoder's tensors in a checkpoint that has a head. keys: our size -> config.json.
    layer: our site or norm -> the tensors that are stacked into it, under `layers`.N.
    types: has token types; else the first row of its table, if it has one, belongs to every token.
    first_position: the row of the position table that the first token reads; "pad": the one after
    config.json's pad_token_id. buckets: the key of the number of relative-position buckets.
    """

    prefix: str
    keys: Mapping[str, str] = field(default_factory=lambda: _BERT_KEYS)
    layers: str = "encoder.layer"
    layer: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _BERT_LAYER)
    types: bool = False
    type_table: bool = True
    first_position: int | str = 0
    buckets: str = ""

    def offset(self, pad_token_id: int) -> int:
        """How many rows of the position table come before the first token's."""
        if isinstance(self.first_position, str):
            return pad_token_id + 1
        return self.first_position


FAMILIES: Mapping[str, Family] = {
    "bert": Family("bert.", types=True),
    "roberta": Family("roberta.", first_position="pad"),
    "xlm-roberta": Family("roberta.", first_position="pad"),
    "camembert": Family("roberta.", first_position="pad"),
    "mpnet": Family(
        "mpnet.",
        layer={
            **_BERT_LAYER,
            "qkv": tuple(f"attention.attn.{name}" for name in "qkv"),
            "out": ("attention.attn.o",),
            "attention_ln": ("attention.LayerNorm",),
        },
        type_table=False,
        first_position=2,
        buckets="relative_attention_num_buckets",
    ),
    "distilbert": Family(
        "distilbert.",
        keys={
            **_BERT_KEYS,
            "layers": "n_layers",
            "hidden": "dim",
            "heads": "n_heads",
            "ffn": "hidden_dim",
            "act": "activation",
        },
        layers="transformer.layer",
        layer={
            "qkv": tuple(f"attention.{name}_lin" for name in "qkv"),
            "out": ("attention.out_lin",),
            "ffn_in": ("ffn.lin1",),
            "ffn_out": ("ffn.lin2",),
            "attention_ln": ("sa_layer_norm",),
            "output_ln": ("output_layer_norm",),
        },
        type_table=False,
    ),
}


def position_bias(embedding: F32, positions: int, furthest: int = 128) -> F32:
    """[buckets, heads] of a relative-position embedding -> [heads, 2 positions - 1] by distance.

    Bidirectional buckets of T5 (1910.10683, section 2.1): half of them for keys behind the query;
    of a half, the first half one a distance, the others in equal steps of log(distance) up to
    `furthest`, beyond which all share the last. In float32, as they were trained.
    """
    half = embedding.shape[0] // 2
    exact = half // 2
    distance = np.arange(1 - positions, positions)  # key - query
    away = np.abs(distance)
    log = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    steps = log / np.float32(math.log(furthest / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    bucket = np.where(away < exact, away, far) + half * (distance > 0)
    return np.ascontiguousarray(embedding[bucket].T, dtype=np.float32)
