"""One text through tokenizer, encoder and head in one process: what serving is measured against.

    python benchmarks/in_process.py OUT TEXTS.jsonl

Reads one job a line on standard input (`{"tier", "texts"}`) and writes one result a line
(`{"latencies_ms", "labels"}`). Each tier gets the threads that its served encoder has.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from samp_core.manifest import Manifest, models_folder, read_manifest
from samp_core.model_config import from_pbtxt
from samp_core.pipeline import Pipeline, load


def encoder_threads(out: Path, build: Manifest, tier: str) -> int:
    """The number of threads in the served encoder's configuration."""
    path = models_folder(out) / build.tiers[tier].encoder / "config.pbtxt"
    config = from_pbtxt(path.read_text(encoding="utf-8"), str(path))
    return int(config.parameters["threads"])


def timed(pipeline: Pipeline, texts: list[str]) -> dict[str, object]:
    """Milliseconds and label of each text, one after another."""
    latencies: list[float] = []
    labels: list[str] = []
    for text in texts:
        begun = time.perf_counter()
        outputs = pipeline.predict([text])
        latencies.append(round(1000 * (time.perf_counter() - begun), 3))
        labels.append(outputs["LABEL"][0, 0].decode())
    return {"latencies_ms": latencies, "labels": labels}


def main() -> None:
    out = Path(sys.argv[1])
    build = read_manifest(out)
    tiers = {name: load(out, name, encoder_threads(out, build, name)) for name in build.tiers}
    lines = Path(sys.argv[2]).read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    for pipeline in tiers.values():
        pipeline.predict(texts[:1])
    print(json.dumps({"tiers": list(tiers)}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(timed(tiers[job["tier"]], texts[: job["texts"]])), flush=True)


if __name__ == "__main__":
    main()
