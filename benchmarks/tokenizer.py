"""Texts a second of one thread: our tokenizer of each kind beside transformers' fast one.

    make bench-tokenizer                     # a quiet machine, about 3 minutes
    make bench-tokenizer BENCH="--quick"     # does it run? no figures

WordPiece is the demo's, or trained here with BPE and Unigram on the film reviews; `e5` is
multilingual-e5-small's Unigram where examples/twelve_layers/prepare.py made its folder. Both read
the same tokenizer.json and cut the same reviews to the same length; their ids are compared first.

`served` is the tokenizer model of the demo's build behind a Triton, called by itself, beside the
same tokenizer in this process in turn: how much of one core's pace is left (after make demo).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from interleave import Contender, Pace, measure
from machine import ROOT, Bystanders, quantiles, report, require_quiet, versions, write_result
from serving import Worker

from samp_core.control import stubs
from samp_core.manifest import read_manifest
from samp_core.server import Server
from samp_core.text import TextEncoder

os.environ["TOKENIZERS_PARALLELISM"] = "false"
FOLDER = ROOT / "build" / "bench" / "tokenizers"
REVIEWS = ROOT / ".demo" / "film_reviews" / "train.jsonl"
READY = {
    "wordpiece": ROOT / ".demo" / "checkpoint",
    "unigram-e5": ROOT / ".demo" / "twelve_layers" / "e5-small",
}
LENGTH = 128
BATCHES = (1, 32)
VOCABULARY = 30_000
# Texts a request, and callers that keep the model busy with them.
REQUESTS = ((1, 16), (32, 2))
Encode = Callable[[list[str]], object]


def main() -> None:
    """Measure every kind that is there, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short turns: it runs, no figures")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository/film-reviews")
    asked = parser.parse_args()
    if not REVIEWS.is_file():
        raise SystemExit("bench: no film reviews; make demo-checkpoint writes them")
    busy = require_quiet(asked.force or asked.quick)
    pace = Pace(2, 0.02, 0.01) if asked.quick else Pace()
    texts = [json.loads(line)["text"] for line in REVIEWS.open(encoding="utf-8")][:2048]
    others = Bystanders([])
    rows, not_run = [], []
    served: list[dict[str, Any]] = []
    for kind, folder in folders(texts, asked.quick).items():
        if not (folder / "tokenizer.json").is_file():
            not_run.append(f"{kind}: {folder.relative_to(ROOT)} is not there")
            continue
        rows += kind_rows(kind, folder, texts, pace, asked.seed)
    print(table(rows))
    share = others.share()
    if (asked.repository / "current").exists():
        served = served_rows(asked.repository, *((1, 0.3) if asked.quick else (5, 2.0)))
        print(served_table(served))
    else:
        not_run.append("served: no build; make demo writes it")
    path = write_result(
        "tokenizer", threads=1, rows=[*rows, *served], not_run=not_run, found_limits={},
        found_versions=versions(), seed=asked.seed, busy_share=busy, others_share=share,
        **({"folder": ROOT / "build" / "bench" / "results"} if asked.quick else {}),
    )  # fmt: skip
    report(path, share)


