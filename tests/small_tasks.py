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
TOPICS = ("food", "sport", "music", "law")
LABELS = {
    "multi-label": TOPICS,
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
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for two
    try:
        return _make(task, folder, rows, seed)
    finally:
        torch.set_num_threads(before)


def _make(task: str, folder: Path, rows: int, seed: int) -> SmallTask:
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


def logits(model: Any, tokenizer: Any, *texts: str) -> Any:
    """transformers' own logits of one text or pair, without the batch."""
    with torch.inference_mode():
        # As lists: a bare empty second text is taken for none.
        lists = ([text] for text in texts)
        ids = tokenizer(*lists, truncation=True, max_length=48, return_tensors="pt")
        return model(**ids).logits[0].numpy()


def _centre(model: Any, scores: Any) -> None:
    """Shift the classifier so that every class has the same median score: none wins always."""
    with torch.no_grad():
        model.classifier.bias -= torch.tensor(np.median(scores, axis=0))


def _pair_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    first, second = sentences(rows, rng), sentences(rows, rng)
    # Some are longer than the model's 48 tokens.
    pairs = [(a, b * rng.choice([1, 1, 1, 3])) for a, b in zip(first, second, strict=True)]
    scores = np.array([logits(model, tokenizer, *pair) for pair in pairs])
    centred = scores - np.median(scores, axis=0)
    _centre(model, scores)
    names = LABELS["pairs"]
    return [
        {"text": a, "text_pair": b, "label": names[(int(s.argmax()) + (rng.random() < 0.05)) % 3]}
        for (a, b), s in zip(pairs, centred, strict=True)
    ]


def find_entities(
    made: SmallTask | tuple[Any, Any], text: str, length: int = 48, stride: int | None = None
) -> list[tuple[int, int, str, float]]:
    """(start, end, label, score) of each entity, from transformers' tokenizer and model alone.

    Every token's logits come from the window of the tokenizer's overflow in which the fewer of
    its neighbours to the left and to the right are most.
    """
    model, tokenizer = (made.model, made.tokenizer) if isinstance(made, SmallTask) else made
    stride = (length - 2) // 4 if stride is None else stride
    windows = tokenizer(
        text, truncation=True, max_length=length, stride=stride, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    tokens: dict[int, tuple[int, Any, int, tuple[int, int]]] = {}
    for w, ids in enumerate(windows["input_ids"]):
        with torch.inference_mode():
            types = torch.tensor([windows["token_type_ids"][w]])
            scores = model(torch.tensor([ids]), token_type_ids=types).logits[0].softmax(-1)
        for t in range(1, len(ids) - 1):
            place = w * (length - 2 - stride) + t
            context = min(t - 1, len(ids) - 2 - t)
            if place not in tokens or context > tokens[place][0]:
                word = windows.word_ids(w)[t]
                offsets = windows["offset_mapping"][w][t]
                tokens[place] = (context, scores[t].double(), word, offsets)
    spans: list[tuple[int, int, str, list[float]]] = []
    word_before, tag_before = -1, "O"
    for place in sorted(tokens):
        _, scores, word, (start, end) = tokens[place]
        if word is None:  # the text spells out a special token
            continue
        if word == word_before:
            if tag_before != "O":
                spans[-1] = (spans[-1][0], end, *spans[-1][2:])
            continue
        tag = model.config.id2label[int(scores.argmax())]
        if tag != "O":
            if tag[0] == "I" and tag_before[2:] == tag[2:]:
                spans[-1] = (spans[-1][0], end, tag[2:], [*spans[-1][3], float(scores.max())])
            else:
                spans.append((start, end, tag[2:], [float(scores.max())]))
        word_before, tag_before = word, tag
    return [(start, end, label, float(np.mean(values))) for start, end, label, values in spans]


def _entity_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    made = []
    texts = sentences(rows, rng)
    _centre(model, np.concatenate([logits(model, tokenizer, text)[1:-1] for text in texts[:60]]))
    for text in texts:
        text *= rng.choice([1, 1, 1, 1, 5])  # some are longer than the model's 48 tokens
        found = [
            {"start": start, "end": end, "label": label}
            for start, end, label, _ in find_entities((model, tokenizer), text)
            if rng.random() > 0.05
        ]
        made.append({"text": text, "entities": found})
    return made


def embedding(model: Any, tokenizer: Any, text: str, how: str = "mean") -> Any:
    """transformers' own vector of one text, of length 1."""
    with torch.inference_mode():
        ids = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
        states = model(**ids).last_hidden_state[0].double()
        pooled = states.mean(dim=0) if how == "mean" else states[0]
        return (pooled / pooled.norm()).numpy()


def _topic_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    texts = sentences(rows, rng)
    scores = np.array([logits(model, tokenizer, text) for text in texts])
    _centre(model, scores)
    found = scores > np.median(scores, axis=0)
    found ^= np.array([[rng.random() < 0.03 for _ in TOPICS] for _ in texts])
    return [
        {"text": text, "labels": [name for name, on in zip(TOPICS, row, strict=True) if on]}
        for text, row in zip(texts, found, strict=True)
    ]


def _score_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    return [
        {"text": t, "score": float(logits(model, tokenizer, t)[0]) + rng.gauss(0, 0.2)}
        for t in sentences(rows, rng)
    ]


def _rerank_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    return [
        {
            "text": a,
            "text_pair": b,
            "score": 3.0 * float(logits(model, tokenizer, a, b)[0]) + rng.gauss(0, 0.3),
        }
        for a, b in zip(sentences(rows, rng), sentences(rows, rng), strict=True)
    ]


def _near_rows(model: Any, tokenizer: Any, rng: random.Random, rows: int) -> list[dict[str, Any]]:
    made = []
    for a, b in zip(sentences(rows, rng), sentences(rows, rng), strict=True):
        cosine = float(embedding(model, tokenizer, a) @ embedding(model, tokenizer, b))
        made.append({"text": a, "text_pair": b, "score": 20 * cosine + rng.gauss(0, 0.3)})
    return made


_MODELS: Mapping[str, Callable[[Any], Any]] = {
    "embedding": transformers.BertModel,
    "multi-label": transformers.BertForSequenceClassification,
    "regression": transformers.BertForSequenceClassification,
    "reranking": transformers.BertForSequenceClassification,
    "entities": transformers.BertForTokenClassification,
    "pairs": transformers.BertForSequenceClassification,
}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "multi-label": {"problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "reranking": {"num_labels": 1},
}
_ROWS: Mapping[str, Callable[[Any, Any, random.Random, int], list[dict[str, Any]]]] = {
    "embedding": _near_rows,
    "entities": _entity_rows,
    "multi-label": _topic_rows,
    "regression": _score_rows,
    "reranking": _rerank_rows,
    "pairs": _pair_rows,
}
