"""The demo's trained checkpoint, small enough for the bundle: SAMP's table of gpu_check.py is then
that of a real model where only the bundle is.

Weights in fp16, and of the vocabulary what the carried rows use: their tokens stay the same, since
a longest piece that was taken is still there and no other was added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_import  # noqa: F401  (before samp_kernels)
import numpy as np

ROWS = 1024
WORDS = "bert.embeddings.word_embeddings.weight"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def carry(checkpoint: Path, rows: Path, out: Path) -> None:
    """Write out/model (a Hugging Face folder) and out/rows.jsonl, the first rows of `rows`."""
    from safetensors.numpy import load_file, save_file

    kept = rows.read_text(encoding="utf-8").splitlines()[:ROWS]
    vocabulary, ids = used(checkpoint, [json.loads(line)["text"] for line in kept])
    model = out / "model"
    model.mkdir(parents=True)
    (out / "rows.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    (model / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"], config["pad_token_id"] = len(vocabulary), vocabulary.index("[PAD]")
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[WORDS] = tensors[WORDS][ids]
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halves, model / "model.safetensors")


def used(checkpoint: Path, texts: list[str]) -> tuple[list[str], list[int]]:
    """The tokens of these texts and the special ones, by their old ids, and those ids."""
    from samp_core.text import TextEncoder

    known: dict[str, Any] = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    names = {number: token for token, number in known["model"]["vocab"].items()}
    numbers = {known["model"]["vocab"][token] for token in SPECIAL}
    for encoding in TextEncoder.load(checkpoint, 512).encode(texts, offsets=False):
        numbers.update(encoding.ids.tolist())
    ids = sorted(numbers)
    return [names[number] for number in ids], ids
