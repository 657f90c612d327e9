"""One text through tokenizer, encoder and head in one process: what serving is measured against.

    python benchmarks/in_process.py OUT TEXTS.jsonl

Loads a build's own files as its model processes do. Reads one job a line on standard input
(`{"tier", "texts"}`) and writes one result a line (`{"latencies_ms", "labels"}`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from samp_core import manifest, serving
from samp_core.model_config import from_pbtxt


def load(out: Path) -> dict[str, Callable[[bytes], str]]:
    """tier -> a function from a text to its label; the tokenizer and the head are shared."""
    build = manifest.read_manifest(out)
    models = manifest.models_folder(out)

    def files(model: str) -> tuple[Path, dict[str, str]]:
        config = from_pbtxt((models / model / "config.pbtxt").read_text(encoding="utf-8"))
        return models / model / "1", dict(config.parameters)

    tokenizer = serving.Tokenizer.load(files(f"tokenizer_{build.model}")[0])
    head = serving.TaskHead.load(*files(f"head_{build.model}"))

    def answer(encoder: serving.Encoder, text: bytes) -> str:
        tokens = outputs(tokenizer.run([(np.array([[text]], dtype=object),)])[0])
        inputs = (tokens["IDS"], tokens["TYPES"], tokens["LENGTHS"])
        features = outputs(encoder.run([inputs])[0])
        answers = outputs(head.run([(features["FEATURE"],)])[0])
        return str(answers["LABEL"][0, 0].decode())

    calls: dict[str, Callable[[bytes], str]] = {}
    for name, tier in build.tiers.items():
        encoder = serving.Encoder.load(*files(tier.encoder))
        calls[name] = partial(answer, encoder)
    return calls


def outputs(result: serving.Outputs | serving.RequestError) -> serving.Outputs:
    if isinstance(result, serving.RequestError):
        raise result
    return result


def main() -> None:
    calls = load(Path(sys.argv[1]))
    lines = Path(sys.argv[2]).read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"].encode() for line in lines if line]
    print(json.dumps({"tiers": list(calls)}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        latencies: list[float] = []
        labels: list[str] = []
        for text in texts[: job["texts"]]:
            begun = time.perf_counter()
            labels.append(calls[job["tier"]](text))
            latencies.append(time.perf_counter() - begun)
        shown = [round(1000 * value, 3) for value in latencies]
        print(json.dumps({"latencies_ms": shown, "labels": labels}), flush=True)


if __name__ == "__main__":
    main()
