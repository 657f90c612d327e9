"""Answer one text with every tier of a build, in the environment that deploy/install.sh made.

    VENV/bin/python deploy/check_install.py OUT [TEXT]

No Triton is needed: the files are loaded as Triton's model processes load them. Prints the answers;
fails when a file or a package is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from samp_core.manifest import read_manifest
from samp_core.pipeline import load


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: check_install.py OUT [TEXT]")
    out = Path(sys.argv[1])
    text = sys.argv[2] if len(sys.argv) == 3 else "A warm and funny film."
    print(f"numpy {np.__version__}: {text}")
    for tier in read_manifest(out).tiers:
        outputs = load(out, tier).predict([text])
        shown = (f"{name} {np.asarray(rows[0]).tolist()}" for name, rows in outputs.items())
        print(f"{tier}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
