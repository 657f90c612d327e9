"""Run a build's tokenizer, encoders and head in the environment that deploy/install.sh made.

    VENV/bin/python deploy/check_install.py OUT [TEXT]

No Triton is needed: the models' own files are loaded as Triton's processes load them, and one text
goes through every tier. Prints the answers; fails when a file or a package is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from samp_core import manifest, serving
from tritonclient.grpc import model_config_pb2


def parameters(folder: Path) -> dict[str, str]:
    """The parameters in a model's config.pbtxt."""
    config = model_config_pb2.ModelConfig()
    text_format.Parse((folder.parent / "config.pbtxt").read_text(encoding="utf-8"), config)
    return {name: value.string_value for name, value in config.parameters.items()}


def answers(out: Path, text: str) -> dict[str, dict[str, object]]:
    """tier -> the head's outputs for `text`."""
    build = manifest.read_manifest(out)
    models = manifest.models_folder(out)
    tokens = serving.Tokenizer.load(models / f"tokenizer_{build.model}" / "1").run(
        [(np.array([[text.encode()]], dtype=object),)]
    )[0]
    folder = models / f"head_{build.model}" / "1"
    head = serving.TaskHead.load(folder, parameters(folder))
    found: dict[str, dict[str, object]] = {}
    for name, tier in build.tiers.items():
        folder = models / tier.encoder / "1"
        encoder = serving.Encoder.load(folder, parameters(folder))
        inputs = tuple(tokens[key] for key in ("IDS", "TYPES", "LENGTHS"))
        features = encoder.run([inputs])[0]
        encoder.close()
        outputs = head.run([(features["FEATURE"],)])[0]
        found[name] = {key: plain(value) for key, value in outputs.items()}
    return found


def plain(rows: np.ndarray) -> object:
    """The first row of an output as JSON can hold it."""
    values = [value.decode() if isinstance(value, bytes) else value for value in rows[0].tolist()]
    return values if len(values) > 1 else values[0]


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: check_install.py OUT [TEXT]")
    text = sys.argv[2] if len(sys.argv) == 3 else "A warm and funny film."
    for tier, outputs in answers(Path(sys.argv[1]), text).items():
        print(f"{tier}: {json.dumps(outputs)} (numpy {np.__version__})")


if __name__ == "__main__":
    main()
