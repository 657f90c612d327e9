"""The native CPU backend: C++ kernels for AVX-512 VNNI, AVX2 with and without VNNI, and any CPU.

`src/` is compiled by setup.py where a C++ compiler is found. backend.py has the ops, session.py a
whole encoder as one call.
"""

from __future__ import annotations

import importlib

MEND = "apt-get install g++ python3-dev, then install this package again (in a clone: make native)"


def missing() -> str:
    """Why the extension cannot be used here; "" where it can."""
    try:
        native = importlib.import_module("samp_kernels.cpu._native")
    except ModuleNotFoundError:
        return "the native kernels are not built"
    except ImportError as error:
        return f"the native kernels do not load ({error})"
    try:
        native.current_level()
    except ValueError as error:
        return str(error)
    return ""


def level() -> str:
    """The dispatch level that runs here; "" where the extension is missing."""
    if missing():
        return ""
    native = importlib.import_module("samp_kernels.cpu._native")
    return str(native.current_level().name)


def state() -> str:
    """One line: the level that runs, or what is lost and how to get it."""
    why = missing()
    return f"absent, {why}; `onednn` goes on; {MEND}" if why else f"{level()} kernels"
