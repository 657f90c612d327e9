"""`samp_kernels` for gpu_check.py on a machine where this package is not installed."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def import_kernels() -> None:
    """`samp_kernels` from the checkout, where the package is not installed; a scipy of one function
    where there is none (reference.py takes erf from it)."""
    if importlib.util.find_spec("samp_kernels") is None:
        place = tempfile.mkdtemp()
        os.symlink(ROOT / "kernels", Path(place, "samp_kernels"))
        sys.path.insert(0, place)
        os.environ["PYTHONPATH"] = place + os.pathsep + os.environ.get("PYTHONPATH", "")
    if importlib.util.find_spec("scipy") is None:
        special: Any = types.ModuleType("scipy.special")
        special.erf = np.vectorize(math.erf, otypes=[float])
        sys.modules["scipy"], sys.modules["scipy.special"] = types.ModuleType("scipy"), special


import_kernels()
