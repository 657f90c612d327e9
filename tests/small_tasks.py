"""Small random checkpoints of every task, as transformers writes them, and rows with gold.

The vocabulary is characters of many scripts, so that texts of all of them have tokens. Gold is the
model's own answer, some of it changed, so that a build finds something to measure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SCRIPTS = (
    "abcdefghijklmnopqrstuvwxyz",
    "0123456789.,!?'-@#/:",
    "αβγδεζηθ",
    "абвгдежз",
    "אבגדהוזח",
    "ابتثجحخد",
    "कखगघङचछज",
    "电影很好看中国",
    "가나다라마바사",
    "😀🎉🦀👍",
)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "".join(SCRIPTS)
VOCABULARY = (*SPECIALS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS))
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
LABELS = {
    "pairs": ("neutral", "entailment", "contradiction"),
    "entities": TAGS,
}
HARD_TEXTS = (
    "",
    " ",
    "😀",
    "a😀b 🎉🎉 c",
    "👨\u200d👩\u200d👧 family 🦀",
    "e\u0301te\u0301 caf\u00e9 na\u00efve",
    "שלום אבג 12.5",
    "ابت ثجح خد",
    "电影很好看 abc 中国",
    "कखग घङ",
    "가나다 라마바사",
    "\ufb01ne \u0130x \u1e9e",
    "[CLS] a [SEP] b",
    "tab\tnew\nline\u2028end",
    "x" * 300,
    "unknown: \u2603 \U0001f680 \u4e00",
)


@dataclass(frozen=True)
class SmallTask:
    """A checkpoint of one task, the labelled rows for it, and transformers' own model."""

    task: str
    checkpoint: Path
    data: Path
    rows: Sequence[Mapping[str, Any]]
    model: Any
    tokenizer: Any

    def command(self, out: Path, *more: object) -> list[object]:
        """The `samp build` of it."""
        return [
            "build", "--model", self.checkpoint, "--task", self.task, "--data", self.data,
            "--name", "small", "--threads", 1, "--calibrator", "minmax", "--out", out, "--json",
            *more,
        ]  # fmt: skip


def make(task: str, folder: Path, rows: int = 500, seed: int = 0) -> SmallTask:
    """Write a checkpoint and rows of a task."""
    torch.manual_seed(seed)
    names = LABELS.get(task, ())
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=48, initializer_range=0.3,
        **({"id2label": dict(enumerate(names))} if names else {}), **_SETTINGS.get(task, {}),
    )  # fmt: skip
    model = _MODELS[task](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
        if task == "entities":
            model.classifier.bias[0] += 1.0  # some words are no entity
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 48}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    config.save_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    made = _ROWS[task](model, tokenizer, random.Random(seed), rows)
    model.save_pretrained(checkpoint)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return SmallTask(task, checkpoint, data, made, model, tokenizer)


def sentences(count: int, rng: random.Random, most: int = 10) -> list[str]:
    """Different texts of 1 to `most` words in mixed scripts, some with no space between them."""
    found: dict[str, None] = {}
    while len(found) < count:
        words = []
        for _ in range(rng.randint(1, most)):
            script = rng.choice(SCRIPTS) if rng.random() < 0.4 else SCRIPTS[0]
            words.append("".join(rng.choices(script, k=rng.randint(1, 4))))
        found[rng.choice([" ", " ", " ", ", ", ""]).join(words)] = None
    return list(found)


def logits(model: Any, tokenizer: Any, *texts: str, **options: Any) -> Any:
    """transformers' own logits of one text or pair, without the batch."""
    with torch.inference_mode():
        ids = tokenizer(*texts, truncation=True, max_length=48, return_tensors="pt", **options)
        return model(**ids).logits[0].numpy()


def _pair_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    first, second = sentences(rows, rng), sentences(rows, rng)
    # Some are longer than the model's 48 tokens.
    pairs = [(a, b * rng.choice([1, 1, 1, 3])) for a, b in zip(first, second, strict=True)]
    scores = np.array([logits(model, tokenizer, *pair) for pair in pairs])
    centred = scores - np.median(scores, axis=0)
    with torch.no_grad():
        model.classifier.bias -= torch.tensor(np.median(scores, axis=0))
    names = LABELS["pairs"]
    return [
        {"text": a, "text_pair": b, "label": names[(int(s.argmax()) + (rng.random() < 0.05)) % 3]}
        for (a, b), s in zip(pairs, centred, strict=True)
    ]


_MODELS: Mapping[str, Callable[[Any], Any]] = {
    "pairs": transformers.BertForSequenceClassification,
}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {}
_ROWS: Mapping[str, Callable[[Any, Any, random.Random, int], list[dict[str, Any]]]] = {
    "pairs": _pair_rows,
}