def folders(texts: list[str], quick: bool) -> dict[str, Path]:
    """Where each kind's tokenizer.json is; BPE and Unigram are trained once and kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    size = 2000 if quick else VOCABULARY
    common = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    whole = [json.loads(line)["text"] for line in REVIEWS.open(encoding="utf-8")]
    made: dict[str, tuple[Any, Any, Any]] = {
        "bpe": (models.BPE(), pre_tokenizers.ByteLevel(), trainers.BpeTrainer(**common)),
        "unigram": (
            models.Unigram(), pre_tokenizers.Metaspace(),
            trainers.UnigramTrainer(unk_token="<unk>", **common),
        ),
    }  # fmt: skip
    found = {"wordpiece": READY["wordpiece"]}
    for kind, (model, splits, trainer) in made.items():
        found[kind] = folder = FOLDER / f"{kind}-{size}"
        if (folder / "tokenizer.json").is_file():
            continue
        print(f"train {kind}", file=sys.stderr, flush=True)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = splits
        tokenizer.train_from_iterator(texts if quick else whole, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".tokenizer.{os.getpid()}"
        tokenizer.save(str(aside))
        aside.replace(folder / "tokenizer.json")
    return {**found, "unigram-e5": READY["unigram-e5"]}


def kind_rows(
    kind: str, folder: Path, texts: list[str], pace: Pace, seed: int
) -> list[dict[str, Any]]:
    """A row for each batch size; ends the program if the two do not give the same ids."""
    from transformers import PreTrainedTokenizerFast

    ours = TextEncoder.load(folder, LENGTH)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    wanted = theirs(texts, truncation=True, max_length=LENGTH)["input_ids"]
    if [one.ids.tolist() for one in ours.encode(texts)] != wanted:
        raise SystemExit(f"bench: {kind}: our ids are not those of transformers")
    arms: dict[str, Encode] = {
        "ours": lambda batch: ours.encode(batch, offsets=False),
        "ours_offsets": lambda batch: ours.encode(batch),
        "transformers": lambda batch: theirs(batch, truncation=True, max_length=LENGTH),
        "transformers_offsets": lambda batch: theirs(
            batch, truncation=True, max_length=LENGTH, return_offsets_mapping=True
        ),
    }
    rows = []
    for size in BATCHES:
        contenders = [
            Contender(arm, arm, walk(encode, texts, size), lambda: np.zeros((0, 0), np.float32))
            for arm, encode in arms.items()
        ]
        measure(contenders, pace, seed)
        row: dict[str, Any] = {
            "kind": kind, "texts": size, "max_length": LENGTH,
            "tokens_a_text": round(float(np.mean([len(ids) for ids in wanted])), 1),
        }  # fmt: skip
        for one in contenders:
            row[f"{one.column}_ms"] = found = quantiles(one.times_ms)
            row[f"{one.column}_texts_per_s"] = round(1000 * size / found["median"])
        for suffix in ("", "_offsets"):
            name = f"transformers{suffix}"
            row[f"ratio_{name}"] = round(
                row[f"{name}_ms"]["median"] / row[f"ours{suffix}_ms"]["median"], 2
            )
        rows.append(row)
    print(f"{kind}: measured", file=sys.stderr, flush=True)
    return rows


def served_rows(repository: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The tokenizer model by itself, and the same tokenizer here, in turn; a row for each size."""
    build = read_manifest(repository)
    name = f"tokenizer_{build.model}"
    ours = TextEncoder.load(build.folder / "models" / name / "1")
    texts = [json.loads(line)["text"] for line in REVIEWS.open(encoding="utf-8")][:2048]
    found = []
    with (
        Server.start(repository, tiers=[build.default_tier]) as server,
        Worker("closed_loop.py", str(REVIEWS)) as client,
    ):
        (pid,) = stubs(server.pid)[name]
        process = psutil.Process(pid)
        for size, callers in REQUESTS:
            call = walk(lambda batch: ours.encode(batch, offsets=False), texts, size)
            rates, here, cores = [], [], []
            for _ in range(rounds):
                busy, begun = sum(process.cpu_times()[:2]), time.perf_counter()
                job = {"concurrency": callers, "seconds": seconds, "warm_s": 0.2, "texts": 2048}
                result = client.ask(url=server.grpc, model=name, rows=size, **job)
                if result["failures"]:
                    raise SystemExit(f"bench: {name} failed: {result['failures'][0]}")
                spent = sum(process.cpu_times()[:2]) - busy
                cores.append(spent / (time.perf_counter() - begun))
                rates.append(size * result["rps"])
                begun, calls = time.perf_counter(), 0
                while time.perf_counter() < begun + seconds / 2:
                    call()
                    calls += 1
                here.append(size * calls / (time.perf_counter() - begun))
            found.append(
                {
                    "kind": "served", "model": name, "texts": size, "callers": callers,
                    "max_length": ours.max_length,
                    "served_texts_per_s": round(statistics.median(rates)),
                    "in_process_texts_per_s": round(statistics.median(here)),
                    "ratio_in_process": round(
                        statistics.median(a / b for a, b in zip(rates, here, strict=True)), 3
                    ),
                    "process_cores": round(statistics.median(cores), 3),
                    "texts_per_s_a_core": round(
                        statistics.median(a / b for a, b in zip(rates, cores, strict=True))
                    ),
                }
            )  # fmt: skip
    return found


def served_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the tokenizer model beside the same tokenizer in process."""
    lines = [
        "| texts a request | callers | served texts/s | its process, cores | in process texts/s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["texts"], row["callers"], f"{row['served_texts_per_s']:,}",
            f"{row['process_cores']:.2f}", f"{row['in_process_texts_per_s']:,}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def walk(encode: Encode, texts: list[str], size: int) -> Callable[[], object]:
    """One call is the next batch of so many texts, round and round."""
    batches = [texts[at : at + size] for at in range(0, len(texts) - size + 1, size)]
    place = iter(range(10**12))
    return lambda: encode(batches[next(place) % len(batches)])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: texts a second of one thread."""
    lines = [
        "| kind | texts a call | ours | transformers | ours, offsets | transformers, offsets |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[f'{arm}_texts_per_s']:,}"
            for arm in ("ours", "transformers", "ours_offsets", "transformers_offsets")
        ]
        lines.append(f"| {row['kind']} | {row['texts']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
