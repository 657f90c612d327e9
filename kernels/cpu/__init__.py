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


def state() -> str:
    """One line: the level that runs, or what is lost and how to get it."""
    why = missing()
    if why:
        return f"absent, {why}; `onednn` goes on; {MEND}"
    from samp_kernels.cpu import _native

    return f"{_native.current_level().name} kernels"
