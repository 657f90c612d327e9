"""A small checkpoint for the bundle, trained from nothing on the demo's film reviews: SAMP's table
of gpu_check.py is then that of a trained model, by labels, also where only the bundle is.

    python benchmarks/gpu_checkpoint.py [--out build/gpu-checkpoint]

Three layers of 128, a vocabulary of its own, 2 MB; about half a minute on two cores. model/ is a
Hugging Face folder, rows.jsonl are rows that did not train it. The demo's own checkpoint (90 MB, or
24 with the words of those rows alone) does not fit beside a Triton into 64 MiB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "examples" / "film_reviews"
ROWS, MOST, WORDS, SEED = 1024, 64, 4000, 7
PASSES, BATCH, RATE = 6, 32, 1e-3
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPE = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": MOST,
}  # fmt: skip


def train(out: Path) -> float:
    """Write out/model and out/rows.jsonl; the accuracy on those rows."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    prepare = _module("prepare")
    splits = prepare.load_splits(prepare.corpus_path())
    words, encode = vocabulary([row["text"] for row in splits["train"]])
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(words), id2label=dict(enumerate(prepare.LABELS)),
        label2id={label: i for i, label in enumerate(prepare.LABELS)}, **SHAPE,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    examples = [(encode(r["text"]), prepare.LABELS.index(r["label"])) for r in splits["train"]]
    rng, steps = np.random.default_rng(SEED), PASSES * (len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    queue: list[Any] = []
    for step in range(steps):
        if not queue:
            order = rng.permutation(len(examples))[: steps // PASSES * BATCH]
            queue = [[examples[i] for i in part] for part in np.split(order, steps // PASSES)]
        loss = model(**_padded(queue.pop())).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0:
            print(f"checkpoint: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    kept = splits["held_out"][:ROWS]
    model.eval().half().save_pretrained(out / "model")
    (out / "model" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    lines = (json.dumps(row, ensure_ascii=False) for row in kept)
    (out / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model.float()
    right = 0
    with torch.inference_mode():
        for begin in range(0, len(kept), 64):
            part = kept[begin : begin + 64]
            batch = _padded([(encode(r["text"]), prepare.LABELS.index(r["label"])) for r in part])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(kept)


def vocabulary(texts: list[str]) -> tuple[list[str], Any]:
    """The pieces of these texts as BERT's uncased ones, and text -> ids of at most MOST tokens."""
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(
        texts, vocab_size=WORDS, special_tokens=list(SPECIAL), show_progress=False
    )
    ids = made.get_vocab()
    tokenizer = BertWordPieceTokenizer(vocab=ids, lowercase=True)  # With [CLS] and [SEP].
    tokenizer.enable_truncation(MOST)
    return sorted(ids, key=lambda word: ids[word]), lambda text: tokenizer.encode(text).ids


def _padded(examples: list[tuple[list[int], int]]) -> dict[str, Any]:
    """ids and mask [batch, longest], labels [batch]."""
    import torch

    longest = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in examples])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([label for _, label in examples]),
    }


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"film_reviews_{name}", REVIEWS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-checkpoint")
    options = parser.parse_args()
    print(f"{options.out}: accuracy {train(options.out):.3f} on {ROWS} rows")


if __name__ == "__main__":
    main()
