"""The repository's packages for gpu_check.py where they are not installed, from the checkout or
the bundle (gpu_bundle.py) that this file lies in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = {
    "samp_kernels": "kernels",
    "samp_client": "client",
    "samp_core": "samp_core",
    "samp_loadtest": "loadtest",
    "samp_templates": "model_repository/templates",
}
BUNDLE = ROOT / "bundle"


def import_packages() -> None:
    """Put them on sys.path and on PYTHONPATH, where Triton's model processes find them."""
    links = {n: p for n, p in LINKS.items() if importlib.util.find_spec(n) is None}
    if links:
        place = os.environ.get("SAMP_LINKS") or tempfile.mkdtemp(prefix="samp-links-")
        os.environ["SAMP_LINKS"] = place
        for name, folder in links.items():
            if (ROOT / folder).is_dir() and not os.path.lexists(Path(place, name)):
                os.symlink(ROOT / folder, Path(place, name))
        add_path(place)


def add_path(folder: str) -> None:
    sys.path.insert(0, folder)
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder + (os.pathsep + known if known else "")


def commit() -> str:
    """Of the files here; a bundle says what it was made from."""
    made = BUNDLE / "bundle.json"
    if made.is_file():
        return str(json.loads(made.read_text(encoding="utf-8")).get("commit", ""))
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


import_packages()
