"""Run a build's tokenizer, encoders and head in the environment that deploy/install.sh made.

    VENV/bin/python deploy/check_install.py OUT [TEXT]

No Triton is needed: the models' own files are loaded as Triton's processes load them, and one text
goes through every tier. Prints the answers; fails when a file or a package is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from samp_core import manifest, serving
from samp_core.model_config import from_pbtxt


def parameters(folder: Path) -> Mapping[str, str]:
    """The parameters in a model's config.pbtxt."""
    path = folder.parent / "config.pbtxt"
    return from_pbtxt(path.read_text(encoding="utf-8"), str(path)).parameters


def answers(out: Path, text: str) -> dict[str, dict[str, object]]:
    """tier -> the head's outputs for `text`."""
    build = manifest.read_manifest(out)
    models = manifest.models_folder(out)
    tokenizer = serving.Tokenizer.load(models / f"tokenizer_{build.model}" / "1")
    tokens = good(tokenizer.run([(np.array([[text.encode()]], dtype=object),)])[0])
    folder = models / f"head_{build.model}" / "1"
    head = serving.TaskHead.load(folder, parameters(folder))
    found: dict[str, dict[str, object]] = {}
    for name, tier in build.tiers.items():
        folder = models / tier.encoder / "1"
        encoder = serving.Encoder.load(folder, parameters(folder))
        inputs = tuple(tokens[key] for key in ("IDS", "TYPES", "LENGTHS"))
        features = good(encoder.run([inputs])[0])
        encoder.close()
        outputs = good(head.run([(features["FEATURE"],)])[0])
        found[name] = {key: plain(value) for key, value in outputs.items()}
    return found


def good(result: serving.Outputs | serving.RequestError) -> serving.Outputs:
    if isinstance(result, serving.RequestError):
        raise result
    return result


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
